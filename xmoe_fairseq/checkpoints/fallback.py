"""Find the last good checkpoint of a folder."""

from __future__ import annotations

import logging
from pathlib import Path

from .files import CheckpointError, load_checkpoint, num_updates, verify_file

logger = logging.getLogger(__name__)


def latest_good(folder: str | Path) -> Path:
    """The undamaged ``checkpoint*.pt`` with the most updates that training can continue from.

    Of several with equally many it is the one named ``checkpoint_last.pt``, else the newest. A warning names every file
    that is passed over and the reason. Averages are passed over because they hold no optimiser state.

    Raises:
        CheckpointError: there is none.
    """
    found = []
    for path in Path(folder).glob("checkpoint*.pt"):
        try:
            state = load_checkpoint(
                path, verify=False, mmap=True
            )  # reads the contents only; latest_good checks for damage below
        except (CheckpointError, OSError) as error:
            logger.warning("passed over: %s", error)
            continue
        if state.get("last_optimizer_state") is not None:
            found.append((num_updates(state), path.name == "checkpoint_last.pt", path.stat().st_mtime, path))
    for *_, path in sorted(found, reverse=True):
        try:
            verify_file(path)
        except CheckpointError as error:
            logger.warning("passed over: %s", error)
            continue
        return path
    raise CheckpointError(
        f"{folder} holds no checkpoint*.pt that is whole and has its optimiser state; start again in another --save-dir"
    )

"""Decide whether a begun training can be continued with other settings, and tell what changed while it ran.

CHECKPOINTS/settings.json keeps the settings of every start. Settings that a resume takes over (more updates, patience,
save intervals, workers, devices, precision) may change; no others may.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from eval.run.hydra_settings import Settings
from eval.text import files

FILE = "settings.json"
MAKE_LONGER = (
    "optimization.max_update",
    "optimization.max_epoch",
    "optimization.stop_*",
    "checkpoint.patience",
)
# Of the groups that may change, the measure of the best checkpoint, the data and the seed must stay.
STAY = (
    "checkpoint.best_checkpoint_metric",
    "checkpoint.maximize_best_checkpoint_metric",
    "dataset.*subset",
    "common.seed",
)
MAY_CHANGE = (
    *MAKE_LONGER,
    "optimization.update_freq",
    "checkpoint.*",
    "dataset.*",
    "distributed_training.*",
    "common.*",
    "hydra.*",
    "job_logging_cfg.*",
    "model.checkpoint_activations",
    "model.offload_activations",
    "model.moe_expert_parallel",
    "model.moe_compute",
)
_ABSENT = object()


class OtherTraining(Exception):
    """A training cannot be continued with the new settings. ``differences``: one line each."""

    def __init__(self, updates: int | None, differences: Sequence[str]) -> None:
        super().__init__("\n".join(differences))
        self.updates, self.differences = updates, differences


def may_change(name: str) -> bool:
    """True if a begun training can take over another value of the setting ``name`` (``group.key``)."""
    return not _matches(name, STAY) and _matches(name, MAY_CHANGE)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def signature(settings: Settings) -> list[str]:
    """Lines ``name=value`` of the settings that decide the trained model and how long it is trained."""
    return [
        f"{name}={_shown(value)}"
        for name, value in sorted(settings.items())
        if not may_change(name) or _matches(name, MAKE_LONGER)
    ]


def differences(old: Settings, new: Settings) -> list[tuple[str, Any, Any]]:
    """Name, old and new value of every setting that differs."""
    pairs = ((name, old.get(name, _ABSENT), new.get(name, _ABSENT)) for name in sorted(old.keys() | new.keys()))
    return [item for item in pairs if item[1] != item[2]]


def describe(difference: tuple[str, Any, Any]) -> str:
    """One readable line, such as ``model.dropout: 0.1, now 0.3``."""
    name, old, new = difference
    return name if name.startswith("content of") else f"{name}: {_shown(old)}, now {_shown(new)}"


def _shown(value: Any) -> str:
    return "(not given)" if value is _ABSENT else value if isinstance(value, str) else json.dumps(value)


class Training:
    """The training in a folder of checkpoints.

    Attributes:
        is_begun: True if there is any checkpoint.
        updates: number in checkpoint_last.pt; 0 if not begun, None if that file cannot be read.
        segments: ``{"update": N, "settings": {...}, "facts": {...}}`` from each (re)start with other settings on.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.is_begun = any(self.folder.glob("checkpoint*.pt"))
        noted = self.folder / FILE
        self.segments: list[dict[str, Any]] = files.read_json(noted)["segments"] if noted.is_file() else []

    @functools.cached_property
    def _state(self) -> dict[str, Any] | None:
        from xmoe_fairseq.checkpoints.files import CheckpointError, load_checkpoint

        try:
            return load_checkpoint(self.folder / "checkpoint_last.pt", verify=False, mmap=True)
        except (CheckpointError, OSError):
            return None

    @property
    def updates(self) -> int | None:
        from xmoe_fairseq.checkpoints.files import num_updates

        if not self.is_begun:
            return 0
        return None if self._state is None else num_updates(self._state)

    def check(self, settings: Settings, facts: Mapping[str, str]) -> list[str]:
        """Compare with the settings and facts of the last start.

        Args:
            settings: flat, of `read_settings`.
            facts: other things that the model depends on, such as the content of the training text. Only names that
                both sides have are compared, so that facts that are known later can be checked later.
        Returns: a line for each setting that differs and may.
        Raises: OtherTraining.
        """
        if not self.is_begun:
            return []
        old = self.segments[-1] if self.segments else {"settings": self._kept_by_checkpoint(settings), "facts": {}}
        changed = [item for item in differences(old["settings"], settings) if not self._is_default(item)]
        known = {name: value for name, value in facts.items() if name in old["facts"]}
        fatal = [item for item in changed if not may_change(item[0])]
        fatal += differences({name: old["facts"][name] for name in known}, known)
        if fatal:
            raise OtherTraining(self.updates, [describe(item) for item in fatal])
        return [describe(item) for item in changed]

    def _kept_by_checkpoint(self, settings: Settings) -> Settings:
        """The last checkpoint's values of the settings given now, for a training without settings.json."""
        return {name: self._of_checkpoint(name, value) for name, value in settings.items()}

    def _of_checkpoint(self, name: str, otherwise: Any) -> Any:
        group, _, key = name.partition(".")
        content = ((self._state or {}).get("cfg") or {}).get(group) or {}
        content = vars(content) if isinstance(content, argparse.Namespace) else content
        return content.get(key, otherwise)

    def _is_default(self, difference: tuple[str, Any, Any]) -> bool:
        """True if a setting is given for the first time, with the value that the checkpoint holds."""
        name, old, new = difference
        return old is _ABSENT and self._of_checkpoint(name, _ABSENT) == new

    def is_done(self, settings: Settings) -> bool:
        """True if no update is left to train; fairseq itself would add one."""
        max_update = settings.get("optimization.max_update") or 0
        return bool(self.updates and 0 < int(max_update) <= self.updates)

    def write(self, settings: Settings, facts: Mapping[str, str]) -> None:
        """Write the settings of a start beside those of earlier ones."""
        now = {"update": self.updates, "settings": settings, "facts": dict(facts)}
        earlier = self.segments if self.is_begun else []
        if earlier and earlier[-1]["settings"] == settings:
            now["update"] = earlier[-1]["update"]
            earlier = earlier[:-1]
        files.write_json(self.folder / FILE, {"segments": [*earlier, now]})


def changes(folder: str | Path) -> list[str]:
    """Lines of what changed while a training ran, such as ``update 40: optimization.max_update: 40, now 60``."""
    segments = Training(folder).segments
    return [
        f"update {later['update']}: " + "; ".join(map(describe, differences(before["settings"], later["settings"])))
        for before, later in itertools.pairwise(segments)
    ]

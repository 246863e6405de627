"""Read and write checkpoint files: no code of a file runs, damaged files are refused, files are written whole.

``torch.save`` writes a zip archive with a CRC-32 of every record, which ``torch.load`` ignores. It is checked here, so
that damage is found in the files of stock ``fairseq-train`` without a checksum file beside them.
"""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from ..files import write_aside
from ..safe_types import allow_checkpoint_types

State = dict[str, Any]
_ZIP_START = b"PK\x03\x04"
_PICKLE_START = b"\x80"  # files older than torch 1.6
_WAY_OUT = "take an older checkpoint (xmoe checkpoint inspect --fallback DIR names the last good one)"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message says why and what to do."""


class TruncatedCheckpointError(CheckpointError):
    """The end of the file is missing."""


class CorruptCheckpointError(CheckpointError):
    """The bytes are not those that were written."""


class UnsafeCheckpointError(CheckpointError):
    """Loading the file would call something that is neither a tensor nor plain data."""


def load_checkpoint(path: str | Path, *, verify: bool = True, mmap: bool = False) -> State:
    """Read a fairseq checkpoint on to the CPU without running code in it.

    Args:
        path: a ``.pt`` file of fairseq.
        verify: check the CRC-32 of every record first. Files older than torch 1.6 have none.
        mmap: leave tensors in the file until they are used (read-only use, several big files).
    Returns:
        The dictionary that fairseq wrote, with at least ``model`` and one of ``cfg`` and ``args``.
    Raises:
        FileNotFoundError: no such file.
        TruncatedCheckpointError, CorruptCheckpointError, UnsafeCheckpointError, CheckpointError: as their names say.
    """
    path = Path(path)
    is_archive = verify_file(path) if verify else _is_archive(path)
    allow_checkpoint_types()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_archive)
    except pickle.UnpicklingError as error:
        raise refusal(path, error) from None
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise CorruptCheckpointError(f"{path}: cannot be read ({_first_line(error)}); {_WAY_OUT}") from error
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise CheckpointError(
            f"{path}: holds no 'model'; a fairseq checkpoint is a dictionary with 'model' and 'cfg' (or 'args')"
        )
    return state


def verify_file(path: str | Path) -> bool:
    """Check the bytes of the file without unpickling anything.

    Returns:
        True if the file has checksums, which all agreed; False for the format that torch wrote before 1.6.
    """
    path = Path(path)
    if not _is_archive(path):
        return False
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, struct.error, ValueError, EOFError, NotImplementedError) as error:
        raise TruncatedCheckpointError(
            f"{path}: {path.stat().st_size} bytes without the table that ends the file ({error}); it was cut off while "
            f"being written or copied: copy it again, or {_WAY_OUT}"
        ) from None
    with archive:
        try:
            damaged = archive.testzip()
        except (
            zipfile.BadZipFile,
            zlib.error,
            struct.error,
            RuntimeError,
            EOFError,
            ValueError,
            OSError,
        ) as error:
            damaged = _first_line(error)
    if damaged is not None:
        raise CorruptCheckpointError(
            f"{path}: the checksum of a record does not agree ({damaged}); bits changed after it was written: "
            f"copy it again, or {_WAY_OUT}"
        )
    return True


def save_checkpoint(state: State, path: str | Path) -> None:
    """Write ``state`` beside ``path`` and then move it there, so that ``path`` is always whole."""

    def write(partial: Path) -> None:
        try:
            torch.save(state, partial)
        except RuntimeError as error:  # torch's zip writer reports a full disk by this error
            raise OSError(f"{path} could not be written ({_first_line(error)}); is the disk full?") from error

    write_aside(path, write)


def num_updates(state: State) -> int:
    """The number of optimiser updates; 0 if the checkpoint does not say."""
    history = state.get("optimizer_history") or [{}]
    return int(history[-1].get("num_updates", 0))


def without_optimizer(state: State) -> State:
    """A copy without the optimiser's state, for inference or for a training that starts afresh."""
    return {**state, "last_optimizer_state": None}


def _is_archive(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(4)
    if len(start) < 4:
        raise TruncatedCheckpointError(f"{path}: {len(start)} bytes long, so nothing was written; {_WAY_OUT}")
    if start != _ZIP_START and start[:1] != _PICKLE_START:
        raise CheckpointError(f"{path}: not a checkpoint that torch wrote (it starts with {start!r})")
    return start == _ZIP_START


def refusal(path: Path, error: Exception) -> CheckpointError:
    """The error to raise when torch's weights_only unpickler raised ``error``."""
    # the message names builtins such as eval without a module
    named = re.search(r"(?:GLOBAL `?|(?:global|class) `?(?=[\w.]+\.))([\w.]*\w)", str(error))
    if named is None:
        detail = str(error).partition("WeightsUnpickler error:")[2].strip() or "its pickle cannot be read"
        return CorruptCheckpointError(
            f"{path}: not a torch checkpoint, or damaged ({detail.splitlines()[0]}); {_WAY_OUT}"
        )
    return UnsafeCheckpointError(
        f"{path}: refused: loading it would call {named[1]}, which is not on the list of harmless types "
        "(xmoe_fairseq/safe_types.py). Nothing was run. Take the file from a source you trust, or have its "
        "owner export safetensors"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]

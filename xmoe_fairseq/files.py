"""Write files whole or not at all, and compute their checksums, with the standard library alone."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO


@contextlib.contextmanager
def partial_beside(path: Path) -> Iterator[Path]:
    """Yield a name beside ``path`` to write to; if the block succeeds, the file is synced and moved to ``path``.

    On any error (a full disk, an interrupt) the partial file is removed and ``path`` keeps its content. A symbolic link
    stays, and the file that it points to is replaced.
    """
    if path.is_symlink():
        path = path.resolve()
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_aside(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Call ``write(partial)`` and move the result to ``path``, whose folders are made (see `partial_beside`)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial_beside(path) as partial:
        write(partial)


@contextlib.contextmanager
def open_aside(paths: Sequence[Path]) -> Iterator[list[BinaryIO]]:
    """Open files to write; if the block succeeds all move to ``paths``, else none (see `partial_beside`)."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as moves:
        partials = [moves.enter_context(partial_beside(path)) for path in paths]
        with contextlib.ExitStack() as opened:
            yield [opened.enter_context(partial.open("wb")) for partial in partials]


def keep_inputs(out: str | Path, *inputs: str | Path) -> None:
    """Raise ValueError if writing ``out`` would replace one of the ``inputs``; ``-`` is no file."""
    for path in inputs:
        if str(out) != "-" and Path(out).resolve() == Path(path).resolve():
            raise ValueError(f"--out {out}: is an input; give another name, so that {path} stays as it is")


def sha256_of(path: str | Path) -> str:
    """Hex digest of a file, read in blocks."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

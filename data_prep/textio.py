"""What every command of this folder shares: pair names, lines, files that appear whole or not at all."""

import argparse
import contextlib
import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO


class DataError(Exception):
    """A problem with the user's data or files; its text is all the user needs."""


def language_pair(text: str) -> tuple[str, str]:
    """Read ``SRC-TGT``, for instance ``uk-en``; an argparse type, so it raises ArgumentTypeError."""
    if not re.fullmatch(r"[a-z]{2,3}-[a-z]{2,3}", text):
        raise argparse.ArgumentTypeError(f"wants two language codes such as uk-en, got {text!r}")
    source, target = text.split("-")
    if source == target:
        raise argparse.ArgumentTypeError(f"wants two different languages, got {text!r}")
    return source, target


def at_least(minimum: int) -> Callable[[str], int]:
    """An argparse type: an integer not below ``minimum``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"wants a whole number, got {text!r}") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be {minimum} or more, got {value}")
        return value

    return parse


def split_lines(block: bytes) -> list[bytes]:
    """Split at LF only (never at U+2028, VT or the like, as ``splitlines`` would); no empty last line."""
    lines = block.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return lines


def read_lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines of a binary stream without their LF. Iterating a binary file splits at LF only."""
    for line in file:
        yield line[:-1] if line.endswith(b"\n") else line


def require_file(path: Path, what: str) -> Path:
    """Return ``path``. Raises: DataError if it is no file or is empty."""
    if not path.is_file():
        raise DataError(f"{path}: no such file ({what}); check the prefix and the language code")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: empty file ({what}); it must have at least one line")
    return path


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else _sha256(file)


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def write_aside(paths: Sequence[Path]) -> Iterator[list[BinaryIO]]:
    """Open ``path.partial`` for each path; move all to their names only if the block succeeds.

    A failure (a full disk, an interrupt) removes the partial files and leaves older results as they were.
    """
    partials = [path.with_name(path.name + ".partial") for path in paths]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.ExitStack() as stack:
            yield [stack.enter_context(partial.open("wb")) for partial in partials]
        for partial, path in zip(partials, paths, strict=True):
            partial.replace(path)
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)


def run_command(main: Callable[[], int], name: str) -> int:
    """Turn the errors a user can cause into one line on stderr and exit code 1."""
    try:
        return main()
    except BrokenPipeError:  # the reader (head, less) went away: not our failure, nothing more to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except DataError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"{name}: error: {error.filename or 'file system'}: {error.strerror or error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"{name}: interrupted; no result was written", file=sys.stderr)
        return 130
    return 1

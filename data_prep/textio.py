"""What every command of this folder shares: pair names, lines, checks of files."""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


class DataError(ValueError):
    """A problem with the user's data or files; its message names the way out."""


def language_pair(text: str) -> tuple[str, str]:
    """Read ``SRC-TGT``, for instance ``uk-en``; an argparse type, so it raises ArgumentTypeError."""
    if not re.fullmatch(r"[a-z]{2,3}-[a-z]{2,3}", text):
        raise argparse.ArgumentTypeError(f"wants two language codes such as uk-en, got {text!r}")
    source, target = text.split("-")
    if source == target:
        raise argparse.ArgumentTypeError(f"wants two different languages, got {text!r}")
    return source, target


def language_code(text: str) -> str:
    """Read one language, for instance ``en``; an argparse type, so it raises ArgumentTypeError."""
    if not re.fullmatch(r"[a-z]{2,3}", text):
        raise argparse.ArgumentTypeError(f"wants a language code such as en, got {text!r}")
    return text


def side_path(prefix: str | Path, language: str) -> Path:
    """The file of one language: PREFIX.LANGUAGE."""
    return Path(f"{prefix}.{language}")


def split_lines(block: bytes) -> list[bytes]:
    """Split at LF only, not at U+2028, VT and others as ``splitlines`` does, and drop an empty last line."""
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

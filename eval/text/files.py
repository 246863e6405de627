"""Read text files with one segment a line strictly, and write files whole or not at all."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from xmoe_fairseq.files import sha256_of, write_aside

# Many tools break lines at the line and paragraph separators, which shifts every later line.
_HIDDEN_BREAKS = {"\u2028": "U+2028", "\u2029": "U+2029"}


def decode_lines(raw: bytes, name: str, *, strict: bool = True) -> list[str]:
    """Split UTF-8 text into segments at newlines only, trailing white space removed (as sacreBLEU reads).

    Args:
        raw: the file's bytes.
        name: what to call the file in an error.
        strict: False keeps a byte order mark, NUL and U+2028/U+2029, as sacreBLEU's command line does.
    Raises: ValueError for invalid UTF-8 and for no line at all; if strict, for those characters too.
    """
    if strict and raw.startswith(b"\xef\xbb\xbf"):
        raise ValueError(f"{name}: starts with a byte order mark; remove it, e.g. sed -i '1s/^\\xEF\\xBB\\xBF//'")
    pieces = raw.split(b"\n")
    if pieces[-1] == b"":
        pieces.pop()
    if not pieces:
        raise ValueError(f"{name}: has no lines; expected one segment per line")
    return [_decode_line(piece, f"{name}, line {number}", strict) for number, piece in enumerate(pieces, start=1)]


def _decode_line(piece: bytes, place: str, strict: bool) -> str:
    try:
        line = piece.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place}: invalid UTF-8 (byte 0x{piece[error.start]:02x} at column {error.start + 1}); "
            "convert the file, e.g. with iconv -t UTF-8"
        ) from None
    if not strict:
        return line.rstrip()
    if "\x00" in line:
        raise ValueError(f"{place}: holds a NUL character; remove it, e.g. with tr -d '\\000'")
    for character, code in _HIDDEN_BREAKS.items():
        if character in line:
            raise ValueError(f"{place}: holds {code}, which other tools take for a line break; replace it by a space")
    return line.rstrip()


def read_lines(path: str | Path, *, strict: bool = True) -> list[str]:
    """Read a file of segments (``-`` is standard input).

    Raises: ValueError as `decode_lines`; FileNotFoundError with the path if there is no such file.
    """
    if str(path) == "-":
        return decode_lines(sys.stdin.buffer.read(), "standard input", strict=strict)
    return decode_lines(read_bytes(path), str(path), strict=strict)


def read_bytes(path: str | Path) -> bytes:
    """The bytes of a file; FileNotFoundError says which path and that a file was expected."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    return Path(path).read_bytes()


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object. Raises: FileNotFoundError; ValueError if it is not valid JSON or not an object."""
    try:
        content = json.loads(read_bytes(path))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def describe_file(path: str | Path, lines: list[str]) -> dict[str, Any]:
    """Path, sha256 and number of lines of an input, for a report."""
    return {"path": str(path), "sha256": sha256_of(path), "lines": len(lines)}


def check_writable(path: str | Path) -> None:
    """Fail early, before hours of work, if ``path`` cannot be written later (``-`` is standard output)."""
    folder = Path(path).parent
    if str(path) != "-" and not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise ValueError(f"cannot write {path}: {folder} is not a writable folder; create it with mkdir -p")


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text at once: an older file stays until the new one is complete. ``-`` is stdout."""
    if str(path) == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    check_writable(path)
    write_aside(path, lambda partial: partial.write_text(text, encoding="utf-8", newline="\n"))


def write_lines(path: str | Path, lines: Iterable[str]) -> None:
    """Write one segment a line (see `write_text`)."""
    write_text(path, "".join(f"{line}\n" for line in lines))


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write a JSON object, floats unrounded (see `write_text`)."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

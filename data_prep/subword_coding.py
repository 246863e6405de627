"""Encode and decode lines with the subwords of a folder (see `subword_models`).

- Every run of Unicode white space becomes one space before learning and encoding, because fairseq splits its input at
  any of them. Every line, also an empty one, gives one line.
- decode(encode(x)) is x as the model normalises it. By default (nmt_nfkc) compatibility forms such as a raised 2 or a
  full-width comma become plain ones; ``--normalization identity`` leaves them. Characters that the model never saw
  become <unk> in fairseq, unless it was learned with ``--byte-fallback``.
- subword-nmt cuts words at spaces, so it suits languages that write them. It does not restore a word that ends in @@.
"""

import io
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import sentencepiece
from subword_nmt.apply_bpe import BPE

from data_prep.subword_models import load_settings
from data_prep.textio import DataError, read_lines, require_file

BATCH_LINES = 10_000


class Coder:
    """Encodes and decodes lines of one language (of either one, if the subwords are joint).

    Args:
        folder: made by ``learn``.
        threads: used by sentencepiece; subword-nmt uses one.
    Raises: DataError if the folder has no subwords for the language.
    """

    def __init__(self, folder: Path, language: str | None = None, *, threads: int = 1) -> None:
        settings = load_settings(folder)
        name, self._threads = settings.name_for(language), threads
        self._bpe: BPE | None = None
        if settings.tool == "subword-nmt":
            codes = require_file(folder / f"{name}.codes", "subword-nmt codes")
            self._bpe = BPE(io.StringIO(codes.read_text(encoding="utf-8")))
            return
        model = require_file(folder / f"{name}.model", "sentencepiece model")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
        except RuntimeError:
            raise DataError(f"{model}: no sentencepiece model, or a damaged one; learn it again") from None

    def encode(self, lines: Sequence[str]) -> list[str]:
        """Subwords of each line, one space between them."""
        if self._bpe is not None:
            return [" ".join(self._bpe.segment_tokens(line.split())) for line in lines]
        tidied = [" ".join(line.split()) for line in lines]
        pieces = self._processor.encode(tidied, out_type=str, num_threads=self._threads)
        return [" ".join(line) for line in pieces]

    def decode(self, lines: Sequence[str]) -> list[str]:
        """Plain text of each line of subwords."""
        if self._bpe is not None:
            return [(line + " ").replace("@@ ", "").strip() for line in lines]
        texts: list[str] = self._processor.decode([line.split() for line in lines], num_threads=self._threads)
        return texts


def transform(code: Callable[[Sequence[str]], list[str]], source: BinaryIO, sink: BinaryIO, name: str) -> int:
    """Stream lines through ``code``, BATCH_LINES at a time. Returns: lines written, equal to lines read."""
    done, lines = 0, read_lines(source)
    while batch := list(itertools.islice(lines, BATCH_LINES)):
        try:
            texts = [raw.decode() for raw in batch]
        except UnicodeDecodeError:
            raise DataError(f"{name}: invalid UTF-8 after line {done}; check it with xmoe prepare validate") from None
        sink.write("".join(f"{line}\n" for line in code(texts)).encode())
        done += len(batch)
    sink.flush()
    return done


class Cutter:
    """Encodes as ``code`` does, keeps the first ``max_length`` subwords of a line, and counts lines and cuts."""

    def __init__(self, code: Callable[[Sequence[str]], list[str]], max_length: int) -> None:
        self._code, self.max_length = code, max_length
        self.lines = self.longest = self.cut = 0

    def __call__(self, lines: Sequence[str]) -> list[str]:
        encoded = [line.split(" ") for line in self._code(lines)]
        self.lines += len(encoded)
        self.longest = max([self.longest, *map(len, encoded)])
        self.cut += sum(len(pieces) > self.max_length for pieces in encoded)
        return [" ".join(pieces[: self.max_length]) for pieces in encoded]

    def report(self) -> dict[str, int]:
        """Lines, longest line in subwords, limit and number of cut lines."""
        return {"lines": self.lines, "longest": self.longest, "max_length": self.max_length, "cut": self.cut}

"""Text to subwords and back, for folders of data_prep.subwords and for single model files."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from fairseq.data.encoders.sentencepiece_bpe import SentencepieceBPE, SentencepieceConfig
from fairseq.data.encoders.subword_nmt_bpe import SubwordNMTBPE, SubwordNMTBPEConfig

from data_prep.subword_coding import Coder


class Subwords(Protocol):
    """The interface that a `Translator` uses: text to subwords joined by spaces, and back."""

    def encode(self, text: str) -> str: ...

    def decode(self, text: str) -> str: ...


class _FolderSubwords:
    """The two languages' models of a folder that data_prep.subwords made."""

    def __init__(self, folder: Path, source_lang: str, target_lang: str) -> None:
        self._source, self._target = Coder(folder, source_lang), Coder(folder, target_lang)

    def encode(self, text: str) -> str:
        return self._source.encode([text])[0]

    def decode(self, text: str) -> str:
        return self._target.decode([text])[0]


def load_subwords(path: str, source_lang: str, target_lang: str) -> Subwords:
    """Subwords of a folder made by ``data_prep.subwords learn``, or of one file by fairseq's own classes.

    A text file is taken for subword-nmt codes, any other for a sentencepiece model. A file decodes as
    fairseq-generate --bpe does, a folder as data_prep.subwords decode does. With sentencepiece these differ
    in unknown pieces (<unk> and U+2047) and in byte pieces, which fairseq leaves as they are.
    Raises: ValueError if it cannot be read.
    """
    kind = "a folder of data_prep.subwords"
    try:
        if Path(path).is_dir():
            return _FolderSubwords(Path(path), source_lang, target_lang)
        kind = "subword-nmt codes" if _is_text(path) else "a sentencepiece model"
        if _is_text(path):
            return SubwordNMTBPE(SubwordNMTBPEConfig(bpe_codes=path))
        return SentencepieceBPE(SentencepieceConfig(sentencepiece_model=path))
    except (Exception, SystemExit) as error:  # each library raises its own errors, and subword-nmt ends the process
        raise ValueError(f"subwords {path}: cannot be read as {kind} ({error})") from None


def _is_text(path: str) -> bool:
    try:
        Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True

"""Translate raw text into raw text, with fairseq's own loading, batching and beam search.

A `Translator` loads its models once. The command line (eval.translate), the web page and the analyses share it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from fairseq import utils
from fairseq.data import data_utils
from torch import Tensor
from tqdm import tqdm

from eval.text.loading import load
from eval.text.search import BeamSearch
from eval.text.split_long import split_text
from eval.text.subwords import load_subwords

_UNSPACED_TARGETS = ("zh", "ja", "th")
_DEFAULT_MAX_TOKENS = 12000  # fairseq-generate's own default


@dataclass(frozen=True)
class TranslatorConfig:
    """The settings of a `Translator`; names and defaults are those of fairseq-generate.

    Attributes:
        paths: checkpoint files; several make an ensemble.
        data: the folder of fairseq-preprocess, for its two dictionaries.
        source_lang, target_lang: language codes, as in ``dict.CODE.txt``.
        subwords: folder of ``data_prep.subwords learn``, a sentencepiece model, or subword-nmt codes.
        user_dir: package with models beyond fairseq's, which also allows its checkpoints' types to be loaded.
        beam: hypotheses kept in the search.
        lenpen: length penalty; above 1 favours longer translations.
        max_len_a, max_len_b: a translation has at most a * source length + b tokens.
        batch_size: most sentences in a batch; None: no limit.
        max_tokens: most source tokens in a batch, padding included; None: 12000 if batch_size is None too.
        max_length: longest source in subwords, without the end mark; None: what the model has positions for.
        split_long: cut longer lines into chunks, translate these and join them; False: raise ValueError.
        model_overrides: model settings to change, as fairseq's --model-overrides.
        device: "cpu", "cuda", "cuda:1"; None: the first GPU if there is one.
    """

    paths: Sequence[str]
    data: str
    source_lang: str
    target_lang: str
    subwords: str
    user_dir: str | None = None
    beam: int = 5
    lenpen: float = 1.0
    max_len_a: float = 0.0
    max_len_b: int = 200
    batch_size: int | None = None
    max_tokens: int | None = None
    max_length: int | None = None
    split_long: bool = True
    model_overrides: Mapping[str, Any] = field(default_factory=dict)
    device: str | None = None

    def check(self) -> None:
        """Raise ValueError or FileNotFoundError for settings that are wrong, without loading anything."""
        for name in ("beam", "batch_size", "max_tokens", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1")
        if not (0 <= self.max_len_a < math.inf and self.max_len_b >= 0 and self.max_len_a + self.max_len_b > 0):
            raise ValueError(
                f"max_len_a ({self.max_len_a}) and max_len_b ({self.max_len_b}) must not be negative, nor both 0: a "
                "translation has at most a * source length + b tokens; fairseq's own are 0 and 200"
            )
        if not math.isfinite(self.lenpen):
            raise ValueError(f"lenpen ({self.lenpen}) must be a number; 1 ranks by the mean of log probabilities")
        if not self.paths:
            raise ValueError("no checkpoint given")
        for path in self.paths:
            if not Path(path).is_file():
                raise FileNotFoundError(f"no such file: {path}")
        if not Path(self.subwords).exists():
            raise FileNotFoundError(f"subwords: no such file or folder: {self.subwords}")
        if self.user_dir is not None and not Path(self.user_dir).is_dir():
            raise FileNotFoundError(f"user_dir: no such folder: {self.user_dir}")
        known = sorted(path.name[5:-4] for path in Path(self.data).glob("dict.*.txt"))
        for language in (self.source_lang, self.target_lang):
            if language not in known:
                found = ", ".join(known) or "none; is it a folder of fairseq-preprocess?"
                raise ValueError(f"language {language!r}: {self.data} has no dict.{language}.txt; it has {found}")


@dataclass(frozen=True)
class Translation:
    """One translated line.

    Attributes:
        text: raw text, one line; empty for an empty line.
        tokens: subwords of the translation, without the end mark.
        score: log probability (natural logarithm) divided by length ** lenpen, as fairseq ranks by; for a
            line of several chunks the mean over chunks, weighted by their numbers of tokens. 0.0 if empty.
        num_chunks: 1, more if the line was cut, 0 if it is empty.
        truncated: the search ran into max_len_a * source length + max_len_b, so the end may be missing.
    """

    text: str = ""
    tokens: tuple[str, ...] = ()
    score: float = 0.0
    num_chunks: int = 0
    truncated: bool = False


class Translator:
    """Translate lists of lines.

    Attributes:
        loaded: the models, ready for inference, and their task, for analyses that look inside.
        search: the beam search.
        max_length: longest source in subwords, without the end mark.
    """

    def __init__(self, config: TranslatorConfig) -> None:
        """Load models, dictionaries and subwords.

        Raises: ValueError or FileNotFoundError, which name what is missing, broken or does not fit.
        """
        config.check()
        self.config = config
        languages = (config.source_lang, config.target_lang)
        self.subwords = load_subwords(config.subwords, *languages)
        self.loaded = load(
            *config.paths,
            data=config.data,
            languages=languages,
            user_dir=config.user_dir,
            overrides=config.model_overrides,
            device=config.device,
        )
        self.task, self.models = self.loaded.task, self.loaded.models
        self.search = BeamSearch(
            self.loaded,
            self.subwords,
            beam=config.beam,
            lenpen=config.lenpen,
            max_len_a=config.max_len_a,
            max_len_b=config.max_len_b,
        )
        positions = utils.resolve_max_positions(
            self.task.max_positions(), *[model.max_positions() for model in self.models]
        )
        self.max_length = min(positions[0] - 1, config.max_length or positions[0])

    def encode(self, text: str) -> list[str]:
        """Subwords of raw text, without the end mark."""
        return self.subwords.encode(text).split()

    def decode(self, tokens: Sequence[str]) -> str:
        """Raw text of subwords."""
        return self.subwords.decode(" ".join(tokens))

    def translate(
        self, lines: Sequence[str], *, progress: bool = False, numbers: Sequence[int] | None = None
    ) -> list[Translation]:
        """One translation per line, in the same order.

        Args:
            lines: raw text. An empty line gives an empty translation.
            progress: show a tqdm bar, in sentences, on stderr.
            numbers: line numbers for error messages; None counts from 1.
        Raises: ValueError if a line is longer than `max_length` and the config says not to split.
        """
        owners, chunks = [], []
        numbers = numbers or range(1, len(lines) + 1)
        for owner, (number, line) in enumerate(zip(numbers, lines, strict=True)):
            for chunk in self._chunk(line, number):
                owners.append(owner)
                chunks.append(chunk)
        parts: list[list[Translation]] = [[] for _ in lines]
        for owner, translation in zip(owners, self._translate_chunks(chunks, progress), strict=True):
            parts[owner].append(translation)
        return [self._join(translations) for translations in parts]

    def _chunk(self, line: str, number: int) -> list[list[str]]:
        tokens = self.encode(line)
        if len(tokens) <= self.max_length:
            return [tokens] if tokens else []
        if not self.config.split_long:
            raise ValueError(
                f"line {number} has {len(tokens)} subwords, the limit is {self.max_length}; "
                "shorten it or allow splitting"
            )
        pieces = split_text(line, self.max_length, lambda text: len(self.encode(text)))
        return [tokens for tokens in map(self.encode, pieces) if tokens]

    def _translate_chunks(self, chunks: list[list[str]], progress: bool) -> list[Translation]:
        """Translate token lists in batches of similar length; results in the order of ``chunks``."""
        dictionary = self.task.source_dictionary
        ids = [dictionary.encode_line(" ".join(c), add_if_not_exist=False).long() for c in chunks]
        dataset = self.task.build_dataset_for_inference(ids, [tokens.numel() for tokens in ids])
        results: list[Translation] = [Translation()] * len(chunks)
        device = self.loaded.device
        with tqdm(total=len(chunks), unit="sentence", disable=not progress) as bar:
            for batch in self._batches(ids):
                sample = dataset.collater([dataset[index] for index in batch])
                sample = utils.move_to_cuda(sample, device) if device.type == "cuda" else sample
                for index, found in self.search.best(sample).items():
                    pieces = tuple(found.pieces.split())
                    results[index] = Translation(found.text, pieces, found.score, 1, found.truncated)
                bar.update(len(batch))
        return results

    def _batches(self, ids: list[Tensor]) -> list[np.ndarray]:
        if not ids:
            return []
        lengths = np.array([tokens.numel() for tokens in ids])
        order = np.argsort(lengths, kind="stable")
        max_tokens = self.config.max_tokens
        if max_tokens is None and self.config.batch_size is None:
            max_tokens = _DEFAULT_MAX_TOKENS
        if max_tokens is not None and lengths.max() > max_tokens:
            raise ValueError(f"max_tokens ({max_tokens}) must be at least the longest source, {lengths.max()}")
        return data_utils.batch_by_size(
            order,
            num_tokens_fn=lambda index: int(lengths[index]),
            num_tokens_vec=lengths[order].astype("int64"),
            max_tokens=max_tokens,
            max_sentences=self.config.batch_size,
        )

    def _join(self, parts: list[Translation]) -> Translation:
        if len(parts) < 2:
            return parts[0] if parts else Translation()
        glue = "" if self.config.target_lang[:2] in _UNSPACED_TARGETS else " "
        sizes = [len(part.tokens) + 1 for part in parts]  # with the end mark
        return Translation(
            text=glue.join(part.text for part in parts if part.text),
            tokens=tuple(token for part in parts for token in part.tokens),
            score=sum(s * part.score for s, part in zip(sizes, parts, strict=True)) / sum(sizes),
            num_chunks=len(parts),
            truncated=any(part.truncated for part in parts),
        )

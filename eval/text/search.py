"""fairseq's beam search over samples, shared by translations, the web page and the analyses."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fairseq.dataclass.configs import GenerationConfig
from fairseq_cli.generate import get_symbols_to_strip_from_output

from eval.text.loading import Loaded
from eval.text.subwords import Subwords


@dataclass(frozen=True)
class Hypothesis:
    """The best translation of one sentence.

    Attributes:
        pieces: subwords, separated by spaces, without the end mark.
        text: raw text.
        score: log probability (natural logarithm) divided by length ** lenpen, as fairseq ranks by.
        truncated: the search ran into its longest length, so the end may be missing.
    """

    pieces: str
    text: str
    score: float
    truncated: bool


class BeamSearch:
    """A beam search with the models of one `Loaded`.

    Attributes:
        generator: fairseq's object.
    """

    def __init__(
        self,
        loaded: Loaded,
        subwords: Subwords,
        *,
        beam: int = 5,
        lenpen: float = 1.0,
        max_len_a: float = 0.0,
        max_len_b: int = 200,
    ) -> None:
        """The names and defaults are those of fairseq-generate (see `TranslatorConfig`)."""
        self.loaded, self.subwords = loaded, subwords
        self.settings = GenerationConfig(beam=beam, lenpen=lenpen, max_len_a=max_len_a, max_len_b=max_len_b)
        for model in loaded.models:
            model.prepare_for_inference_(Namespace(generation=self.settings))
        self.generator = loaded.task.build_generator(loaded.models, self.settings)
        self._strip = get_symbols_to_strip_from_output(self.generator)

    def best(self, sample: dict[str, Any]) -> dict[int, Hypothesis]:
        """Search one fairseq sample. Returns: id of a sentence -> its best translation."""
        found = self.loaded.task.inference_step(self.generator, self.loaded.models, sample)
        source_length = sample["net_input"]["src_tokens"].size(1)
        settings = self.settings
        longest = min(int(settings.max_len_a * source_length + settings.max_len_b), self.generator.max_len - 1)
        ids = sample["id"].tolist()
        return {index: self._read(nbest[0], longest) for index, nbest in zip(ids, found, strict=True)}

    def _read(self, hypothesis: Mapping[str, Any], longest: int) -> Hypothesis:
        tokens = hypothesis["tokens"].int().cpu()
        pieces = self.loaded.task.target_dictionary.string(tokens, extra_symbols_to_ignore=self._strip)
        return Hypothesis(
            pieces=pieces,
            text=self.subwords.decode(pieces),
            score=float(hypothesis["score"]),
            truncated=tokens.numel() > longest,  # the end mark was forced
        )

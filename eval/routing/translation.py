"""Translate with beam search, score the translations, and record the routing of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.routing.corpus import Corpus, from_lines
from eval.routing.forward_passes import add_plans, short_label, summed_figures
from eval.text.loading import Loaded
from eval.text.scoring import score_corpus
from eval.text.search import BeamSearch, Hypothesis
from eval.text.subwords import load_subwords
from xmoe_fairseq.moe import RoutingPlan, record_plans

MAX_EXPERTS_SHOWN = 16  # experts of one token in one layer, the largest weight first


class Search:
    """A beam search over a corpus that also counts its routing."""

    def __init__(self, loaded: Loaded, subwords: str, *, beam: int = 5, max_tokens: int = 4096) -> None:
        self.loaded, self.max_tokens = loaded, max_tokens
        self.bpe = load_subwords(subwords, loaded.task.cfg.source_lang, loaded.task.cfg.target_lang)
        self.search = BeamSearch(loaded, self.bpe, beam=beam)

    def translate(self, corpus: Corpus, indices: np.ndarray) -> tuple[dict[int, Hypothesis], dict[str, Any]]:
        """Translate some sentences. Returns: sentence -> translation, and the routing figures of the search."""
        found: dict[int, Hypothesis] = {}
        sums: dict[str, dict[str, float]] = {}
        for sample in corpus.samples(corpus.batches(indices, self.max_tokens), self.loaded.device):
            with record_plans(self.loaded.model) as plans:
                found |= self.search.best(sample)
            add_plans(sums, plans)
        return found, summed_figures(sums)

    def references(self, corpus: Corpus, indices: Sequence[int]) -> dict[int, str]:
        """The targets of the corpus as the subword model decodes them: normalised, without unknown symbols."""
        dictionary = self.loaded.task.target_dictionary
        return {int(i): self.bpe.decode(dictionary.string(corpus.dataset[int(i)]["target"])) for i in indices}


def scores(translations: dict[int, Hypothesis], references: dict[int, str], language: str) -> dict[str, float]:
    """BLEU and chrF2++ of the translated sentences; empty if every translation is empty."""
    order = sorted(translations)
    hypotheses = [translations[i].text for i in order]
    if not any(line.strip() for line in hypotheses):
        return {"bleu": 0.0, "chrf++": 0.0}
    result = score_corpus(
        hypotheses, [[references[i] for i in order]], target_language=language, names=("bleu", "chrf++")
    )
    return {name: metric.score for name, metric in result.items()}


@torch.no_grad()
def routing_of(
    loaded: Loaded, source: Sequence[str], target: Sequence[str], max_tokens: int = 4096
) -> list[dict[str, Any]]:
    """The experts of every token of translated sentences, from one forward pass with the translation as target.

    Args:
        source, target: subwords, separated by spaces.
    Returns:
        per sentence, in order: ``source`` and ``target`` tokens as the stacks see them (the decoder's first is the end
        mark), and ``routing``: layer label -> per token ``[n, expert, weight, expert, weight, ...]``. n
        experts computed the token; at most ``MAX_EXPERTS_SHOWN`` of them are listed, by falling weight. None stands
        for a sentence that is too long.
    """
    corpus = from_lines(loaded, source, target)
    result: list[Any] = [None] * len(source)
    for sample in corpus.samples(corpus.batches(corpus.indices, max_tokens), loaded.device):
        with record_plans(loaded.model) as plans:
            loaded.model(**sample["net_input"])
        inputs = sample["net_input"]
        sides = {"encoder": (inputs["src_tokens"], loaded.task.source_dictionary)}
        sides["decoder"] = (inputs["prev_output_tokens"], loaded.task.target_dictionary)
        assigned = {
            short_label(name): token_experts(layer_plans[0]) for name, layer_plans in plans.items() if layer_plans
        }
        for row, index in enumerate(sample["id"].tolist()):
            result[index] = _sentence(row, sides, assigned)
    return result


def _sentence(row: int, sides: dict[str, tuple[Tensor, Any]], assigned: dict[str, list[list[float]]]) -> dict[str, Any]:
    symbols, columns = {}, {}
    for side, (ids_BT, dictionary) in sides.items():
        real = ids_BT[row].ne(dictionary.pad()).nonzero().flatten().tolist()
        symbols[side] = [dictionary[int(ids_BT[row, t])] for t in real]
        columns[side] = [t * ids_BT.size(0) + row for t in real]
    routing = {label: [tokens[c] for c in columns[label.split()[0]]] for label, tokens in assigned.items()}
    return {"source": symbols["encoder"], "target": symbols["decoder"], "routing": routing}


def token_experts(plan: RoutingPlan) -> list[list[float]]:
    """For each row of the flattened batch ``[n, expert, weight, ...]``, by falling weight, then by expert."""
    pairs: list[list[tuple[float, int]]] = [[] for _ in range(plan.num_tokens)]
    columns = (plan.token_index_A.tolist(), plan.expert_index_A.tolist(), plan.weight_A.tolist())
    for token, expert, weight in zip(*columns, strict=True):
        pairs[token].append((-weight, expert))
    rows = []
    for found in pairs:
        row: list[float] = [len(found)]
        for weight, expert in sorted(found)[:MAX_EXPERTS_SHOWN]:
            row += [expert, round(-weight, 4)]
        rows.append(row)
    return rows

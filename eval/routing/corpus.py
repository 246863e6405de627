"""The sentences of an analysis: a binarised test set, or raw text that is encoded here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fairseq import utils
from fairseq.data import LanguagePairDataset, data_utils

from eval.text.loading import Loaded


@dataclass(frozen=True)
class Corpus:
    """A fairseq dataset and the indices of its sentences to use.

    Attributes:
        indices: int64, the sentences, in order of length.
        num_skipped: sentences longer than the model has positions for, left out.
    """

    dataset: Any
    indices: np.ndarray
    num_skipped: int

    def evenly(self, count: int | None) -> np.ndarray:
        """At most ``count`` of the indices (None: all), spread evenly over the lengths."""
        if count is None or count >= len(self.indices):
            return self.indices
        return self.indices[np.linspace(0, len(self.indices) - 1, count).round().astype(int)]

    def batches(self, indices: np.ndarray, max_tokens: int) -> list[Any]:
        """Lists of indices; a batch has at most ``max_tokens`` tokens a side, padding included."""
        longest = max((self.dataset.num_tokens(index) for index in indices), default=0)
        return list(self.dataset.batch_by_size(indices, max_tokens=max(max_tokens, longest)))

    def samples(self, batches: Sequence[Any], device: torch.device) -> Iterator[dict[str, Any]]:
        """Yield one fairseq sample (net_input, target, id) per batch."""
        for batch in batches:
            sample = self.dataset.collater([self.dataset[int(index)] for index in batch])
            yield utils.move_to_cuda(sample, device) if device.type == "cuda" else sample


def binarised(loaded: Loaded, split: str) -> Corpus:
    """A test set of fairseq-preprocess. Raises: FileNotFoundError if there is none of that name."""
    loaded.task.load_dataset(split)
    return _usable(loaded, loaded.task.dataset(split))


def from_lines(loaded: Loaded, source: Sequence[str], target: Sequence[str] | None) -> Corpus:
    """A translation dataset of lines of subwords, separated by spaces; target None leaves it with sources alone."""
    if target is not None and len(source) != len(target):
        raise ValueError(f"{len(source)} source lines, {len(target)} target lines; line n must be the same sentence")
    task = loaded.task
    sides = []
    for lines, dictionary in ((source, task.source_dictionary), (target, task.target_dictionary)):
        ids = None if lines is None else [dictionary.encode_line(line, add_if_not_exist=False).long() for line in lines]
        sides.append(ids)
    source_ids, target_ids = sides
    dataset = LanguagePairDataset(
        source_ids,
        np.array([len(ids) for ids in source_ids]),
        task.source_dictionary,
        target_ids,
        None if target_ids is None else np.array([len(ids) for ids in target_ids]),
        task.target_dictionary,
        left_pad_source=task.cfg.left_pad_source,
        left_pad_target=task.cfg.left_pad_target,
        shuffle=False,
    )
    return _usable(loaded, dataset)


def _usable(loaded: Loaded, dataset: Any) -> Corpus:
    with data_utils.numpy_seed(1):
        indices = dataset.ordered_indices()
    total = len(indices)
    if not total:
        raise ValueError("the test set is empty")
    positions = utils.resolve_max_positions(loaded.task.max_positions(), loaded.model.max_positions())
    indices, too_long = dataset.filter_indices_by_size(indices, positions)
    if not len(indices):
        raise ValueError(f"all {total} sentences are longer than the model's {positions} positions")
    return Corpus(dataset, np.asarray(indices), len(too_long))


def input_tokens(sample: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Side -> int64 (batch, time): the tokens whose hidden states each stack routes.

    A decoder reads the target shifted by one; its first token is the end mark.
    """
    inputs = sample["net_input"]
    if "prev_output_tokens" not in inputs:
        return {"decoder": inputs["src_tokens"]}
    return {"encoder": inputs["src_tokens"], "decoder": inputs["prev_output_tokens"]}

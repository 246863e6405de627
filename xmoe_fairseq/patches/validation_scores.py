"""Validate by translation: BLEU and chrF2++ of detokenised text, to select and stop by (fairseq's ``--eval-bleu``).

fairseq's BLEU sums counts over batches and ranks and is right if its two flags undo the subwords of the data. Otherwise
it gives no warning: with SentencePiece data and the flag's default of ``@@ `` it scores pieces, which are more and
easier than words. This refuses such a setting, and adds chrF2++ of the same translations.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from fairseq import utils
from fairseq.logging import metrics
from fairseq.tasks.translation import TranslationTask
from fairseq.trainer import Trainer
from sacrebleu.metrics import BLEU, CHRF

from .wrap import wrap

logger = logging.getLogger(__name__)
SCORES = ("bleu", "chrf")
# counts of sacrebleu's chrF2++: three for each of 6 character and 2 word n-gram orders
_CHRF = CHRF(word_order=2)
_NUM_COUNTS = 3 * (_CHRF.char_order + _CHRF.word_order)


def install() -> None:
    """Wrap the translation task, and the trainer that receives the metric to select by."""
    wrap(Trainer, "__init__", "validation-scores", _start)
    wrap(TranslationTask, "build_model", "validation-scores", _build_model)
    wrap(TranslationTask, "_inference_with_bleu", "validation-scores", _translate_and_score)
    wrap(TranslationTask, "valid_step", "validation-scores", _valid_step)
    wrap(TranslationTask, "reduce_metrics", "validation-scores", _reduce_metrics)


def _start(original: Callable[..., None], trainer: Trainer, cfg: Any, task: Any, *args: Any, **kwargs: Any) -> None:
    metric = cfg.checkpoint.best_checkpoint_metric
    if metric in SCORES and not cfg.checkpoint.maximize_best_checkpoint_metric:
        raise ValueError(
            f"--best-checkpoint-metric {metric} selects the lowest score; add --maximize-best-checkpoint-metric "
            "(checkpoint.maximize_best_checkpoint_metric: true)"
        )
    if metric in SCORES and not getattr(task.cfg, "eval_bleu", False):
        raise ValueError(
            f"--best-checkpoint-metric {metric} needs translations of the validation set: add --eval-bleu "
            "(task.eval_bleu: true), or select by loss"
        )
    original(trainer, cfg, task, *args, **kwargs)


def _build_model(original: Callable[..., Any], task: TranslationTask, *args: Any, **kwargs: Any) -> Any:
    if task.cfg.eval_bleu:
        check_detokenised(task.cfg.eval_bleu_remove_bpe, task.target_dictionary.symbols)
    return original(task, *args, **kwargs)


def check_detokenised(remove_bpe: str | None, symbols: list[str]) -> None:
    """Raise ValueError if ``--eval-bleu-remove-bpe`` leaves the subwords of these dictionary entries in place."""
    marks = {
        "sentencepiece": any(symbol.startswith("\u2581") for symbol in symbols),
        "subword_nmt": any(symbol.endswith("@@") for symbol in symbols),
    }
    undone = {"@@ ": "subword_nmt"}.get(remove_bpe or "", remove_bpe)
    for kind, is_used in marks.items():
        if is_used and undone != kind:
            raise ValueError(
                f"--eval-bleu would score pieces instead of words: the target dictionary is {kind}'s and "
                f"--eval-bleu-remove-bpe is {remove_bpe!r}; set it to {kind} (task.eval_bleu_remove_bpe: {kind})"
            )


def _translate_and_score(
    _original: Callable[..., Any], task: TranslationTask, generator: Any, sample: Any, model: Any
) -> Any:
    """sacrebleu's BLEU of one batch; the counts of its chrF2++ wait in ``task.chrf_counts`` for `_valid_step`."""

    def text(tokens: torch.Tensor, unknown: str) -> str:
        words = task.tgt_dict.string(tokens.int().cpu(), task.cfg.eval_bleu_remove_bpe, unk_string=unknown)
        return task.tokenizer.decode(words) if task.tokenizer else words

    beams = task.inference_step(generator, [model], sample, prefix_tokens=None)
    # unknown words of the two sides never match, and each counts as one word
    hypotheses = [text(beam[0]["tokens"], "UNKNOWNTOKENINHYP") for beam in beams]
    targets = (utils.strip_pad(target, task.tgt_dict.pad()) for target in sample["target"])
    references = [text(target, "UNKNOWNTOKENINREF") for target in targets]
    if task.cfg.eval_bleu_print_samples:
        logger.info("example hypothesis: %s", hypotheses[0])
        logger.info("example reference: %s", references[0])
    task.chrf_counts = np.sum(_CHRF._extract_corpus_statistics(hypotheses, [references]), axis=0)
    bleu = BLEU(tokenize="none", force=True) if task.cfg.eval_tokenized_bleu else BLEU(force=True)
    return bleu.corpus_score(hypotheses, [references])


def _valid_step(original: Callable[..., Any], task: TranslationTask, *args: Any, **kwargs: Any) -> Any:
    loss, sample_size, logging_output = original(task, *args, **kwargs)
    if task.cfg.eval_bleu:
        logging_output.update({f"_chrf_{index}": int(count) for index, count in enumerate(task.chrf_counts)})
    return loss, sample_size, logging_output


def _reduce_metrics(
    original: Callable[..., None], task: TranslationTask, logging_outputs: list[dict[str, Any]], criterion: Any
) -> None:
    original(task, logging_outputs, criterion)
    if not any("_chrf_0" in output for output in logging_outputs):
        return
    counts = [sum(float(output.get(f"_chrf_{index}", 0)) for output in logging_outputs) for index in range(_NUM_COUNTS)]
    metrics.log_scalar("_chrf_counts", np.array(counts))  # log_scalar sums arrays
    metrics.log_derived("chrf", lambda meters: round(_chrf(meters["_chrf_counts"].sum), 2))


def _chrf(counts: Any) -> float:
    return float(_CHRF._compute_score_from_stats([int(count) for count in counts]).score)

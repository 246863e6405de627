"""Score translations with sacreBLEU: one corpus, or files; and the scores as a table."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import sacrebleu
from sacrebleu.metrics import BLEU
from sacrebleu.metrics.base import Metric
from tabulate import tabulate

from eval.text import files, metrics


@dataclass(frozen=True)
class MetricScore:
    """The unrounded score of one metric over one corpus.

    Attributes:
        name: sacreBLEU's name, e.g. ``chrF2++``.
        score: 0 to 100 (TER can exceed 100; lower is better there).
        signature: sacreBLEU's full signature of ``score``.
        mean: mean over the bootstrap resamples, or None without bootstrap.
        ci95: half width of the 95% confidence interval around ``mean``, or None.
        bootstrap_signature: the signature with number of resamples and seed, or None.
    """

    name: str
    score: float
    signature: str
    mean: float | None = None
    ci95: float | None = None
    bootstrap_signature: str | None = None


def score_corpus(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    target_language: str,
    names: Sequence[str] = metrics.METRICS,
    bootstrap: int = 0,
    seed: int | None = None,
) -> dict[str, MetricScore]:
    """Score one corpus.

    Args:
        hypotheses: detokenised translations.
        references: one sequence per reference, each as long as ``hypotheses``.
        names: out of ``metrics.METRICS``.
        bootstrap: resamples for the confidence intervals; 0 leaves them out. sacreBLEU holds
            resamples x segments x statistics float32 at once (about 200 MB for 1000 x 2000, chrF2++).
        seed: seed of the resampling; None takes sacreBLEU's own (``SACREBLEU_SEED`` or 12345).
    Raises: ValueError for unequal lengths, empty input, an unknown metric or language, or bootstrap = 1.
    """
    if bootstrap < 0 or bootstrap == 1:
        raise ValueError(f"bootstrap ({bootstrap}) must be 0 (none) or at least 2 resamples; 1000 is usual")
    named = {"hypotheses": list(hypotheses)}
    named.update({f"reference {n}": list(reference) for n, reference in enumerate(references, start=1)})
    metrics.check_parallel(named)
    metrics.check_not_empty("hypotheses", hypotheses)
    built = metrics.build_metrics(names, target_language, references)
    with metrics.sacrebleu_seed(seed):
        return {name: _score_one(metric, list(hypotheses), bootstrap) for name, metric in built.items()}


def _score_one(metric: Metric, hypotheses: list[str], bootstrap: int) -> MetricScore:
    signature = str(metric.get_signature())  # read before the resampling adds its own fields
    _make_resamples_alike(metric)
    result = metric.corpus_score(hypotheses, references=None, n_bootstrap=bootstrap)
    if not bootstrap:
        return MetricScore(result.name, result.score, signature)
    # sacreBLEU has both in underscored attributes, and otherwise only as rounded text
    mean, ci95 = float(result._mean), float(result._ci)
    return MetricScore(result.name, result.score, signature, mean, ci95, str(metric.get_signature()))


def _make_resamples_alike(metric: Metric) -> None:
    """Make all scores of resamples floats. Those of chrF and TER are float32 where anything matches, else float, and
    sacreBLEU cannot average both.
    """
    compute = metric._compute_score_from_stats

    def in_float32(stats: Any) -> Any:
        result = compute(stats)
        if isinstance(stats, np.ndarray):  # a resample, since the corpus itself has a list
            result.score = np.float32(result.score)
        return result

    if not isinstance(metric, BLEU):
        metric._compute_score_from_stats = in_float32


def score_files(hypotheses: str, references: Sequence[str], *, target_language: str, **options: Any) -> dict[str, Any]:
    """Score files and return the content of ``--out`` (schema: docs/evaluation.md).

    ``options`` are those of `score_corpus`. Raises: as `files.read_lines` and `score_corpus`.
    """
    hypothesis_lines = files.read_lines(hypotheses)
    reference_lines = [files.read_lines(path) for path in references]
    metrics.check_parallel({hypotheses: hypothesis_lines, **dict(zip(references, reference_lines, strict=True))})
    empty = metrics.check_not_empty(hypotheses, hypothesis_lines)
    if empty:
        print(f"score: warning: {empty} of {len(hypothesis_lines)} hypotheses are empty", file=sys.stderr)
    scores = score_corpus(hypothesis_lines, reference_lines, target_language=target_language, **options)
    return {
        "hypotheses": files.describe_file(hypotheses, hypothesis_lines) | {"empty_lines": empty},
        "references": [
            files.describe_file(path, lines) for path, lines in zip(references, reference_lines, strict=True)
        ],
        "target_language": target_language,
        "sacrebleu_version": sacrebleu.__version__,
        "scores": {name: asdict(score) for name, score in scores.items()},
    }


def format_table(report: dict[str, Any]) -> str:
    """A Markdown table with two decimals; the signatures stand below it, because their bars would break the table."""
    scores = report["scores"].values()
    rows = [[score["name"], f"{score['score']:.2f}", _interval(score)] for score in scores]
    headers = ["metric", "score", "bootstrap mean ± 95% CI"]
    table = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    signatures = [f"- {score['name']}: `{score['signature']}`" for score in scores]
    signatures += [
        f"- interval of {score['name']}: `{score['bootstrap_signature']}`"
        for score in scores
        if score["bootstrap_signature"]
    ]
    return "\n".join([table, "", *signatures])


def _interval(score: dict[str, Any]) -> str:
    return "" if score["ci95"] is None else f"{score['mean']:.2f} ± {score['ci95']:.2f}"

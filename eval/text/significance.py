"""Test by sacreBLEU's paired tests whether systems differ by more than chance; and the results as a table."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from sacrebleu.significance import PairedTest
from tabulate import tabulate

from eval.text import metrics

METHODS = {"bootstrap": "bs", "approximate-randomisation": "ar"}


def _check_seed(seed: int | None) -> None:
    """Refuse seed 0: sacreBLEU's paired tests take it for "no seed", so that no two runs agree."""
    value = str(seed) if seed is not None else os.environ.get("SACREBLEU_SEED", "12345")
    if value != "none" and not (value.isdigit() and int(value) > 0):
        raise ValueError(
            f"seed ({value}) must be a positive integer: sacreBLEU's paired tests take 0 for an unseeded "
            "run. Try --seed 1 or leave it out (SACREBLEU_SEED, else 12345)"
        )


def compare_systems(
    systems: Sequence[tuple[str, Sequence[str]]],
    references: Sequence[Sequence[str]],
    *,
    method: str,
    target_language: str = "en",
    names: Sequence[str] = ("bleu", "chrf++"),
    trials: int = 0,
    seed: int | None = None,
    processes: int = 1,
) -> dict[str, Any]:
    """Test every system against the first.

    Args:
        systems: (name, hypotheses) pairs, the baseline first, all as long as the references.
        references: one sequence per reference file.
        method: ``bootstrap`` or ``approximate-randomisation``. With the latter the confidence intervals
            still come from 1000 bootstrap resamples, since that test gives none.
        trials: resamples or shuffles; 0 takes sacreBLEU's default (1000 and 10000).
        seed: positive; None takes ``SACREBLEU_SEED``, else 12345.
        processes: worker processes, one system each at a time.
    Returns:
        ``{"method", "trials", "baseline", "signatures": {metric: str}, "systems": [...]}``, each system being
        ``{"name", "same_text_as_baseline", "scores": {metric: {"score", "mean", "ci95", "p_value"}}}``;
        floats unrounded, p_value None for the baseline and 1 for a text equal to its own.
    Raises: ValueError for fewer than two systems, equal names, unequal lengths, empty systems, a bad option.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r}: choose from {', '.join(METHODS)}")
    if trials < 0 or processes < 1:
        raise ValueError(f"trials ({trials}) must be 0 or more and processes ({processes}) 1 or more")
    _check_seed(seed)
    _check_systems(systems, references)
    same = [index > 0 and list(lines) == list(systems[0][1]) for index, (_, lines) in enumerate(systems)]
    built = metrics.build_metrics(names, target_language, references)
    with metrics.sacrebleu_seed(seed):
        test = PairedTest(
            [(name, list(lines)) for name, lines in systems],
            built,
            references=None,
            test_type=METHODS[method],
            n_samples=trials,
            n_ar_confidence=0 if method == "approximate-randomisation" else -1,
            n_jobs=processes,
        )
        signatures, results = test()
    return {
        "method": method,
        "trials": test.n_samples,
        "baseline": systems[0][0],
        "signatures": {name: str(signature) for name, signature in signatures.items()},
        "systems": [
            {
                "name": name,
                "same_text_as_baseline": same[index],
                "scores": {metric: _figures(results[metric][index], same[index]) for metric in signatures},
            }
            for index, (name, _) in enumerate(systems)
        ],
    }


def _check_systems(systems: Sequence[tuple[str, Sequence[str]]], references: Sequence[Sequence[str]]) -> None:
    names = [name for name, _ in systems]
    if len(names) < 2:
        raise ValueError(f"a paired test needs at least two systems, got {len(names)}")
    if len(set(names)) < len(names):
        raise ValueError(f"two systems share a name: {', '.join(names)}")
    named = {f"system {name}": list(lines) for name, lines in systems}
    for name, lines in named.items():
        metrics.check_not_empty(name, lines)
    metrics.check_parallel(named | {f"reference {n}": list(ref) for n, ref in enumerate(references, start=1)})


def _figures(result: Any, is_same_text: bool) -> dict[str, float | None]:
    """Figures of one system and metric; the p-value of an equal text is 1, for which sacreBLEU gives its smallest."""
    p_value = 1.0 if is_same_text else result.p_value
    figures = {"score": result.score, "mean": result.mean, "ci95": result.ci, "p_value": p_value}
    return {name: None if value is None else float(value) for name, value in figures.items()}


def format_table(report: dict[str, Any]) -> str:
    """A Markdown table of score, bootstrap mean ± 95% CI and p-value, and below it the signatures."""
    rows = []
    for system in report["systems"]:
        row = [system["name"] + (" (baseline)" if system["name"] == report["baseline"] else "")]
        for figures in system["scores"].values():
            cell = f"{figures['score']:.2f} ({figures['mean']:.2f} ± {figures['ci95']:.2f})"
            row.append(cell if figures["p_value"] is None else f"{cell}, p = {figures['p_value']:.4f}")
        rows.append(row)
    table = tabulate(rows, ["system", *report["signatures"]], tablefmt="github", disable_numparse=True)
    signatures = "\n".join(f"- {name}: `{signature}`" for name, signature in report["signatures"].items())
    method = f"Paired {report['method']}, {report['trials']} trials, against {report['baseline']}."
    return f"{table}\n\n{method}\n{signatures}"

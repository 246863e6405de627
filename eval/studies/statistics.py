"""Means over seeds, and tests of differences between methods.

The test over seeds is the paired t-test on one difference per seed: methods of the same seed read the same batches, so
what the order of the data does to both cancels, and seeds are independent draws. It generalises to other seeds, which a
test on one translation each cannot. A permutation of signs would assume less, but with three seeds it cannot fall
below p = 0.25. The t-test assumes that the differences are normally distributed, which three numbers cannot show.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy import stats


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation (n - 1) of one number per seed; the deviation of a single one is None."""
    return {
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "n": len(values),
    }


def paired_test(groups: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Test whether the mean of differences is other than 0; a group of differences for each pair, one number a seed.

    With several groups this takes the mean over groups of each group's mean, and pools the deviation within groups, so
    that the size of the effect may differ between pairs.

    Returns:
        ``mean``, ``low`` and ``high`` of its 95 % interval, ``p`` (two-sided), ``df``; all but the mean None where no
        group has two numbers.
    """
    groups = [list(group) for group in groups if group]
    means = [statistics.fmean(group) for group in groups]
    mean = statistics.fmean(means)
    df = sum(len(group) - 1 for group in groups)
    if df < 1:
        return {"mean": mean, "low": None, "high": None, "p": None, "df": df}
    squares = sum((x - centre) ** 2 for group, centre in zip(groups, means, strict=True) for x in group)
    error = math.sqrt(squares / df * sum(1 / len(group) for group in groups)) / len(groups)
    half = float(stats.t.ppf(0.975, df)) * error
    if error > 0:
        p = float(2 * stats.t.sf(abs(mean) / error, df))
    else:
        p = 1.0 if mean == 0 else 0.0
    return {"mean": mean, "low": mean - half, "high": mean + half, "p": p, "df": df}


def holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Holm's correction for many comparisons; None stays None."""
    known = sorted((p, name) for name, p in p_values.items() if p is not None)
    corrected: dict[str, float | None] = dict.fromkeys(p_values)
    worst = 0.0
    for rank, (p, name) in enumerate(known):
        worst = max(worst, min(1.0, p * (len(known) - rank)))
        corrected[name] = worst
    return corrected

"""Collect the content of study.json from the cells of a study.

It does not depend on time or place, so that an interrupted study gives the same file as an uninterrupted one. Speeds
are in another file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval.studies.kinds import COSTS, TRANSLATION
from eval.studies.plan import Cell, Study
from eval.studies.statistics import holm, paired_test, spread
from eval.text import files
from eval.text.significance import compare_systems

RISE = 0.01  # relative rise of the perplexity; the cheapest threshold within it is reported


def collect(study: Study, out: Path) -> dict[str, Any]:
    """Collect study.json from the finished cells; the others are listed as missing."""
    reports: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    missing = []
    for cell in study.cells():
        path = out / "cells" / cell.name / "scores.json"
        if not path.is_file():
            missing.append(cell.name)
            continue
        try:
            figures = study.kind.figures(files.read_json(path))
        except KeyError as error:
            raise ValueError(
                f"{path}: scores.json has no {error}; it is of another version, run the cell again"
            ) from None
        reports.setdefault(cell.pair.name, {}).setdefault(cell.method.name, {})[cell.seed] = figures
    if not reports:
        raise ValueError(f"no cell of the study is finished in {out}, so there is nothing to tell")
    within = within_seeds(study, out, reports) if study.kind is TRANSLATION else {}
    return summarise(study, reports, missing) | {"within_seeds": within}


def summarise(study: Study, reports: dict[str, Any], missing: list[str]) -> dict[str, Any]:
    """Study.json without the tests on translations. ``reports``: pair -> method -> seed -> figures."""
    pairs = {}
    for pair in study.pairs:
        methods = {
            method.name: {
                "title": method.title,
                "paper": method.paper,
                "seeds": {str(seed): figures for seed, figures in found.items()},
                "over_seeds": _over_seeds(study, list(found.values())),
            }
            for method in study.methods
            if (found := reports.get(pair.name, {}).get(method.name))
        }
        pairs[pair.name] = {"test_set": pair.test_set, "methods": methods}
    return {
        **({} if study.kind is TRANSLATION else {"kind": study.kind.name}),
        "title": study.title,
        "baseline": study.baseline,
        "missing": missing,
        "pairs": pairs,
        "over_seeds": over_seeds(study, reports),
        "order": order(study, reports),
    }


def _over_seeds(study: Study, cells: list[dict[str, Any]]) -> dict[str, Any]:
    columns = study.kind.columns
    found: dict[str, Any] = {name: spread([cell[name] for cell in cells]) for name in (*columns, *COSTS)}
    goals = {goal for cell in cells for goal in cell["prices"] if all(goal in other["prices"] for other in cells)}
    found["prices"] = {
        goal: {
            name: spread([cell["prices"][goal][name] for cell in cells]) for name in (*columns, "moe_flops", "mflops")
        }
        for goal in sorted(goals)
    }
    if any(cell.get("sweep") for cell in cells):
        found["sweep"] = _swept([cell["sweep"] for cell in cells])
    return found


def _swept(sweeps: list[list[dict[str, float]]]) -> dict[str, Any]:
    """Means over seeds at each threshold, and the cheapest threshold that costs little.

    Returns: ``points``; ``cheapest``, the point of the lowest FLOPs whose validation perplexity is at most RISE above
        that at ``reference``, the highest threshold.
    """
    points = [
        {"threshold": group[0]["threshold"]}
        | {name: spread([point[name] for point in group]) for name in group[0] if name != "threshold"}
        for group in zip(*sweeps, strict=True)
    ]
    reference = max(points, key=lambda point: point["threshold"])
    most = reference["dev_perplexity"]["mean"] * (1 + RISE)
    allowed = [point for point in points if point["dev_perplexity"]["mean"] <= most]
    cheapest = min(allowed, key=lambda point: point["moe_flops"]["mean"])
    return {"points": points, "reference": reference["threshold"], "cheapest": cheapest["threshold"]}


def differences(reports: dict[str, Any], pair: str, one: str, other: str, measure: str) -> list[float]:
    """The difference ``one`` minus ``other`` for every seed that both have on a pair."""
    left, right = (reports.get(pair, {}).get(name, {}) for name in (one, other))
    return [left[seed][measure] - right[seed][measure] for seed in left if seed in right]


def over_seeds(study: Study, reports: dict[str, Any]) -> dict[str, Any]:
    """Test each method against the baseline: measure -> pair (or ``all pairs``) -> method -> test, Holm beside p."""
    names = [pair.name for pair in study.pairs]
    scopes = {name: [name] for name in names} | ({"all pairs": names} if len(names) > 1 else {})
    result: dict[str, Any] = {}
    for measure in study.kind.measures:
        for scope, members in scopes.items():
            tests = {}
            for method in study.methods:
                groups = [differences(reports, pair, method.name, study.baseline, measure) for pair in members]
                if method.name != study.baseline and all(groups):
                    tests[method.name] = paired_test(groups)
            corrected = holm({name: test["p"] for name, test in tests.items()})
            rows = {name: {**test, "p_holm": corrected[name]} for name, test in tests.items()}
            result.setdefault(measure, {})[scope] = rows
    return result


def order(study: Study, reports: dict[str, Any]) -> dict[str, Any]:
    """Rank the methods: measure -> pair -> methods from best to worst, each with the test against the next one."""
    result: dict[str, Any] = {}
    for measure, (_, more_is_better) in study.kind.measures.items():
        for pair, methods in reports.items():
            means = {
                name: spread([figures[measure] for figures in seeds.values()])["mean"]
                for name, seeds in methods.items()
            }
            ranked = sorted(means, key=lambda name: means[name], reverse=more_is_better)
            rows = []
            for place, name in enumerate(ranked):
                after = ranked[place + 1] if place + 1 < len(ranked) else None
                shared = differences(reports, pair, name, after, measure) if after else []
                rows.append({"method": name, "mean": means[name], "next": paired_test([shared]) if shared else None})
            result.setdefault(measure, {})[pair] = rows
    return result


def within_seeds(study: Study, out: Path, reports: dict[str, Any]) -> dict[str, Any]:
    """sacreBLEU's paired bootstrap of every method against the baseline: pair -> seed -> method -> metric -> p."""
    result: dict[str, Any] = {}
    cells = {cell.name: cell for cell in study.cells()}
    for pair in study.pairs:
        found = reports.get(pair.name, {})
        for seed in found.get(study.baseline, {}):
            names = [study.baseline, *(name for name in found if name != study.baseline and seed in found[name])]
            if len(names) < 2:
                continue
            systems = [(name, _hypotheses(out, cells[f"{pair.name}/{name}/seed-{seed}"])) for name in names]
            references = [files.read_lines(f"{pair.test}.{pair.target}")]
            tested = compare_systems(systems, references, method="bootstrap", target_language=pair.target)
            result.setdefault(pair.name, {})[str(seed)] = {
                system["name"]: {metric: score["p_value"] for metric, score in system["scores"].items()}
                for system in tested["systems"][1:]
            }
    return result


def _hypotheses(out: Path, cell: Cell) -> list[str]:
    return files.read_lines(out / "cells" / cell.name / "translations" / f"test.{cell.pair.target}")


def speeds(study: Study, out: Path) -> dict[str, Any]:
    """Words a second of every finished cell, which depend on time and place."""
    found: dict[str, Any] = {}
    for cell in study.cells():
        path = out / "cells" / cell.name / "scores.json"
        if path.is_file():
            found[cell.name] = study.kind.speeds(files.read_json(path))
    return found

"""What the cells of a study add up to: the content of study.json.

Nothing in it depends on time or place: a study that was interrupted gives the same file as one that was not. Speeds
stand in a file of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval import compare
from eval.studies.plan import Cell, Study
from eval.studies.statistics import holm, paired_test, spread
from eval.text import files

# name -> (what it is, whether more is better)
MEASURES = {
    "dev_loss": ("validation loss, bits", False),
    "bleu": ("BLEU", True),
    "chrf++": ("chrF2++", True),
}
COSTS = {
    "moe_flops_inference": "MoE FLOPs / dense, inference",
    "moe_flops_training": "MoE FLOPs / dense, training",
    "mflops_inference": "MFLOPs a token, inference",
    "mflops_training": "MFLOPs a token, training",
}


def cell_figures(report: dict[str, Any]) -> dict[str, Any]:
    """One cell, from its scores.json.

    Raises: ValueError for a report that lacks something: written by another version of run_pair.sh.
    """
    try:
        routing, per_token = report["routing"], report["flops_per_token"]
        relative = {
            "inference": routing["valid"]["overall"].get("flops", 1.0),
            "training": routing["train"]["overall"].get("flops", 1.0),
        }
        forward = {name: per_token["shared"] + per_token["moe_as_dense"] * share for name, share in relative.items()}
        figures = {
            "dev_loss": report["training"]["best_valid_nll_loss"],
            **{metric: report["scores"][metric]["score"] for metric in ("bleu", "chrf++")},
            **{f"moe_flops_{name}": share for name, share in relative.items()},
            "mflops_inference": forward["inference"] / 1e6,
            "mflops_training": 3 * forward["training"] / 1e6,  # the backward pass costs two forward passes
        }
        prices = {goal: _price(part, per_token) for goal, part in report["calibrated"].items()}
        return {
            **figures,
            "experts_inference": routing["valid"]["overall"].get("used"),
            "parameters": report["num_parameters"],
            "updates": report["training"]["updates"],
            "prices": prices,
            "signatures": {metric: report["scores"][metric]["signature"] for metric in ("bleu", "chrf++")},
            "translations_sha256": report["hypotheses"]["sha256"],
            "commit": report["commit"],
            "versions": report["versions"],
        }
    except KeyError as error:
        raise ValueError(f"scores.json has no {error}; it is of another version, run the cell again") from None


def _price(part: dict[str, Any], per_token: dict[str, float]) -> dict[str, Any]:
    after = part["after"]
    return {
        "moe_threshold": after["moe_threshold"],
        "moe_max_experts": after["moe_max_experts"],
        "dev_loss_before": part["before"]["loss_bits"],
        "dev_loss": after["loss_bits"],
        "moe_flops": after["flops"],
        "mflops": (per_token["shared"] + per_token["moe_as_dense"] * after["flops"]) / 1e6,
        "experts": after["experts"],
        **{metric: part["scores"][metric]["score"] for metric in ("bleu", "chrf++")},
    }


def collect(study: Study, out: Path) -> dict[str, Any]:
    """The content of study.json from the cells that are finished; the others are listed as missing."""
    reports: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    missing = []
    for cell in study.cells():
        path = out / "cells" / cell.name / "scores.json"
        if not path.is_file():
            missing.append(cell.name)
            continue
        try:
            figures = cell_figures(files.read_json(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        reports.setdefault(cell.pair.name, {}).setdefault(cell.method.name, {})[cell.seed] = figures
    if not reports:
        raise ValueError(f"no cell of the study is finished in {out}, so there is nothing to tell")
    return summarise(study, reports, missing) | {"within_seeds": within_seeds(study, out, reports)}


def summarise(study: Study, reports: dict[str, Any], missing: list[str]) -> dict[str, Any]:
    """Everything of study.json but the tests on translations. ``reports``: pair -> method -> seed -> figures."""
    pairs = {}
    for pair in study.pairs:
        methods = {
            method.name: {
                "title": method.title,
                "paper": method.paper,
                "seeds": {str(seed): figures for seed, figures in found.items()},
                "over_seeds": _over_seeds(list(found.values())),
            }
            for method in study.methods
            if (found := reports.get(pair.name, {}).get(method.name))
        }
        pairs[pair.name] = {"test_set": pair.test_set, "methods": methods}
    return {
        "title": study.title,
        "baseline": study.baseline,
        "missing": missing,
        "pairs": pairs,
        "over_seeds": over_seeds(study, reports),
        "order": order(study, reports),
    }


def _over_seeds(cells: list[dict[str, Any]]) -> dict[str, Any]:
    found = {name: spread([cell[name] for cell in cells]) for name in (*MEASURES, *COSTS)}
    goals = {goal for cell in cells for goal in cell["prices"] if all(goal in other["prices"] for other in cells)}
    found["prices"] = {
        goal: {
            name: spread([cell["prices"][goal][name] for cell in cells])
            for name in ("dev_loss", "bleu", "chrf++", "moe_flops", "mflops")
        }
        for goal in sorted(goals)
    }
    return found


def differences(reports: dict[str, Any], pair: str, one: str, other: str, measure: str) -> list[float]:
    """``one`` minus ``other`` for every seed that both have on a pair."""
    left, right = (reports.get(pair, {}).get(name, {}) for name in (one, other))
    return [left[seed][measure] - right[seed][measure] for seed in left if seed in right]


def over_seeds(study: Study, reports: dict[str, Any]) -> dict[str, Any]:
    """Every method against the baseline: measure -> pair (or ``all pairs``) -> method -> test, Holm beside p."""
    names = [pair.name for pair in study.pairs]
    scopes = {name: [name] for name in names} | ({"all pairs": names} if len(names) > 1 else {})
    result: dict[str, Any] = {}
    for measure in MEASURES:
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
    """Measure -> pair -> methods from best to worst, each with the test against the next one."""
    result: dict[str, Any] = {}
    for measure, (_, more_is_better) in MEASURES.items():
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
            tested = compare.compare_systems(systems, references, method="bootstrap", target_language=pair.target)
            result.setdefault(pair.name, {})[str(seed)] = {
                system["name"]: {metric: score["p_value"] for metric, score in system["scores"].items()}
                for system in tested["systems"][1:]
            }
    return result


def _hypotheses(out: Path, cell: Cell) -> list[str]:
    return files.read_lines(out / "cells" / cell.name / "translations" / f"test.{cell.pair.target}")


def speeds(study: Study, out: Path) -> dict[str, Any]:
    """Words a second of every finished cell; these do depend on time and place."""
    found: dict[str, Any] = {}
    for cell in study.cells():
        path = out / "cells" / cell.name / "scores.json"
        if path.is_file():
            report = files.read_json(path)
            found[cell.name] = {
                "training_words_per_second": report["training"]["words_per_second"],
                "training_seconds": report["training"]["seconds"],
                "translated_tokens_per_second": report["generation"]["tokens_per_second"],
            }
    return found

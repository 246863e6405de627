"""study.md: the tables of a study."""

from __future__ import annotations

from typing import Any

from tabulate import tabulate

from eval.studies.collect import COSTS, MEASURES
from eval.table import load_paper

_SHOWN_COSTS = ("moe_flops_inference", "moe_flops_training", "mflops_inference")


def _table(headers: list[str], rows: list[list[str]]) -> str:
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _spread(found: dict[str, Any], digits: int) -> str:
    mean = f"{found['mean']:.{digits}f}"
    return mean if found["sd"] is None else f"{mean} ± {found['sd']:.{digits}f}"


def _digits(name: str) -> int:
    return 3 if name in ("dev_loss", "moe_flops_inference", "moe_flops_training") else 2


def _p(value: float | None) -> str:
    return "–" if value is None else ("< 0.0001" if value < 0.0001 else f"{value:.4f}")


def pair_table(study: dict[str, Any], pair: str, speeds: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows: a method as trained, then at each price; the paper's cell beside it."""
    paper = load_paper()
    place = paper["pairs"].index(pair) if pair in paper["pairs"] else None
    rows = []
    for name, method in study["pairs"][pair]["methods"].items():
        found = method["over_seeds"]
        seen = [speeds[cell]["training_words_per_second"] for cell in speeds if cell.startswith(f"{pair}/{name}/")]
        words = [speed for speed in seen if speed is not None]
        row = [method["title"], str(found["dev_loss"]["n"])]
        row += [_spread(found[key], _digits(key)) for key in (*MEASURES, *_SHOWN_COSTS)]
        row.append(f"{sum(words) / len(words):,.0f}" if words else "–")
        row.append(_paper_cell(paper, method["paper"], place))
        rows.append(row)
        for goal, price in found["prices"].items():
            shown = [_spread(price[key], _digits(key)) for key in MEASURES]
            costs = [_spread(price["moe_flops"], 3), "", _spread(price["mflops"], 2)]
            rows.append([f"{method['title']}, {goal}", str(price["bleu"]["n"]), *shown, *costs, "", ""])
    titles = [what for what, _ in MEASURES.values()]
    headers = ["method", "seeds", *titles, *(COSTS[key] for key in _SHOWN_COSTS), "training words/s", "paper"]
    return headers, rows


def _paper_cell(paper: dict[str, Any], row: str | None, place: int | None) -> str:
    found = next((method for method in paper["methods"] if method["id"] == row), None)
    return "–" if found is None or place is None else f"{found['bleu'][place]}/{found['chrf++'][place]}"


def tests_table(study: dict[str, Any], measure: str) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the tests over seeds for one measure."""
    rows = []
    titles = {name: method["title"] for pair in study["pairs"].values() for name, method in pair["methods"].items()}
    for scope, tests in study["over_seeds"][measure].items():
        for name, test in tests.items():
            interval = "–" if test["low"] is None else f"{test['low']:+.3f} to {test['high']:+.3f}"
            row = [scope, titles[name], f"{test['mean']:+.3f}", interval, str(test["df"])]
            rows.append([*row, _p(test["p"]), _p(test["p_holm"])])
    return ["pair", "method", "difference", "95 % interval", "degrees of freedom", "p", "p (Holm)"], rows


def within_table(study: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of sacreBLEU's paired bootstrap within each seed."""
    rows = [
        [pair, seed, name, *(_p(value) for value in metrics.values())]
        for pair, seeds in study["within_seeds"].items()
        for seed, methods in seeds.items()
        for name, metrics in methods.items()
    ]
    return ["pair", "seed", "method", "p, BLEU", "p, chrF2++"], rows


def order_lines(study: dict[str, Any], measure: str) -> list[str]:
    """One line a pair: the methods from best to worst, with p of each step."""
    lines = []
    for pair, rows in study["order"][measure].items():
        steps = [
            f"{row['method']} ({row['mean']:.{_digits(measure)}f})"
            + (f" —[p {_p(row['next']['p'])}]→" if row["next"] is not None else "")
            for row in rows
        ]
        lines.append(f"{pair}: {' '.join(steps)}")
    return lines


TEST_OVER_SEEDS = (
    "Paired t-test on one difference per seed. Methods of one seed read the same batches, and seeds are independent "
    "draws, so the test speaks about other seeds too; over all pairs the deviation within pairs is pooled. It assumes "
    "normally distributed differences. Holm corrects for the number of methods."
)
TEST_WITHIN = (
    "sacreBLEU's paired bootstrap (1000 resamples) of the translations of one seed; it says nothing about other seeds."
)


def markdown(study: dict[str, Any], speeds: dict[str, Any]) -> str:
    """The whole of study.md."""
    parts = [f"# {study['title']}"]
    if study["missing"]:
        parts.append(f"Not finished, so left out: {', '.join(study['missing'])}.")
    for pair, content in study["pairs"].items():
        if content["methods"]:
            parts.append(f"## {pair}\n\nTest set: {content['test_set']}. Mean ± standard deviation over seeds.")
            parts.append(_table(*pair_table(study, pair, speeds)))
    parts.append(f"## Differences over seeds\n\nAgainst {study['baseline']}. {TEST_OVER_SEEDS}")
    for measure, (title, more_is_better) in MEASURES.items():
        headers, rows = tests_table(study, measure)
        if rows:
            parts.append(f"{title} ({'more' if more_is_better else 'less'} is better)\n\n{_table(headers, rows)}")
    headers, rows = within_table(study)
    if rows:
        parts.append(
            f"## Differences within seeds\n\nAgainst {study['baseline']}. {TEST_WITHIN}\n\n{_table(headers, rows)}"
        )
    parts.append("## Order of methods\n\nFrom best to worst; p of the paired t-test between neighbours.")
    for measure, (title, _) in MEASURES.items():
        parts.append(f"{title}\n\n" + "\n".join(f"- {line}" for line in order_lines(study, measure)))
    parts.append(_signatures(study))
    return "\n\n".join(parts) + "\n"


def signatures(study: dict[str, Any]) -> list[str]:
    """Every sacreBLEU signature of the study."""
    found = [
        f"{metric}: {signature}"
        for pair in study["pairs"].values()
        for method in pair["methods"].values()
        for cell in method["seeds"].values()
        for metric, signature in cell["signatures"].items()
    ]
    return list(dict.fromkeys(found))


def _signatures(study: dict[str, Any]) -> str:
    return "## Signatures\n\n" + "\n".join(f"- `{line}`" for line in signatures(study))

"""Write study.md, the tables of a study."""

from __future__ import annotations

from typing import Any

from tabulate import tabulate

from eval.studies.collect import RISE
from eval.studies.kinds import COSTS, LANGUAGE_MODEL, kind_of
from eval.table import load_paper

_SHOWN_COSTS = ("moe_flops_inference", "moe_flops_training", "mflops_inference")


def as_table(headers: list[str], rows: list[list[str]]) -> str:
    """A table of these cells in GitHub's Markdown."""
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _spread(found: dict[str, Any], digits: int) -> str:
    mean = f"{found['mean']:.{digits}f}"
    return mean if found["sd"] is None else f"{mean} ± {found['sd']:.{digits}f}"


def _digits(name: str) -> int:
    return 3 if name in ("dev_loss", "bits_per_byte", "moe_flops_inference", "moe_flops_training") else 2


def _p(value: float | None) -> str:
    return "–" if value is None else ("< 0.0001" if value < 0.0001 else f"{value:.4f}")


def pair_table(study: dict[str, Any], pair: str, speeds: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of each method as trained and at each price, with the paper's cell beside it.

    Columns without any content are left out: words/s if ``speeds`` is empty, the paper's cells of another pair.
    """
    kind = kind_of(study)
    rows = []
    for name, method in study["pairs"][pair]["methods"].items():
        found = method["over_seeds"]
        seen = [speeds[cell]["training_words_per_second"] for cell in speeds if cell.startswith(f"{pair}/{name}/")]
        words = [speed for speed in seen if speed is not None]
        row = [method["title"], str(found["dev_loss"]["n"])]
        row += [_spread(found[key], _digits(key)) for key in (*kind.columns, *_SHOWN_COSTS)]
        row.append(f"{sum(words) / len(words):,.0f}" if words else "–")
        row.append(
            _paper_perplexity(method["paper"]) if kind is LANGUAGE_MODEL else _paper_scores(method["paper"], pair)
        )
        rows.append(row)
        for goal, price in found["prices"].items():
            shown = [_spread(price[key], _digits(key)) for key in kind.columns]
            costs = [_spread(price["moe_flops"], 3), "", _spread(price["mflops"], 2)]
            rows.append([f"{method['title']}, {goal}", str(price["dev_loss"]["n"]), *shown, *costs, "", ""])
    headers = [
        "method",
        "seeds",
        *kind.columns.values(),
        *(COSTS[key] for key in _SHOWN_COSTS),
        "training words/s",
        "paper",
    ]
    filled = [place for place in range(len(headers)) if any(row[place] not in ("", "–") for row in rows)]
    return [headers[place] for place in filled], [[row[place] for place in filled] for row in rows]


def _paper_scores(row: str | None, pair: str) -> str:
    """BLEU and chrF2++ of Table 3."""
    paper = load_paper()
    found = next((method for method in paper["methods"] if method["id"] == row), None)
    place = paper["pairs"].index(pair) if pair in paper["pairs"] else None
    return "–" if found is None or place is None else f"{found['bleu'][place]}/{found['chrf++'][place]}"


def _paper_perplexity(row: str | None) -> str:
    """Perplexities of OpenWebText and WikiText-103 in Table 1."""
    found = next((method for method in load_paper("table1")["methods"] if method["id"] == row), None)
    return "–" if found is None else f"{found['openwebtext']}/{found['wikitext103']}"


def sweep_table(study: dict[str, Any], pair: str) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the thresholds that language models were evaluated at."""
    shown = {"moe_flops": 3, "experts": 2, "dev_loss": 3, "dev_perplexity": 3, "perplexity": 3}
    rows = [
        [method["title"], f"{point['threshold']:g}", *(_spread(point[name], digits) for name, digits in shown.items())]
        for method in study["pairs"][pair]["methods"].values()
        for point in method["over_seeds"].get("sweep", {}).get("points", ())
    ]
    titles = [
        "MoE FLOPs / dense",
        "experts a token",
        "validation loss, bits",
        "validation perplexity",
        "test perplexity",
    ]
    return ["method", "threshold", *titles], rows


def sweep_lines(study: dict[str, Any], pair: str) -> list[str]:
    """One line for each method on how far the FLOPs fall before the perplexity rises."""
    lines = []
    for method in study["pairs"][pair]["methods"].values():
        if not (sweep := method["over_seeds"].get("sweep")):
            continue
        points = {point["threshold"]: point for point in sweep["points"]}
        least, most = points[sweep["cheapest"]], points[sweep["reference"]]
        rise = least["perplexity"]["mean"] / most["perplexity"]["mean"] - 1
        lines.append(
            f"{method['title']}: the validation perplexity stays within {RISE:.0%} of that at t = "
            f"{sweep['reference']:g} down to t = {sweep['cheapest']:g}, where MoE FLOPs / dense are "
            f"{least['moe_flops']['mean']:.3f} instead of {most['moe_flops']['mean']:.3f} and the test perplexity "
            f"differs by {rise:+.2%}"
        )
    return lines


def tests_table(study: dict[str, Any], measure: str) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the tests over seeds for one measure; without a second seed, the differences alone."""
    rows = []
    tested = has_tests(study)
    titles = {name: method["title"] for pair in study["pairs"].values() for name, method in pair["methods"].items()}
    for scope, tests in study["over_seeds"][measure].items():
        for name, test in tests.items():
            interval = "–" if test["low"] is None else f"{test['low']:+.3f} to {test['high']:+.3f}"
            row = [scope, titles[name], f"{test['mean']:+.3f}"]
            rows.append([*row, interval, str(test["df"]), _p(test["p"]), _p(test["p_holm"])] if tested else row)
    headers = ["pair", "method", "difference"]
    return [*headers, *(["95 % interval", "degrees of freedom", "p", "p (Holm)"] if tested else [])], rows


def has_tests(study: dict[str, Any]) -> bool:
    """True if any method has two seeds in common with the baseline."""
    scopes = [scope for measure in study["over_seeds"].values() for scope in measure.values()]
    return any(test["p"] is not None for scope in scopes for test in scope.values())


def tests_note(study: dict[str, Any]) -> str:
    """The text above the tests over seeds."""
    told = TEST_OVER_SEEDS if has_tests(study) else NO_TEST
    return f"Against {study['baseline']}. {told}"


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
    """One line for each pair: the methods from best to worst, with p of each step."""
    lines = []
    for pair, rows in study["order"][measure].items():
        steps = [
            f"{row['method']} ({row['mean']:.{_digits(measure)}f})"
            + (_step(row["next"]) if row["next"] is not None else "")
            for row in rows
        ]
        lines.append(f"{pair}: {' '.join(steps)}")
    return lines


def _step(test: dict[str, Any]) -> str:
    return " →" if test["p"] is None else f" —[p {_p(test['p'])}]→"


def order_note(study: dict[str, Any]) -> str:
    """The text above the order of methods."""
    steps = "p of the paired t-test between neighbours." if has_tests(study) else "One seed: no step is tested."
    return f"From best to worst. {steps}"


NO_TEST = (
    "There is one seed of each method, so no test over seeds: these differences say nothing about how another seed "
    "would come out."
)
TEST_OVER_SEEDS = (
    "Paired t-test on one difference per seed. Methods of one seed read the same batches, and seeds are independent "
    "draws, so the test speaks about other seeds too; over all pairs the deviation within pairs is pooled. It assumes "
    "normally distributed differences. Holm corrects for the number of methods."
)
TEST_WITHIN = (
    "sacreBLEU's paired bootstrap (1000 resamples) of the translations of one seed; it says nothing about other seeds."
)


SWEEP = (
    "The same checkpoint at each threshold. FLOPs and experts a token are those of the validation set, counted; the "
    "cheapest threshold is chosen there too."
)


def pair_note(study: dict[str, Any], pair: str) -> str:
    """The text above the table of a pair."""
    note = f"Test set: {study['pairs'][pair]['test_set']}. Mean ± standard deviation over seeds."
    if kind_of(study) is LANGUAGE_MODEL:
        note += (
            " Perplexities of different subwords cannot be compared, those a word (the end of a line is one more) and "
            "the bits a byte can. Paper: Table 1, OpenWebText/WikiText-103."
        )
    return note


def markdown(study: dict[str, Any], speeds: dict[str, Any]) -> str:
    """The text of study.md."""
    parts = [f"# {study['title']}"]
    if study["missing"]:
        parts.append(f"Not finished, so left out: {', '.join(study['missing'])}.")
    for pair, content in study["pairs"].items():
        if content["methods"]:
            parts.append(f"## {pair}\n\n{pair_note(study, pair)}")
            parts.append(as_table(*pair_table(study, pair, speeds)))
            headers, rows = sweep_table(study, pair)
            if rows:
                lines = "\n".join(f"- {line}" for line in sweep_lines(study, pair))
                parts.append(f"### {pair}: thresholds\n\n{SWEEP}\n\n{lines}\n\n{as_table(headers, rows)}")
    parts.append(f"## Differences over seeds\n\n{tests_note(study)}")
    for measure, (title, more_is_better) in kind_of(study).measures.items():
        headers, rows = tests_table(study, measure)
        if rows:
            parts.append(f"{title} ({'more' if more_is_better else 'less'} is better)\n\n{as_table(headers, rows)}")
    headers, rows = within_table(study)
    if rows:
        parts.append(
            f"## Differences within seeds\n\nAgainst {study['baseline']}. {TEST_WITHIN}\n\n{as_table(headers, rows)}"
        )
    parts.append(f"## Order of methods\n\n{order_note(study)}")
    for measure, (title, _) in kind_of(study).measures.items():
        parts.append(f"{title}\n\n" + "\n".join(f"- {line}" for line in order_lines(study, measure)))
    if signatures(study):
        parts.append("## Signatures\n\n" + "\n".join(f"- `{line}`" for line in signatures(study)))
    return "\n\n".join(parts) + "\n"


def signatures(study: dict[str, Any]) -> list[str]:
    """Every sacreBLEU signature of the study."""
    found = [
        f"{metric}: {signature}"
        for pair in study["pairs"].values()
        for method in pair["methods"].values()
        for cell in method["seeds"].values()
        for metric, signature in cell.get("signatures", {}).items()
    ]
    return list(dict.fromkeys(found))

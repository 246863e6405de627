"""Lay our scores beside the paper's Table 3, as Markdown or LaTeX.

xmoe table --paper table3 --cell METHOD PAIR SCORES.json [SCORES.json ...] [--cell ...]

METHOD is a row of the paper (dense, switch_32x2048, top_k_64x1024, top_k_128x512, xmoe_64x1024,
xmoe_128x512) or any other name, which gets a row of its own. SCORES.json comes from xmoe run or xmoe score --out;
several files are runs with different seeds and become mean ± standard deviation. A number in brackets is the FLOPs of
the MoE layers at inference, relative to the dense FFN. Scores made with other settings than the paper's stop the table,
and so do files that say that they are of another pair, method or seed than given; a cell with another test set or
number of training pairs than the paper's Table 4 is marked.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from eval.text import files
from xmoe_fairseq.command_line import CommandParser, command_parser, reports_errors

_METRICS = ("bleu", "chrf++")
_MISSING = "–"
_OTHER_DATA = "*"
_MILLION = 1_000_000


@dataclass(frozen=True)
class Cell:
    """Our runs of one method on one pair.

    Attributes:
        bleu, chrf: one unrounded score per run, in the order of the files.
        test_set: the name the scorer was given, or None.
        versions: sacreBLEU versions that made the scores.
        train_pairs: numbers of training pairs, from the files that tell them.
        flops: FLOPs of the MoE layers at inference relative to the dense FFN, one for each run that tells them.
        is_checked: True if every file tells pair, method and seed.
        overrides: settings of the model that the translation changed.
    """

    bleu: tuple[float, ...]
    chrf: tuple[float, ...]
    test_set: str | None
    versions: frozenset[str]
    train_pairs: frozenset[int] = frozenset()
    flops: tuple[float, ...] = ()
    is_checked: bool = False
    overrides: frozenset[str] = frozenset()


def load_paper(name: str = "table3") -> dict[str, Any]:
    """The paper's numbers as published (eval/paper_table3.json)."""
    return files.read_json(Path(__file__).with_name(f"paper_{name}.json"))


def load_cell(paper: dict[str, Any], method: str, pair: str, paths: Sequence[str]) -> Cell:
    """Read score files of one cell.

    Raises: ValueError for an unknown pair, a file without BLEU or chrF2++, a signature other than the paper's
        (version apart), a file of another pair or method, or files that disagree on their test set or share a seed.
    """
    if pair not in paper["pairs"]:
        raise ValueError(f"--cell pair {pair!r}: the table has {', '.join(paper['pairs'])}")
    reports = [files.read_json(path) for path in paths]
    for path, report in zip(paths, reports, strict=True):
        _check_report(paper, path, report)
        _check_identity(paper, method, pair, path, report)
    _check_seeds(method, pair, paths, reports)
    test_sets = {report.get("test_set") for report in reports}
    if len(test_sets) > 1:
        raise ValueError(f"{', '.join(paths)}: scored on different test sets: {sorted(map(str, test_sets))}")
    return Cell(
        bleu=tuple(report["scores"]["bleu"]["score"] for report in reports),
        chrf=tuple(report["scores"]["chrf++"]["score"] for report in reports),
        test_set=test_sets.pop(),
        versions=frozenset(_version(report["scores"]["bleu"]["signature"]) for report in reports),
        train_pairs=frozenset(report["data"]["train_pairs"] for report in reports if report.get("data")),
        flops=tuple(report["inference"]["relative_flops"] for report in reports if report.get("inference")),
        overrides=frozenset((report.get("inference") or {}).get("model_overrides") or "{}" for report in reports)
        - {"{}"},
        is_checked=all({"pair", "config_file", "seed"} <= report.keys() for report in reports),
    )


def _check_identity(paper: dict[str, Any], method: str, pair: str, path: str, report: dict[str, Any]) -> None:
    """Refuse a file of another pair or, for a row of the paper, of another configuration."""
    if report.get("pair", pair) != pair:
        raise ValueError(f"{path}: is of {report['pair']}, not of {pair}")
    configuration = Path(report.get("config_file") or method).stem
    if method in {known["id"] for known in paper["methods"]} and configuration != method:
        raise ValueError(f"{path}: was trained with {report['config_file']}, not with {method}")


def _check_seeds(method: str, pair: str, paths: Sequence[str], reports: Sequence[dict[str, Any]]) -> None:
    """Refuse two files with the same seed, since several files are several runs."""
    seeds: dict[Any, str] = {}
    for path, report in zip(paths, reports, strict=True):
        if (seed := report.get("seed")) is not None and seeds.setdefault(seed, path) != path:
            raise ValueError(
                f"{path}: has seed {seed} as {seeds[seed]} has; {method} {pair} wants runs of different seeds"
            )


def _check_report(paper: dict[str, Any], path: str, report: dict[str, Any]) -> None:
    for metric in _METRICS:
        score = report.get("scores", {}).get(metric, {})
        if not isinstance(score.get("score"), float) or "signature" not in score:
            raise ValueError(f"{path}: has no {metric} score with its signature; make it with xmoe score --out")
        settings, expected = score["signature"].rpartition("|version:")[0], paper["signatures"][metric]
        if settings != expected:
            raise ValueError(f"{path}: {metric} was made with {settings}, the paper's is {expected}; score it again")


def _version(signature: str) -> str:
    return signature.rpartition("|version:")[2]


def _format_runs(runs: Sequence[float]) -> str:
    mean = f"{statistics.mean(runs):.1f}"
    return mean if len(runs) == 1 else f"{mean}±{statistics.stdev(runs):.1f}"


def differences(paper: dict[str, Any], pair: str, cell: Cell) -> list[str]:
    """How the cell's test set and training pairs differ from the paper's Table 4, which gives whole millions."""
    found = []
    if cell.test_set is None or cell.test_set.lower() not in paper["test_sets"][pair]:
        found.append(cell.test_set or "test set not stated")
    expected = paper["bitext"][pair]
    found += [
        f"{pairs:,} training pairs"
        for pairs in sorted(cell.train_pairs)
        if round(pairs / _MILLION) != round(expected / _MILLION)
    ]
    return found


def _format_cell(paper: dict[str, Any], pair: str, cell: Cell | None) -> str:
    if cell is None:
        return _MISSING
    mark = _OTHER_DATA if differences(paper, pair, cell) else ""
    cost = f" ({statistics.mean(cell.flops):.2f})" if cell.flops else ""
    return f"{_format_runs(cell.bleu)}/{_format_runs(cell.chrf)}{mark}{cost}"


def _our_row(paper: dict[str, Any], name: str, cells: dict[str, Cell]) -> list[str]:
    row = [name, "ours", *(_format_cell(paper, pair, cells.get(pair)) for pair in paper["pairs"])]
    if len(cells) < len(paper["pairs"]):
        return [*row, _MISSING]  # the paper's average is over all pairs
    averages = [
        statistics.mean(statistics.mean(getattr(cell, metric)) for cell in cells.values())
        for metric in ("bleu", "chrf")
    ]
    differs = any(differences(paper, pair, cell) for pair, cell in cells.items())
    return [*row, f"{averages[0]:.1f}/{averages[1]:.1f}" + (_OTHER_DATA if differs else "")]


def build_rows(paper: dict[str, Any], cells: dict[str, dict[str, Cell]]) -> list[list[str]]:
    """Rows of method, source (paper or ours), a cell for each pair, and average. ``cells``: method -> pair -> Cell."""
    rows = []
    for method in paper["methods"]:
        scores = [f"{b}/{c}" for b, c in zip(method["bleu"], method["chrf++"], strict=True)]
        rows.append([method["name"], "paper", *scores, f"{method['bleu_avg']}/{method['chrf++_avg']}"])
        rows.append(_our_row(paper, method["name"], cells.get(method["id"], {})))
    known = {method["id"] for method in paper["methods"]}
    rows += [_our_row(paper, name, row) for name, row in cells.items() if name not in known]
    return rows


def build_notes(paper: dict[str, Any], cells: dict[str, dict[str, Cell]]) -> list[str]:
    """Notes on sources, signatures, number of runs, other test sets and missing cells."""
    present = [(name, pair, cell) for name, row in cells.items() for pair, cell in row.items()]
    versions = ", ".join(sorted({version for *_, cell in present for version in cell.versions}))
    settings = "; ".join(f"{name}: {signature}" for name, signature in paper["signatures"].items())
    notes = [f"paper: {paper['source']}.", f"{settings}; ours with sacreBLEU {versions}."]
    several = [f"{name} {pair} ({len(cell.bleu)} runs)" for name, pair, cell in present if len(cell.bleu) > 1]
    if several:
        notes.append(f"Mean ± standard deviation over seeds: {', '.join(several)}.")
    other = [
        f"{name} {pair} ({', '.join(found)})"
        for name, pair, cell in present
        if (found := differences(paper, pair, cell))
    ]
    if other:
        notes.append(f"{_OTHER_DATA} not the data of the paper, so not comparable with it: {'; '.join(other)}.")
    if any(cell.flops for *_, cell in present):
        notes.append("In brackets: FLOPs of the MoE layers at inference / of the dense FFN, counted on the test set.")
    changed = [f"{name} {pair} ({', '.join(sorted(cell.overrides))})" for name, pair, cell in present if cell.overrides]
    if changed:
        notes.append(f"Translated with other settings than trained with: {'; '.join(changed)}.")
    unchecked = [f"{name} {pair}" for name, pair, cell in present if not cell.is_checked]
    if unchecked:
        notes.append(f"Taken at their word, since their files name no pair, method or seed: {', '.join(unchecked)}.")
    missing = {
        method["id"]: [pair for pair in paper["pairs"] if pair not in cells.get(method["id"], {})]
        for method in paper["methods"]
    }
    gaps = [f"{name} ({', '.join(pairs)})" for name, pairs in missing.items() if pairs]
    if gaps:
        notes.append(f"Missing ({_MISSING}), not run by us: {'; '.join(gaps)}.")
    return notes


def format_table(paper: dict[str, Any], cells: dict[str, dict[str, Cell]], style: str) -> str:
    """The whole text, ``style`` being ``markdown`` or ``latex`` (needs the booktabs package)."""
    headers = ["method", "source", *paper["pairs"], "avg"]
    rows, notes = build_rows(paper, cells), build_notes(paper, cells)
    if style == "markdown":
        table = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
        return "\n".join([table, "", *(f"- {note}".replace("- *", "- \\*") for note in notes), ""])
    table = tabulate(rows, headers, tablefmt="latex_booktabs", disable_numparse=True)
    text = "\n".join([table, *(f"% {note}" for note in notes), ""])
    return text.replace("±", "$\\pm$").replace(_MISSING, "--")


def _parser() -> CommandParser:
    parser = command_parser("table", __doc__)
    add = parser.add_argument
    add(
        "--paper",
        choices=["table3"],
        default="table3",
        help="the paper's table (only table3 is of translation)",
    )
    add(
        "--cell",
        nargs="+",
        action="append",
        default=[],
        metavar="X",
        help="METHOD PAIR SCORES.json [...]; repeat",
    )
    add("--format", choices=["markdown", "latex"], default="markdown")
    parser.flag("--out", old="--output", default="-", help="default: standard output")
    return parser


def _read_cells(paper: dict[str, Any], given: Sequence[Sequence[str]]) -> dict[str, dict[str, Cell]]:
    if not given:
        raise ValueError("no --cell given; each is METHOD PAIR SCORES.json")
    cells: dict[str, dict[str, Cell]] = {}
    taken: dict[Path, str] = {}
    for item in given:
        if len(item) < 3:
            raise ValueError(f"--cell {' '.join(item)}: expected METHOD PAIR SCORES.json [SCORES.json ...]")
        method, pair, *paths = item
        if pair in cells.setdefault(method, {}):
            raise ValueError(f"--cell {method} {pair}: given twice; name all its score files in one --cell")
        for path in paths:
            where = Path(path).resolve()
            if where in taken:
                raise ValueError(f"{path}: given for {taken[where]} and for {method} {pair}; a file is one run")
            taken[where] = f"{method} {pair}"
        cells[method][pair] = load_cell(paper, method, pair, paths)
    return cells


@reports_errors("table")
def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    paper = load_paper(args.paper)
    files.write_text(args.out, format_table(paper, _read_cells(paper, args.cell), args.format))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""README and docs: links lead somewhere, commands and flags exist, and a number that stands in two places agrees."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import cost_formulas, cost_model
from eval import method_table

ROOT = Path(__file__).parents[1]
PAGES = sorted({ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("[a-z]*/README.md")})


def page_text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def table_rows(text, start):
    """Cells of the rows of the first Markdown table after the line that begins with ``start``."""
    lines = text[text.index(start) :].splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
    return rows[:1] + rows[2:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+://", target):
            continue
        place, _, anchor = target.partition("#")
        path = (page.parent / place) if place else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", name).lower().replace(" ", "-") for name in headings}, target


def test_the_index_names_every_page():
    index = page_text("docs/README.md")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, page.name


def newest_rows(pattern):
    """Rows of the newest result file that matches, by method, case, tokens, mode and dtype; later files win."""
    rows = {}
    for path in sorted((ROOT / "benchmarks" / "results").glob(pattern)):
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            key = (row.get("method") or row.get("arch"), row.get("case"), row.get("tokens"), row.get("mode"))
            rows[(*key, row.get("dtype"))] = row
    return rows


OURS, PEER = "ours", r"loop over experts \((?:official|released) code's way\)"
CASES = ("32x2048", "64x1024", "128x512")


def measured(rows, method, case, tokens, mode, dtype):
    found = [row["ratio"] for key, row in rows.items() if re.fullmatch(method, key[0]) and
             key[1:] == (case, tokens, mode, dtype)]  # fmt: skip
    return found[-1] if found else None


def test_the_layers_costs_are_those_of_the_result_files():
    rows = newest_rows("*-layer-*.json")
    table = table_rows(page_text("benchmarks/README.md"), "Time of one layer relative")
    compared = 0
    for label, *cells in table[1:]:
        dtype, tokens, passes = re.fullmatch(r"(\w+), T ([\d,]+), (.+)", label).groups()
        mode = "train" if "backward" in passes else "infer"
        for method, cell in zip((OURS, PEER, "plain batched", "GEMMs alone"), cells, strict=True):
            for case, shown in zip(CASES, cell.split(" / "), strict=True) if cell else ():
                value = measured(rows, method, case, int(tokens.replace(",", "")), mode, dtype)
                assert value is not None, (label, method, case)
                assert abs(float(shown) - value) <= 0.0051, (label, method, case, shown, value)
                compared += 1
    assert compared >= 40


def test_readmes_costs_are_those_of_the_benchmarks():
    rows = newest_rows("*-layer-*.json")
    text = page_text("README.md")
    for label, ours, official in table_rows(text, "Time of one layer of 64")[1:]:
        dtype, tokens = re.fullmatch(r"(\w+), ([\d,]+) tokens", label).groups()
        for shown, method in ((ours, OURS), (official, PEER)):
            value = measured(rows, method, "64x1024", int(tokens.replace(",", "")), "train", dtype)
            assert not shown or abs(float(shown) - value) <= 0.0051, (label, shown, value)
    speed = re.search(r"runs `xmoe_transformer` at (\d\.\d\d) of", text)[1]
    files = sorted((ROOT / "benchmarks" / "results").glob("*-train-cpu.json"))
    ratios = {row["arch"]: row["ratio"] for row in json.loads(files[-1].read_text(encoding="utf-8"))["rows"]}
    assert abs(float(speed) - ratios["xmoe_transformer"]) <= 0.0051


def test_the_demos_numbers_agree():
    first_screen, page = page_text("README.md"), page_text("docs/training.md")
    score, interval, seconds = re.search(
        r"BLEU (\d+\.\d+) ± (\d+\.\d+) on 500 .* after\s+(\d+) s", first_screen
    ).groups()
    row = table_rows(page, "On the 500 held-out lines")[1]
    assert row[1] == f"{score} ± {interval}"
    assert f"{seconds} s on 2 cores" in row[0]


def test_counted_tables_are_those_of_their_commands():
    methods = page_text("docs/methods.md")
    for size, vocabulary, length in (("wmt23", 32000, 32), ("gpt2", 50257, 1024)):
        assert method_table.table(size, vocabulary, length) in methods
    model, ranks, tokens = cost_formulas.Model(), [1, 8, 16, 32], 8192
    printed = table_rows(cost_model.report(model, ranks, tokens), "| GPUs")
    shown = table_rows(page_text("docs/scaling.md"), "`xmoe_transformer` (64 x 1024, 9 expert layers")
    for ours, told in zip(printed[1:], shown[1:], strict=True):
        *common, ms_a100, break_even, ms_h200, _ = ours
        assert told == [*common, ms_a100, ms_h200, break_even]


def test_scores_of_real_text_are_those_of_the_evidence():
    runs = json.loads(page_text("docs/results/2026-11-22-small-cpu.json"))["runs"]
    headings = {
        "he-en": "### Hebrew to English",
        "uk-en": "### Ukrainian to English",
        "zh-en": "### Chinese to English",
    }
    names = {"dense": "dense", "switch": "Switch", "top_k": "top-2", "xmoe": "XMoE"}
    compared = 0
    for run in runs:
        rows = {row[0]: row for row in table_rows(page_text("docs/results-earlier.md"), headings[run["pair"]])}
        assert rows[names[run["method"]]][1] == f"{run['best_valid_nll_bits']:.3f}"
        plain = run["scores"][0]["inference"]
        cells = {names[run["method"]]: [], "XMoE, `moe_max_experts` 2 at inference": []}
        for scored in run["scores"]:
            row = next(iter(cells)) if scored["inference"] == plain else list(cells)[1]
            for metric in ("bleu", "chrf++"):
                found = scored["scores"][metric]
                cells[row].append(f"{found['score']:.2f} ± {found['ci95']:.2f}")
        for name, values in cells.items():
            assert not values or rows[name][2 : 2 + len(values)] == values, (run["pair"], name)
            compared += len(values)
    assert compared == 56


def test_no_other_measured_number_of_readme_stands_elsewhere():
    """Numbers with two decimals: each is compared above, or stands on one page only."""
    compared = r"BLEU \d+\.\d+ ± \d+\.\d+|^\|.*|at \d\.\d\d of|Python 3\.\d+ to 3\.\d+"
    prose = re.sub(r"^```.*?^```", "", page_text("README.md"), flags=re.MULTILINE | re.DOTALL)
    rest = re.sub(compared, "", prose, flags=re.MULTILINE)
    for number in re.findall(r"(?<![\w.])\d+\.\d\d(?![\d.])", rest):
        for page in PAGES:
            assert page == ROOT / "README.md" or number not in page.read_text(encoding="utf-8"), (number, page.name)

"""docs/results.md and results-routers.md show the figures of docs/results/*.json to the last digit.

A comment ``<!-- FILE.json: TABLE ARGUMENT -->`` stands above each table that a study's code makes.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from eval.studies import text
from tests.test_docs import table_rows

DOCS = Path(__file__).parents[1] / "docs"
TABLES = {
    "methods": lambda study, pair: text.as_table(*text.pair_table(study, pair, {})),
    "tests": lambda study, measure: text.as_table(*text.tests_table(study, measure)),
    "sweep": lambda study, pair: text.as_table(*text.sweep_table(study, pair)),
    "cheapest": lambda study, pair: "\n".join(f"- {line}" for line in text.sweep_lines(study, pair)),
    "order": lambda study, measure: "\n".join(f"- {line}" for line in text.order_lines(study, measure)),
}
BLOCK = re.compile(r"^<!-- (\S+\.json): (\w+) (\S+) -->\n\n(.*?)(?:\n\n|\Z)", re.MULTILINE | re.DOTALL)
PAGES = sorted(DOCS.glob("results*.md"))
BLOCKS = [block for page in PAGES for block in BLOCK.findall(page.read_text(encoding="utf-8"))]


def squeezed(table: str) -> str:
    """The table without the spaces and dashes that align it."""
    return re.sub(r"-{3,}", "---", re.sub(r" +", " ", table.strip()))


@pytest.mark.parametrize(("name", "table", "argument", "shown"), BLOCKS, ids=[" ".join(b[:3]) for b in BLOCKS])
def test_tables_are_those_of_the_study(name, table, argument, shown):
    content = json.loads((DOCS / "results" / name).read_text(encoding="utf-8"))
    made = TABLES[table](content.get("study", content), argument)
    assert squeezed(shown) == squeezed(made), f"the page should have\n{made}"


def test_every_study_is_shown():
    shown = {name for name, *_ in BLOCKS}
    held = {
        path.name
        for path in (DOCS / "results").glob("*.json")
        if {"over_seeds", "order"} <= json.loads(path.read_text(encoding="utf-8")).get("study", {}).keys()
        or {"over_seeds", "order"} <= json.loads(path.read_text(encoding="utf-8")).keys()
    }
    assert shown == held


def test_growth_with_data_is_that_of_the_curves():
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    curves = json.loads((DOCS / "results" / "2026-11-26-tiny-growth-curves.json").read_text(encoding="utf-8"))

    def both(pair, updates):
        return [curves[pair][method][updates.replace(",", "")] for method in ("dense", "xmoe32")]

    def difference(dense, xmoe):
        return f"{xmoe['loss_bits'] - dense['loss_bits']:+.3f}"

    (_, *pairs), *rows = table_rows(page, "Validation loss of XMoE minus that of dense")
    for updates, *shown in rows:
        for pair, cell in zip(pairs, shown, strict=True):
            if cell:
                assert cell == difference(*both(pair, updates)), (pair, updates)
            else:
                assert updates.replace(",", "") not in curves[pair]["xmoe32"], (pair, updates)
    assert sum(bool(cell) for row in rows for cell in row[1:]) >= 18
    wanted = ("moe_wanted", "moe_encoder_1_wanted", "moe_encoder_3_wanted", "moe_decoder_1_wanted")
    for updates, *shown in table_rows(page, "The 90,000 pairs in full")[1:]:
        dense, xmoe = both("de-en.90k", updates)
        losses = [f"{dense['loss_bits']:.3f}", f"{xmoe['loss_bits']:.3f}", difference(dense, xmoe)]
        assert shown == losses + [f"{xmoe[key]:.1f}" for key in wanted], updates

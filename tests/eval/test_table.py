"""eval.table: our cells beside the paper's, none invented."""

import json
import statistics

import pytest

from eval import table

PAPER = table.load_paper()


def write_scores(path, bleu, chrf, test_set="flores200.devtest", tokenizer="13a"):
    signatures = {
        "bleu": f"nrefs:1|case:mixed|eff:no|tok:{tokenizer}|smooth:exp|version:2.6.0",
        "chrf++": "nrefs:1|case:mixed|eff:yes|nc:6|nw:2|space:no|version:2.6.0",
    }
    scores = {
        name: {"score": value, "signature": signatures[name]} for name, value in (("bleu", bleu), ("chrf++", chrf))
    }
    path.write_text(json.dumps({"scores": scores, "test_set": test_set}))
    return str(path)


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"][2:]


def test_the_published_averages_follow_from_the_published_cells():
    for method in PAPER["methods"]:
        for metric in ("bleu", "chrf++"):
            # the paper averages before rounding, so half a unit in the last place on either side
            assert statistics.mean(method[metric]) == pytest.approx(method[f"{metric}_avg"], abs=0.1001)


def test_cells_stand_below_the_paper_and_gaps_are_named(tmp_path, capsys):
    one = write_scores(tmp_path / "1.json", 30.04, 54.26)
    two = write_scores(tmp_path / "2.json", 31.04, 54.26)
    other = write_scores(tmp_path / "3.json", 12.0, 30.0, test_set="mix.test")
    cells = ["--cell", "xmoe_64x1024", "uk-en", one, two, "--cell", "hash_32x2048", "he-en", other]
    assert table.main(cells) == 0
    printed = capsys.readouterr().out
    rows = rows_of(printed)
    index = rows.index(
        [
            "XMoE 64 x 1024",
            "paper",
            "31.7/55.7",
            "29.4/53.3",
            "28.4/54.0",
            "36.1/60.5",
            "18.1/45.6",
            "28.7/53.8",
        ]
    )
    assert rows[index + 1] == ["XMoE 64 x 1024", "ours", "30.5±0.7/54.3±0.0", "–", "–", "–", "–", "–"]
    assert rows[-1] == ["hash_32x2048", "ours", "–", "–", "–", "12.0/30.0*", "–", "–"]
    assert "not comparable with it: hash_32x2048 he-en (mix.test)" in printed
    assert "Missing (–), not run by us: dense (uk-en, de-en, ru-en, he-en, zh-en); " in printed
    assert "xmoe_64x1024 uk-en (2 runs)" in printed
    assert "xmoe_64x1024 (de-en, ru-en, he-en, zh-en)" in printed.split("Missing")[1]


def test_an_average_needs_all_five_pairs(tmp_path, capsys):
    cells = []
    for number, pair in enumerate(PAPER["pairs"]):
        path = write_scores(tmp_path / f"{pair}.json", 20.0 + number, 50.0, PAPER["test_sets"][pair][0])
        cells += ["--cell", "dense", pair, path]
    assert table.main(cells) == 0
    assert rows_of(capsys.readouterr().out)[1][-1] == "22.0/50.0"


def test_latex_is_written_at_once(tmp_path):
    cell = ["--cell", "dense", "uk-en", write_scores(tmp_path / "1.json", 30.0, 54.0)]
    assert table.main([*cell, "--format", "latex", "--out", str(tmp_path / "t.tex")]) == 0
    text = (tmp_path / "t.tex").read_text()
    assert "\\toprule" in text
    assert "30.0/54.0" in text
    assert not set("–±") & set(text)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (["dense", "fr-en", "1.json"], "the table has uk-en"),
        (["dense", "uk-en"], "expected METHOD PAIR"),
        (["dense", "uk-en", "absent.json"], "no such file"),
        (["dense", "uk-en", "zh.json"], "tok:zh"),
        (["dense", "uk-en", "none.json"], "has no bleu score"),
        (["dense", "uk-en", "1.json", "mix.json"], "different test sets"),
    ],
)
def test_bad_cells_are_named(tmp_path, capsys, monkeypatch, cell, message):
    monkeypatch.chdir(tmp_path)
    write_scores(tmp_path / "1.json", 30.0, 54.0)
    write_scores(tmp_path / "mix.json", 30.0, 54.0, test_set="mix.test")
    write_scores(tmp_path / "zh.json", 30.0, 54.0, tokenizer="zh")
    (tmp_path / "none.json").write_text("{}")
    assert table.main(["--cell", *cell, "--out", "out.md"]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.md").exists()

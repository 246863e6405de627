"""eval.table: our cells beside the paper's, none invented."""

import json
import statistics
from pathlib import Path

import pytest

from eval import table

ROOT = Path(__file__).parents[2]
PAPER = table.load_paper()


def write_scores(path, bleu, chrf, test_set="flores200.devtest", tokenizer="13a", **more):
    signatures = {
        "bleu": f"nrefs:1|case:mixed|eff:no|tok:{tokenizer}|smooth:exp|version:2.6.0",
        "chrf++": "nrefs:1|case:mixed|eff:yes|nc:6|nw:2|space:no|version:2.6.0",
    }
    scores = {
        name: {"score": value, "signature": signatures[name]} for name, value in (("bleu", bleu), ("chrf++", chrf))
    }
    path.write_text(json.dumps({"scores": scores, "test_set": test_set, **more}))
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
    assert "name no pair, method or seed: xmoe_64x1024 uk-en, hash_32x2048 he-en" in printed
    assert "xmoe_64x1024 (de-en, ru-en, he-en, zh-en)" in printed.split("Missing")[1]


def run_scores(path, seed=1, pairs=10_000_000, flops=1.5, **changed):
    """A file as scripts/run_pair.sh writes it: it tells what it is of."""
    identity = {"pair": "uk-en", "config_file": "/configs/xmoe_64x1024.yaml", "seed": seed}
    figures = {"data": {"train_pairs": pairs}, "inference": {"relative_flops": flops}}
    return write_scores(path, 30.0, 54.0, **(identity | figures | changed))


def test_a_cell_tells_its_cost_and_a_star_that_its_data_are_not_the_papers(tmp_path, capsys):
    one, two = run_scores(tmp_path / "1.json"), run_scores(tmp_path / "2.json", seed=2, flops=1.7)
    few = run_scores(tmp_path / "few.json", pairs=2_000_000)
    cheap = {"relative_flops": 1.0, "model_overrides": "{'moe_threshold': 0.5}"}
    budgeted = run_scores(tmp_path / "cheap.json", inference=cheap)
    assert (
        table.main(
            [
                "--cell",
                "xmoe_64x1024",
                "uk-en",
                one,
                two,
                "--cell",
                "own",
                "uk-en",
                few,
                "--cell",
                "cheap",
                "uk-en",
                budgeted,
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    rows = rows_of(printed)
    assert "30.0±0.0/54.0±0.0 (1.60)" in [row[2] for row in rows]
    assert (rows[-2][2], rows[-1][2]) == ("30.0/54.0* (1.50)", "30.0/54.0 (1.00)")
    assert "other settings than trained with: cheap uk-en ({'moe_threshold': 0.5})" in printed
    assert "not comparable with it: own uk-en (2,000,000 training pairs)" in printed
    assert "Taken at their word" not in printed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pair": "de-en"}, "2.json: is of de-en, not of uk-en"),
        ({"config_file": "/x/dense.yaml"}, "2.json: was trained with /x/dense.yaml, not with xmoe_64x1024"),
        ({"seed": 1}, "2.json: has seed 1 as 1.json has"),
    ],
)
def test_files_of_another_run_than_said_are_refused(tmp_path, capsys, monkeypatch, changed, message):
    monkeypatch.chdir(tmp_path)
    run_scores(tmp_path / "1.json")
    run_scores(tmp_path / "2.json", **({"seed": 2} | changed))
    assert table.main(["--cell", "xmoe_64x1024", "uk-en", "1.json", "2.json"]) == 1
    assert message in capsys.readouterr().err


def test_the_same_file_is_one_run(tmp_path, capsys):
    path = write_scores(tmp_path / "1.json", 30.0, 54.0)
    (tmp_path / "link.json").symlink_to(path)
    for cells in (["--cell", "a", "uk-en", path, path], ["--cell", "a", "uk-en", path, "--cell", "b", "uk-en"]):
        assert table.main([*cells, *([str(tmp_path / "link.json")] if len(cells) == 7 else [])]) == 1
        assert "a file is one run" in capsys.readouterr().err


def test_the_download_draws_the_papers_numbers_of_pairs():
    rows = [line.split("\t") for line in (ROOT / "data_prep" / "wmt23.tsv").read_text().splitlines()]
    assert {row[0]: int(row[2]) for row in rows if row[1:2] == ["pairs"]} == PAPER["bitext"]


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

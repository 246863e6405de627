"""eval/run_report.py and eval/run_table.py on hand-written pieces of a run."""

from __future__ import annotations

import json

import pytest
import torch

from eval import run_report, run_table

FIGURES = {
    "loss": 2.0,
    "moe_used": 1.75,
    "moe_flops": 0.875,
    "moe_decoder1_used": 2.0,
    "moe_encoder3_used": 1.25,
    "moe_encoder11_used": 1.5,
}
NO_BOOTSTRAP = {"mean": None, "ci95": None, "bootstrap_signature": None}
SCORES = {
    "bleu": {"name": "BLEU", "score": 61.234, "signature": "nrefs:1|tok:13a"} | NO_BOOTSTRAP,
    "chrf++": {"name": "chrF2++", "score": 70.0, "signature": "nrefs:1|nw:2"} | NO_BOOTSTRAP,
}


def log_line(kind: str, **figures: float) -> str:
    prefix = {"train": "train_", "valid": "valid_"}[kind]
    content = {"epoch": 3} | {f"{prefix}{name}": str(value) for name, value in figures.items()}
    return f"[2026-01-31 12:00:00,000][{kind}][INFO] - {json.dumps(content)}\n"


@pytest.fixture
def pieces(tmp_path):
    """The files of a finished run and the arguments that name them."""
    for name, lines in {
        "test.uk": "раз\nдва\n",
        "test.en": "one\ntwo\n",
        "hypotheses": "one\nthree\n",
    }.items():
        (tmp_path / name).write_text(lines, encoding="utf-8")
    (tmp_path / "train.log").write_text(
        log_line("valid", **(FIGURES | {"loss": 1.5, "num_updates": 20}))
        + log_line("train", **(FIGURES | {"wps": 1234.5, "wall": 60.0, "num_updates": 30}))
        + log_line("valid", **(FIGURES | {"num_updates": 30}))
    )
    (tmp_path / "generate.log").write_text("INFO: Translated 2 sentences (1,000 tokens) in 4.0s (0.50 sentences/s)\n")
    score = {
        "scores": SCORES,
        "target_language": "en",
        "test_set": "flores200",
        "hypotheses": {"path": str(tmp_path / "hypotheses"), "lines": 2},
        "references": [{"path": str(tmp_path / "test.en"), "lines": 2}],
    }
    (tmp_path / "score.json").write_text(json.dumps(score))
    (tmp_path / "commit.txt").write_text("abc123\n")
    weight = torch.zeros(2, 3)  # input and output embeddings are one matrix
    names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "decoder.output_projection.weight")
    state = {"model": {**dict.fromkeys(names, weight), "encoder.version": torch.ones(1)}}
    torch.save(state | {"cfg": {"model": {"_name": "xmoe_transformer_tiny"}}}, tmp_path / "model.pt")
    values = {
        "pair": "uk-en", "seed": 1, "config": "xmoe.yaml", "training-log": tmp_path / "train.log",
        "checkpoint": tmp_path / "model.pt", "generation-log": tmp_path / "generate.log",
        "score": tmp_path / "score.json", "source": tmp_path / "test.uk",
        "commit-file": tmp_path / "commit.txt", "out": tmp_path,
    }  # fmt: skip
    return tmp_path, [str(text) for name, value in values.items() for text in (f"--{name}", value)]


def test_routing_figures_are_sorted_by_layer():
    routing = run_report.routing_figures(FIGURES)
    assert routing["overall"] == {"used": 1.75, "flops": 0.875}
    assert list(routing["layers"]) == ["encoder 3", "encoder 11", "decoder 1"]
    assert routing["layers"]["decoder 1"] == {"used": 2.0}


def test_scores_json_holds_every_figure_of_the_run(pieces):
    folder, arguments = pieces
    assert run_report.main(arguments) == 0
    report = json.loads((folder / "scores.json").read_text())
    assert report["scores"] == SCORES
    assert (report["target_language"], report["test_set"]) == ("en", "flores200")
    assert (report["seed"], report["commit"], report["num_parameters"]) == (1, "abc123", 6)
    assert report["config"] == {"model": {"_name": "xmoe_transformer_tiny"}}
    assert report["training"]["updates"] == 30
    assert (report["training"]["valid_loss"], report["training"]["best_valid_loss"]) == (2.0, 1.5)
    assert report["training"]["words_per_second"] == 1234.5
    assert report["generation"]["tokens_per_second"] == 250.0
    assert report["routing"]["valid"]["layers"]["encoder 11"] == {"used": 1.5}


def test_report_shows_scores_samples_and_routing(pieces):
    folder, arguments = pieces
    run_report.main(arguments)
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "source       два\nreference    two\ntranslation  three" in text
    assert "- BLEU: `nrefs:1|tok:13a`" in text.splitlines(), "its bars would break a table"
    cells = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    assert ["", "encoder 11", "1.500", "", ""] in cells
    assert ["", "all layers", "1.750", "0.875", ""] in cells


def test_a_dense_model_has_a_report_too(pieces):
    folder, arguments = pieces
    (folder / "train.log").write_text(log_line("train", loss=2.0, num_updates=5))
    assert run_report.main(arguments) == 0
    assert "No MoE layer" in (folder / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("train.log", "holds no figures"),
        ("generate.log", "no line 'Translated"),
        ("score.json", "not valid JSON"),
    ],
)
def test_an_unfinished_piece_is_named_and_nothing_is_written(pieces, capsys, broken, message):
    folder, arguments = pieces
    (folder / broken).write_text("")
    assert run_report.main(arguments) == 1
    assert message in capsys.readouterr().err
    assert not (folder / "scores.json").exists()
    assert not (folder / "report.md").exists()


def test_the_table_has_a_row_for_each_run(pieces, capsys):
    folder, arguments = pieces
    run_report.main(arguments)
    assert run_table.main([str(folder), str(folder)]) == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert rows[2] == rows[3] == [folder.name, "61.23", "70.00", "6", "1.75", "0.88", "1234", "2.000"]
    assert run_table.main([str(folder / "none")]) == 1

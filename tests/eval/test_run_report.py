"""eval/run_report.py and eval/run_table.py on hand-written pieces of a run."""

from __future__ import annotations

import json

import pytest
import torch
from fairseq.data import indexed_dataset

from eval import run_report, run_table
from eval.run.evidence import at_length_limit
from eval.run.figures import routing_figures

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
    valid = {"loss_bits": 1.25, "flops": 0.875, "experts": 1.75}
    (tmp_path / "evaluation.json").write_text(json.dumps({"subsets": {"valid": valid}}))
    weight = torch.zeros(2, 3)  # input and output embeddings are one matrix
    names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "decoder.output_projection.weight")
    state = {"model": {**dict.fromkeys(names, weight), "encoder.version": torch.ones(1)}}
    torch.save(state | {"cfg": {"model": {"_name": "xmoe_transformer_tiny"}}}, tmp_path / "model.pt")
    values = {
        "pair": "uk-en", "seed": 1, "config": "xmoe.yaml", "training-log": tmp_path / "train.log",
        "checkpoint": tmp_path / "model.pt", "generation-log": tmp_path / "generate.log",
        "score": tmp_path / "score.json", "evaluation": tmp_path / "evaluation.json", "source": tmp_path / "test.uk",
        "commit-file": tmp_path / "commit.txt", "out": tmp_path,
    }  # fmt: skip
    return tmp_path, [str(text) for name, value in values.items() for text in (f"--{name}", value)]


def test_routing_figures_are_sorted_by_layer():
    routing = routing_figures(FIGURES)
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
    assert report["evaluation"]["valid"]["loss_bits"] == 1.25
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


@pytest.fixture
def evidence(pieces):
    """The pieces, with an analysis, data and notes beside them; arguments for all of it."""
    folder, arguments = pieces
    layer = {
        "wanted": 2.0,
        "dropped": 0.0,
        "load_cv": 0.5,
        "entropy": 1.0,
        "balance": 1.0,
        "dense_flops_per_token": 4000,
    }
    layers = {
        "encoder 1": layer | {"tokens": 10, "used": 2.0, "flops": 0.5},
        "decoder 1": layer | {"tokens": 30, "used": 4.0, "flops": 1.5},
    }
    analysis = {"data": {"set": "test"}, "checkpoint": {"path": "/run/averaged.pt"}, "layers": layers}
    (folder / "analysis.json").write_text(json.dumps(analysis))
    builder = indexed_dataset.MMapIndexedDatasetBuilder(str(folder / "train.uk-en.uk.bin"))
    for _ in range(3):
        builder.add_item(torch.tensor([5, 2]))
    builder.finalize(str(folder / "train.uk-en.uk.idx"))
    (folder / "lengths.json").write_text(json.dumps({"train": {"pairs": 1000, "longest": [2000, 9], "left_out": 4}}))
    (folder / "overlap.json").write_text(
        json.dumps({"held_out": [{"text": "/raw/test", "lines": 2, "pairs": 1, "sources": 2}]})
    )
    (folder / "cut.json").write_text(json.dumps({"lines": 2, "longest": 1801, "max_length": 1023, "cut": 1}))
    (folder / "corpora.tsv").write_text("A-a\t12\nB-b\tleft out by --without\n")
    (folder / "generate.log").write_text(
        "S-0\ta b\nH-0\t-1.0\tx y z\nS-1\ta\nH-1\t-1.0\tx y\nTranslated 2 sentences (1,000 tokens) in 4.0s\n"
    )
    notes = {
        "analysis": "analysis.json", "lengths": "lengths.json", "overlap": "overlap.json", "cut": "cut.json",
        "corpora": "corpora.tsv",
    }  # fmt: skip
    arguments += [text for name, file in notes.items() for text in (f"--{name}", str(folder / file))]
    return folder, [*arguments, "--data", str(folder), "--max-len-a", "0", "--max-len-b", "3"]


def test_a_score_stands_beside_what_it_cost_and_what_it_was_made_of(evidence):
    folder, arguments = evidence
    assert run_report.main(arguments) == 0
    report, text = json.loads((folder / "scores.json").read_text()), (folder / "report.md").read_text()
    assert report["inference"]["flops_per_token"] == {"encoder": 2000.0, "decoder": 6000.0}
    assert report["inference"]["relative_flops"] == (10 * 0.5 + 30 * 1.5) / 40
    assert report["inference"]["experts_per_token"] == 3.5
    assert report["data"]["train_pairs"] == 3
    assert report["data"]["left_out_corpora"] == ["B-b: left out by --without"]
    assert report["generation"]["at_length_limit"] == 1
    cells = [tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in text.splitlines()]
    for row in (
        ("training pairs", "3"),
        ("too long, left out", "train 4 of 1,000"),
        ("test lines cut", "1 of 2 (at 1023 subwords)"),
        ("held-out pairs in the training text", "test 1 of 2"),
        ("corpora left out", "B-b: left out by --without"),
        ("translations at the length limit", "1 (max-len-a 0, max-len-b 3)"),
        ("changed while training", "nothing"),
    ):
        assert row in cells
    assert "1.250 of the dense FFN's FLOPs, 3.50 experts a token" in text


def test_the_routing_table_is_the_analysis_and_says_so(evidence, pieces):
    folder, arguments = evidence
    run_report.main(arguments)
    text = (folder / "report.md").read_text()
    assert "Of the checkpoint that translated, on the test set (teacher forcing)" in text
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    assert ["encoder 1", "2.000", "2.000"] in [row[1:4] for row in rows]
    assert not any("encoder 11" in row for row in rows), "that is of the training log"
    run_report.main(pieces[1][: pieces[1].index("--analysis")])
    assert "Of the last validation in the training log" in (folder / "report.md").read_text()
    assert run_table.row(str(folder))[4] == "1.75"


def test_a_length_limit_may_grow_with_the_source():
    lines = ["S-7\ta b c", "H-7\t-1\tx x x x x", "S-8\ta", "H-8\t-1\tx", "P-8\t-1 -1"]
    assert at_length_limit(lines, max_len_a=1, max_len_b=1, positions=1024) == 1
    assert at_length_limit(lines, max_len_a=0, max_len_b=200, positions=2) == 2


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
    assert "no such file" in capsys.readouterr().err.lower()
    (folder / "scores.json").write_text('{"language": "en"}')
    assert run_table.main([str(folder)]) == 1
    assert "a language model's run, which has no BLEU" in capsys.readouterr().err

"""eval/run/training_log.py and history.py on lines as fairseq writes them."""

from __future__ import annotations

import io
import math

import pytest

from eval.run import training_log
from eval.run.history import read_history
from eval.run.training_log import last_figures, parse_line, read_records

START = "[2026-01-31 12:00:00,000]"
INNER = START + '[train_inner][INFO] - {"epoch": 1, "update": 0.5, "loss": "9.5", "wps": "100", "num_updates": "10"}'
VALID = START + '[valid][INFO] - {"epoch": 1, "valid_loss": "8.25", "valid_moe_used": "2.5", "valid_num_updates": "20"}'
TRAIN = (
    "2026-01-31 12:00:00 | INFO | train | "
    '{"epoch": 1, "train_loss": "nan", "train_lr": null, "train_num_updates": "20"}'
)


def test_figures_lose_the_prefix_of_their_kind():
    assert parse_line(VALID).figures == {"epoch": 1.0, "loss": 8.25, "moe_used": 2.5, "num_updates": 20.0}
    record = parse_line(TRAIN)
    assert (record.kind, record.num_updates, math.isnan(record.figures["loss"])) == ("train", 20, True)
    assert "lr" not in record.figures


@pytest.mark.parametrize("line", ["", f"{START}[fairseq.trainer][INFO] - begin training epoch 1", INNER[:90]])
def test_other_and_broken_lines_hold_no_figures(line):
    assert parse_line(line) is None


def test_updates_repeated_after_an_interruption_count_once(tmp_path):
    log = tmp_path / "train.log"
    log.write_text("\n".join([INNER, VALID, INNER.replace("9.5", "9.75"), VALID.replace("8.25", "8.5")]))
    records = read_records(log)
    assert [(record.kind, record.figures["loss"]) for record in records] == [
        ("train_inner", 9.75),
        ("valid", 8.5),
    ]
    assert last_figures(records, "valid")["loss"] == 8.5
    assert last_figures(records, "train") == {}


def test_the_command_keeps_the_log_and_shows_what_matters(tmp_path, monkeypatch, capsys):
    lines = [
        f"{START}[fairseq_cli.train][INFO] - {{'_name': None, 'max_update': 40, 'lr': [0.1]}}",
        INNER,
        f"{START}[fairseq.trainer][WARNING] - gradients overflow",
        f"{START}[fairseq_cli.train][INFO] - done training in 2.1 seconds",
    ]
    text = "".join(f"{line}\n" for line in lines)
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    log = tmp_path / "train.log"
    assert training_log.main(["--log", str(log)]) == 0
    shown = capsys.readouterr().err
    assert log.read_text() == text
    assert "gradients overflow" in shown
    assert "10/40" in shown
    assert "done training" not in shown


def test_a_training_that_stops_early_shows_its_last_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Could not override 'model.moe_colour'.\n"))
    training_log.main(["--log", str(tmp_path / "train.log")])
    shown = capsys.readouterr().err
    assert "the training stopped early" in shown
    assert "Could not override 'model.moe_colour'." in shown


def test_history_reads_a_training_log(tmp_path):
    lines = [
        f'2026-01-01 | INFO | train_inner | {{"epoch": 1, "loss": "{loss}", "num_updates": "{n}", '
        f'"moe_encoder_1_wanted": "{wanted}", "moe_wanted": "{wanted}"}}'
        for n, loss, wanted in ((10, "3.5", "4"), (20, "2.5", "3.25"), (30, "nan", "1"))
    ]
    (tmp_path / "log").write_text("\n".join(lines))
    history = read_history(str(tmp_path / "log"))
    assert history["layers"] == {"encoder 1": {"updates": [10, 20, 30], "wanted": [4, 3.25, 1]}}
    assert history["train"]["moe_wanted"] == [4, 3.25, 1]
    assert history["first_nan_update"] == 30
    (tmp_path / "empty").write_text("nothing\n")
    with pytest.raises(ValueError, match="log_format"):
        read_history(str(tmp_path / "empty"))

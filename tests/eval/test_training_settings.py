"""What a begun training can take over, and values as hydra reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from eval.run import resume, training_settings
from eval.run.hydra_settings import parse_override, quoted, read_settings

YAML = """
# a comment
common: {log_interval: 4, seed: 1}
dataset: {max_tokens: 200}
model: {_name: xmoe_transformer_tiny, dropout: 1e-1}
optimization: {lr: [0.01], max_update: 40}
checkpoint: {patience: 10}
"""
FACTS = ("--fact", "content of --train (uk)=abc", "--fact", "vocab_size=40")


@pytest.fixture
def training(tmp_path):
    """A folder with a training of 40 updates, begun with YAML and FACTS; a function that checks another start."""
    (tmp_path / "tiny.yaml").write_text(YAML)
    folder = tmp_path / "checkpoints"
    folder.mkdir()

    def check(*arguments):
        fixed = ("check", "--save-dir", str(folder), "--config", str(tmp_path / "tiny.yaml"))
        return training_settings.main([*fixed, *arguments])

    assert check("--write", *FACTS) == 0
    cfg = {"model": {"_name": "xmoe_transformer_tiny", "dropout": 0.1, "moe_threshold": 0.9}}
    state = {"model": {}, "cfg": cfg, "optimizer_history": [{"num_updates": 40}]}
    torch.save(state, folder / "checkpoint_last.pt")
    check.folder = folder
    return check


@pytest.mark.parametrize(
    "setting",
    [
        "optimization.max_update=60",
        "checkpoint.patience=20",
        "checkpoint.save_interval_updates=7",
        "dataset.num_workers=3",
        "distributed_training.distributed_world_size=2",
        "optimization.update_freq=[2]",
        "common.amp=true",
        "model.checkpoint_activations=true",
        "model.moe_threshold=0.9",  # only written down: the checkpoint says that it was so
        "model.dropout=0.10",
    ],
)
def test_what_a_resume_takes_over_continues(training, setting):
    assert training("--set", setting, *FACTS) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--set", "model.dropout=0.3"), "  model.dropout: 0.1, now 0.3"),
        (("--set", "model.moe_threshold=0.5"), "  model.moe_threshold: (not given), now 0.5"),
        (("--set", "criterion.label_smoothing=0.2"), "  criterion.label_smoothing: (not given), now 0.2"),
        (("--set", "optimization.lr=[0.02]"), "  optimization.lr: [0.01], now [0.02]"),
        (("--set", "common.seed=2"), "  common.seed: 1, now 2"),
        (("--fact", "content of --train (uk)=abd"), "  content of --train (uk)"),
        (("--fact", "vocab_size=50"), "  vocab_size: 40, now 50"),
    ],
)
def test_what_it_cannot_take_over_is_named(training, capsys, arguments, said):
    assert training(*arguments) == 2
    heading, *lines = capsys.readouterr().err.splitlines()
    assert "at update 40, was begun with other settings" in heading
    assert lines == [said]


def test_a_continued_training_tells_what_changed(training, capsys):
    longer = ("--set", "optimization.max_update=60")
    assert training("--state", *FACTS) == 0
    assert training("--state", "--write", *longer, *FACTS) == 0
    shown = capsys.readouterr()
    assert shown.out == "done 40\ncontinue 40\n"
    assert resume.changes(training.folder) == ["update 40: optimization.max_update: 40, now 60"]
    assert training("--write", *longer, *FACTS) == 0
    assert len(json.loads((training.folder / "settings.json").read_text())["segments"]) == 2


def test_a_training_without_notes_is_judged_by_its_checkpoint(training, capsys):
    (training.folder / "settings.json").unlink()
    assert training("--set", "model.moe_threshold=0.9", *FACTS) == 0
    assert training("--set", "model.moe_threshold=0.8") == 2
    assert "model.moe_threshold: 0.9, now 0.8" in capsys.readouterr().err


def test_a_folder_without_checkpoints_takes_anything(training, capsys):
    (training.folder / "checkpoint_last.pt").unlink()
    assert training("--set", "model.dropout=0.3", "--state") == 0
    assert capsys.readouterr().out == "fresh 0\n"


@pytest.mark.parametrize("text", ["a = шлях ({,' x", "it's", "{x", "c:\\dir\\", "\\'", "${x}", "[a", "#", "", "a:b"])
def test_hydra_reads_a_quoted_text_as_it_stands(text):
    parsed = OverridesParser.create().parse_override(f"a.b={quoted(text)}")
    assert OmegaConf.create({"x": parsed.value()}).x == text


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("a.b=[0.1,2]", [0.1, 2]),
        ("a.b=null", None),
        ("a.b=1e-3", 0.001),
        ("a.b=(0.9, 0.98)", "(0.9, 0.98)"),
        ("a.b=x,y", "x,y"),
        ("a.b=q=w", "q=w"),
        ("a.b=it's", "it's"),
        ("a.b='it\\'s'", "it's"),
        ("a.b=шлях", "шлях"),
    ],
)
def test_a_setting_that_hydra_cannot_read_is_a_text(override, value, capsys):
    assert parse_override(override)[1] == value
    assert training_settings.main(["overrides", "--set", override]) == 0
    printed = OverridesParser.create().parse_override(capsys.readouterr().out.rstrip("\n"))
    assert printed.value() == value


def test_settings_that_cannot_be_read_are_named(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("model: [")
    assert training_settings.main(["signature", "--config", str(tmp_path / "bad.yaml")]) == 1
    assert "bad.yaml: " in capsys.readouterr().err
    with pytest.raises(ValueError, match="line break"):
        quoted("a\nb")


def test_comments_and_workers_do_not_count_in_the_signature(tmp_path):
    (tmp_path / "a.yaml").write_text(YAML)
    (tmp_path / "b.yaml").write_text(YAML.replace("# a comment", "") + "# other\n")
    settings = [read_settings(Path(tmp_path / name), ["dataset.num_workers=2"]) for name in ("a.yaml", "b.yaml")]
    assert resume.signature(settings[0]) == resume.signature(settings[1])
    assert "dataset.num_workers=2" not in resume.signature(settings[0])
    assert "optimization.max_update=40" in resume.signature(settings[0])

"""scripts/run_study.sh on two pairs: killed in the middle it continues, to the same study.json. And language models."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.test_run_pair import CONFIG, WORDS, write_corpus

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
STUDY = """
pairs:
  uk-en: {train: PLACE/train, valid: PLACE/valid, test: PLACE/test}
  de-en: {train: PLACE/train, valid: PLACE/valid, test: PLACE/test, set: {optimization.max_update: 22}}
methods:
  dense: {config: dense.yaml}
  xmoe: {config: xmoe.yaml}
seeds: [1, 2]
set: {optimization.max_update: 20}
run: {vocab-size: 40, average: "last:2", beam: 2, device: cpu, workers: 1}
calibrate: []
"""


LM_MODEL = """
common: {log_interval: 4}
task: {_name: language_modeling, tokens_per_sample: 32, sample_break_mode: none}
dataset: {max_tokens: 128, num_workers: 0, required_batch_size_multiple: 1}
optimizer: {_name: adam}
lr_scheduler: {_name: fixed}
optimization: {lr: [0.01], max_update: 20}
checkpoint: {save_interval_updates: 10, keep_interval_updates: 2, no_epoch_checkpoints: true}
criterion: {_name: cross_entropy}
model: {_name: dense_transformer_tiny_lm, decoder_embed_dim: 16, decoder_ffn_embed_dim: 32}
"""
LM_STUDY = """
pairs:
  en: {train: PLACE/train, valid: PLACE/valid, test: PLACE/test}
methods:
  dense: {config: lm.yaml}
  as_xmoe:
    config: lm.yaml
    set:
      criterion._name: cross_entropy_with_load_balance
      model._name: dense_xmoe_transformer_tiny_lm
      model.moe_num_experts: 4
      model.moe_expert_dim: 8
    sweep: [0.25, 1.0]
seeds: [1, 2]
run: {vocab-size: 40, average: "last:2", device: cpu, workers: 1}
calibrate: ["budget:0.5"]
"""


def start(study: Path, out: Path) -> subprocess.Popen[str]:
    command = ["bash", str(ROOT / "scripts" / "run_study.sh"), "--study", str(study), "--out", str(out), "--jobs", "2"]
    environment = {**os.environ, "XMOE_VENV": sys.prefix, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def test_a_killed_study_continues_to_the_same_results(tmp_path):
    write_corpus(tmp_path)
    for name in ("train", "valid", "test"):  # another "language": the same words backwards
        text = (tmp_path / f"{name}.uk").read_text(encoding="utf-8")
        for word in WORDS:
            text = text.replace(word, word[::-1])
        (tmp_path / f"{name}.de").write_text(text, encoding="utf-8")
    (tmp_path / "xmoe.yaml").write_text(CONFIG)
    dense = CONFIG.replace("xmoe_transformer", "dense_transformer").replace("_with_load_balance", "")
    (tmp_path / "dense.yaml").write_text("\n".join(line for line in dense.splitlines() if "moe_" not in line))
    study = tmp_path / "study.yaml"
    study.write_text(STUDY.replace("PLACE", str(tmp_path)))

    whole = start(study, tmp_path / "whole")
    errors = whole.communicate()[1]
    assert whole.returncode == 0, errors
    assert "[8/8]" in errors
    expected = (tmp_path / "whole" / "study.json").read_bytes()
    content = json.loads(expected)
    assert content["missing"] == []
    updates = {
        pair: {s["updates"] for m in p["methods"].values() for s in m["seeds"].values()}
        for pair, p in content["pairs"].items()
    }
    assert updates == {"uk-en": {20}, "de-en": {22}}
    assert content["over_seeds"]["dev_loss"]["all pairs"]["xmoe"]["df"] == 2
    assert (tmp_path / "whole" / "study.html").stat().st_size > 100_000

    # the same with two cells to go; it is killed while the second of them trains
    part = tmp_path / "part"
    shutil.copytree(tmp_path / "whole", part)
    (part / "study.json").unlink()
    cells = [part / "cells" / name for name in ("uk-en/xmoe/seed-2", "de-en/xmoe/seed-1")]
    for cell in cells:
        shutil.rmtree(cell)
    killed, last = start(study, part), cells[1] / "checkpoints" / "checkpoint_last.pt"
    while not last.exists():
        assert killed.poll() is None, killed.stderr.read()
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (part / "study.json").exists()
    again = start(study, part)
    errors = again.communicate()[1]
    assert again.returncode == 0, errors
    assert (part / "study.json").read_bytes() == expected


def test_a_study_of_language_models(tmp_path):
    write_corpus(tmp_path)
    (tmp_path / "lm.yaml").write_text(LM_MODEL)
    study, out = tmp_path / "study.yaml", tmp_path / "out"
    study.write_text(LM_STUDY.replace("PLACE", str(tmp_path)))
    running = start(study, out)
    errors = running.communicate()[1]
    assert running.returncode == 0, errors
    content = json.loads((out / "study.json").read_text())
    dense, sparse = (content["pairs"]["en"]["methods"][name] for name in ("dense", "as_xmoe"))
    assert content["over_seeds"]["perplexity"]["en"]["as_xmoe"]["df"] == 1
    assert dense["over_seeds"]["moe_flops_training"]["mean"] == sparse["over_seeds"]["moe_flops_training"]["mean"] == 1
    sweep, cell = sparse["over_seeds"]["sweep"], sparse["seeds"]["1"]
    assert [point["threshold"] for point in sweep["points"]] == [0.25, 1.0]
    assert cell["sweep"][0]["moe_flops"] < cell["sweep"][1]["moe_flops"] == cell["moe_flops_inference"] == 1
    # trained at t = 1, so that point of the sweep is the model as trained
    assert (cell["sweep"][1]["dev_loss"], cell["sweep"][1]["perplexity"]) == (cell["dev_loss"], cell["perplexity"])
    assert cell["prices"]["budget:0.5"]["moe_flops"] == pytest.approx(0.5, rel=0.1)
    assert "the validation perplexity stays within 1% of that at t = 1" in (out / "study.md").read_text()
    assert '"name":"as_xmoe, seed 2"' in (out / "study.html").read_text()

    # the same as fairseq's own evaluation, and the units of text by hand
    folder = out / "cells" / "en" / "as_xmoe" / "seed-1"
    command = [
        "fairseq-eval-lm",
        str(out / "data" / "en" / "data-bin"),
        "--user-dir",
        str(ROOT / "xmoe_fairseq"),
        "--cpu",
    ]
    command += [
        "--path",
        str(folder / "checkpoints" / "averaged.pt"),
        "--tokens-per-sample",
        "32",
        "--gen-subset",
        "test",
    ]
    command[0] = str(Path(sys.executable).parent / command[0])
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    loss = float(re.search(r"Loss \(base 2\): ([\d.]+)", told.stderr + told.stdout)[1])
    test = json.loads((folder / "scores.json").read_text())["evaluation"]["test"]
    assert test["loss_bits"] == pytest.approx(loss, abs=1e-4)
    assert cell["perplexity"] == test["perplexity"] == pytest.approx(2**loss, rel=1e-3)
    text = (tmp_path / "test.en").read_text(encoding="utf-8")
    bits = test["loss_bits"] * test["target_tokens"]
    assert test["bits_per_byte"] == pytest.approx(bits / len(text.encode()))
    assert math.log2(test["word_perplexity"]) == pytest.approx(bits / (len(text.split()) + len(text.splitlines())))

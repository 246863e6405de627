"""scripts/run_pair.sh through the real commands on a tiny corpus: kept, repeated and continued stages."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
STAGES = [
    "validate",
    "subwords",
    "encode",
    "binarise",
    "train",
    "average",
    "generate",
    "detokenise",
    "score",
    "report",
]
WORDS = {
    "один": "one",
    "два": "two",
    "три": "three",
    "чотири": "four",
    "п'ять": "five",
    "шість": "six",
    "сім": "seven",
}
CONFIG = """
common: {log_interval: 4}
task: {_name: translation}
dataset: {max_tokens: 200, num_workers: 0, required_batch_size_multiple: 1}
model:
  _name: xmoe_transformer_tiny
  encoder_embed_dim: 16
  decoder_embed_dim: 16
  encoder_ffn_embed_dim: 32
  decoder_ffn_embed_dim: 32
  moe_num_experts: 4
  moe_expert_dim: 16
criterion: {_name: label_smoothed_cross_entropy_with_load_balance, label_smoothing: 0.1}
optimizer: {_name: adam}
lr_scheduler: {_name: fixed}
optimization: {lr: [0.01], max_update: 100}
checkpoint: {save_interval_updates: 4, keep_interval_updates: 3, no_epoch_checkpoints: true}
"""


def write_corpus(folder: Path) -> None:
    chosen = random.Random(1)
    for split, lines in {"train": 60, "valid": 6, "test": 6}.items():
        rows = [chosen.choices(list(WORDS), k=chosen.randint(1, 5)) for _ in range(lines)]
        sides = {
            "uk": [" ".join(row) for row in rows],
            "en": [" ".join(WORDS[word] for word in row) for row in rows],
        }
        for language, text in sides.items():
            (folder / f"{split}.{language}").write_text("\n".join(text) + "\n", encoding="utf-8")


class Pipeline:
    """run_pair.sh on one corpus and one output folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"

    def command(self, *arguments: str) -> list[str]:
        prefixes = [text for split in ("train", "valid", "test") for text in (f"--{split}", f"{self.folder}/{split}")]
        fixed = [
            "--pair",
            "uk-en",
            *prefixes,
            "--out",
            str(self.out),
            "--config",
            str(self.folder / "tiny.yaml"),
        ]
        sizes = [
            "--vocab-size",
            "40",
            "--average",
            "last:2",
            "--beam",
            "2",
            "--device",
            "cpu",
            "--workers",
            "1",
        ]
        return ["bash", str(ROOT / "scripts" / "run_pair.sh"), *fixed, *sizes, *arguments]

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "XMOE_VENV": sys.prefix, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            self.command(*arguments),
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env=environment,
            start_new_session=True,
        )

    def run(self, *arguments: str) -> tuple[int, str, list[str]]:
        """Exit code, standard error and the stages that ran."""
        process = self.start(*arguments)
        errors = process.communicate()[1]
        ran = [name for name in STAGES if f"run_pair: {name}: start" in errors or f" {name}: restart" in errors]
        return process.returncode, errors, ran

    def scores(self) -> dict:
        return json.loads((self.out / "scores.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run; the tests below change settings one after the other, in the order of this file."""
    folder = tmp_path_factory.mktemp("run_pair")
    write_corpus(folder)
    (folder / "tiny.yaml").write_text(CONFIG)
    pipeline = Pipeline(folder)
    code, errors, ran = pipeline.run()
    assert code == 0, errors
    assert ran == STAGES
    return pipeline


def test_the_result_carries_its_evidence(finished):
    report = finished.scores()
    assert report["scores"]["bleu"]["signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|")
    assert "nw:2" in report["scores"]["chrf++"]["signature"]
    assert (report["seed"], report["training"]["updates"]) == (1, 100)
    assert report["config"]["model"]["moe_num_experts"] == 4
    assert set(report["routing"]["valid"]["layers"]) == {"encoder 1", "decoder 1"}
    assert 1 <= report["routing"]["valid"]["overall"]["used"] <= 4
    hypotheses = Path(report["hypotheses"]["path"]).read_text(encoding="utf-8").splitlines()
    assert len(hypotheses) == 6
    assert "translation  " in (finished.out / "report.md").read_text(encoding="utf-8")


def test_hypotheses_are_in_the_order_of_the_test_set(finished):
    lines = (finished.out / "translations" / "generate.txt").read_text(encoding="utf-8").splitlines()
    by_number = {int(line.split("\t")[0][2:]): line.split("\t")[2] for line in lines if line.startswith("H-")}
    in_order = (finished.out / "translations" / "test.subwords.en").read_text(encoding="utf-8").splitlines()
    assert in_order == [by_number[number] for number in range(6)]


def test_the_same_command_keeps_every_stage(finished):
    before = (finished.out / "scores.json").stat().st_mtime_ns
    code, errors, ran = finished.run()
    assert (code, ran) == (0, []), errors
    assert (finished.out / "scores.json").stat().st_mtime_ns == before


def test_a_changed_beam_translates_again_with_the_same_model(finished):
    model = (finished.out / "checkpoints" / "averaged.pt").stat().st_mtime_ns
    code, errors, ran = finished.run("--beam", "1")
    assert (code, ran) == (0, STAGES[STAGES.index("generate") :]), errors
    assert (finished.out / "checkpoints" / "averaged.pt").stat().st_mtime_ns == model


def test_bad_input_stops_before_anything_is_overwritten(finished):
    source = finished.folder / "train.uk"
    text = source.read_bytes()
    source.write_bytes(text + "зайвий рядок\n".encode())
    before = {path: path.stat().st_mtime_ns for path in finished.out.rglob("*.*") if path.is_file()}
    code, errors, ran = finished.run("--beam", "1")
    source.write_bytes(text)
    assert (code, ran) == (1, ["validate"])
    assert "61" in errors
    assert "stage 'validate' failed" in errors
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_an_interrupted_training_continues(finished):
    changed = ("--beam", "1", "--seed", "2", "--subwords", "subword-nmt")
    started, last = time.time(), finished.out / "checkpoints" / "checkpoint_last.pt"
    process = finished.start(*changed)
    while not (last.exists() and last.stat().st_mtime > started):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    errors = process.communicate()[1]
    assert "subwords: start" in errors
    assert not (finished.out / "scores.json").exists(), "scores of the older settings must not stay"
    code, errors, ran = finished.run(*changed)
    assert (code, ran) == (0, STAGES[STAGES.index("train") :]), errors
    log = (finished.out / "train.log").read_text(encoding="utf-8")
    assert "Loaded checkpoint" in log
    assert finished.scores()["seed"] == 2


def test_bad_input_leaves_nothing_behind(tmp_path):
    write_corpus(tmp_path)
    shutil.copy(tmp_path / "valid.uk", tmp_path / "kept")
    (tmp_path / "valid.uk").write_bytes(b"\xff\xfe broken\n" * 6)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    pipeline = Pipeline(tmp_path)
    code, errors, ran = pipeline.run()
    assert (code, ran) == (1, ["validate"])
    assert "valid.uk" in errors
    assert [path.name for path in pipeline.out.iterdir()] == [".stages"]

"""scripts/run_pair.sh through the real commands on a tiny corpus: kept, repeated and continued stages."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.tiny_yaml import MODEL

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]

ROOT = Path(__file__).parents[2]
STAGES = [
    "validate",
    "subwords",
    "encode",
    "binarise",
    "lengths",
    "train",
    "average",
    "generate",
    "detokenise",
    "score",
    "calibrate",
    "analyse",
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
# Hypotheses of a model that has seen 40 updates end at its last position, so few positions make short searches.
POSITIONS = 64
CONFIG = f"""{MODEL}
  max_source_positions: {POSITIONS}
  max_target_positions: {POSITIONS}
common: {{log_interval: 4}}
dataset: {{max_tokens: 48, num_workers: 0, required_batch_size_multiple: 1}}
optimization: {{lr: [0.01], max_update: 40}}
checkpoint: {{save_interval_updates: 4, keep_interval_updates: 3, no_epoch_checkpoints: true}}
"""


def write_corpus(folder: Path) -> None:
    chosen = random.Random(1)
    for split, lines in {"train": 60, "valid": 6, "test": 6}.items():
        rows = [chosen.choices(list(WORDS), k=chosen.randint(1, 5)) for _ in range(lines)]
        # more subwords than a batch of the training takes (57 of 48), and than the model has positions (75 of 64)
        rows[-1] *= {"train": 7, "valid": 1, "test": 15}[split]
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
            "last:9",
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

    def interrupt(self, *arguments: str) -> tuple[int, str]:
        """Start, send SIGUSR1 after the training's next checkpoint; exit code and standard error."""
        started, last = time.time(), self.out / "checkpoints" / "checkpoint_last.pt"
        process = self.start(*arguments)
        while not (last.exists() and last.stat().st_mtime > started):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
        errors = process.communicate()[1]
        return process.returncode, errors

    def scores(self) -> dict:
        return json.loads((self.out / "scores.json").read_text(encoding="utf-8"))

    def text(self, *parts: str) -> str:
        return self.out.joinpath(*parts).read_text(encoding="utf-8")

    def times(self) -> dict[Path, int]:
        """When each file was last written, but for those of the stages."""
        found = (path for path in self.out.rglob("*") if path.is_file() and ".stages" not in path.parts)
        return {path: path.stat().st_mtime_ns for path in found}


@pytest.fixture(scope="module")
def life(tmp_path_factory):
    """One run from its first training over other settings, refusals and an interruption to a new start.

    Every step notes what it saw; the tests below only read, in any order. The path holds what shells, hydra and
    fairseq treat apart.
    """
    folder = tmp_path_factory.mktemp("run_pair") / "a = шлях ({,' x"
    folder.mkdir()
    write_corpus(folder)
    (folder / "tiny.yaml").write_text(CONFIG)
    pipeline, seen = Pipeline(folder), {}
    seen["first"] = pipeline.run()
    assert seen["first"][0] == 0, seen["first"][1]
    seen["scores"], seen["hypotheses"] = pipeline.scores(), pipeline.text("translations", "test.subwords.en")
    seen["generated"], seen["report"] = pipeline.text("translations", "generate.txt"), pipeline.text("report.md")
    before = pipeline.times()
    seen["again"] = pipeline.run()
    seen["other text"] = _with_other_text(pipeline)
    refused = (
        "--set",
        "model.moe_num_experts=8",
        "--seed",
        "2",
        "--vocab-size",
        "50",
        "--set",
        "common.log_interval=5",
    )
    seen["refused"] = pipeline.run(*refused)
    seen["left alone"] = pipeline.times() == before
    longer = ("--beam", "1", "--set", "optimization.max_update=200", "--set", "common.log_interval=5")
    (folder / "tiny.yaml").write_text(CONFIG + "# a comment\n")
    seen["interrupted"] = pipeline.interrupt(*longer)
    seen["old scores stay"] = (pipeline.out / "scores.json").exists()
    seen["continued"] = pipeline.run(*longer)
    seen["continued scores"] = pipeline.scores()
    seen["log"] = pipeline.text("train.log")
    seen["restarted"] = pipeline.run("--restart", "--data-only", "--vocab-size", "50")
    return pipeline, seen


def _with_other_text(pipeline: Pipeline) -> tuple[int, str, list[str]]:
    """What a finished run says to other training text, which its stages would otherwise begin with."""
    source = pipeline.folder / "train.uk"
    text = source.read_text(encoding="utf-8")
    source.write_text(text.replace("один", "одна"), encoding="utf-8")
    result = pipeline.run()
    source.write_text(text, encoding="utf-8")
    return result


def test_every_stage_runs_in_its_order_and_leaves_its_evidence(life):
    pipeline, seen = life
    assert seen["first"][2] == STAGES
    report = seen["scores"]
    assert report["scores"]["bleu"]["signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|")
    assert "nw:2" in report["scores"]["chrf++"]["signature"]
    assert (report["seed"], report["training"]["updates"]) == (1, 40)
    assert report["config"]["model"]["moe_num_experts"] == 4
    assert set(report["routing"]["valid"]["layers"]) == {"encoder 1", "decoder 1"}
    assert 1 <= report["routing"]["valid"]["overall"]["used"] <= 4
    assert "translation  " in seen["report"]
    cheaper = report["calibrated"]["loss:0.01"]
    # calibrate measured the same model on the same text by itself
    assert report["evaluation"]["valid"]["loss_bits"] == pytest.approx(cheaper["before"]["loss_bits"], abs=1e-6)
    assert cheaper["after"]["loss_bits"] <= cheaper["before"]["loss_bits"] + 0.01
    assert cheaper["after"]["flops"] <= cheaper["before"]["flops"]
    assert set(cheaper["scores"]) == set(report["scores"])
    assert "| loss:0.01" in seen["report"]
    aside = pipeline.out.with_name("out.1")
    analysis = json.loads((aside / "analysis.json").read_text(encoding="utf-8"))
    assert set(analysis["layers"]) == {"encoder 1", "decoder 1"}
    page = (aside / "report.html").read_text(encoding="utf-8")
    assert "explorer" in page
    assert "at the price loss:0.01" in page
    assert "averaged.pt on test" in page


def test_long_lines_and_missing_checkpoints_are_told_and_stop_nothing(life):
    _, seen = life
    data = seen["scores"]["data"]
    assert data["train_pairs"] == 60
    assert (data["lengths"]["train"]["left_out"], data["lengths"]["valid"]["left_out"]) == (1, 0)
    assert 48 < max(data["lengths"]["train"]["longest"]) < POSITIONS, "the batch must be what leaves it out"
    assert (data["cut"]["lines"], data["cut"]["cut"], data["cut"]["max_length"]) == (6, 1, POSITIONS - 1)
    assert f"1 of 6 lines cut to {POSITIONS - 1} subwords" in seen["first"][1]
    averaged = seen["scores"]["averaged_from"]
    assert f"{len(averaged)} checkpoints instead of 9" in seen["first"][1]
    assert ", ".join(averaged) in seen["report"]


def test_the_cost_at_inference_stands_beside_the_score(life):
    cost = life[1]["scores"]["inference"]
    assert (cost["set"], cost["checkpoint"]) == ("test", "averaged.pt")
    # 2 of the tiny model's layers, each 4 experts of 16 for a dense FFN of 32, at most all of them
    assert set(cost["flops_per_token"]) == {"encoder", "decoder"}
    assert 4 * 16 * 16 <= cost["flops_per_token"]["encoder"] <= 4 * (4 * 16 * 16)
    assert "MoE layers at inference: " in life[1]["report"]


def test_hypotheses_are_in_the_order_of_the_test_set(life):
    lines = life[1]["generated"].splitlines()
    by_number = {int(line.split("\t")[0][2:]): line.split("\t")[2] for line in lines if line.startswith("H-")}
    assert life[1]["hypotheses"].splitlines() == [by_number[number] for number in range(6)]


def test_the_same_command_keeps_every_stage(life):
    code, errors, ran = life[1]["again"]
    assert (code, ran) == (0, []), errors


def test_what_a_training_cannot_take_over_is_refused_by_name_and_nothing_is_touched(life):
    seen = life[1]
    code, errors, ran = seen["refused"]
    assert (code, ran) == (2, [])
    for line in ("  model.moe_num_experts: 4, now 8", "  seed: 1, now 2", "  vocab_size: 40, now 50"):
        assert line in errors.splitlines()
    assert "log_interval" not in errors
    assert "--restart" in errors
    code, errors, ran = seen["other text"]
    assert (code, ran) == (2, [])
    assert "  content of --train (uk)" in errors.splitlines()
    assert seen["left alone"]


def test_a_longer_training_continues_and_an_interruption_too(life):
    seen = life[1]
    code, errors = seen["interrupted"]
    assert "continues with optimization.max_update: 40, now 200" in errors
    assert code == 75, errors
    assert "the same command again continues from here" in errors
    assert not seen["old scores stay"], "scores of the older settings must not stay"
    code, errors, ran = seen["continued"]
    assert (code, ran) == (0, STAGES[STAGES.index("train") :]), errors
    report = seen["continued scores"]
    assert report["training"]["updates"] == 200
    starts = [int(found) for found in re.findall(r"Loaded checkpoint .*@ (\d+) updates", seen["log"])]
    assert starts[0] == 40
    assert len(starts) == 2
    (stopped,) = re.findall(r"stopped by a signal at update (\d+), saved", seen["log"])
    assert 40 < starts[1] == int(stopped) < 200


def test_a_restart_renames_the_old_run(life):
    pipeline, seen = life
    code, errors, ran = seen["restarted"]
    assert (code, ran) == (0, STAGES[: STAGES.index("train")]), errors
    assert (pipeline.out.with_name("out.1") / "checkpoints" / "checkpoint_last.pt").is_file()
    assert (pipeline.out.with_name("out.1") / "scores.json").is_file()
    assert not (pipeline.out / "checkpoints").exists()


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

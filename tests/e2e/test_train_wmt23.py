"""scripts/train_wmt23.sh on own text: data for all cells of a pair, protected, and one cell trained on them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.tiny_yaml import MODEL

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]

ROOT = Path(__file__).parents[2]
WORDS = {"один": "one", "два": "two", "три": "three", "чотири": "four", "п'ять": "five", "шість": "six"}
CONFIG = f"""{MODEL}  max_source_positions: 64
dataset: {{max_tokens: 400, num_workers: 0, required_batch_size_multiple: 1}}
optimization: {{lr: [0.01], max_update: 8}}
checkpoint: {{save_interval_updates: 4, no_epoch_checkpoints: true}}
"""


@pytest.fixture(scope="module")
def cell(tmp_path_factory):
    """Raw text and a configuration; a call runs the script with more arguments: exit code, standard error."""
    folder = tmp_path_factory.mktemp("wmt23") / "a = шлях ({,' x"
    (folder / "raw").mkdir(parents=True)
    (folder / "tiny.yaml").write_text(CONFIG)
    draw = random.Random(1)
    for split, count in {"train": 300, "valid": 8, "test": 8}.items():
        rows = [draw.choices(list(WORDS), k=draw.randint(3, 8)) for _ in range(count)]
        rows[-1] *= 30 if split == "test" else 1  # more subwords than the model has positions
        for code, text in (("uk", rows), ("en", [[WORDS[word] for word in row] for row in rows])):
            (folder / "raw" / f"{split}.{code}").write_text("".join(" ".join(row) + "\n" for row in text), "utf-8")

    def run(*arguments):
        command = ["bash", str(ROOT / "scripts" / "train_wmt23.sh"), "--pair", "uk-en", "--raw", str(folder / "raw")]
        command += ["--data", str(folder / "data"), "--out", str(folder / "run"), "--configs", str(folder)]
        command += ["--language-id", "none", "--max-pairs", "100", "--workers", "1", "--gpus", "0", *arguments]
        environment = os.environ | {"XMOE_VENV": sys.prefix, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        return result.returncode, result.stderr

    run.folder = folder
    return run


def test_the_data_of_a_pair_are_made_once_protected_and_trained_on(cell):
    code, errors = cell("--vocab-size", "40", "--data-only")
    assert code == 0, errors
    data = cell.folder / "data"
    assert len((data / "sample" / "train.uk").read_text(encoding="utf-8").splitlines()) == 100
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*.*") if ".stages" not in path.parts}

    code, errors = cell("--vocab-size", "41", "--data-only", "--sample-seed", "2")
    assert code == 2
    assert "  sample_seed: 1, now 2" in errors
    assert "--restart-data" in errors
    assert {path: path.stat().st_mtime_ns for path in before} == before

    cheap = ("--calibrate", "none")
    code, errors = cell("--vocab-size", "40", "--method", "tiny", "--average", "last:1", "--prepared", *cheap)
    assert code == 0, errors
    assert "binarise: kept" in errors
    report = json.loads((cell.folder / "run" / "scores.json").read_text(encoding="utf-8"))
    assert (report["data"]["train_pairs"], report["training"]["updates"]) == (100, 8)
    assert report["data"]["cut"] == {
        "lines": 8,
        "longest": report["data"]["cut"]["longest"],
        "max_length": 63,
        "cut": 1,
    }
    assert report["generation"]["max_len_b"] == 400
    assert report["inference"]["relative_flops"] > 0

    code, errors = cell("--vocab-size", "41", "--data-only", "--restart-data")
    assert code == 0, errors
    assert (cell.folder / "data.1" / "bin" / "dict.uk.txt").is_file()
    code, errors = cell("--vocab-size", "41", "--method", "tiny", "--average", "last:1")
    assert code == 2, "the run was trained on the data that are in data.1 now"
    assert "  content of dict.uk.txt" in errors
    assert (cell.folder / "run" / "checkpoints" / "checkpoint_last.pt").is_file()

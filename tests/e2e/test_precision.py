"""A whole language pair in float32, with --amp and with the bfloat16 settings of the WMT23 recipes, on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from eval.run.training_log import last_figures, read_records
from tests.e2e import stock
from tests.e2e.test_run_pair import CONFIG, Pipeline, write_corpus

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

SETTINGS = {
    "float16": ["common.amp=true"],
    "bfloat16": ["common.amp=true", "common.bf16=true"],
    "float32": [],
}
# Significant bits of the formats: 11 and 8.
ROUNDING = {"float16": 2**-11, "bfloat16": 2**-8}
QUIET = CONFIG.replace("_name: xmoe_transformer_tiny", "_name: xmoe_transformer_tiny\n  dropout: 0.0")
QUIET = QUIET.replace("lr: [0.01]", "lr: [0.003]").replace("max_tokens: 48", "max_tokens: 200")


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Validation loss after 40 updates: with --amp of a run from raw text to scores, else of its training alone.

    Checkpoints are float32 with each, so what follows the training is the same: test_run_pair.py has the rest of it.
    """
    folder = tmp_path_factory.mktemp("precision")
    write_corpus(folder)
    (folder / "tiny.yaml").write_text(QUIET)
    pipeline = Pipeline(folder)
    code, errors, _ = pipeline.run("--set", *SETTINGS["float16"], "--calibrate", "none", "--no-analysis")
    assert code == 0, errors
    assert pipeline.scores()["scores"]
    found = {"float16": loss_after_40(pipeline.out / "train.log")}
    for name in ("bfloat16", "float32"):
        train(folder, pipeline.out / "data-bin", name)
        found[name] = loss_after_40(folder / f"{name}.log")
    return found


def loss_after_40(log: Path) -> float:
    figures = last_figures(read_records(log), "valid")
    assert figures["num_updates"] == 40
    return figures["loss"]


def train(folder: Path, data_bin: Path, name: str) -> None:
    """As run_pair.sh trains, with other settings; into the folder and the log of that name."""
    settings = {
        "task.data": data_bin,
        "task.source_lang": "uk",
        "task.target_lang": "en",
        "checkpoint.save_dir": folder / name,
        "common.user_dir": stock.USER_DIR,
        "common.log_format": "json",
        "common.cpu": "true",
        "common.seed": 1,
        "dataset.update_epoch_batch_itr": "true",
    }
    command = [str(Path(sys.executable).with_name("fairseq-hydra-train")), "--config-dir", str(folder)]
    command += ["--config-name", "tiny", f"hydra.run.dir={folder}/hydra"]
    command += [f"++{key}={value}" for key, value in settings.items()]
    command += [f"++{setting}" for setting in SETTINGS[name]]
    with (folder / f"{name}.log").open("w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=200, check=True)


@pytest.mark.parametrize("name", list(ROUNDING))
def test_the_loss_is_that_of_float32_within_rounding(losses: dict[str, float], name: str) -> None:
    shown = 0.001  # both losses are logged with three decimals
    assert losses[name] == pytest.approx(losses["float32"], abs=ROUNDING[name] * losses["float32"] + shown)

"""scripts/train_wmt23.sh and scripts/slurm/: arguments, and the commands that --dry-run prints."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SBATCH = sorted((ROOT / "scripts" / "slurm").glob("*.sbatch"))
TRAINING_JOBS = [path for path in SBATCH if path.name != "data.sbatch"]


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``bash ARGUMENT...`` with the environment of the tests."""
    variables = {**os.environ, "XMOE_VENV": sys.prefix} | environment
    return subprocess.run(["bash", *map(str, arguments)], capture_output=True, text=True, env=variables, check=False)


def cell(folder: Path, *arguments: str, pair: str = "uk-en", method: str = "xmoe_64x1024") -> str:
    """What a dry run prints."""
    places = ("--data", folder / "data", "--out", folder / "run")
    script = ROOT / "scripts" / "train_wmt23.sh"
    result = run(script, "--pair", pair, "--method", method, "--dry-run", *places, *arguments)
    assert result.returncode == 0, result.stderr
    assert list(folder.iterdir()) == []
    assert subprocess.run(["bash", "-n"], input=result.stdout, text=True, check=False).returncode == 0
    return result.stdout


def test_a_cell_goes_from_the_download_to_the_score(tmp_path):
    printed = cell(tmp_path, "--seed", "7")
    parts = (
        f"download_wmt23.sh --pair uk-en --out {tmp_path}/data",
        "python -m data_prep.clean",
        "python -m data_prep.sample",
        "--max-pairs 10000000 --seed 1",
        "python -m data_prep.subwords learn --vocab-size 32000",
        "data_prep/binarise.sh",
        "torchrun --nnodes=1 --nproc-per-node=4",
        "fairseq-hydra-train",
        "--config-name xmoe_64x1024",
        "++common.seed=7",
        "xmoe_fairseq.checkpoints.average --best-of",
        "fairseq-generate",
        "--test-set flores200.devtest",
        "python -m eval.run_report",
    )
    places = [printed.rindex(part) for part in parts]
    assert places == sorted(places)
    assert f"--exclude {tmp_path}/data/raw/valid {tmp_path}/data/raw/test" in printed
    assert "--rdzv-endpoint=127.0.0.1:0" in printed
    assert "update_freq" not in printed, "the YAML is for 4 GPUs"


@pytest.mark.parametrize(("gpus", "update_freq"), [("0", 32), ("2", 16), ("32", 1)])
def test_other_numbers_of_gpus_keep_the_tokens_of_an_update(tmp_path, gpus, update_freq):
    printed = cell(tmp_path, "--gpus", gpus, pair="de-en", method="dense")
    assert f"++optimization.update_freq=\\[{update_freq}\\]" in printed
    assert (f"++distributed_training.distributed_world_size={gpus}" in printed) == (gpus != "0")
    assert ("torchrun" in printed) == (int(gpus) > 1)
    assert "--test-set wmt22" in printed


def test_own_text_is_neither_downloaded_nor_passed_off_as_the_papers_test(tmp_path):
    printed = cell(
        tmp_path, "--raw", "/text", "--gpus", "0", "--configs", str(ROOT / "train_configs/small"), method="meo"
    )
    assert "download" not in printed
    assert "--test-set test" in printed
    assert "++common.cpu=true" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--pair fr-en --method dense", "--pair must be one of uk-en, de-en, ru-en, he-en, zh-en; got 'fr-en'"),
        ("--pair uk-en --method magic", "xmoe_128x512 xmoe_64x1024; got 'magic'"),
        ("--pair uk-en", "--pair and --method are needed"),
        ("--pair uk-en --method dense --gpus 3", "an update has 32 batches, which 3 GPUs cannot share"),
        ("--pair uk-en --method dense --language-id fasttext", "--language-id is py3langid or none, got 'fasttext'"),
        ("--pair uk-en --method dense --raw x --recipes y", "--raw replaces the download; leave out --recipes"),
        ("--pair uk-en --method dense --raw x --without y", "--raw replaces the download"),
        ("--pair uk-en --data-only --prepared", "--prepared takes the data as they are"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    result = run(ROOT / "scripts" / "train_wmt23.sh", *arguments.split(), "--dry-run")
    assert result.returncode == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data-bin bin", "--data-bin and --subword-model go together"),
        ("--data-bin bin --subword-model sub --train t", "leave out --train and --valid"),
    ],
)
def test_run_pair_takes_prepared_data_whole_or_not_at_all(arguments, message):
    fixed = ("--pair", "uk-en", "--test", "t", "--out", "o", "--dry-run")
    result = run(ROOT / "scripts" / "run_pair.sh", *fixed, *arguments.split())
    assert (result.returncode, message in result.stderr) == (2, True)


@pytest.mark.parametrize("script", SBATCH, ids=lambda path: path.name)
def test_a_job_says_how_to_submit_it(script):
    result = run(script, "--help")
    assert (result.returncode, result.stdout.startswith("Usage: sbatch ")) == (0, True)
    outside = run(script, "--pair", "uk-en", "--method", "dense", SLURM_SUBMIT_DIR="/")
    assert (outside.returncode, "not the root of the project" in outside.stderr) == (2, True)


def test_jobs_train_on_all_their_gpus(tmp_path):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\nprintf 'node1\\nnode2\\n'\n")
    scontrol.chmod(0o755)
    job = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "41234",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_CPUS_PER_TASK": "8",
    }
    one, several = (run(script, "--pair", "uk-en", "--method", "dense", "--dry-run", **job) for script in TRAINING_JOBS)
    assert (one.returncode, one.stderr) == (several.returncode, several.stderr) == (0, "")
    assert "torchrun --nnodes=1 --nproc-per-node=2" in one.stdout
    launcher = "srun --nodes=2 --ntasks-per-node=1 --kill-on-bad-exit=1 torchrun --nnodes=2 --nproc-per-node=2"
    assert launcher in several.stdout
    assert "--rdzv-endpoint=node1:21234" in several.stdout
    assert "++distributed_training.distributed_world_size=4" in several.stdout


def test_the_cell_passes_on_what_the_translation_and_the_download_take(tmp_path):
    printed = cell(
        tmp_path, "--model-overrides", "{'moe_threshold': 0.7}", "--without", "A-b-1-eng-ukr", "--max-pairs", "0"
    )
    assert "--without A-b-1-eng-ukr" in printed
    assert "--model-overrides \\{\\'moe_threshold\\':\\ 0.7\\}" in printed
    assert "data_prep.sample" not in printed


def test_data_alone_need_no_method_and_train_nothing(tmp_path):
    script = ROOT / "scripts" / "train_wmt23.sh"
    printed = run(script, "--pair", "uk-en", "--data-only", "--dry-run", "--data", tmp_path / "data")
    assert printed.returncode == 0, printed.stderr
    assert "data_prep/binarise.sh" in printed.stdout
    assert "fairseq-hydra-train" not in printed.stdout
    refused = run(script, "--pair", "uk-en", "--method", "dense", "--prepared", "--data", tmp_path / "data")
    assert (refused.returncode, "are not ready; first run" in refused.stderr) == (1, True)


TRAINER = """
echo "$*" >"$CALLS"
trap 'exit 75' USR1
touch "$READY"
while :; do sleep 0.1; done
"""


@pytest.mark.parametrize(("restarts", "queued"), [("0", True), ("50", False)])
def test_a_job_near_its_time_limit_saves_and_is_queued_again(tmp_path, restarts, queued):
    (tmp_path / "scripts").mkdir()
    for name in ("lib.sh", "stages.sh"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts")
    (tmp_path / "scripts" / "train_wmt23.sh").write_text(TRAINER)
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$*" >{tmp_path}/requeued\n')
    (tmp_path / "scontrol").chmod(0o755)
    job = {
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "7",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_RESTART_COUNT": restarts,
    }
    places = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": f"{tmp_path}/calls", "READY": f"{tmp_path}/ready"}
    process = subprocess.Popen(
        ["bash", ROOT / "scripts" / "slurm" / "one_node.sbatch", "--pair", "uk-en", "--restart"],
        env=os.environ | job | places,
    )
    while not (tmp_path / "ready").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=20) == 75
    assert (tmp_path / "requeued").exists() == queued
    # a new start is asked for once: the job that is queued again continues
    assert ("--restart" in (tmp_path / "calls").read_text()) == (restarts == "0")
    if queued:
        assert (tmp_path / "requeued").read_text() == "requeue 7\n"

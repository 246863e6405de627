"""scripts/train_wmt23.sh and scripts/slurm/: arguments, and the commands that --dry-run prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SBATCH = sorted((ROOT / "scripts" / "slurm").glob("*.sbatch"))


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


@pytest.mark.parametrize(("gpus", "update_freq"), [("1", 32), ("2", 16), ("8", 4), ("32", 1)])
def test_other_numbers_of_gpus_keep_the_tokens_of_an_update(tmp_path, gpus, update_freq):
    printed = cell(tmp_path, "--gpus", gpus, pair="de-en", method="dense")
    assert f"++optimization.update_freq=\\[{update_freq}\\]" in printed
    assert f"++distributed_training.distributed_world_size={gpus}" in printed
    assert ("torchrun" in printed) == (gpus != "1")
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
    one, several = (run(script, "--pair", "uk-en", "--method", "dense", "--dry-run", **job) for script in SBATCH)
    assert (one.returncode, one.stderr) == (several.returncode, several.stderr) == (0, "")
    assert "torchrun --nnodes=1 --nproc-per-node=2" in one.stdout
    launcher = "srun --nodes=2 --ntasks-per-node=1 --kill-on-bad-exit=1 torchrun --nnodes=2 --nproc-per-node=2"
    assert launcher in several.stdout
    assert "--rdzv-endpoint=node1:21234" in several.stdout
    assert "++distributed_training.distributed_world_size=4" in several.stdout

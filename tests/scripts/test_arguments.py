"""The scripts' command lines: help, errors by their text, and --dry-run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCED = ("lib.sh", "stages.sh", "model_run.sh", "pair_data.sh")  # by the others
COMMANDS = sorted(path for path in (ROOT / "scripts").rglob("*.sh") if path.name not in SOURCED)


def run_script(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XMOE_VENV": sys.prefix}
    command = ["bash", str(ROOT / "scripts" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", check=False)


def run_pair_arguments(folder: Path, **changed: str) -> list[str]:
    values = {
        "pair": "uk-en",
        "train": "raw/train",
        "valid": "raw/valid",
        "test": "raw/test",
        "out": str(folder / "out"),
    }
    values |= {name.replace("_", "-"): value for name, value in changed.items()}
    return [text for name, value in values.items() for text in (f"--{name}", value)]


@pytest.mark.parametrize("script", COMMANDS, ids=lambda path: path.name)
def test_help_says_how_to_use_the_script(script):
    result = subprocess.run(["bash", script, "--help"], capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert result.stdout.startswith(f"Usage: {script.relative_to(ROOT)}")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pair": "uken"}, "--pair wants two language codes such as uk-en, got 'uken'"),
        ({"pair": "en-en"}, "--pair wants two different languages, got 'en-en'"),
        ({"seed": "-1"}, "--seed wants a whole number of at least 0, got '-1'"),
        ({"beam": "0"}, "--beam wants a whole number of at least 1, got '0'"),
        ({"user_dir": "nowhere"}, "--user-dir wants a package, a folder with __init__.py, got 'nowhere'"),
        ({"max_len_b": "0"}, "--max-len-a and --max-len-b are both 0"),
        ({"lenpen": "long"}, "--lenpen wants a number such as 1.0, got 'long'"),
        ({"average": "5"}, "--average wants last:N or best:N such as last:5, got '5'"),
        ({"subwords": "wordpiece"}, "--subwords is sentencepiece or subword-nmt, got 'wordpiece'"),
        ({"device": "tpu"}, "--device is cpu, cuda or auto, got 'tpu'"),
        ({"set": "max_update=3"}, "--set wants GROUP.KEY=VALUE such as optimization.max_update=2000"),
        ({"config": "none.yaml"}, "--config: no such file: 'none.yaml'"),
        ({"config": "setup.cfg"}, "--config wants a file that ends in .yaml, got 'setup.cfg'"),
        ({"colour": "red"}, "unknown argument --colour; see --help"),
    ],
)
def test_run_pair_refuses_bad_arguments(tmp_path, changed, message):
    result = run_script("run_pair.sh", *run_pair_arguments(tmp_path, **changed))
    assert result.returncode == 2
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", ["run_pair.sh", "run_lm.sh"])
def test_a_folder_of_the_users_own_is_left_as_it_is(tmp_path, script):
    (tmp_path / "out" / "data-bin").mkdir(parents=True)
    (tmp_path / "out" / "data-bin" / "mine").write_text("mine")
    arguments = run_pair_arguments if script == "run_pair.sh" else run_lm_arguments
    result = run_script(script, *arguments(tmp_path, device="cpu"))
    assert result.returncode == 2
    assert "is no folder of such a run and has a 'data-bin'" in result.stderr
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["data-bin", "mine"]


def test_run_pair_names_the_missing_argument(tmp_path):
    result = run_script("run_pair.sh", *run_pair_arguments(tmp_path)[:-2])
    assert (result.returncode, "--out is missing" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--pair", "fr-en"],
            "the demo's corpus exists for uk-en, de-en, ru-en, he-en and zh-en, got 'fr-en'",
        ),
        (["--method", "magic"], "--method is one of: "),
        (["--method", "dense", "--compare"], "--compare trains every method; leave out --method"),
        (["--seed"], "--seed needs a value"),
    ],
)
def test_demo_refuses_bad_arguments(arguments, message):
    result = run_script("demo.sh", *arguments)
    assert result.returncode == 2
    assert message in result.stderr


def test_setup_refuses_an_unknown_argument():
    result = run_script("setup.sh", "--fast")
    assert (result.returncode, "unknown argument --fast" in result.stderr) == (2, True)


def test_dry_run_prints_every_command_and_writes_nothing(tmp_path):
    arguments = run_pair_arguments(tmp_path, device="cpu", seed="7")
    result = run_script("run_pair.sh", *arguments, "--dry-run")
    assert result.returncode == 0, result.stderr
    for part in (
        "python -m data_prep.validate --pair uk-en",
        "python -m data_prep.subwords learn --tool sentencepiece",
        "fairseq-preprocess ",
        "fairseq-hydra-train ",
        "++common.seed=7",
        "python -m xmoe_fairseq.checkpoints.average",
        "fairseq-generate ",
        "--required-batch-size-multiple 1",
        "python -m eval.score",
        "python -m eval.run_report",
    ):
        assert part in result.stdout
    assert subprocess.run(["bash", "-n"], input=result.stdout, text=True, check=False).returncode == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", ["run_pair.sh", "run_lm.sh"])
def test_a_package_of_the_users_own_reaches_every_command_that_loads_a_model(tmp_path, script):
    arguments = run_pair_arguments if script == "run_pair.sh" else run_lm_arguments
    own = str(ROOT / "tests" / "e2e" / "own_router")
    result = run_script(script, *arguments(tmp_path, device="cpu", user_dir=own), "--dry-run")
    assert result.returncode == 0, result.stderr
    assert f"{ROOT}/xmoe_fairseq" not in result.stdout
    assert result.stdout.count(own) == (6 if script == "run_pair.sh" else 4)


def run_lm_arguments(folder: Path, **changed: str) -> list[str]:
    values = {"language": "en", "train": "raw/train", "valid": "raw/valid", "test": "raw/test", "out": f"{folder}/out"}
    values |= {name.replace("_", "-"): value for name, value in changed.items()}
    return [text for name, value in values.items() for text in (f"--{name}", value)]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"language": "en-de"}, "--language wants a language code such as en, got 'en-de'"),
        ({"sweep": "1.5"}, "--sweep wants a threshold in [0, 1] such as 0.7, got '1.5'"),
        ({"data_bin": "bin"}, "--data-bin brings all text; leave out --train, --valid and --test"),
        ({"calibrate": "cheap"}, "--calibrate wants loss:BITS or budget:X"),
    ],
)
def test_run_lm_refuses_bad_arguments(tmp_path, changed, message):
    result = run_script("run_lm.sh", *run_lm_arguments(tmp_path, **changed))
    assert result.returncode == 2
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_run_lm_prints_every_command(tmp_path):
    result = run_script("run_lm.sh", *run_lm_arguments(tmp_path, device="cpu", sweep="0.5"), "--dry-run")
    assert result.returncode == 0, result.stderr
    for part in (
        "python -m data_prep.validate --language en",
        "fairseq-preprocess --only-source",
        "fairseq-hydra-train ",
        "python -m eval.perplexity ",
        "--thresholds 0.5 --skip-others",
        "--check-subset test",
        "python -m eval.lm_report",
    ):
        assert part in result.stdout
    assert "source_lang" not in result.stdout
    assert subprocess.run(["bash", "-n"], input=result.stdout, text=True, check=False).returncode == 0
    assert list(tmp_path.iterdir()) == []

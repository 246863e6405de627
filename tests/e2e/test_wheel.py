"""The wheel in environments that hold only what it declares, and in one with fairseq. No network is asked."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from xmoe_fairseq import __version__

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def run(command, folder, *, code=0):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(word) for word in command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of what it is made of."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT / "xmoe_fairseq", source / "xmoe_fairseq", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    run([*build, "--no-build-isolation", "--wheel-dir", target, source], source)
    (built,) = target.glob("*.whl")
    return built


def requirements_of(names):
    """Distributions that ``names`` need, themselves included, as installed here; markers and extras are read."""
    from packaging.requirements import Requirement

    found, waiting = {}, [Requirement(name) for name in names]
    while waiting:
        requirement = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        key = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if key not in found:
            found[key] = importlib.metadata.distribution(requirement.name)
            waiting += [Requirement(line) for line in found[key].requires or ()]
    return found.values()


def environment(folder, distributions):
    """A virtual environment whose site-packages hold links to ``distributions`` and nothing else."""
    run([sys.executable, "-m", "venv", "--without-pip", folder], folder.parent)
    (site,) = folder.glob("lib/python3*/site-packages")
    for distribution in distributions:
        for first in {path.parts[0] for path in distribution.files if path.parts[0] not in ("..", "__pycache__")}:
            if not (site / first).exists():
                (site / first).symlink_to(distribution.locate_file(first))
    return folder / "bin" / "python", site


def install(wheel, python, *flags):
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, "--no-index", *flags, wheel], wheel.parent)


def readme_python():
    """The first Python of README.md."""
    return re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)[1]


def test_the_layer_alone_runs_from_the_wheel_and_what_it_declares(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        told = archive.read(metadata).decode()
        files = {name for name in archive.namelist() if name.startswith("xmoe_fairseq/")}
    assert f"\nVersion: {__version__}\n" in told
    extras = set(re.findall(r"^Provides-Extra: (\S+)$", told, re.MULTILINE))
    assert extras == {"completion", "fairseq", "safetensors", "triton", "dev"}
    ours = subprocess.run(["git", "ls-files", "xmoe_fairseq"], cwd=ROOT, capture_output=True, text=True, check=False)
    if ours.returncode == 0:  # not in a copy without its history
        assert set(ours.stdout.split()) <= files
    needs = [line for line in re.findall(r"^Requires-Dist: (.*)$", told, re.MULTILINE) if "extra ==" not in line]

    python, site = environment(tmp_path / "empty", requirements_of(needs))
    assert not (site / "fairseq").exists()
    install(wheel, python)
    assert len([line for line in readme_python().splitlines() if line]) == 5
    run([python, "-W", "error::ImportWarning", "-c", readme_python()], tmp_path)
    xmoe = python.parent / "xmoe"
    assert run([xmoe, "--version"], tmp_path).stdout == f"xmoe {__version__}\n"
    assert "xmoe translate needs the module eval.translate" in run([xmoe, "translate"], tmp_path, code=1).stderr
    assert "needs fairseq, which is not installed" in run([xmoe, "checkpoint", "inspect"], tmp_path, code=1).stderr


@pytest.mark.skipif(find_spec("fairseq") is None, reason="fairseq is not installed")
def test_beside_fairseq_the_wheel_registers_its_models_and_its_commands_run(wheel, tmp_path):
    everything = [found for found in importlib.metadata.distributions() if found.metadata["Name"] != "xmoe-fairseq"]
    python, site = environment(tmp_path / "with-fairseq", everything)
    install(wheel, python, "--no-deps")
    code = (
        "from fairseq import options, utils; from argparse import Namespace;"
        f"utils.import_user_module(Namespace(user_dir={str(site / 'xmoe_fairseq')!r}));"
        "from fairseq.models import ARCH_MODEL_REGISTRY as archs; import xmoe_fairseq;"
        "print('xmoe_transformer' in archs, xmoe_fairseq.__file__)"
    )
    said = run([python, "-W", "ignore", "-c", code], tmp_path).stdout.split()
    assert said == ["True", str(site / "xmoe_fairseq" / "__init__.py")]
    missing = run([python.parent / "xmoe", "checkpoint", "inspect", "absent.pt"], tmp_path, code=1)
    assert missing.stderr.splitlines()[-1].startswith("inspect: error: ")

"""One helper changes fairseq: named, once, and listed in docs/patches.md."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

from fairseq import checkpoint_utils

from xmoe_fairseq import patches
from xmoe_fairseq.patches import expert_parallel
from xmoe_fairseq.patches.wrap import INSTALLED, patches_of, wrap

ROOT = Path(__file__).parents[2]


class Target:
    """Something to patch."""

    def method(self, number):
        return number

    @staticmethod
    def static(number):
        return number


def test_a_wrapper_runs_once_however_often_it_is_installed(monkeypatch):
    monkeypatch.setattr("xmoe_fairseq.patches.wrap.INSTALLED", {})
    for _ in range(2):
        wrap(Target, "method", "doubled", lambda original, target, number: 2 * original(target, number))
        wrap(Target, "static", "doubled", lambda original, number: 2 * original(number))
        wrap(Target, "method", "plus-one", lambda original, target, number: 1 + original(target, number))
    assert (Target().method(3), Target.static(3), Target().static(3)) == (7, 6, 6)
    assert patches_of(Target.method) == ("doubled", "plus-one")
    assert Target.method.__doc__ is None
    assert Target.method.__name__ == "method"


def test_a_plain_function_has_no_patches():
    assert patches_of(SimpleNamespace()) == ()


def test_installing_everything_again_changes_nothing():
    patches.install()
    before = checkpoint_utils.load_checkpoint_to_cpu
    patches.install()
    assert checkpoint_utils.load_checkpoint_to_cpu is before


def test_the_docs_list_exactly_the_patches_that_there_are():
    patches.install()
    expert_parallel.install()
    sources = "".join(path.read_text() for path in (ROOT / "xmoe_fairseq" / "patches").glob("*.py"))
    named = set(re.findall(r'wrap\([^"]*?"\w+", "([\w-]+)"', sources)) | set(
        re.findall(r'INSTALLED\["([\w-]+)"\]', sources)
    )
    listed = re.findall(r"^\| `([\w-]+)` \|", (ROOT / "docs" / "patches.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(named)
    assert set(INSTALLED) <= named


def test_fairseq_is_changed_nowhere_else():
    """Assignments to attributes of imported fairseq names, outside the folder of the patches."""
    found = []
    for path in (ROOT / "xmoe_fairseq").rglob("*.py"):
        if path.parent.name == "patches":
            continue
        source = path.read_text()
        modules = re.findall(r"^from fairseq[\w.]* import (.+)$", source, re.MULTILINE)
        names = {name.split(" as ")[-1].strip(" ()") for line in modules for name in line.split(",")} - {""}
        found += [
            f"{path.name}: {name}"
            for name in names
            if re.search(rf"(^\s*{name}\.\w+(\.\w+)* = )|(setattr\({name}\b)", source, re.MULTILINE)
        ]
    assert not found

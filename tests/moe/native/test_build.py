"""Without a compiler, or without a usable library, the reason is told and torch's operators remain."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from xmoe_fairseq.moe.native import build, library


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The library's place, empty; what was found before is forgotten, also afterwards."""
    place = tmp_path / "rows-test.so"
    for module in (build, library):
        monkeypatch.setattr(module, "library_file", lambda: place)
    for found in (library._library, library.chosen_path):
        found.cache_clear()
    yield place
    for found in (library._library, library.chosen_path):
        found.cache_clear()


@pytest.mark.parametrize(
    ("compiler", "reason"), [("false", "the compiler ended with 1"), ("no-such-compiler", "No such")]
)
def test_a_failed_build_says_why(
    compiler: str, reason: str, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr("sys.argv", ["native"])
    assert build.main() == 1
    assert reason in capsys.readouterr().err
    assert not elsewhere.exists()


def test_without_the_library_torch_remains(elsewhere: Path) -> None:
    assert library.available_paths() == ["torch"]
    assert library.chosen_path() == "torch"


def test_a_library_that_cannot_be_loaded_is_passed_over(elsewhere: Path, caplog: pytest.LogCaptureFixture) -> None:
    elsewhere.write_bytes(b"not a library")
    assert library.available_paths() == ["torch"]
    assert "cannot be loaded" in caplog.text

"""scripts/lib.sh: which stages run, which are kept, what an interruption leaves."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PIPELINE = """
set -euo pipefail
. "$1/scripts/lib.sh"
out=$2 stages=(first second third) results=("$2/result") results_stage=third
do_first() { echo "first${resumed:+ resumed}" >>"$out/ran"; }
do_second() { echo "second${resumed:+ resumed}" >>"$out/ran"; [[ ! -f $out/broken ]]; }
do_third() { echo "third${resumed:+ resumed}" >>"$out/ran"; echo done >"$out/result"; }
clean_second() { echo "clean second" >>"$out/ran"; }
trap report_failed_stage EXIT
stage first do_first "$3" "$out/input"
stage second do_second "$4" "$out/input"
stage third do_third "$5" "$out/input"
"""


@pytest.fixture
def pipeline(tmp_path):
    """A function that runs three stages with these settings; returns its result and the stages that ran."""
    (tmp_path / "input").write_text("text")

    def run(*settings):
        (tmp_path / "ran").write_text("")
        command = ["bash", "-c", PIPELINE, "pipeline", ROOT, tmp_path, *settings]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        return result, (tmp_path / "ran").read_text().split("\n")[:-1]

    return run


def test_nothing_changed_keeps_every_stage(pipeline):
    assert pipeline("a", "b", "c")[1] == ["first", "clean second", "second", "third"]
    result, ran = pipeline("a", "b", "c")
    assert ran == []
    assert [line.split("pipeline: ")[-1] for line in result.stderr.splitlines()] == [
        "first: kept",
        "second: kept",
        "third: kept",
    ]


def test_a_changed_setting_runs_that_stage_and_all_later_ones(pipeline):
    pipeline("a", "b", "c")
    assert pipeline("a", "B", "c")[1] == ["clean second", "second", "third"]
    assert pipeline("a", "b", "c")[1] == ["clean second", "second", "third"]


def test_a_changed_input_runs_its_stages(pipeline, tmp_path):
    pipeline("a", "b", "c")
    (tmp_path / "input").write_text("other text")
    assert pipeline("a", "b", "c")[1] == ["first", "clean second", "second", "third"]


def test_a_failed_stage_is_named_and_continued(pipeline, tmp_path):
    pipeline("a", "b", "c")
    (tmp_path / "broken").touch()
    result, ran = pipeline("a", "B", "c")
    assert (result.returncode, ran) == (1, ["clean second", "second"])
    assert "stage 'second' failed" in result.stderr
    assert not (tmp_path / "result").exists(), "the result of the older settings must not stay"
    (tmp_path / "broken").unlink()
    assert pipeline("a", "B", "c")[1] == ["second resumed", "third"]


def test_other_settings_after_an_interruption_start_afresh(pipeline, tmp_path):
    (tmp_path / "broken").touch()
    pipeline("a", "b", "c")
    (tmp_path / "broken").unlink()
    assert pipeline("a", "B", "c")[1] == ["clean second", "second", "third"]


def test_a_missing_input_is_named(pipeline, tmp_path):
    (tmp_path / "input").unlink()
    result, ran = pipeline("a", "b", "c")
    assert (result.returncode, ran) == (1, [])
    assert f"no such file: {tmp_path}/input" in result.stderr


def test_a_stage_after_the_results_leaves_them(tmp_path):
    (tmp_path / "input").write_text("text")
    later = PIPELINE.replace("second third)", "second third fourth)") + 'stage fourth do_fourth "$6" "$out/input"\n'
    later = later.replace("trap", 'do_fourth() { grep -q done "$out/result"; }\ntrap')
    for settings in ("x", "y"):  # the second time only the fourth stage runs
        command = ["bash", "-c", later, "pipeline", ROOT, tmp_path, "a", "b", "c", settings]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "third: kept" in done.stderr
    assert "fourth: start" in done.stderr

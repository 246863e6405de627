"""scripts/lib.sh and stages.sh: which stages run, which are kept, what an interruption leaves."""

from __future__ import annotations

import hashlib
import os
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PIPELINE = """
set -euo pipefail
. "$1/scripts/lib.sh"
out=$2 stages=(first second third) results=("$2/result") results_stage=third
do_first() { echo first >>"$out/ran"; }
do_second() { echo second >>"$out/ran"; [[ ! -f $out/broken ]]; }
do_third() { echo third >>"$out/ran"; echo done >"$out/result"; }
trap report_failed_stage EXIT
stage first do_first "letter=$3" -- "$out/input"
stage second do_second "letter=$4" -- "$out/input"
stage third do_third "letter=$5" -- "$out/input"
"""
SETTLED = PIPELINE.replace("trap", "settled=(first second) way_out='go away'\ntrap")


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
    assert pipeline("a", "b", "c")[1] == ["first", "second", "third"]
    result, ran = pipeline("a", "b", "c")
    assert ran == []
    assert [line.split("pipeline: ")[-1] for line in result.stderr.splitlines()] == [
        "first: kept",
        "second: kept",
        "third: kept",
    ]


def test_a_changed_setting_runs_that_stage_and_all_later_ones(pipeline):
    pipeline("a", "b", "c")
    assert pipeline("a", "B", "c")[1] == ["second", "third"]
    assert pipeline("a", "b", "c")[1] == ["second", "third"]


def test_a_changed_input_runs_its_stages(pipeline, tmp_path):
    pipeline("a", "b", "c")
    (tmp_path / "input").write_text("other text")
    assert pipeline("a", "b", "c")[1] == ["first", "second", "third"]


def test_a_failed_stage_is_named_and_continued(pipeline, tmp_path):
    pipeline("a", "b", "c")
    (tmp_path / "broken").touch()
    result, ran = pipeline("a", "B", "c")
    assert (result.returncode, ran) == (1, ["second"])
    assert "stage 'second' failed" in result.stderr
    assert not (tmp_path / "result").exists(), "the result of the older settings must not stay"
    (tmp_path / "broken").unlink()
    assert pipeline("a", "B", "c")[1] == ["second", "third"]


def test_a_missing_input_is_named(pipeline, tmp_path):
    (tmp_path / "input").unlink()
    result, ran = pipeline("a", "b", "c")
    assert (result.returncode, ran) == (1, [])
    assert f"no such file: {tmp_path}/input" in result.stderr


def test_a_stage_after_the_results_leaves_them(tmp_path):
    (tmp_path / "input").write_text("text")
    later = (
        PIPELINE.replace("second third)", "second third fourth)")
        + 'stage fourth do_fourth "letter=$6" -- "$out/input"\n'
    )
    later = later.replace("trap", 'do_fourth() { grep -q done "$out/result"; }\ntrap')
    for settings in ("x", "y"):  # the second time only the fourth stage runs
        command = ["bash", "-c", later, "pipeline", ROOT, tmp_path, "a", "b", "c", settings]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "third: kept" in done.stderr
    assert "fourth: start" in done.stderr


def test_a_settled_stage_stops_and_names_what_differs(pipeline, tmp_path):
    pipeline("a", "b", "c")
    (tmp_path / "input").write_text("other text")
    command = ["bash", "-c", SETTLED, "pipeline", ROOT, tmp_path, "a", "B", "c"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "stage 'first' in" in refused.stderr
    assert "\n  content of input\n" in refused.stderr
    assert "keep both, or go away; nothing was changed" in refused.stderr
    (tmp_path / "input").write_text("text")
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "\n  letter: b, now B\n" in refused.stderr
    assert pipeline("a", "b", "c")[1] == []


def test_a_file_is_hashed_again_only_if_it_changed(tmp_path):
    """The cache knows content by the inode's times: a rewritten file of equal size and mtime is read again."""
    (tmp_path / ".stages").mkdir()
    text = tmp_path / "text = (x"
    text.write_text("one")
    times = (time.time_ns() - 10**10, time.time_ns() - 10**10)
    script = """
        set -euo pipefail; . "$1/scripts/lib.sh"; out=$2
        date() { if [[ $* == +%s ]]; then command date -d '+1 hour' +%s; else command date "$@"; fi; }
        sha256sum() { echo "read" >&2; command sha256sum; }
        checksum "$3"
    """

    def checksum():
        command = ["bash", "-c", script, "-", ROOT, tmp_path, text]
        return subprocess.run(command, capture_output=True, text=True, check=True)

    for content in ("one", "two"):
        text.write_text(content)
        os.utime(text, ns=times)
        expected = hashlib.sha256(content.encode()).hexdigest() + "\n"
        first, second = checksum(), checksum()
        assert (first.stdout, first.stderr) == (expected, "read\n")
        assert (second.stdout, second.stderr) == (expected, "")


@pytest.mark.parametrize(("signal", "code", "said"), [("USR1", 75, "stopped by a signal"), ("TERM", 143, "failed")])
def test_a_signal_ends_a_stage_at_once(tmp_path, signal, code, said):
    script = """
        set -euo pipefail; . "$1/scripts/lib.sh"; out=$2 stages=(long)
        long() { sleep 60; }
        trap report_failed_stage EXIT
        kill_soon() { sleep 0.5; kill -"$1" "$2"; }
        kill_soon "$3" $$ &
        stage long long
    """
    command = ["bash", "-c", script, "pipeline", ROOT, tmp_path, signal]
    stopped = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert (stopped.returncode, said in stopped.stderr) == (code, True)


def test_flags_are_read_alike_everywhere():
    script = """
        set -euo pipefail; . "$1/scripts/lib.sh"; shift
        usage() { echo help; }
        flags=(out max-update 'set:overrides[]') switches=(dry-run unit:unit_only) overrides=()
        read_flags "$@"
        printf '%s\n' "$out" "$max_update" "$dry_run" "$unit_only" "${#overrides[@]}" "${overrides[@]}" "${rest[@]}"
    """
    words = ["--out", "a b", "--set", "x=$(y)", "--max-update=3", "--unit", "--set", "it's", "--", "--rest"]
    read = subprocess.run(["bash", "-c", script, "-", ROOT, *words], capture_output=True, text=True, check=True)
    assert read.stdout.splitlines() == ["a b", "3", "", "yes", "2", "x=$(y)", "it's", "--rest"]
    for word, message in (
        ("--colour", "unknown argument --colour"),
        ("unit", "unknown argument unit"),
        ("--out", "--out needs a value"),
    ):
        refused = subprocess.run(["bash", "-c", script, "-", ROOT, word], capture_output=True, text=True, check=False)
        assert (refused.returncode, message in refused.stderr) == (2, True)


def test_cores_do_not_depend_on_the_threads_of_a_process():
    script = '. "$1/scripts/lib.sh"; num_cores'
    command = ["env", "OMP_NUM_THREADS=1", "bash", "-c", script, "-", str(ROOT)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(found.stdout) == len(os.sched_getaffinity(0))


def test_a_name_of_the_last_release_is_taken_with_a_warning():
    script = """
        set -euo pipefail; . "$1/scripts/lib.sh"; shift
        flags=(out) old_flags=(json:out)
        read_flags "$@"
        printf '%s\\n' "$out"
    """
    for words in (["--json", "x y"], ["--json=x y"]):
        read = subprocess.run(["bash", "-c", script, "-", ROOT, *words], capture_output=True, text=True, check=False)
        assert (read.returncode, read.stdout) == (0, "x y\n"), read.stderr
        assert "--json is now --out; the old name goes in the next release" in read.stderr

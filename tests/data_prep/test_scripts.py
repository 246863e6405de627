"""The shell entry points: arguments, printed lines, checksums."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def shell(script, *arguments):
    command = ["bash", str(ROOT / "data_prep" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", ["download_wmt23.sh", "binarise.sh", "checksums.sh"])
def test_help_and_unknown_arguments(script):
    helped = shell(script, "--help")
    assert helped.returncode == 0
    assert helped.stdout.startswith(f"Usage: data_prep/{script}")
    refused = shell(script, "--nonsense", "x")
    assert refused.returncode == 2
    assert "--nonsense" in refused.stderr


@pytest.mark.parametrize(
    ("pair", "code", "test_set"),
    [
        ("uk-en", "ukr", "Flores-flores200_devtest-1-eng-ukr"),
        ("he-en", "heb", "Flores-flores200_devtest-1-eng-heb"),
        ("de-en", "deu", "Statmt-generaltest-2022_refA-deu-eng"),
        ("ru-en", "rus", "Statmt-generaltest-2022_refA-rus-eng"),
        ("zh-en", "zho", "Statmt-generaltest-2022_refA-zho-eng"),
    ],
)
def test_dry_run_prints_every_download(pair, code, test_set, tmp_path):
    printed = shell("download_wmt23.sh", "--pair", pair, "--out", tmp_path / "out", "--dry-run")
    assert printed.returncode == 0, printed.stderr
    assert f"--langs {code}-eng" in printed.stdout
    assert f"--test {test_set}" in printed.stdout
    listed = [line.split()[2] for line in printed.stdout.splitlines() if line.startswith("#   train")]
    assert listed, "the corpora are listed"
    # mtdata's names end in the language for a monolingual corpus, in two languages for parallel text
    assert all(len(name.split("-")) == 5 and {"eng", code} & set(re.split("[-_]", name)) for name in listed)
    assert not [name for name in listed if "backtrans" in name]
    assert f"--train {' '.join(listed)} --merge" in printed.stdout
    assert "get-recipe" not in printed.stdout
    assert not (tmp_path / "out").exists()


def test_back_translation_comes_only_when_asked_for():
    printed = shell("download_wmt23.sh", "--pair", "ru-en", "--with-back-translation", "--dry-run").stdout
    assert "#   train  Statmt-backtrans_ruen-wmt20-rus-eng" in printed
    assert "back-translation included" in printed


MTDATA = """#!/usr/bin/env bash
# Stands for mtdata: writes two lines a corpus, and fails for those whose name is in $DEAD.
set -euo pipefail
echo "$*" >>"$CALLS"
case $1 in
--version) echo "mtdata 0.5.1 /somewhere" ;;
list-recipe)
    echo '{"id": "wmt23-ruen", "train": ["A-a-1-eng-rus", "Statmt-backtrans-1-rus-eng"], "mono_train": ["M-m-1-rus"]}'
    ;;
get)
    while (($#)); do
        case $1 in
        --out) out=$2 ;;
        --train) train=yes ;;
        *-*-*-*-*) [[ -z ${train-} ]] || names+=("$1") ;;
        --merge) train='' ;;
        esac
        shift
    done
    mkdir -p "$out/train-parts"
    rm -f "$out/train.rus"
    for name in "${names[@]-}"; do
        [[ -n $name ]] || continue
        if [[ " ${DEAD-} " == *" $name "* ]]; then
            printf '%s\\tnot found\\n' "$name" >>"$out/errors.tsv"
        else
            printf 'a\\nb\\n' | tee "$out/train-parts/$name.rus" "$out/train-parts/$name.eng" >>"$out/train.rus"
        fi
    done
    [[ ! -f $out/train.rus ]] || cp "$out/train.rus" "$out/train.eng"
    for split in dev test1; do for code in rus eng; do echo x >"$out/$split.$code"; done; done
    ;;
esac
"""


@pytest.fixture
def download(tmp_path):
    """download_wmt23.sh --pair ru-en with an mtdata that downloads nothing; returns result and mtdata's calls."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    for name, text in {"mtdata": MTDATA, "python": f'#!/bin/sh\nexec {sys.executable} "$@"\n'}.items():
        (tmp_path / "venv" / "bin" / name).write_text(text)
        (tmp_path / "venv" / "bin" / name).chmod(0o755)

    def run(*arguments, dead=""):
        (tmp_path / "calls").write_text("")
        environment = {"XMOE_MTDATA_VENV": str(tmp_path / "venv"), "CALLS": str(tmp_path / "calls"), "DEAD": dead}
        command = ["bash", str(ROOT / "data_prep/download_wmt23.sh"), "--pair", "ru-en", "--out", str(tmp_path / "out")]
        command += map(str, arguments)
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
        return result, (tmp_path / "calls").read_text().splitlines()

    run.out = tmp_path / "out"
    return run


def test_a_dead_address_is_named_and_can_be_left_out_by_name(download):
    dead = "Tilde-airbaltic-1-eng-rus"
    result, _ = download(dead=dead)
    assert result.returncode == 1
    assert f"add --without {dead}" in result.stderr
    assert not (download.out / "raw" / "train.ru").exists()
    result, calls = download("--without", dead, dead=dead)
    assert result.returncode == 0, result.stderr
    assert not any(dead in call or "mono" in call for call in calls)
    corpora = dict(line.split("\t") for line in (download.out / "corpora.tsv").read_text().splitlines())
    assert corpora[dead] == "left out by --without"
    assert corpora["Statmt-backtrans_ruen-wmt20-rus-eng"].startswith("machine-translated")
    assert corpora["Tilde-czechtourism-1-eng-rus"] == "2"
    assert len((download.out / "raw" / "train.ru").read_text().splitlines()) == 2 * 9
    # finished text is not fetched anew with another choice: trainings may build on it
    refused, calls = download()
    assert (refused.returncode, "corpora: " in refused.stderr) == (2, True)
    assert not any(call.startswith("get") for call in calls)
    assert "no such corpus" not in refused.stderr
    wrong, _ = download("--without", "Nobody-nothing-1-eng-rus")
    assert (wrong.returncode, "--without Nobody-nothing-1-eng-rus: the pair has" in wrong.stderr) == (2, True)


def test_of_a_recipe_only_the_parallel_text_people_wrote_is_taken(download, tmp_path):
    (tmp_path / "recipes.yml").write_text("- id: wmt23-ruen\n")
    result, calls = download("--recipes", tmp_path / "recipes.yml")
    assert result.returncode == 0, result.stderr
    (trained,) = [call for call in calls if "--train" in call]
    assert "--train A-a-1-eng-rus --merge" in trained


def test_download_refuses_other_pairs():
    refused = shell("download_wmt23.sh", "--pair", "fr-en")
    assert refused.returncode == 2
    assert "--pair must be one of uk-en, de-en, ru-en, he-en, zh-en; got 'fr-en'" in refused.stderr


def test_binarise_names_what_is_missing(tmp_path):
    flags = ["--pair", "uk-en", "--train", "a", "--valid", "b", "--test", "c", "--out", tmp_path / "out"]
    refused = shell("binarise.sh", *flags)
    assert refused.returncode == 2
    assert "--subwords is needed" in refused.stderr
    (tmp_path / "subwords.json").write_text("{}")
    missing = shell("binarise.sh", *flags, "--subwords", tmp_path)
    assert missing.returncode == 1
    assert "/a.uk is missing or empty" in missing.stderr
    assert not (tmp_path / "out").exists()


def test_binarise_cuts_test_lines_that_would_stop_the_translation(tmp_path):
    (tmp_path / "subwords.json").write_text("{}")
    for split in ("train", "valid", "test"):
        for code in ("uk", "en"):
            (tmp_path / f"{split}.{code}").write_text("x\n")
    prefixes = [word for split in ("train", "valid", "test") for word in (f"--{split}", tmp_path / split)]
    flags = ["--pair", "uk-en", *prefixes, "--subwords", tmp_path, "--out", tmp_path / "out", "--dry-run"]
    for more, length in (([], "1023"), (["--max-positions", "256"], "255")):
        printed = shell("binarise.sh", *flags, *more).stdout.splitlines()
        cut = [line for line in printed if "--max-length" in line]
        assert [line.split("--input ")[1].split()[0] for line in cut] == [f"{tmp_path}/test.{c}" for c in ("uk", "en")]
        assert all(f"--max-length {length}" in line for line in cut)


def test_checksums_find_a_changed_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    noted = shell("checksums.sh", "--out", tmp_path / "note.tsv", tmp_path / "a.txt")
    assert noted.stdout.startswith("2\t8\t")
    assert shell("checksums.sh", "--check", tmp_path / "note.tsv").returncode == 0
    (tmp_path / "a.txt").write_text("one\ntwo!\n")
    changed = shell("checksums.sh", "--check", tmp_path / "note.tsv")
    assert changed.returncode == 1
    assert "a.txt: is not the file noted in the manifest" in changed.stderr
    (tmp_path / "empty").touch()
    refused = shell("checksums.sh", "--out", tmp_path / "note.tsv", tmp_path / "empty")
    assert refused.returncode == 1
    assert (tmp_path / "note.tsv").read_text().startswith("2\t8\t")  # the older note stays


def test_a_folder_bin_that_is_no_data_is_never_replaced(tmp_path):
    kept = tmp_path / "bin" / "tool"
    kept.parent.mkdir()
    kept.write_text("precious")
    refused = shell("wikitext103.sh", "--out", tmp_path)
    assert refused.returncode == 2
    assert f"{tmp_path}/bin has no dict.txt" in refused.stderr
    assert kept.read_text() == "precious"

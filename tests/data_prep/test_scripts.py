"""The shell entry points: arguments, printed lines, checksums."""

import subprocess
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
    assert f"get-recipe --recipe-id wmt23-{pair[:2]}en" in printed.stdout
    assert not (tmp_path / "out").exists()


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

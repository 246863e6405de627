"""The completion script: bash itself asks it for commands, flags and values."""

from __future__ import annotations

import shlex
import subprocess

import pytest

from xmoe_fairseq import cli, completion

ASKED = (
    ["st"],
    ["checkpoint", "im"],
    ["run", "--"],
    ["prepare", "subwords", "learn", "--vocab"],
    ["bench", "layer", "--modes", ""],
    ["translate", "--checkpoint", ""],
    ["translate", "--data", ""],
)


@pytest.fixture(scope="module")
def scripts():
    return {shell: completion.script(shell, list(cli.COMMANDS.values())) for shell in completion.SHELLS}


@pytest.fixture(scope="module")
def answers(scripts, tmp_path_factory):
    """What bash offers after each of ASKED, in a folder with one file and one folder."""
    folder = tmp_path_factory.mktemp("completion")
    (folder / "model.pt").touch()
    (folder / "data-bin").mkdir()
    lines = [scripts["bash"]]
    for words in ASKED:
        lines += [f"COMP_WORDS=(xmoe {shlex.join(words)}) COMP_CWORD={len(words)}", "COMPREPLY=()", "_shtab_xmoe"]
        lines += ['echo "${COMPREPLY[@]}"']
    (folder.parent / "script").write_text("\n".join(lines))
    done = subprocess.run(["bash", folder.parent / "script"], cwd=folder, capture_output=True, text=True, check=True)
    return dict(zip(map(" ".join, ASKED), (set(line.split()) for line in done.stdout.split("\n")), strict=False))


def test_commands_and_families_complete(answers):
    assert answers["st"] == {"study"}
    assert answers["checkpoint im"] == {"import-official", "import-dense", "import-safetensors"}


def test_flags_of_scripts_and_of_modules_complete(answers):
    assert {"--pair", "--train", "--config", "--no-analysis", "--max-len-a", "--max-len-b"} <= answers["run --"]
    assert answers["prepare subwords learn --vocab"] == {"--vocab-size"}


def test_values_complete_where_they_are_known(answers):
    assert answers["bench layer --modes "] >= {"train", "infer", "decode"}
    assert answers["translate --checkpoint "] == {"model.pt", "data-bin"}
    assert answers["translate --data "] == {"data-bin"}


def test_the_zsh_script_knows_the_same_commands(scripts):
    assert scripts["zsh"].startswith("#compdef xmoe")
    for command in cli.COMMANDS.values():
        assert f"\n    {command.name.split()[-1]}:'" in scripts["zsh"], command.name


def test_every_flag_of_a_usage_text_is_found_with_its_value():
    usage = (
        "Usage: x.sh --pair SRC-TGT --train PREFIX [--jobs N]\n\nText that mentions --other PROGRAM flags.\n\n"
        "  --pair SRC-TGT   two languages, as --pair of --that\n"
        "  --a X, --b-c N   numbers\n  --dry-run        print\n  -h, --help       this text\n"
    )
    wanted = {"--pair": "SRC-TGT", "--train": "PREFIX", "--jobs": "N", "--a": "X", "--b-c": "N", "--dry-run": ""}
    assert dict(completion.flags_of_usage(usage)) == wanted

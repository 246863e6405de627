"""Commands, flags, settings and paths that README, docs and YAMLs show exist, and the commands parse."""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from fairseq import models, options, registry, tasks
from fairseq.dataclass.configs import FairseqConfig
from omegaconf import OmegaConf

import xmoe_fairseq  # noqa: F401  registers architectures and criterions
from tests.test_docs import PAGES, ROOT, page_text
from xmoe_fairseq import cli
from xmoe_fairseq.moe_args import moe_settings

TEXTS = [*PAGES, ROOT / "CHANGELOG.md"]
YAMLS = sorted((ROOT / "train_configs").glob("*/*.yaml"))
# Programs of others, shown but not checked further.
OTHERS = {"source", "pip", "python", "sbatch", "job=$(sbatch", "mkdir", "echo"}


def shell_lines(text: str) -> Iterator[str]:
    """Lines of the shell blocks of a page, continued ones joined: fenced as bash, or indented and led by a program."""
    fence = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
    for language, block in fence.findall(text):
        if language == "bash":
            yield from re.sub(r"\\\n\s*", " ", block).splitlines()
    rest = re.sub(r"\\\n\s*", " ", fence.sub("", text))
    programs = r"(?:\w+=\S+ )*(?:xmoe|bash|fairseq-[\w-]+|python|pip|sbatch|job=\$\(sbatch) "
    yield from re.findall(rf"^ {{4}}({programs}.*)$", rest, re.MULTILINE)


def yaml_lines(text: str) -> Iterator[str]:
    """Commands in the comments of a YAML."""
    comments = "\n".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", comments)
    for line in re.findall(r"^(?:Run: )?((?:\w+=\S+ )*(?:(?:bash )?scripts/|xmoe |fairseq-).*)$", joined, re.MULTILINE):
        yield re.sub(r" \(see --help\)", "", line)


def shown() -> list[tuple[str, list[str], bool]]:
    """(page, words, whether some words are left out) of every command, assignments of the environment removed."""
    lines = [(page, line) for page in PAGES for line in shell_lines(page.read_text(encoding="utf-8"))]
    lines += [(path, line) for path in YAMLS for line in yaml_lines(path.read_text(encoding="utf-8"))]
    found = []
    for path, line in lines:
        plain = re.sub(r"\[(?=--)|(?<=\w)\](?=\s|$)", "", line.replace("$PWD", "/folder"))
        words = shlex.split(plain, comments=True)
        words = words[: words.index(">")] if ">" in words else words
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            del words[0]
        if words:
            partial = "..." in words
            found.append((str(path.relative_to(ROOT)), [word for word in words if word != "..."], partial))
    return found


class Found(Exception):
    pass


@functools.cache
def parser_of(target: str) -> argparse.ArgumentParser:
    """The parser of a command's module, as its ``main`` makes it."""
    found = []

    def note(parser, *_):
        found.append(parser)
        raise Found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", note)
        patch.setattr("sys.argv", [target])
        with pytest.raises(Found):
            importlib.import_module(target).main()
    return found[-1]


@functools.cache
def flags_of(target: str) -> frozenset[str]:
    """Every flag a command takes: of its parser, or told by the usage of its script."""
    if target.endswith(".sh"):
        usage = page_text(target).split("usage() {", 1)[1].split("\nTEXT\n", 1)[0]
        return frozenset(re.findall(r"--[a-z][a-z0-9-]*", usage))
    top = parser_of(target)
    parsers = [top]
    for action in top._actions:
        parsers += action.choices.values() if isinstance(action, argparse._SubParsersAction) else []
    old = {name for parser in parsers for name in getattr(parser, "old_names", ())}
    return frozenset(old.union(*(action.option_strings for parser in parsers for action in parser._actions)))


def given_flags(words: list[str]) -> set[str]:
    return {word.split("=")[0] for word in words if word.startswith("--") and word != "--"}


@functools.cache
def settings_of(group: str, name: str | None) -> frozenset[str]:
    """Keys of one group of a YAML; ``name`` is its ``_name``, of the model's architecture for instance."""
    fields = OmegaConf.to_container(OmegaConf.structured(FairseqConfig))[group]
    typed = set(fields) if isinstance(fields, dict) else set()
    if group == "model":
        parser = argparse.ArgumentParser()
        models.ARCH_MODEL_REGISTRY[name].add_args(parser)
        return frozenset(typed | {action.dest for action in parser._actions})
    if group == "task":
        return frozenset(typed | set(tasks.TASK_DATACLASS_REGISTRY[name].__dataclass_fields__))
    if group in registry.REGISTRIES:
        return frozenset(typed | set(registry.REGISTRIES[group]["dataclass_registry"][name].__dataclass_fields__))
    return frozenset(typed)


def check_key(key: str, config: Path | None, where: str) -> None:
    """``GROUP.KEY`` is a setting of fairseq, or of what ``config`` (a YAML; None: the translation models) names."""
    group, _, name = key.lstrip("+").partition(".")
    defaults = {"task": "translation", "model": "xmoe_transformer", "lr_scheduler": "inverse_sqrt", "optimizer": "adam"}
    defaults["criterion"] = "label_smoothed_cross_entropy_with_load_balance"
    named = (OmegaConf.load(config).get(group) or {}).get("_name") if config else None
    assert name in {"_name", *settings_of(group, named or defaults.get(group))}, f"{where}: {key}"


def check_xmoe(words: list[str], partial: bool, where: str) -> None:
    found = cli.find(words)
    assert found is not None, f"{where}: xmoe {' '.join(words)}"
    command, arguments = found
    if command.target.endswith(".sh"):
        check_script(command.target, arguments, where)
        return
    assert given_flags(arguments) <= flags_of(command.target), f"{where}: {command.name}: {arguments}"
    if not partial and "--help" not in arguments:
        try:
            parser_of(command.target).parse_args(arguments)
        except SystemExit:
            pytest.fail(f"{where}: xmoe {' '.join(words)} does not parse")


def check_script(script: str, arguments: list[str], where: str) -> None:
    """The script exists and knows the flags; what follows ``--`` is fairseq-train's; YAMLs and settings exist."""
    assert (ROOT / script).is_file(), f"{where}: {script}"
    if "--" in arguments:
        place = arguments.index("--")
        check_fairseq("fairseq-train", arguments[place + 1 :], where)
        arguments = arguments[:place]
    unknown = given_flags(arguments) - flags_of(script)
    assert not unknown, f"{where}: {script}: {unknown}"
    for flag, value in itertools.pairwise(arguments):
        if flag in ("--config", "--study"):
            assert list(ROOT.glob(re.sub("[A-Z]{3,}", "*", value))), f"{where}: {value}"
        if flag == "--set":
            check_key(value.split("=")[0], None, where)
        if flag == "--method":
            assert list((ROOT / "train_configs").glob(f"*/{value}.yaml")), f"{where}: {value}"


def check_fairseq(program: str, arguments: list[str], where: str) -> None:
    """The arguments parse as the program's own, with what ``--user-dir`` adds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr("sys.argv", [program, *arguments])
        try:
            if program == "fairseq-train":
                options.parse_args_and_arch(options.get_training_parser(), arguments)
            else:
                assert program == "fairseq-generate", f"{where}: {program}"
                args = options.parse_args_and_arch(options.get_generation_parser(), arguments)
                assert set(ast.literal_eval(args.model_overrides)) <= settings_of("model", "xmoe_transformer"), where
        except SystemExit:
            pytest.fail(f"{where}: {program} {' '.join(arguments)} does not parse")


def check_hydra(arguments: list[str], where: str) -> None:
    flags = dict(zip(arguments[:4:2], arguments[1:4:2], strict=True))
    config = ROOT / flags["--config-dir"] / f"{flags['--config-name']}.yaml"
    assert config.is_file(), f"{where}: {config}"
    for word in arguments[4:]:
        key, equals, _ = word.partition("=")
        assert equals, f"{where}: {word}"
        check_key(key, config, where)


def test_commands_that_are_shown_parse():
    num_shown = dict.fromkeys(("xmoe", "script", "fairseq"), 0)
    for where, (program, *arguments), partial in shown():
        if program == "xmoe" and arguments[0].startswith("-"):
            continue
        if program == "xmoe":
            check_xmoe(arguments, partial, where)
        elif program == "bash" or program.startswith("scripts/"):
            script, *rest = arguments if program == "bash" else [program, *arguments]
            check_script(script, rest, where)
        elif program == "fairseq-hydra-train":
            check_hydra(arguments, where)
        elif program.startswith("fairseq-"):
            check_fairseq(program, arguments, where)
        else:
            assert program in OTHERS, f"{where}: {program}"
            continue
        num_shown["xmoe" if program == "xmoe" else "fairseq" if program.startswith("fairseq-") else "script"] += 1
    assert num_shown["xmoe"] >= 40
    assert num_shown["script"] >= 25
    assert num_shown["fairseq"] >= 6


def inline_code(text: str) -> list[str]:
    """What stands between backticks outside code blocks."""
    without_blocks = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", without_blocks)]


def test_examples_of_the_help_texts_parse():
    """Lines of ``--help`` that begin with ``xmoe``, those with placeholders by their flags alone."""
    num_examples = 0
    for command in cli.COMMANDS.values():
        if not command.target.endswith(".sh"):
            for line in re.sub(r"\\\n\s*", " ", parser_of(command.target).epilog or "").splitlines():
                words = line.replace("[", "").replace("]", "").split()
                if words[:1] == ["xmoe"] and any(word.startswith("--") for word in words):
                    found = cli.find(words[1:])
                    assert found is not None, line
                    assert given_flags(words) <= flags_of(found[0].target), line
                    num_examples += 1
    assert num_examples >= 10


def test_options_of_the_usage_of_scripts_are_read():
    """Each option line of a usage names flags that the script's code knows."""
    num_flags = 0
    for target in {command.target for command in cli.COMMANDS.values() if command.target.endswith(".sh")}:
        usage, code = page_text(target).split("usage() {", 1)[1].split("\nTEXT\n", 1)
        for shared in re.findall(r'^\. "\$\(dirname "\$\{BASH_SOURCE\[0\]\}"\)/(\w+\.sh)"', code, re.MULTILINE):
            code += page_text(f"{Path(target).parent}/{shared}") if shared != "lib.sh" else ""
        if "hf_peers" in target:
            code = page_text("benchmarks/hf_peers.py")
        for line in re.findall(r"^  (--.*)$", usage, re.MULTILINE):
            for flag in re.findall(r"--[a-z][a-z0-9-]*", line.split("  ")[0]):
                name = flag.lstrip("-").replace("-", "[-_]")
                assert re.search(rf"(?<![\w-]){name}(?![\w-])|{flag}\b", code), f"{target}: {flag}"
                num_flags += 1
    assert num_flags >= 90


def test_commands_in_sentences_and_tables_exist():
    names = set(cli.COMMANDS) | {name.split()[0] for name in cli.COMMANDS} | {"COMMAND"}
    for page in TEXTS:
        for code in inline_code(page.read_text(encoding="utf-8")):
            program, *words = code.replace(" / ", " ").replace("...", "").split()
            if program == "xmoe" and words and words[0][0].isalpha() and words[:2] != ["checkpoint", "NAME"]:
                found = cli.find(words)
                assert found or words[0] in names, f"{page.name}: {code}"
                unknown = given_flags(words) - (flags_of(found[0].target) if found else set())
                assert not unknown, f"{page.name}: {code}: {unknown}"


@functools.cache
def every_flag() -> set[str]:
    """Flags of all commands, scripts and fairseq, and those that pages name of SLURM, mtdata, tests/e2e/own_router."""
    flags = set().union(*(flags_of(command.target) for command in cli.COMMANDS.values()))
    parsers = [options.get_training_parser(), options.get_generation_parser()]
    flags |= {name for parser in parsers for action in parser._actions for name in action.option_strings}
    named = [settings_of("model", "xmoe_transformer"), settings_of("model", "meo_transformer_64x1024")]
    named += [settings_of("model", "transformer_lm"), settings_of("task", "translation")]
    registries = [kind["dataclass_registry"] for kind in registry.REGISTRIES.values()]
    named += [found.__dataclass_fields__ for known in registries for found in known.values() if found]
    return (
        flags
        | {f"--{name.replace('_', '-')}" for names in named for name in names}
        | {"--signal", "--quick", "--moe-margin"}
    )


def test_flags_in_sentences_exist():
    for page in TEXTS:
        for code in inline_code(page.read_text(encoding="utf-8")):
            for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", code.replace("--moe-*", "")):
                assert flag in every_flag(), f"{page.name}: {code}"


def test_settings_in_sentences_exist():
    """``moe_*`` names, ``GROUP.KEY`` of the YAMLs."""
    of_others = {"moe_loss_coeff", "moe_balance", "moe_margin"}  # the official code, the log, tests/e2e/own_router
    groups = "|".join(name for name in FairseqConfig.__dataclass_fields__ if name != "_name")
    for page in TEXTS:
        for code in inline_code(page.read_text(encoding="utf-8")):
            for name in re.findall(r"\bmoe_[a-z_]+\b(?!\*|\.)", code):
                assert name in moe_settings().keys() | of_others, f"{page.name}: {code}"
            for key in re.findall(rf"(?<![\w./])\+*((?:{groups})\.[a-z_]+)(?=[=`:]|$)", code):
                if key != "model.safetensors":
                    check_key(key, None, page.name)


def test_paths_that_are_named_exist():
    """Paths of the checkout between backticks in the pages, pages of docs/ named in the sources."""
    folders = "xmoe_fairseq|data_prep|eval|scripts|train_configs|benchmarks|docs|tests|moe"
    num_named = 0
    for page in TEXTS:
        for code in inline_code(page.read_text(encoding="utf-8")):
            for path in re.findall(rf"(?:^| )((?:{folders})/[\w./{{}},*-]*)(?=$| |:)", code):
                pattern = re.sub(r"\{[^}]*\}|[A-Z]{3,}", "*", path).rstrip("/")
                bases = (ROOT, ROOT / "xmoe_fairseq")
                assert any(list(base.glob(pattern)) for base in bases), f"{page.name}: {path}"
                num_named += 1
    assert num_named >= 50
    for folder in ("xmoe_fairseq", "data_prep", "eval", "benchmarks", "scripts", "train_configs"):
        for source in [
            path for ending in ("py", "sh", "yaml", "sbatch") for path in (ROOT / folder).rglob(f"*.{ending}")
        ]:
            for name in re.findall(r"docs/[a-z-]+\.md", source.read_text(encoding="utf-8")):
                assert (ROOT / name).is_file(), f"{source.name}: {name}"


def test_the_tour_names_what_the_files_hold():
    rows = re.findall(r"^\| \[`([\w/.]+)`\]\(\1\) \| (.*) \|$", page_text("README.md"), re.MULTILINE)
    assert len(rows) == 6
    for path, answer in rows:
        for name in re.findall(r"`([A-Za-z_.]+)`", re.sub(r"\[.*?\]", "", answer)):
            for part in name.split("."):
                assert re.search(rf"^ *(?:class|def) {part}\b", page_text(path), re.MULTILINE), f"{path}: {name}"


def test_the_router_of_the_docs_is_the_one_that_is_tested():
    router = page_text("tests/e2e/own_router/above_average.py")
    block = re.search(r"^```python\n(@register_router.*?)^```", page_text("docs/methods.md"), re.MULTILINE | re.DOTALL)[
        1
    ]
    for line in filter(None, block.splitlines()):
        assert line in router, line

"""The command ``xmoe``, which has a name for every module and script of the project.

Its table of names imports nothing before a command is chosen. Commands of the package run from any installation, all
others from the checkout that holds the package.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from . import __version__
from .command_line import reports_errors

CHECKOUT = Path(__file__).resolve().parent.parent


class Command(NamedTuple):
    """One line of the table: the words after ``xmoe``, a module or a script of the checkout, and what it does."""

    name: str
    target: str
    does: str


GROUPS: dict[str, tuple[Command, ...]] = {
    "Start": (
        Command("demo", "scripts/demo.sh", "a translation project in minutes, on a CPU, without a download"),
        Command("setup", "scripts/setup.sh", "make the virtual environment from the pinned requirements"),
        Command("native", "xmoe_fairseq.moe.native.build", "compile the library for few rows (set-up does it)"),
        Command("completion", "xmoe_fairseq.completion", "print a script that completes xmoe in bash or zsh"),
        Command("test", "scripts/test.sh", "every check: format, lint, types, shell, unit and end-to-end tests"),
    ),
    "Prepare text": (
        Command("prepare phrases", "data_prep.phrases", "make the demo's corpus"),
        Command("prepare download", "data_prep/download_wmt23.sh", "fetch a language pair of WMT23"),
        Command("prepare validate", "data_prep.validate", "check parallel or monolingual text, change nothing"),
        Command("prepare clean", "data_prep.clean", "mend and filter parallel text"),
        Command("prepare sample", "data_prep.sample", "draw a number of pairs by seed"),
        Command("prepare subwords", "data_prep.subwords", "learn, encode, decode, dictionaries"),
        Command("prepare binarise", "data_prep/binarise.sh", "clean text to fairseq's binary data"),
        Command("prepare lengths", "data_prep.lengths", "lengths of binary data against what a model takes"),
        Command("prepare wikitext103", "data_prep/wikitext103.sh", "fetch and binarise the language models' text"),
        Command("prepare checksums", "data_prep/checksums.sh", "note what a stage made, or compare with a note"),
        Command("prepare gpt2", "data_prep.gpt2", "encode text with GPT-2's byte pairs"),
    ),
    "Train": (
        Command("run", "scripts/run_pair.sh", "raw parallel text to a trained, scored, explained model"),
        Command("lm", "scripts/run_lm.sh", "raw text to a trained, evaluated language model"),
        Command("study", "scripts/run_study.sh", "texts x methods x seeds: trained, tested, compared"),
        Command("wmt23", "scripts/train_wmt23.sh", "one cell of the paper's Table 3, from the download on"),
        Command("ranks", "scripts/train_multi.sh", "fairseq-train on several processes"),
    ),
    "Translate": (
        Command("translate", "eval.translate", "raw text in, raw text out, line for line"),
        Command("serve", "eval.serve", "a local page: a sentence, its translation and its routing"),
    ),
    "Evaluate": (
        Command("score", "eval.score", "BLEU, chrF2++, chrF2, TER with signatures and intervals"),
        Command("compare", "eval.compare", "paired significance tests of several systems"),
        Command("comet", "eval/comet.sh", "COMET, in an environment of its own"),
        Command("oracle", "eval.check_oracle", "does the scorer reproduce published scores?"),
        Command("table", "eval.table", "scores beside the paper's Table 3"),
        Command("runs", "eval.run_table", "one table of several runs"),
        Command("sizes", "eval.method_table", "parameters and FLOPs of every method, counted"),
    ),
    "Look inside": (
        Command("calibrate", "eval.calibrate", "threshold and limit of experts for a budget, written into a copy"),
        Command("quantisation", "eval.quantisation", "loss and scores of a float and of quantised checkpoints, tested"),
        Command(
            "perplexity", "eval.perplexity", "loss and perplexity on whole splits, and the FLOPs of the MoE layers"
        ),
        Command("sweep", "eval.sweep", "quality against counted FLOPs: threshold or capacity swept"),
        Command("analyse", "eval.analyse", "what the router does on a test set, as JSON"),
        Command("report", "eval.report", "the page of one run, or a comparison of several"),
    ),
    "Checkpoints": (
        Command("checkpoint inspect", "xmoe_fairseq.checkpoints.inspect", "what a file holds and whether it is sound"),
        Command("checkpoint average", "xmoe_fairseq.checkpoints.average", "average several of one training"),
        Command("checkpoint quantise", "xmoe_fairseq.checkpoints.quantise", "int8 or bfloat16 weights, for inference"),
        Command(
            "checkpoint import-official", "xmoe_fairseq.checkpoints.import_official", "convert one of the official code"
        ),
        Command(
            "checkpoint import-dense", "xmoe_fairseq.checkpoints.import_dense", "start from a dense fairseq transformer"
        ),
        Command(
            "checkpoint import-safetensors", "xmoe_fairseq.checkpoints.import_safetensors", "safetensors to fairseq"
        ),
        Command(
            "checkpoint export-safetensors", "xmoe_fairseq.checkpoints.export_safetensors", "fairseq to safetensors"
        ),
    ),
    "Measure": (
        Command("bench layer", "benchmarks.layer", "one layer's time and memory beside its peers"),
        Command("bench scaling", "benchmarks.scaling", "time against experts, rows a token and tokens"),
        Command("bench train", "benchmarks.train", "fairseq-train's words per second"),
        Command("bench generate", "benchmarks.generate", "translation speed"),
        Command("bench cost-model", "benchmarks.cost_model", "time and traffic of a training on many ranks, computed"),
        Command("bench gpu", "benchmarks/gpu.sh", "all of this on a GPU, in parts of at most 9 minutes"),
        Command(
            "bench gpu-layer", "benchmarks.gpu_layer", "one layer on a GPU, eager and as a graph, beside its peers"
        ),
        Command("bench gpu-count", "benchmarks.gpu_count", "launches, bytes and time of a layer on a GPU, on paper"),
        Command("bench gpu-compile", "benchmarks.gpu_compile", "compile the GPU kernels and look for spills"),
        Command("bench hf-peers", "benchmarks/hf_peers.sh", "beside the sparse blocks of transformers"),
    ),
}
COMMANDS = {command.name: command for commands in GROUPS.values() for command in commands}


def help_text(prefix: str = "") -> str:
    """One line for each command, by group; with ``prefix`` only those whose names begin with that word."""
    lines = [f"usage: xmoe {prefix or 'COMMAND'} [ARGUMENT...]", ""]
    for title, commands in GROUPS.items():
        shown = [command for command in commands if not prefix or command.name.split()[0] == prefix]
        if shown:
            lines += [title, *(f"  {command.name:<30}{command.does}" for command in shown), ""]
    return "\n".join([*lines, "xmoe COMMAND --help tells more; xmoe --version prints the version."])


def find(arguments: Sequence[str]) -> tuple[Command, list[str]] | None:
    """The command that the first one or two words name, and the arguments after them."""
    for words in (2, 1):
        command = COMMANDS.get(" ".join(arguments[:words]))
        if command is not None and len(arguments) >= words:
            return command, list(arguments[words:])
    return None


def command_line(command: Command, arguments: Sequence[str]) -> list[str]:
    """The words of the process that runs ``command``. Raises: FileNotFoundError if a checkout or fairseq is missing."""
    is_script = command.target.endswith(".sh")
    is_packaged = command.target.startswith("xmoe_fairseq.")
    if not is_packaged and not (CHECKOUT / "scripts" / "lib.sh").is_file():
        what = command.target if is_script else f"the module {command.target}"
        raise FileNotFoundError(
            f"xmoe {command.name} needs {what}, which is part of the project's checkout and not of the installed "
            "package; clone the repository and run bash scripts/setup.sh there, which installs this command too"
        )
    if command.target.startswith("xmoe_fairseq.checkpoints.") and find_spec("fairseq") is None:
        raise FileNotFoundError(
            f"xmoe {command.name} needs fairseq, which is not installed here; "
            "pip install --no-build-isolation 'xmoe-fairseq[fairseq]', or bash scripts/setup.sh in a checkout"
        )
    start = ["bash", str(CHECKOUT / command.target)] if is_script else [sys.executable, "-m", command.target]
    return [*start, *arguments]


def environment() -> dict[str, str]:
    """The environment of a command, with the checkout's modules and without warnings of its libraries and of runpy."""
    found = dict(os.environ)
    paths = [str(CHECKOUT), *filter(None, [found.get("PYTHONPATH")])]
    found["PYTHONPATH"] = os.pathsep.join(paths)
    found.setdefault("PYTHONSAFEPATH", "1")  # a file eval.py in the user's folder is no part of the project
    kinds = ("FutureWarning", "DeprecationWarning", "UserWarning", "RuntimeWarning:runpy")
    found.setdefault("PYTHONWARNINGS", ",".join(f"ignore::{kind}" for kind in kinds))
    if (Path(sys.prefix) / ".xmoe-runtime").is_file():  # written by scripts/setup.sh
        found.setdefault("XMOE_VENV", sys.prefix)
    return found


@reports_errors("xmoe")
def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    first = arguments[0] if arguments else ""
    families = {name.split()[0] for name in COMMANDS if " " in name}
    if first in ("", "-h", "--help", "help"):
        print(help_text(), file=sys.stdout if first else sys.stderr)
        return 0 if first else 2
    if first in ("-V", "--version"):
        print(f"xmoe {__version__}")
        return 0
    found = find(arguments)
    if found is not None:
        line = command_line(*found)
        os.execvpe(
            line[0], line, environment()
        )  # replaces this process, so that exit code and signals are those of the command
    if first in families and (len(arguments) == 1 or arguments[1] in ("-h", "--help")):
        print(help_text(first), file=sys.stdout if len(arguments) > 1 else sys.stderr)
        return 0 if len(arguments) > 1 else 2
    name = " ".join(arguments[: 2 if first in families else 1])
    import difflib

    close = difflib.get_close_matches(name, COMMANDS, n=3)
    hint = f"did you mean {', '.join(close)}?" if close else "xmoe --help lists all"
    print(f"xmoe: error: no command {name!r}; {hint}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

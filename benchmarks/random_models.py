"""Models of a real size with random weights, and sentences for them: what translating costs needs no training.

A random model never ends a sentence by itself, so ``fairseq-generate`` is given one length for all translations. A
random router is undecided; ``moe_max_experts`` holds every token to the experts that cost what the dense FFN does.
"""

from __future__ import annotations

import random
import shutil
import subprocess
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from fairseq.tasks.translation import TranslationConfig, TranslationTask

import xmoe_fairseq  # noqa: F401  registers the architectures
from benchmarks.common import fairseq
from xmoe_fairseq.checkpoints.files import load_checkpoint, save_checkpoint
from xmoe_fairseq.checkpoints.quantise import quantise_checkpoint

VOCABULARY = 32000
DENSE, SPARSE = "dense_transformer_wmt23", "xmoe_transformer"
# name -> (checkpoint it is made of, arguments of quantise_checkpoint); the first is what the others are compared with
MODELS: dict[str, tuple[str, tuple[str, str] | None]] = {
    "dense float32": (DENSE, None),
    "dense int8": (DENSE, ("int8", "all")),
    "sparse float32": (SPARSE, None),
    "sparse bfloat16 experts": (SPARSE, ("bfloat16", "experts")),
    "sparse int8 experts": (SPARSE, ("int8", "experts")),
    "sparse int8 all": (SPARSE, ("int8", "all")),
}


def make_data(folder: Path, sentences: int) -> Path:
    """Sentences of 10 to 40 random words, binarised, with a dictionary of ``VOCABULARY`` symbols; kept if there."""
    folder = folder / f"{sentences}-sentences"
    if (folder / "bin" / "test.xx-yy.xx.bin").exists():
        return folder / "bin"
    shutil.rmtree(folder / "bin", ignore_errors=True)  # a half-made one
    source = random.Random(1)
    symbols = [f"w{number}" for number in range(VOCABULARY - 4)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dict.txt").write_text("".join(f"{symbol} 1\n" for symbol in symbols))
    for language in ("xx", "yy"):
        text = "".join(" ".join(source.choices(symbols, k=source.randint(10, 40))) + "\n" for _ in range(sentences))
        (folder / f"test.{language}").write_text(text)
    command = [*fairseq("preprocess"), "-s", "xx", "-t", "yy", "--joined-dictionary", "--srcdict", folder / "dict.txt"]
    command += ["--testpref", folder / "test", "--destdir", folder / "bin"]
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
    return folder / "bin"


def make_checkpoints(folder: Path, data: Path, names: list[str], sizes: dict[str, Any] | None = None) -> dict[str, str]:
    """Write the checkpoints of ``names`` (keys of ``MODELS``); those that exist are kept. Returns name -> path.

    ``sizes``: settings that make both architectures smaller, for tests.
    """
    paths = {}
    for name in names:
        arch, quantised = MODELS[name]
        path = folder / f"{name.replace(' ', '-')}.pt"
        paths[name] = str(path)
        if path.exists():
            continue
        if quantised is None:
            save_checkpoint(_random_state(arch, data, sizes or {}), path)
        else:
            plain = next(other for other, made in MODELS.items() if made == (arch, None))
            base = make_checkpoints(folder, data, [plain], sizes)[plain]
            save_checkpoint(quantise_checkpoint(load_checkpoint(base, mmap=True), *quantised), path)
    return paths


def _random_state(arch: str, data: Path, sizes: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    words = Dictionary.load(str(data / "dict.xx.txt"))
    task = TranslationTask(TranslationConfig(data=str(data), source_lang="xx", target_lang="yy"), words, words)
    settings = {"moe_max_experts": 2} if arch == SPARSE else {}
    sizes = {name: size for name, size in sizes.items() if arch == SPARSE or not name.startswith("moe_")}
    cfg = Namespace(arch=arch, _name=arch, task="translation", share_all_embeddings=True, **{**settings, **sizes})
    ARCH_CONFIG_REGISTRY[arch](cfg)
    cfg.max_source_positions = cfg.max_target_positions = 1024
    model = ARCH_MODEL_REGISTRY[arch].build_model(cfg, task)
    return {
        "args": None,
        "cfg": {"model": cfg, "task": {"_name": "translation", "source_lang": "xx", "target_lang": "yy"}},
        "model": model.state_dict(),
        "criterion": None,
        "optimizer_history": [
            {"criterion_name": "none", "optimizer_name": "none", "lr_scheduler_state": {}, "num_updates": 0}
        ],
        "task_state": {},
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}, "val_loss": None},
        "last_optimizer_state": None,
    }

"""A tiny trained model, made once through fairseq's own commands, for the tests of eval/translate.py."""

import importlib
import io
import random
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_prep.subword_coding import Coder
from data_prep.subword_models import Settings, learn

USER_DIR = Path(__file__).resolve().parents[2] / "xmoe_fairseq"
NUMBERS = {
    "один": "one", "два": "two", "три": "three", "чотири": "four", "п'ять": "five", "шість": "six",
    "сім": "seven", "вісім": "eight", "дев'ять": "nine", "десять": "ten",
}  # fmt: skip


@dataclass(frozen=True)
class TinyModel:
    """A trained model with all that translating needs; ``source`` are the raw lines of its test set."""

    checkpoint: Path
    data: Path
    subwords: Path
    user_dir: Path
    source: list[str]


def _made_up_lines(count: int) -> list[tuple[str, str]]:
    generator = random.Random(3)
    words = [[generator.choice(list(NUMBERS)) for _ in range(generator.randint(1, 6))] for _ in range(count)]
    return [(" ".join(line), " ".join(NUMBERS[word] for word in line)) for line in words]


def _run_fairseq(command: str, *arguments: object) -> str:
    module = importlib.import_module(f"fairseq_cli.{command}")
    with pytest.MonkeyPatch.context() as monkeypatch, redirect_stdout(io.StringIO()) as output:
        monkeypatch.setattr("sys.argv", [f"fairseq-{command}", *map(str, arguments)])
        module.cli_main()
    return output.getvalue()


@pytest.fixture(scope="session")
def run_fairseq() -> Callable[..., str]:
    """Run a fairseq command inside this process and return its standard output: run_fairseq("train", ...)."""
    return _run_fairseq


def _write_data(folder: Path) -> list[str]:
    pairs = _made_up_lines(80)
    for side, language in enumerate(("uk", "en")):
        (folder / f"raw.{language}").write_text("".join(f"{pair[side]}\n" for pair in pairs), "utf-8")
    learn([folder / "raw.uk", folder / "raw.en"], folder / "subwords", Settings("uk", "en", vocab_size=70))
    coder = Coder(folder / "subwords", "uk")  # joint: the other language has the same
    for name, part in (("train", pairs[:60]), ("test", pairs[60:])):
        for side, language in enumerate(("uk", "en")):
            lines = coder.encode([pair[side] for pair in part])
            (folder / f"{name}.{language}").write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return [source for source, _ in pairs[60:]]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A mixture-of-experts model of width 16 after 60 updates on spelled-out numbers."""
    folder = tmp_path_factory.mktemp("tiny")
    source = _write_data(folder)
    data, models = folder / "bin", folder / "checkpoints"
    _run_fairseq(
        "preprocess", "--source-lang", "uk", "--target-lang", "en", "--trainpref", folder / "train",
        "--testpref", folder / "test", "--destdir", data, "--joined-dictionary",
    )  # fmt: skip
    _run_fairseq(
        "train", data, "--user-dir", USER_DIR, "--arch", "xmoe_transformer_tiny", "--cpu",
        "--source-lang", "uk", "--target-lang", "en", "--save-dir", models,
        "--criterion", "label_smoothed_cross_entropy_with_load_balance", "--moe-interval", 1,
        "--moe-num-experts", 4, "--moe-expert-dim", 16, "--encoder-layers", 1, "--decoder-layers", 1,
        "--encoder-embed-dim", 16, "--encoder-ffn-embed-dim", 32, "--encoder-attention-heads", 2,
        "--decoder-embed-dim", 16, "--decoder-ffn-embed-dim", 32, "--decoder-attention-heads", 2,
        "--share-all-embeddings", "--max-source-positions", 64, "--max-target-positions", 64,
        "--optimizer", "adam", "--lr", 0.02, "--dropout", 0, "--batch-size", 30, "--max-update", 60,
        "--seed", 1, "--num-workers", 0, "--disable-validation", "--no-epoch-checkpoints",
        "--no-progress-bar", "--log-format", "none",
    )  # fmt: skip
    return TinyModel(models / "checkpoint_last.pt", data, folder / "subwords", USER_DIR, source)

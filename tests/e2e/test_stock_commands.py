"""The main job through fairseq's own commands: every command, resuming, saving, and one translation per sentence."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e import stock
from xmoe_fairseq.checkpoints import quantise
from xmoe_fairseq.checkpoints.files import CheckpointError

pytestmark = pytest.mark.e2e
ARCH = "xmoe_transformer_tiny"
SMALL = ("--encoder-embed-dim", 32, "--decoder-embed-dim", 32, "--encoder-ffn-embed-dim", 64)
SMALL += ("--decoder-ffn-embed-dim", 64, "--moe-expert-dim", 32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 training, 10 validation and 64 test sentences of letters, to be written in capitals."""
    folder = tmp_path_factory.mktemp("letters")
    for split, count in (("train", 160), ("valid", 10), ("test", 64)):
        for side, language in enumerate(("xx", "yy")):
            lines = "".join(pair[side] + "\n" for pair in stock.made_up_pairs(count, seed=count))
            (folder / f"{split}.{language}").write_text(lines, encoding="utf-8")
    prefixes = [f"--{split}pref={folder / split}" for split in ("train", "valid", "test")]
    stock.run(
        "fairseq-preprocess", "-s", "xx", "-t", "yy", *prefixes, "--joined-dictionary", "--destdir", folder / "bin"
    )
    return folder / "bin"


@pytest.fixture(scope="module")
def checkpoint(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that translates some sentences right and some wrong."""
    folder = tmp_path_factory.mktemp("model")
    return train(
        data, folder, "--max-update", 120, "--lr", 5e-3, "--max-tokens", 400, "--dropout", 0.0, "--disable-validation"
    )


def train(data: Path, folder: Path, *arguments: object) -> Path:
    return stock.train(data, ARCH, folder, *SMALL, "--seed", 3, *arguments)


@contextmanager
def fairseq_log() -> Iterator[list[str]]:
    """fairseq's log messages; its commands rearrange the root logger, which pytest's caplog listens to."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("fairseq")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def sources(data: Path) -> list[str]:
    return (data.parent / "test.xx").read_text(encoding="utf-8").splitlines()


def hypotheses(printed: str) -> list[str]:
    found = re.findall(r"^H-(\d+)\t[^\t]*\t(.*)$", printed, flags=re.MULTILINE)
    return [text for _, text in sorted(found, key=lambda pair: int(pair[0]))]


def translate(data: Path, checkpoint: Path, *arguments: object) -> list[str]:
    return [text for text, _ in stock.generate(data, checkpoint, *arguments)]


@pytest.mark.parametrize("beam", [1, 5])
def test_a_translation_does_not_depend_on_the_batch(data: Path, checkpoint: Path, beam: int) -> None:
    alone = translate(data, checkpoint, "--beam", beam, "--batch-size", 1)
    assert len(alone) == 64
    assert len(set(alone)) > 30
    right = sum(text == source.upper() for text, source in zip(alone, sources(data), strict=True))
    assert right > 10  # it learnt something, so these are decided translations
    assert translate(data, checkpoint, "--beam", beam, "--batch-size", 64) == alone
    assert translate(data, checkpoint, "--beam", beam, "--batch-size", 7) == alone


def test_interactive_translates_as_generate_and_takes_one_word(data: Path, checkpoint: Path, tmp_path: Path) -> None:
    lines = [*sources(data)[:20], "a"]
    (tmp_path / "in").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    common = (data, "--user-dir", stock.USER_DIR, "--path", checkpoint, "--cpu", "--beam", 3, "--max-len-b", 8)
    for buffer in (1, 21):
        printed = stock.run(
            "fairseq-interactive", *common, "-s", "xx", "-t", "yy", "--input", tmp_path / "in",
            "--buffer-size", buffer, "--batch-size", buffer,
        )  # fmt: skip
        got = hypotheses(printed)
        assert got[:20] == translate(data, checkpoint)[:20]
        assert len(got) == 21


def test_validate_logs_the_routing_and_model_overrides_change_it(data: Path, checkpoint: Path) -> None:
    wanted = {}
    for threshold in (None, 0.0, 1.0):
        overrides = () if threshold is None else ("--model-overrides", repr({"moe_threshold": threshold}))
        with fairseq_log() as lines:
            stock.run(
                "fairseq-validate", data, "--task", "translation", "--user-dir", stock.USER_DIR, "--path", checkpoint,
                "--cpu", "--max-tokens", 400, "--num-workers", 0, *overrides,
            )  # fmt: skip
        shown = dict(re.findall(r"(\S+) ([-\d.]+)(?: \||$)", lines[-1]))
        assert float(shown["moe_dropped"]) == 0  # nothing is dropped at inference
        assert {"loss", "moe_encoder_1_used", "moe_decoder_1_entropy", "moe_load_cv", "moe_flops"} <= shown.keys()
        wanted[threshold] = float(shown["moe_wanted"])
    assert wanted[0.0] == 1
    assert wanted[1.0] == 8
    assert 1 < wanted[None] < 8


def test_training_logs_the_routing_of_every_layer(data: Path, tmp_path: Path) -> None:
    with fairseq_log() as lines:
        train(data, tmp_path, "--log-format", "json", "--log-interval", 1, "--update-freq", 2)
    text = "\n".join(lines)
    for name in ("moe_wanted", "moe_used", "moe_dropped", "moe_load_cv", "moe_entropy", "moe_balance", "moe_flops"):
        for label in (name, name.replace("moe_", "moe_encoder_1_"), name.replace("moe_", "moe_decoder_1_")):
            assert re.search(rf'"(train_|valid_)?{label}": "[\d.]+"', text), label


def saved_state(path: Path) -> dict[str, Any]:
    state = torch.load(path, weights_only=True)  # protection on
    history = state["optimizer_history"][-1]  # each resumption adds one
    return {"model": state["model"], "optimizer": state["last_optimizer_state"], "history": history}


def assert_bit_equal(got: Any, want: Any, where: str = "") -> None:
    if isinstance(want, dict):
        assert got.keys() == want.keys()
        for key in want:
            assert_bit_equal(got[key], want[key], f"{where}.{key}")
    elif isinstance(want, list):
        assert len(got) == len(want)
        for index, pair in enumerate(zip(got, want, strict=True)):
            assert_bit_equal(*pair, f"{where}[{index}]")
    elif torch.is_tensor(want):
        assert torch.equal(got, want), where
    else:
        assert got == want, where


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--update-freq", 2, "--moe-router-noise", "gumbel", "--moe-router", "top_k", "--moe-top-k", 2),
        ("--optimizer", "fused_adam"),
    ],
)
def test_resuming_mid_epoch_is_bit_equal(data: Path, tmp_path: Path, options: tuple[object, ...]) -> None:
    common = ("--batch-size", 16, "--dropout", 0.2, "--lr-scheduler", "inverse_sqrt", "--warmup-updates", 4, *options)
    whole = train(data, tmp_path / "whole", *common, "--max-update", 13)  # 10 batches an epoch
    train(data, tmp_path / "parts", *common, "--max-update", 3)
    parts = train(data, tmp_path / "parts", *common, "--max-update", 13)
    assert_bit_equal(saved_state(parts), saved_state(whole))
    shorter = train(data, tmp_path / "shorter", *common, "--max-update", 12)
    with pytest.raises(AssertionError):  # the comparison sees one update
        assert_bit_equal(saved_state(shorter), saved_state(whole))


def test_a_nan_names_its_module_and_keeps_the_last_good_checkpoint(data: Path, tmp_path: Path) -> None:
    good = train(data, tmp_path, "--batch-size", 16, "--max-update", 2)
    before = good.read_bytes()
    with pytest.raises(FloatingPointError), fairseq_log() as lines:
        # 1e30 * Adam's step of about 1: the next forward pass overflows
        train(data, tmp_path, "--batch-size", 16, "--max-update", 9, "--lr", 1e30, "--reset-lr-scheduler")
    assert good.read_bytes() == before
    assert re.search(r"(NaN|Inf) detected in output of (encoder|decoder)\.\S+", "\n".join(lines))
    torch.load(good, weights_only=True)


def test_hydra_train_reads_the_same_settings(data: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(
        f"""
common: {{user_dir: {stock.USER_DIR}, cpu: true, no_progress_bar: true, seed: 3}}
task: {{_name: translation, data: {data}, source_lang: xx, target_lang: yy}}
model:
  _name: {ARCH}
  share_all_embeddings: true
  encoder_embed_dim: 32
  decoder_embed_dim: 32
  encoder_ffn_embed_dim: 64
  decoder_ffn_embed_dim: 64
  moe_expert_dim: 32
  moe_router: top_k
  moe_top_k: 3
criterion: {{_name: label_smoothed_cross_entropy_with_load_balance, label_smoothing: 0.1, balance_loss_weight: 0.02}}
dataset: {{batch_size: 16, num_workers: 0, required_batch_size_multiple: 1}}
optimization: {{max_update: 2, lr: [0.001]}}
optimizer: {{_name: adam}}
lr_scheduler: {{_name: fixed}}
checkpoint: {{save_dir: {tmp_path / "saved"}, no_epoch_checkpoints: true}}
""",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "fairseq_cli.hydra_train", "--config-dir", tmp_path, "--config-name", "tiny"]
    done = subprocess.run(
        [*map(str, command), f"hydra.run.dir={tmp_path / 'hydra'}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    saved = torch.load(tmp_path / "saved" / "checkpoint_last.pt", weights_only=True)
    assert saved["cfg"]["criterion"]["balance_loss_weight"] == 0.02
    assert saved["model"]["encoder.layers.1.moe.experts.w1"].shape == (8, 32, 32)
    assert len(translate(data, tmp_path / "saved" / "checkpoint_last.pt")) == 64


def test_a_checkpoint_of_other_sizes_is_refused(data: Path, checkpoint: Path) -> None:
    with pytest.raises(RuntimeError, match=r"size mismatch for encoder.layers.1.moe.router.weight"):
        translate(data, checkpoint, "--model-overrides", "{'moe_num_experts': 4}")


def of_one_length(data: Path, folder: Path) -> Path:
    """A data-bin whose 64 test sentences have six letters each, so that no batch has padding.

    Padding may change the last bit of the attention, which is float32 (on an AMD EPYC by 1e-6 in its products), and
    so the rounding of a row that the next int8 map reads.
    """
    pairs = [pair for pair in stock.made_up_pairs(1000, seed=7) if len(pair[0]) == 11][:64]
    for side, language in enumerate(("xx", "yy")):
        (folder / f"test.{language}").write_text("".join(f"{pair[side]}\n" for pair in pairs), encoding="utf-8")
    prepare = ("-s", "xx", "-t", "yy", "--testpref", folder / "test", "--destdir", folder)
    stock.run("fairseq-preprocess", *prepare, "--joined-dictionary", "--srcdict", data / "dict.xx.txt")
    return folder


def test_int8_translates_independently_of_the_batch_and_is_not_trained_on(
    data: Path, checkpoint: Path, tmp_path: Path
) -> None:
    int8 = tmp_path / "int8.pt"
    assert not quantise.main(["--checkpoint", str(checkpoint), "--out", str(int8), "--what", "all"])
    even = of_one_length(data, tmp_path)
    one_by_one = translate(even, int8, "--batch-size", 1)
    assert len(set(one_by_one)) > 30
    assert one_by_one == translate(even, int8, "--batch-size", 5) == translate(even, int8, "--batch-size", 64)
    alone = translate(data, int8, "--batch-size", 1)
    in_float, together = translate(data, checkpoint), translate(data, int8, "--batch-size", 64)
    # small letters and few updates: some sentences are a close call
    assert sum(a == b for a, b in zip(alone, in_float, strict=True)) > 0.7 * len(alone)
    assert sum(a == b for a, b in zip(alone, together, strict=True)) > 0.95 * len(alone)
    with pytest.raises(CheckpointError, match="cannot be trained, continued or finetuned"):
        train(data, tmp_path / "save", "--finetune-from-model", int8)

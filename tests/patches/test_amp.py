"""--amp on CPU tensors, with fairseq's own trainer: equal to float32 but for the rounding of the number format."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
import torch
from fairseq.logging import metrics
from fairseq.trainer import Trainer

from tests.e2e import ranks

UPDATES = 40
# Random sentences, one layer a side. With --adam-eps 1e-6 an eps that grows with the loss scale shows.
FLAGS = shlex.split("--encoder-layers 1 --decoder-layers 1 --moe-interval 1 --adam-eps 1e-6 --lr 0.003")
WORDS = ranks.dictionary()


def trainer(*flags: str) -> Trainer:
    metrics.reset()
    return ranks.build([*FLAGS, *flags], 0, 1, WORDS)


def update(trainer: Trainer, number: int) -> float:
    with metrics.aggregate(new_root=True) as logged:
        trainer.train_step([ranks.share(number, WORDS, 0, 1)])
    return float(logged["loss"].avg) if "loss" in logged else float("nan")


def losses(trainer: Trainer) -> list[float]:
    return [update(trainer, number) for number in range(UPDATES)]


@pytest.fixture(scope="module")
def float32() -> list[float]:
    return losses(trainer())


def test_a_loss_scale_changes_nothing(float32: list[float]) -> None:
    """The scale is a power of two: multiplied and divided once, gradients are those of float32."""
    scaled = trainer("--amp", "--amp-init-scale", str(2**22))
    scaled.optimizer.amp_dtype = torch.float32  # the scaling alone, without float16
    assert losses(scaled) == pytest.approx(float32, rel=1e-6)
    assert scaled.optimizer.scaler.get_scale() == 2**22


@pytest.mark.parametrize(
    ("flags", "rounding"),
    [
        (("--amp",), 2**-11),  # float16 has 11 significant bits
        (("--amp", "--bf16"), 2**-8),
        (("--bf16",), 2**-8),
    ],
)
def test_after_40_updates_the_loss_is_that_of_float32_within_rounding(
    float32: list[float], flags: tuple[str, ...], rounding: float
) -> None:
    half = trainer(*flags)
    got = losses(half)
    assert half.get_num_updates() == UPDATES
    assert got[-1] == pytest.approx(float32[-1], rel=rounding)
    assert got != float32  # the format was used
    is_float32 = {parameter.dtype for parameter in half.get_model().parameters()} == {torch.float32}
    assert is_float32 == ("--amp" in flags)


def test_the_scale_is_saved_and_comes_back() -> None:
    first = trainer("--amp", "--amp-init-scale", "256", "--amp-scale-window", "3")
    for number in range(4):
        update(first, number)
    assert first.optimizer.scaler.get_scale() == 512  # grown after three updates
    state = first.optimizer.state_dict()
    second = trainer("--amp", "--amp-init-scale", "16", "--amp-scale-window", "5")
    second.optimizer.load_state_dict(state)
    scaler = second.optimizer.scaler
    assert (scaler.get_scale(), scaler.get_growth_interval(), scaler._get_growth_tracker()) == (512, 5, 1)
    # a checkpoint of stock fairseq has none
    del state["loss_scaler"]
    third = trainer("--amp", "--amp-init-scale", "16")
    third.optimizer.load_state_dict(state)
    assert third.optimizer.scaler.get_scale() == 16


def poison(trainer: Trainer) -> None:
    """The next backward pass gives one gradient an infinity."""
    parameter = next(trainer.get_model().parameters())
    handle = parameter.register_hook(lambda gradient: (handle.remove(), torch.full_like(gradient, torch.inf))[1])


def weights(trainer: Trainer) -> dict[str, Any]:
    return {name: value.clone() for name, value in trainer.get_model().state_dict().items()}


@pytest.mark.parametrize("optimizer", ["adam", "fused_adam"])  # the second skips the step itself
def test_an_overflow_lowers_the_scale_and_repeats_the_batch(optimizer: str) -> None:
    whole, hit = (trainer("--amp", "--optimizer", optimizer) for _ in range(2))
    update(whole, 0)
    poison(hit)
    update(hit, 0)
    assert hit.optimizer.scaler.get_scale() == whole.optimizer.scaler.get_scale() / 2
    assert hit.get_num_updates() == 1
    torch.testing.assert_close(weights(hit), weights(whole), rtol=1e-3, atol=1e-4)


def test_bfloat16_has_no_scale_and_an_infinity_is_an_error(tmp_path) -> None:
    half = trainer("--amp", "--bf16", "--save-dir", str(tmp_path))
    poison(half)
    before = weights(half)
    with pytest.raises(FloatingPointError, match="gradients are Nan/Inf"):
        update(half, 0)
    torch.testing.assert_close(weights(half), before, rtol=0, atol=0)
    assert half.optimizer.scaler.get_scale() == 1.0


@pytest.mark.parametrize("optimizer", ["adam", "fused_adam"])
@pytest.mark.parametrize(("before", "after"), [((), ("--amp",)), (("--amp",), ()), (("--amp",), ("--amp", "--bf16"))])
def test_a_training_continues_in_another_precision(tmp_path, before, after, optimizer: str) -> None:
    first = trainer(*before, "--optimizer", optimizer)
    update(first, 0)
    first.consolidate_optimizer()
    path = str(tmp_path / "checkpoint.pt")
    first.save_checkpoint(path, {"train_iterator": {"epoch": 1, "iterations_in_epoch": 1, "version": 2}})
    second = trainer(*after, "--optimizer", optimizer)
    second.load_checkpoint(path)
    assert second.get_num_updates() == 1
    moments = [
        [slots["exp_avg"] for slots in run.optimizer.optimizer.state_dict()["state"].values()]
        for run in (first, second)
    ]
    assert moments[0]
    assert all(torch.equal(*pair) for pair in zip(*moments, strict=True))
    update(second, 1)
    assert second.get_num_updates() == 2

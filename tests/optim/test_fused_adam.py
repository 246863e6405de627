"""--optimizer fused_adam: the mathematics of Adam, fairseq's flags, a state that continues."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fairseq.optim import build_optimizer
from omegaconf import OmegaConf

from xmoe_fairseq.optim.fused_adam import FusedAdam

STEPS = 5


def optimizer_for(name: str, params: list[torch.nn.Parameter], **settings: Any):
    cfg = {"_name": name, "adam_betas": "(0.9, 0.98)", "adam_eps": 1e-9, "weight_decay": 0.1, "lr": [0.01], **settings}
    cfg |= {"fp16_adam_stats": False, "tpu": False} if name == "adam" else {}
    return build_optimizer(OmegaConf.create(cfg), params)


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((6, 4, 3), (5,))]


def run(optimizer: Any, params: list[torch.nn.Parameter], first: int, last: int) -> None:
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


def by_hand(params: list[torch.Tensor], steps: int) -> list[torch.Tensor]:
    """arXiv 1412.6980, Algorithm 1, in float64, with the decay of arXiv 1711.05101."""
    values = [param.detach().double() for param in params]
    moments = [(torch.zeros_like(value), torch.zeros_like(value)) for value in values]
    for number in range(steps):
        generator = torch.Generator().manual_seed(number)
        for index, value in enumerate(values):
            grad = torch.randn(value.shape, generator=generator).double()
            mean, square = moments[index]
            mean, square = 0.9 * mean + 0.1 * grad, 0.98 * square + 0.02 * grad**2
            moments[index] = (mean, square)
            corrected_mean, corrected_square = mean / (1 - 0.9 ** (number + 1)), square / (1 - 0.98 ** (number + 1))
            values[index] = value * (1 - 0.01 * 0.1) - 0.01 * corrected_mean / (corrected_square.sqrt() + 1e-9)
    return values


@pytest.mark.parametrize("name", ["fused_adam", "adam"])
def test_steps_are_those_of_the_paper(name: str) -> None:
    params = parameters()
    expected = by_hand(params, STEPS)
    run(optimizer_for(name, params), params, 0, STEPS)
    for param, value in zip(params, expected, strict=True):
        assert torch.allclose(param.double(), value, rtol=1e-5, atol=1e-6)


def test_a_loaded_state_continues_to_the_last_bit_and_takes_the_new_learning_rate() -> None:
    params = parameters()
    optimizer = optimizer_for("fused_adam", params)
    run(optimizer, params, 0, 3)
    others = [torch.nn.Parameter(param.detach().clone()) for param in params]
    other = optimizer_for("fused_adam", others)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()), {"lr": 0.01})
    run(optimizer, params, 3, STEPS)
    run(other, others, 3, STEPS)
    assert all(torch.equal(one, two) for one, two in zip(params, others, strict=True))
    other.load_state_dict(optimizer.state_dict(), {"lr": 0.5})
    assert other.get_lr() == 0.5
    assert other.optimizer.param_groups[0]["fused"]


@pytest.mark.parametrize("betas", ["(0.8, 0.7)", (0.8, 0.7), [0.8, 0.7]])
def test_betas_from_a_flag_or_a_yaml(betas: Any) -> None:
    optimizer = optimizer_for("fused_adam", parameters(), adam_betas=betas)
    assert isinstance(optimizer, FusedAdam)
    assert optimizer.optimizer_config == {"lr": 0.01, "betas": (0.8, 0.7), "eps": 1e-9, "weight_decay": 0.1}

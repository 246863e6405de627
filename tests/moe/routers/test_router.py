"""What all routers share: the gate's first weights."""

from __future__ import annotations

import pytest
import torch

from tests.moe.helpers import EXPERTS, HIDDEN, ROUTERS, WIDTH
from xmoe_fairseq.moe import MoEConfig, MoELayer


@pytest.mark.parametrize("case", [case for case in ROUTERS if case != "hash"])
def test_the_gates_first_weights_are_multiplied_and_nothing_else_changes(case: str) -> None:
    layers = []
    for scale in (1.0, 4.0):
        torch.manual_seed(0)
        settings = {"router": case, **ROUTERS[case], "gate_init_scale": scale}
        layers.append(MoELayer(MoEConfig(WIDTH, EXPERTS, HIDDEN, **settings)))
    plain, scaled = (dict(layer.named_parameters()) for layer in layers)
    assert torch.equal(scaled.pop("router.weight"), 4 * plain.pop("router.weight"))
    assert all(torch.equal(scaled[name], weight) for name, weight in plain.items())


def test_a_scaled_gate_asks_for_fewer_experts() -> None:
    x_TD = torch.nn.functional.layer_norm(torch.randn(500, 64, generator=torch.Generator().manual_seed(1)), (64,))
    wanted = []
    for scale in (1.0, 4.0, 16.0):
        torch.manual_seed(0)
        router = MoELayer(MoEConfig(64, 32, 4, gate_init_scale=scale)).router
        wanted.append(float(router(x_TD, None, None).chosen_TK.sum()) / len(x_TD))
    assert wanted[0] > 2 * wanted[1] > 4 * wanted[2] > 4

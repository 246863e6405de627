"""Settings that a router declares: keywords of MoEConfig, refused with other routers, each name declared once."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from xmoe_fairseq.moe import MoEConfig, MoELayer, RoutingPlan, register_router, registry
from xmoe_fairseq.moe.plan import Choices
from xmoe_fairseq.moe.routers.router import Router, probability_choices
from xmoe_fairseq.moe.routers.top_k import TOP_K, TopKRouter
from xmoe_fairseq.moe.settings import Setting, not_negative

SIZES: dict[str, Any] = {"embed_dim": 8, "num_experts": 4, "expert_dim": 16}
OFFSET = Setting("offset", int, 1, "the expert beside the likeliest", check=not_negative, allowed="not be negative")


class Beside(Router):
    """The expert ``offset`` places after the likeliest."""

    settings = (OFFSET,)
    unused = ("input_jitter",)

    def choose(self, prob_TG: Tensor, real_T: Tensor | None, token_ids_T: Tensor | None) -> Choices:
        expert_T1 = (prob_TG.detach().argmax(dim=-1, keepdim=True) + self.config.offset) % prob_TG.size(-1)
        return probability_choices(prob_TG, expert_T1, None, real_T, normalize=False)


@pytest.fixture
def beside() -> Iterator[None]:
    register_router("beside")(Beside)
    yield
    del registry.ROUTERS["beside"]


def plan_of(**settings: Any) -> RoutingPlan:
    torch.manual_seed(0)
    layer = MoELayer(MoEConfig(**SIZES, capacity_factor=None, **settings))
    plan: RoutingPlan = layer(torch.randn(7, 8))[1]
    return plan


@pytest.mark.usefixtures("beside")
def test_its_value_reaches_the_router() -> None:
    likeliest = plan_of(router="switch")
    for offset in (0, 3):
        moved = plan_of(router="beside", offset=offset)
        expected = dict(zip(likeliest.token_index_A.tolist(), likeliest.expert_index_A.tolist(), strict=True))
        assert {token: (expert + offset) % 4 for token, expert in expected.items()} == dict(
            zip(moved.token_index_A.tolist(), moved.expert_index_A.tolist(), strict=True)
        )


@pytest.mark.usefixtures("beside")
def test_it_is_a_keyword_an_attribute_and_part_of_the_record() -> None:
    config = MoEConfig(**SIZES, router="beside", offset=2)
    assert config.offset == 2
    assert MoEConfig(**SIZES, router="beside").offset == 1
    assert replace(config, num_experts=6).offset == 2
    assert replace(config, offset=0).offset == 0
    assert config != replace(config, offset=0)
    for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert copied == config
        assert hash(copied) == hash(config)
    assert "offset" in repr(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router": "beside", "offset": -1}, r"moe_offset \(-1\) must not be negative"),
        ({"router": "beside", "offset": 1.5}, r"moe_offset \(1.5\) must not be negative"),
        ({"router": "beside", "offset": True}, r"moe_offset \(True\) must"),
        ({"router": "switch", "offset": 2}, r"moe_offset \(2\) works with moe_router beside, not switch; set moe_off"),
        ({"router": "beside", "input_jitter": 0.1}, r"moe_input_jitter \(0.1\) has no effect with moe_router beside"),
    ],
)
@pytest.mark.usefixtures("beside")
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEConfig(**SIZES, **settings)


def test_names_that_are_no_settings() -> None:
    with pytest.raises(TypeError, match=r"MoEConfig has no offset; its settings are .*num_experts.*threshold"):
        MoEConfig(**SIZES, offset=2)
    with pytest.raises(AttributeError, match="offset"):
        _ = MoEConfig(**SIZES).offset


def test_one_name_means_one_thing() -> None:
    def router_with(*settings: Setting) -> type[Router]:
        return type("Other", (Router,), {"settings": settings})

    with pytest.raises(ValueError, match=r"router other declares moe_top_k in another way than router top_k; use"):
        register_router("other")(router_with(replace(TOP_K, default=3)))
    with pytest.raises(ValueError, match=r"router other declares moe_expert_dim, a setting of every layer"):
        register_router("other")(router_with(Setting("expert_dim", int, 1, "")))
    assert "other" not in registry.ROUTERS
    try:
        register_router("other")(router_with(*TopKRouter.settings))  # the same declarations are shared
        assert registry.routers_with("top_k")[-1] == "other"
    finally:
        registry.ROUTERS.pop("other", None)


def test_text_of_a_flag_becomes_a_value() -> None:
    settings = registry.router_settings()
    assert settings["top_k"].parse("none") is None
    assert settings["top_k"].parse("3") == 3
    assert settings["threshold"].parse("0.5") == 0.5
    assert settings["threshold"].parse("0.5,0.75") == [0.5, 0.75]
    with pytest.raises(ValueError, match="invalid literal"):
        settings["top_k"].parse("3,4")

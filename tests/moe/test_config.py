"""MoEConfig refuses settings that cannot work, and names the allowed ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from xmoe_fairseq.moe import MoEConfig

SIZES: dict[str, Any] = {"embed_dim": 8, "num_experts": 4, "expert_dim": 16}
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"embed_dim": 0}, r"embed_dim \(0\) must be at least 1"),
        ({"num_experts": 0}, r"num_experts \(0\) must be at least 1"),
        ({"expert_dim": -3}, r"expert_dim \(-3\) must be at least 1"),
        ({"min_capacity": 0}, r"min_capacity \(0\) must be at least 1"),
        ({"threshold": 1.01}, r"moe_threshold \(1.01\) must be a probability mass in \[0, 1\]"),
        ({"threshold": -0.1}, r"moe_threshold \(-0.1\) must be"),
        ({"threshold": NAN}, r"moe_threshold \(nan\) must be"),
        ({"capacity_factor": 0}, r"moe_capacity_factor \(0\) must be > 0; .* None never drops"),
        ({"capacity_factor": NAN}, r"moe_capacity_factor \(nan\) must be > 0"),
        ({"capacity_factor": INF}, r"moe_capacity_factor \(inf\) must be > 0"),
        ({"eval_capacity_factor": -1.0}, r"moe_eval_capacity_factor \(-1.0\) must be > 0"),
        ({"num_null_experts": -1}, r"moe_null_experts \(-1\) must not be negative"),
        ({"shared_expert_dim": -1}, r"shared_expert_dim \(-1\) must not be negative"),
        ({"z_loss_weight": -0.1}, r"z_loss_weight \(-0.1\) must not be negative; 0 turns it off"),
        ({"z_loss_weight": NAN}, r"z_loss_weight \(nan\)"),
        ({"input_jitter": 1.0}, r"input_jitter \(1.0\) must be in \[0, 1\)"),
        ({"activation_dropout": -0.1}, r"activation_dropout \(-0.1\) must be in \[0, 1\)"),
        ({"activation": "tanhh"}, r"activation \('tanhh'\) must be one of gelu, .*relu"),
        ({"router_noise": "loud"}, r"moe_router_noise \('loud'\) must be one of none, gumbel, gaussian"),
        ({"threshold": "0.9"}, r"moe_threshold \('0.9'\) must be a probability mass"),
        ({"num_experts": 4.5}, r"moe_num_experts \(4.5\) must be at least 1, a whole number"),
        ({"merge_experts": "false"}, r"moe_merge_experts \('false'\) must be True or False"),
        ({"max_experts": 5}, r"moe_max_experts \(5\) must be between 1 and moe_num_experts \(4\)"),
        (
            {"router": "top_k", "top_k": 2, "max_experts": 2},
            r"moe_max_experts \(2\) works with moe_router threshold, not top_k; set moe_max_experts none",
        ),
        ({"compute": "gpu"}, r"moe_compute \('gpu'\) must be one of auto, triton, bmm, grouped, loop, masked"),
        ({"router": "thresold"}, r"moe_router 'thresold' is not known; choose one of adamoe, base, hash, .*--user-dir"),
        ({"router": "hash", "hash_seed": 2**63}, r"moe_hash_seed \(9223372036854775808\) must be a whole number"),
        ({"router": "top_k"}, "moe_router top_k needs moe_top_k"),
        ({"router": "adamoe"}, "moe_router adamoe needs moe_top_k"),
        (
            {"router": "top_k", "top_k": 0},
            r"moe_top_k \(0\) must be at least 1",
        ),
        (
            {"router": "top_k", "top_k": 5},
            r"moe_top_k \(5\) must be .*moe_num_experts \(4\) \+ moe_null_experts \(0\); lower moe_top_k or raise one",
        ),
        (
            {"router": "switch", "top_k": 2},
            "moe_router switch takes one expert a token, moe_top_k is 2; .*set moe_router top_k",
        ),
        (
            {"num_null_experts": 2},
            r"moe_null_experts \(2\) works with moe_router adamoe, not threshold; set moe_null_experts 0",
        ),
        (
            {"router_noise": "gumbel"},
            r"moe_router_noise \(gumbel\) works with moe_router top_k, switch, adamoe, not threshold; set",
        ),
        ({"router": "hash", "router_noise": "gumbel"}, r"moe_router_noise \(gumbel\) works with .* not hash"),
        (
            {"router": "hash", "z_loss_weight": 0.1},
            r"moe_z_loss_weight \(0.1\) has no effect with moe_router hash; set it to 0.0",
        ),
        ({"gate_init_scale": 0.0}, r"moe_gate_init_scale \(0.0\) must be > 0; 1 starts as published"),
        ({"router": "hash", "gate_init_scale": 4.0}, r"moe_gate_init_scale \(4.0\) has no effect with moe_router hash"),
        ({"router": "hash", "input_jitter": 0.1}, r"moe_input_jitter \(0.1\) has no effect with moe_router hash"),
        (
            {"router": "hash", "normalize_weights": True},
            r"moe_normalize_weights \(True\) has no effect with moe_router hash",
        ),
        ({"router": "base", "z_loss_weight": 0.1}, r"moe_z_loss_weight \(0.1\) has no effect with moe_router base"),
        (
            {"router": "base", "normalize_weights": True},
            r"moe_normalize_weights \(True\) has no effect with moe_router base",
        ),
        ({"token_adapter": True}, "moe_token_adapter needs moe_merge_experts"),
        ({"merge_experts": True, "router": "top_k", "capacity_factor": None}, "moe_merge_experts needs moe_top_k"),
        (
            {"merge_experts": True, "top_k": 2, "router": "threshold"},
            "moe_merge_experts gates per sentence and ignores moe_router threshold; set moe_router top_k",
        ),
        (
            {"merge_experts": True, "top_k": 2, "capacity_factor": 2.0},
            r"moe_merge_experts drops no token: moe_capacity_factor \(2.0\) .* must be None",
        ),
    ],
)
def test_every_refusal_names_the_setting_and_the_way_out(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEConfig(**{**SIZES, **settings})


@pytest.mark.parametrize(
    "settings",
    [
        {"threshold": 0.0},
        {"threshold": 1.0, "capacity_factor": None},
        {"router": "adamoe", "top_k": 6, "num_null_experts": 2},
        {"router": "adamoe", "top_k": 2},
        {"router": "switch", "top_k": 1},
        {"router": "base", "input_jitter": 0.1},
        {"top_k": 2},  # threshold ignores it: --model-overrides switches between the two
        {"merge_experts": True, "router": "top_k", "top_k": 4, "capacity_factor": None, "token_adapter": True},
    ],
)
def test_the_edges_of_what_is_allowed(settings: dict[str, Any]) -> None:
    config = MoEConfig(**{**SIZES, **settings})
    assert {name: getattr(config, name) for name in settings} == settings  # taken as given, nothing replaced


def test_it_is_frozen_and_hashable() -> None:
    config = MoEConfig(**SIZES)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.threshold = 0.5  # type: ignore[misc]
    assert hash(config) == hash(MoEConfig(**SIZES))
    assert dataclasses.replace(config, threshold=0.5).threshold == 0.5


def test_cost_figures() -> None:
    config = MoEConfig(**SIZES, dense_dim=64)
    assert config.flops_per_row == 2 * (8 * 16 + 16 * 8)
    assert config.row_cost == 0.25
    assert MoEConfig(**SIZES).row_cost == 1

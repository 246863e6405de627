"""The checks of expert parallelism; tests/e2e/test_distributed.py has whole training runs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from fairseq import utils

from xmoe_fairseq.patches import expert_parallel
from xmoe_fairseq.patches.expert_parallel import check_supported
from xmoe_fairseq.patches.wrap import patches_of


def settings(**changed: object) -> SimpleNamespace:
    """fairseq's configuration as far as the check reads it."""
    flat = {
        "ddp_backend": "legacy_ddp",
        "zero_sharding": "none",
        "use_bmuf": False,
        "fp16": False,
        "fp16_no_flatten_grads": False,
        "memory_efficient_fp16": False,
        "store_ema": False,
        "ema_fp32": False,
        **changed,
    }
    group = SimpleNamespace(**flat)
    return SimpleNamespace(distributed_training=group, optimization=group, common=group, ema=group)


def task(eval_bleu: bool = False) -> SimpleNamespace:
    return SimpleNamespace(cfg=SimpleNamespace(eval_bleu=eval_bleu))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ddp_backend": "fully_sharded"}, "--ddp-backend fully_sharded; choose one of legacy_ddp"),
        ({"zero_sharding": "os"}, "--zero-sharding os"),
        ({"use_bmuf": True}, "--use-bmuf"),
        ({"fp16": True}, "add --fp16-no-flatten-grads"),
        ({"store_ema": True, "ema_fp32": True}, "--ema-fp32"),
    ],
)
def test_what_it_cannot_honour_is_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_supported(settings(**changed), task())


def test_eval_bleu_is_refused_and_the_rest_allowed() -> None:
    with pytest.raises(ValueError, match="--eval-bleu: ranks decode different numbers of steps"):
        check_supported(settings(), task(eval_bleu=True))
    check_supported(settings(fp16=True, fp16_no_flatten_grads=True, store_ema=True, ddp_backend="c10d"), task())


def test_models_without_spread_experts_keep_the_stock_norm() -> None:
    stock = utils.clip_grad_norm_
    try:
        expert_parallel.install()
        expert_parallel.install()
        assert patches_of(utils.clip_grad_norm_).count("expert-gradient-norm") == 1
        parameter = torch.nn.Parameter(torch.zeros(2))
        parameter.grad = torch.tensor([3.0, 4.0])
        assert utils.clip_grad_norm_([parameter], 1.0) == 5.0
        torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]))
    finally:
        utils.clip_grad_norm_ = stock

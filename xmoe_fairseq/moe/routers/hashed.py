"""Hash layers: a fixed random hash of the token id chooses the expert (arXiv 2106.04426)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import MoEConfig
from ..plan import Choices
from ..registry import register_router
from ..settings import Setting
from .router import Router, real_choices

_MASK = 0x7FFFFFFFFFFFFFFF


def hash_experts(token_ids: Tensor, seed: Tensor, num_experts: int) -> Tensor:
    """int64 expert of each id: a 64-bit mixer (splitmix64's rounds), the same on every device and run."""
    mixed = token_ids.long() * -7046029254386353131 + seed
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        mixed = (mixed ^ ((mixed >> shift) & (_MASK >> (shift - 1)))) * factor
    mixed = mixed ^ ((mixed >> 31) & (_MASK >> 30))
    return (mixed & _MASK) % num_experts


@register_router("hash")
class HashRouter(Router):
    """One expert per token, a hash of its vocabulary index, with weight 1. It has no parameters and no balance loss.

    State: buffer ``seed`` int64, so that a checkpoint keeps its hash function.
    """

    seed: Tensor
    unused = ("normalize_weights", "input_jitter", "gate_init_scale", "z_loss_weight")
    weights_by_softmax = False
    settings = (
        Setting(
            *("hash_seed", int, 1, "seed of the hash router; each layer adds its index"),
            check=lambda seed: abs(seed) < 2**62,
            allowed="be a whole number whose size is below 2^62",
            in_layer=lambda seed, number: seed + number,  # another hash in every layer
            ignored_elsewhere=True,
        ),
    )

    def __init__(self, config: MoEConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.register_buffer("seed", torch.tensor(config.hash_seed, dtype=torch.int64))

    @classmethod
    def num_gates(cls, config: MoEConfig) -> int:
        return 0

    @classmethod
    def state_shapes(cls, config: MoEConfig) -> dict[str, tuple[int, ...]]:
        return {"seed": ()}

    @classmethod
    def experts_wanted(cls, config: MoEConfig) -> float | None:
        return 1.0

    def forward(self, x_TD: Tensor, real_T: Tensor | None, token_ids_T: Tensor | None) -> Choices:
        if token_ids_T is None:
            raise ValueError(
                "moe_router hash chooses by vocabulary index and got no token_ids; call the layer with "
                "token_ids=... (the models of this package do), or choose another moe_router"
            )
        expert_T1 = hash_experts(token_ids_T, self.seed, self.config.num_experts).unsqueeze(-1)
        one = torch.ones((), device=x_TD.device)
        return Choices(
            expert_TK=expert_T1,
            chosen_TK=real_choices(expert_T1, None, real_T),
            score_TK=one.expand_as(expert_T1),
            weight_TE=one.expand(x_TD.size(0), self.config.num_experts),
            balance=None,
            entropy=one.new_zeros(()),
        )

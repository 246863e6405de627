"""The layer of merged experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..activations import ACTIVATIONS
from ..balance import SpreadTerms
from ..capacity import make_plan
from ..config import MoEConfig
from ..context import SentenceContext
from ..experts.stacked import Experts, compute_dtype
from ..layer import MoELayer
from ..plan import Choices, RoutingPlan
from ..registry import register_layer
from ..routers.router import real_choices
from .cache import merged_for_decoding, slots_by_sentence
from .flops import merge_flops
from .gate import GateChoice, SentenceGate, choices_merged, masked_mean
from .gemm import merged_linear


@register_layer("merged")
class MergedMoELayer(MoELayer):
    """``y, plan = layer(x, padding=None, token_ids=None, context=None)``.

    ``MoELayer(config)`` and ``build_layer(config)`` build it for a configuration that merges.

    The input of the gates is one vector per sentence. Without ``context`` it is the mean of the layer's input over the
    positions that are not padding. In a decoder that would depend on later tokens, so a decoder passes a
    ``SentenceContext``.

    The plan has a pair for each real token and each expert that its sentence merges in the first map, weighted with the
    gate. Its ``row_cost`` is chosen so that the sum over pairs is the cost of one expert per token and of the merging.

    State: ``experts.{w1,b1,w2,b2}`` as in experts/stacked.py; ``gate1`` and ``gate2``: ``weight`` and ``noise_weight``
    (E, D); with ``token_adapter`` ``adapter1.{down,up}`` and ``adapter2.{down,up}``.
    """

    own_defaults = {"router": "top_k", "capacity_factor": None}  # noqa: RUF012
    # the gates of merged experts sum to 1 and begin at 0, and SentenceGate adds its own noise
    unused = (
        *("normalize_weights", "input_jitter", "router_noise", "gate_init_scale", "z_loss_weight"),
        *("shared_expert_dim", "weights", "compute"),
    )

    @classmethod
    def check(cls, config: MoEConfig) -> None:
        if config.expert_parallel:
            raise ValueError(
                "moe_merge_experts needs all experts' matrices on every rank: leave moe_expert_parallel out"
            )
        if config.router != "top_k":
            raise ValueError(
                f"moe_merge_experts gates per sentence and ignores moe_router {config.router}; set moe_router top_k"
            )
        if config.top_k is None:
            raise ValueError(
                "moe_merge_experts needs moe_top_k: the number of experts to merge; MEO's own default is 4"
            )
        if config.capacity_factor is not None or config.eval_capacity_factor is not None:
            raise ValueError(
                f"moe_merge_experts drops no token: moe_capacity_factor ({config.capacity_factor}) and "
                f"moe_eval_capacity_factor ({config.eval_capacity_factor}) must be None (on the command line: none)"
            )
        config.refuse(cls.unused, "with moe_merge_experts")

    @classmethod
    def state_shapes(cls, config: MoEConfig) -> dict[str, tuple[int, ...]]:
        gate = (config.num_experts, config.embed_dim)
        names = [f"gate{number}.{weight}" for number in (1, 2) for weight in ("weight", "noise_weight")]
        experts = {f"experts.{name}": shape for name, shape in Experts.state_shapes(config).items()}
        return experts | dict.fromkeys(names, gate)

    def __init__(self, config: MoEConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.experts = Experts(config)
        self.gate1 = SentenceGate(config)
        self.gate2 = SentenceGate(config)
        self.adapter1 = TokenAdapter(config.embed_dim) if config.token_adapter else None
        self.adapter2 = TokenAdapter(config.expert_dim) if config.token_adapter else None

    def _forward(
        self, x: Tensor, padding: Tensor | None, _token_ids: Tensor | None, context: SentenceContext | None
    ) -> tuple[Tensor, RoutingPlan]:
        """Merge the experts of each sentence and compute each token with its sentence's merged expert.

        Args:
            x: floating point (T, B, D), time first as in fairseq, or (T, D) for one sentence.
            padding: bool (T, B) or (T,), True at padding, which gates and counts ignore; the output there is 0.
            context: required in a decoder.
        """
        x_TBD, real_TB = self._sentences(x, padding)
        vector_BD = self._gate_input(x_TBD, real_TB, context)
        choice1, choice2 = self.gate1(vector_BD), self.gate2(vector_BD)
        cache = None if context is None else context.cache
        merges = 0 if cache else x_TBD.size(1)
        x_BTD = x_TBD.transpose(0, 1)
        if cache is None:
            y_BTD = self._compute(x_BTD, choice1, choice2)
        else:
            y_BTD = self._compute_cached(x_BTD, vector_BD, choice1, choice2, cache)
        y_TBD = y_BTD.transpose(0, 1).to(x.dtype)
        if real_TB is not None:
            y_TBD = y_TBD.masked_fill(~real_TB.unsqueeze(-1), 0.0)
        return y_TBD.reshape(x.shape), self._plan(x_TBD, real_TB, choice1, choice2, merges)

    def _sentences(self, x: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``x`` as (T, B, D) with 0 at padding, and bool (T, B), True where it is not padding."""
        if x.dim() not in (2, 3):
            raise ValueError(
                f"merged experts need whole sentences: x must be (T, B, D) or (T, D), got {tuple(x.shape)}"
            )
        real_TB = None if padding is None else ~padding.bool()
        if x.dim() == 2:
            x, real_TB = x.unsqueeze(1), None if real_TB is None else real_TB.unsqueeze(1)
        # 0 instead of the values at padding, which may be NaN
        return x if real_TB is None else x.masked_fill(~real_TB.unsqueeze(-1), 0.0), real_TB

    def _gate_input(self, x_TBD: Tensor, real_TB: Tensor | None, context: SentenceContext | None) -> Tensor:
        if context is None:
            return masked_mean(x_TBD, real_TB)
        vector_BD = context.vector_BD
        if vector_BD.shape != x_TBD.shape[1:]:
            raise ValueError(
                f"context holds {tuple(vector_BD.shape)}, x needs {tuple(x_TBD.shape[1:])}: one vector per sentence, "
                "of the decoder's width; merged experts need --encoder-embed-dim equal to --decoder-embed-dim"
            )
        return vector_BD.float()

    def _compute(self, x_BTD: Tensor, choice1: GateChoice, choice2: GateChoice) -> Tensor:
        """Compute both maps; merged matrices exist for one chunk of sentences at a time."""
        experts, dtype = self.experts, compute_dtype(x_BTD)
        x_BTD = self._adapt(self.adapter1, x_BTD).to(dtype)
        with torch.autocast(x_BTD.device.type, enabled=False):
            pre_BTF = merged_linear(x_BTD, choice1, experts.w1, experts.b1)
        hidden_BTF = self._hidden(pre_BTF).to(dtype)
        with torch.autocast(x_BTD.device.type, enabled=False):
            return merged_linear(hidden_BTF, choice2, experts.w2, experts.b2)

    def _hidden(self, pre: Tensor) -> Tensor:
        hidden = ACTIVATIONS[self.config.activation].forward(pre)
        hidden = nn.functional.dropout(hidden, self.config.activation_dropout, self.training)
        return self._adapt(self.adapter2, hidden)

    @staticmethod
    def _adapt(adapter: TokenAdapter | None, x: Tensor) -> Tensor:
        return x if adapter is None else x + adapter(x)

    def _compute_cached(
        self,
        x_RTD: Tensor,
        vector_RD: Tensor,
        choice1: GateChoice,
        choice2: GateChoice,
        cache: dict[str, Tensor],
    ) -> Tensor:
        """Compute both maps with matrices merged in the first decoding step; the beams of a sentence share them."""
        dtype = compute_dtype(x_RTD)
        if not cache:
            cache.update(merged_for_decoding(self.experts, vector_RD, (choice1, choice2), dtype))
        slot_R, beams = slots_by_sentence(cache["sentence_R"], cache["w1"].size(0))
        shared = x_RTD.new_zeros(cache["w1"].size(0) * beams, *x_RTD.shape[1:]).index_copy(0, slot_R, x_RTD)
        x_UND = self._adapt(self.adapter1, shared.view(cache["w1"].size(0), -1, x_RTD.size(-1))).to(dtype)
        with torch.autocast(x_RTD.device.type, enabled=False):
            hidden_UNF = self._hidden(torch.baddbmm(cache["b1"].unsqueeze(1), x_UND, cache["w1"])).to(dtype)
            y_UND = torch.baddbmm(cache["b2"].unsqueeze(1), hidden_UNF, cache["w2"])
        return y_UND.view(shared.shape).index_select(0, slot_R)

    def _plan(
        self, x_TBD: Tensor, real_TB: Tensor | None, choice1: GateChoice, choice2: GateChoice, merges: int
    ) -> RoutingPlan:
        num_tokens = x_TBD.size(0) * x_TBD.size(1)
        num_real = torch.full((), num_tokens, device=x_TBD.device) if real_TB is None else real_TB.sum()
        real_B = None if real_TB is None else real_TB.any(dim=0)

        def per_token(value_BE: Tensor) -> Tensor:
            return value_BE.expand(x_TBD.size(0), *value_BE.shape).reshape(num_tokens, value_BE.size(-1))

        real_T = None if real_TB is None else real_TB.reshape(-1)
        expert_TK = per_token(choice1.expert_BK)
        weight_TE = per_token(choice1.weight_BE)
        with torch.no_grad():
            entropy_T = per_token(torch.special.entr(choice1.weight_BE).sum(dim=-1, keepdim=True)).squeeze(-1)
            entropy = (entropy_T if real_T is None else entropy_T[real_T]).sum() / num_real.clamp(min=1)
        return make_plan(
            Choices(
                expert_TK=expert_TK,
                chosen_TK=real_choices(expert_TK, None, real_T),
                score_TK=weight_TE.detach().gather(1, expert_TK),
                weight_TE=weight_TE,
                balance=SpreadTerms(torch.cat([choice1.spread(real_B), choice2.spread(real_B)])),
                entropy=entropy,
            ),
            capacity=None,
            num_real_tokens=num_real,
            row_cost=self._row_cost(num_real, merges),
        )

    def _row_cost(self, num_real: Tensor, merges: int) -> Tensor:
        computed = num_real * self.config.flops_per_row + merges * merge_flops(self.config)
        dense = 4 * self.config.embed_dim * (self.config.dense_dim or self.config.expert_dim)
        return computed / (num_real.clamp(min=1) * choices_merged(self.config) * dense)


class TokenAdapter(nn.Module):
    """MEO's "token level": x + up(relu(down(x))) with width / 64 hidden units; initialised as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, max(1, width // 64))
        self.up = nn.Linear(max(1, width // 64), width)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        """The summand beside ``x``."""
        y: Tensor = self.up(torch.relu(self.down(x)))
        return y

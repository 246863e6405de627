"""MEO: merge the chosen experts' matrices, once per sentence, and compute once (arXiv 2310.09832).

An expert is one linear map, so a feed-forward network has two banks of E maps, each with its own gate; since the maps
are linear, the merged map gives exactly the gated sum of the experts' outputs. (Merging whole networks would not: the
activation stands between.) What differs from the released code, and why, is in docs/methods.md.

Axis letters: T positions, B sentences, padding included; D model width; F hidden units; E experts; K experts merged;
C width of a gate's input; I, O widths of one map; M sentences of one chunk; R rows of a decoding batch (sentences x
beams); U sentences that are kept merged; Q quantities to balance.

Memory: every sentence has matrices of its own, 2 x D x F numbers. They are made for a chunk of at most
``CHUNK_NUMBERS`` numbers at a time and made again in the backward pass, never kept: an update holds one chunk and its
gradient, however many sentences it has. Incremental decoding keeps them for the sentences in the batch, once for all
beams.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .activations import ACTIVATIONS
from .balance import SpreadTerms
from .capacity import make_plan
from .config import MoEConfig
from .experts import Experts, compute_dtype
from .layer import MoELayer
from .ordering import sort_descending
from .plan import Choices, RoutingPlan
from .routers.base import real_choices

# Numbers of merged matrices that exist at one time, per bank: 64 MiB in float32, 32 sentences of 512 x 1024.
CHUNK_NUMBERS = 2**24
# Added to the learned standard deviation of the gate's noise, as in the released code.
NOISE_FLOOR = 1e-2


@dataclass(frozen=True)
class SentenceContext:
    """What a decoder's merged layer needs beside its input.

    Attributes:
        vector_BC: float, one vector per row of the batch: the mean of the encoder's final output over the source
            tokens that are not padding. It must not depend on the target.
        cache: a dictionary that the caller keeps through one incremental decoding (and reorders with
            ``reorder_cache``); merged matrices stay in it. None: merge for this call alone.
    """

    vector_BC: Tensor
    cache: dict[str, Tensor] | None = None


class MergedMoELayer(MoELayer):
    """``y, plan = layer(x, padding=None, token_ids=None, context=None)``.

    ``MoELayer(config)`` builds it for a config that merges.

    The gates see one vector per sentence: without ``context`` the mean of the layer's input over real positions, which
    suits an encoder and would show a decoder its future; a decoder passes a ``SentenceContext``.

    The plan names, for each real token, the experts that its sentence merges in the first map, with their gates as
    weights; its ``row_cost`` is such that the pairs add up to the real cost: one expert per token, and the merging.

    State: ``experts.{w1,b1,w2,b2}`` as in experts.py; ``gate1`` and ``gate2``: ``weight`` and ``noise_weight`` (E, D);
    with ``token_adapter`` ``adapter1.{down,up}`` and ``adapter2.{down,up}``.
    """

    def __init__(self, config: MoEConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.experts = Experts(config)
        self.gate1 = SentenceGate(config)
        self.gate2 = SentenceGate(config)
        self.adapter1 = TokenAdapter(config.embed_dim) if config.token_adapter else None
        self.adapter2 = TokenAdapter(config.expert_dim) if config.token_adapter else None

    def forward(
        self,
        x: Tensor,
        padding: Tensor | None = None,
        token_ids: Tensor | None = None,
        context: SentenceContext | None = None,
    ) -> tuple[Tensor, RoutingPlan]:
        """Merge for each sentence, compute each token once.

        Args:
            x: floating point (T, B, D), time first as in fairseq, or (T, D) for one sentence.
            padding: bool (T, B) or (T,), True at padding: not seen by the gates, not counted; output 0.
            token_ids: not used.
            context: required in a decoder.
        Returns:
            ``y`` like ``x``, and the plan.
        Raises:
            ValueError: shapes that do not fit.
        """
        if x.dim() not in (2, 3):
            raise ValueError(
                f"merged experts need whole sentences: x must be (T, B, D) or (T, D), got {tuple(x.shape)}"
            )
        self._flatten(x, padding, None)  # refuses shapes that do not fit
        if x.dim() == 2:
            x_TBD, real_TB = x.unsqueeze(1), None if padding is None else ~padding.bool().unsqueeze(1)
        else:
            x_TBD, real_TB = x, None if padding is None else ~padding.bool()
        if real_TB is not None:
            x_TBD = x_TBD.masked_fill(~real_TB.unsqueeze(-1), 0.0)  # what padding holds must not matter, NaN included
        vector_BC = self._gate_input(x_TBD, real_TB, context)
        choice1, choice2 = self.gate1(vector_BC), self.gate2(vector_BC)
        cache = None if context is None else context.cache
        merges = 0 if cache else x_TBD.size(1)
        x_BTD = x_TBD.transpose(0, 1)
        if cache is None:
            y_BTD = self._compute(x_BTD, choice1, choice2)
        else:
            y_BTD = self._compute_cached(x_BTD, vector_BC, choice1, choice2, cache)
        y_TBD = y_BTD.transpose(0, 1).to(x.dtype)
        if real_TB is not None:
            y_TBD = y_TBD.masked_fill(~real_TB.unsqueeze(-1), 0.0)
        return y_TBD.reshape(x.shape), self._plan(x_TBD, real_TB, choice1, choice2, merges)

    def _gate_input(self, x_TBD: Tensor, real_TB: Tensor | None, context: SentenceContext | None) -> Tensor:
        if context is None:
            return masked_mean(x_TBD, real_TB)
        vector_BC = context.vector_BC
        if vector_BC.shape != x_TBD.shape[1:]:
            raise ValueError(
                f"context holds {tuple(vector_BC.shape)}, x needs {tuple(x_TBD.shape[1:])}: one vector per sentence, "
                "of the decoder's width; merged experts need --encoder-embed-dim equal to --decoder-embed-dim"
            )
        return vector_BC.float()

    def _compute(self, x_BTD: Tensor, choice1: GateChoice, choice2: GateChoice) -> Tensor:
        """Both maps with the matrices made chunk by chunk."""
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
        vector_RC: Tensor,
        choice1: GateChoice,
        choice2: GateChoice,
        cache: dict[str, Tensor],
    ) -> Tensor:
        """Rows of one sentence (its beams) share matrices that the first step made."""
        dtype = compute_dtype(x_RTD)
        if not cache:
            first_U, cache["sentence_R"] = distinct_rows(vector_RC)
            for number, choice, weight, bias in (
                (1, choice1, self.experts.w1, self.experts.b1),
                (2, choice2, self.experts.w2, self.experts.b2),
            ):
                gate_UK, expert_UK = choice.gate_BK[first_U], choice.expert_BK[first_U]
                cache[f"w{number}"] = merge(weight, gate_UK, expert_UK).to(dtype)
                cache[f"b{number}"] = merge(bias, gate_UK, expert_UK).to(dtype)
        slot_R, beams = _slots(cache["sentence_R"], cache["w1"].size(0))
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
        num_real = torch.tensor(num_tokens, device=x_TBD.device) if real_TB is None else real_TB.sum()
        real_B = None if real_TB is None else real_TB.any(dim=0)

        def per_token(value_BE: Tensor) -> Tensor:
            return value_BE.expand(x_TBD.size(0), *value_BE.shape).reshape(num_tokens, -1)

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


class SentenceGate(nn.Module):
    """Noisy top-k over one vector per sentence. State: ``weight`` and ``noise_weight`` (E, D), zero at the start.

    Source: Shazeer et al., arXiv 1701.06538, as used by MEO's released code.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.top_k = choices_merged(config)
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.embed_dim))
        self.noise_weight = nn.Parameter(torch.zeros(config.num_experts, config.embed_dim))

    def forward(self, vector_BC: Tensor) -> GateChoice:
        """``vector_BC``: float32; noise is added in training only."""
        with torch.autocast(vector_BC.device.type, enabled=False):
            clean_BE = vector_BC @ self.weight.float().t()
            noisy_BE, scale_BE = clean_BE, None
            if self.training:
                scale_BE = nn.functional.softplus(vector_BC @ self.noise_weight.float().t()) + NOISE_FLOOR
                noisy_BE = clean_BE + torch.randn_like(clean_BE) * scale_BE
            # sort_descending wants numbers >= 0; ties go to the lower expert
            order_BE = sort_descending(noisy_BE.detach() - noisy_BE.detach().amin(dim=-1, keepdim=True))[1]
            expert_BK = order_BE[:, : self.top_k]
            gate_BK = noisy_BE.gather(1, expert_BK).softmax(dim=-1)
            weight_BE = torch.zeros_like(noisy_BE).scatter(1, expert_BK, gate_BK)
            load_BE = self._load(clean_BE, noisy_BE, scale_BE, order_BE, expert_BK)
        return GateChoice(expert_BK, gate_BK, weight_BE, load_BE)

    def _load(
        self, clean_BE: Tensor, noisy_BE: Tensor, scale_BE: Tensor | None, order_BE: Tensor, expert_BK: Tensor
    ) -> Tensor:
        """Whether an expert is chosen; in training the probability that it would be with other noise for itself."""
        chosen_BE = torch.zeros_like(clean_BE).scatter(1, expert_BK, 1.0)
        if scale_BE is None or self.top_k >= clean_BE.size(-1):
            return chosen_BE
        # the value to beat: that of the k-th expert for those outside, of the next one for those inside
        kth_B1, next_B1 = noisy_BE.gather(1, order_BE[:, self.top_k - 1 : self.top_k + 1]).split(1, dim=1)
        to_beat_BE = torch.where(chosen_BE.bool(), next_B1, kth_B1)
        load_BE: Tensor = torch.special.ndtr((clean_BE - to_beat_BE) / scale_BE)
        return load_BE


@dataclass(frozen=True)
class GateChoice:
    """What one gate decided.

    Attributes:
        expert_BK: int64, K different experts, likeliest first.
        gate_BK: float32 with gradient, rows sum to 1: a softmax over the K chosen logits.
        weight_BE: float32: the same, spread over all experts.
        load_BE: float32, 1 or the smooth probability of being chosen.
    """

    expert_BK: Tensor
    gate_BK: Tensor
    weight_BE: Tensor
    load_BE: Tensor

    def spread(self, real_B: Tensor | None) -> Tensor:
        """float32 (2, E): importance and load, summed over the sentences that have a real token."""
        both_2BE = torch.stack([self.weight_BE, self.load_BE])
        if real_B is not None:
            both_2BE = both_2BE.masked_fill(~real_B.view(1, -1, 1), 0.0)
        return both_2BE.sum(dim=1)


class TokenAdapter(nn.Module):
    """MEO's "token level": x + up(relu(down(x))) with width / 64 units between; the identity at the start."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, max(1, width // 64))
        self.up = nn.Linear(max(1, width // 64), width)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        """What to add to ``x``."""
        y: Tensor = self.up(torch.relu(self.down(x)))
        return y


def merged_linear(x_BTI: Tensor, choice: GateChoice, weight_EIO: Tensor, bias_EO: Tensor) -> Tensor:
    """Each sentence times its own merged matrix, plus its own merged bias: (B, T, O), dtype of ``x_BTI``."""
    y: Tensor = _MergedLinear.apply(x_BTI, choice.gate_BK, choice.expert_BK, weight_EIO, bias_EO)
    return y


class _MergedLinear(torch.autograd.Function):
    """``x[b] @ merged[b] + merged_bias[b]``; merged matrices live chunk by chunk, in both passes."""

    @staticmethod
    def forward(
        ctx: Any, x_BTI: Tensor, gate_BK: Tensor, expert_BK: Tensor, weight_EIO: Tensor, bias_EO: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x_BTI, gate_BK, expert_BK, weight_EIO, bias_EO)
        y_BTO = x_BTI.new_empty(*x_BTI.shape[:2], weight_EIO.size(-1))
        for chunk in _chunks(x_BTI.size(0), weight_EIO):
            merged_MIO = merge(weight_EIO, gate_BK[chunk], expert_BK[chunk]).to(x_BTI.dtype)
            bias_MO = merge(bias_EO, gate_BK[chunk], expert_BK[chunk]).to(x_BTI.dtype)
            y_BTO[chunk] = torch.baddbmm(bias_MO.unsqueeze(1), x_BTI[chunk], merged_MIO)
        return y_BTO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTO: Tensor) -> tuple[Tensor | None, ...]:
        x_BTI, gate_BK, expert_BK, weight_EIO, bias_EO = ctx.saved_tensors
        weight_EX = weight_EIO.flatten(1)
        grad_x, grad_gate_BK = torch.empty_like(x_BTI), torch.empty_like(gate_BK)
        grad_weight_EX, grad_bias_EO = torch.zeros_like(weight_EX), torch.zeros_like(bias_EO)
        for chunk in _chunks(x_BTI.size(0), weight_EIO):
            gate_MK, expert_MK, grad_MTO = gate_BK[chunk], expert_BK[chunk], grad_BTO[chunk]
            merged_MIO = merge(weight_EIO, gate_MK, expert_MK).to(x_BTI.dtype)
            grad_x[chunk] = torch.bmm(grad_MTO, merged_MIO.transpose(1, 2))
            del merged_MIO
            grad_merged_MX = torch.bmm(x_BTI[chunk].transpose(1, 2), grad_MTO).flatten(1).to(weight_EX.dtype)
            grad_merged_bias_MO = grad_MTO.sum(dim=1).to(bias_EO.dtype)
            weight_ME = _dense_gates(gate_MK, expert_MK, weight_EX)
            grad_weight_EX.addmm_(weight_ME.t(), grad_merged_MX)
            grad_bias_EO.addmm_(weight_ME.t(), grad_merged_bias_MO)
            grad_ME = grad_merged_MX @ weight_EX.t() + grad_merged_bias_MO @ bias_EO.t()
            grad_gate_BK[chunk] = grad_ME.gather(1, expert_MK).to(gate_BK.dtype)
        return grad_x, grad_gate_BK, None, grad_weight_EX.view_as(weight_EIO), grad_bias_EO


def merge(bank: Tensor, gate_BK: Tensor, expert_BK: Tensor) -> Tensor:
    """Gated sum of the chosen experts' tensors: (E, ...) -> (B, ...), in the dtype of ``bank``.

    Few of many are looked up; from half of them on one GEMM over all is cheaper.
    """
    flat_EX = bank.flatten(1)
    if 2 * expert_BK.size(1) < flat_EX.size(0):
        gates = gate_BK.to(flat_EX.dtype)
        merged = nn.functional.embedding_bag(expert_BK, flat_EX, mode="sum", per_sample_weights=gates)
    else:
        merged = _dense_gates(gate_BK, expert_BK, flat_EX) @ flat_EX
    return merged.view(-1, *bank.shape[1:])


def _dense_gates(gate_BK: Tensor, expert_BK: Tensor, flat_EX: Tensor) -> Tensor:
    zeros = flat_EX.new_zeros(gate_BK.size(0), flat_EX.size(0))
    return zeros.scatter(1, expert_BK, gate_BK.to(flat_EX.dtype))


def _chunks(num_sentences: int, weight_EIO: Tensor) -> list[slice]:
    each = max(1, CHUNK_NUMBERS // weight_EIO[0].numel())
    return [slice(start, start + each) for start in range(0, num_sentences, each)]


def masked_mean(x_TBD: Tensor, real_TB: Tensor | None) -> Tensor:
    """float32 (B, D): mean over the positions that are not padding; 0 where there are none."""
    x_TBD = x_TBD.float()
    if real_TB is None:
        return x_TBD.mean(dim=0)
    total_BD = x_TBD.masked_fill(~real_TB.unsqueeze(-1), 0.0).sum(dim=0)
    return total_BD / real_TB.sum(dim=0).clamp(min=1).unsqueeze(-1)


def distinct_rows(vector_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows are bit for bit the same: the beams of one sentence.

    Returns:
        int64 (U,): the first row of each kind; int64 (R,): the kind of each row.
    """
    kinds, kind_R = torch.unique(vector_RC, dim=0, return_inverse=True)
    row_R = torch.arange(kind_R.numel(), device=kind_R.device)
    first_U = row_R.new_full((kinds.size(0),), kind_R.numel()).scatter_reduce(0, kind_R, row_R, "amin")
    return first_U, kind_R


def _slots(sentence_R: Tensor, num_sentences: int) -> tuple[Tensor, int]:
    """A place for each row among equal-sized groups, one per sentence, and the size of a group."""
    count_U = torch.bincount(sentence_R, minlength=num_sentences)
    largest = int(count_U.max())
    order_R = torch.argsort(sentence_R, stable=True)
    start_U = count_U.cumsum(0) - count_U
    place_R = torch.empty_like(order_R)
    place_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    return sentence_R * largest + place_R - start_U[sentence_R], largest


def reorder_cache(cache: dict[str, Tensor], new_order: Tensor) -> None:
    """Follow a beam search: row r becomes the old row ``new_order[r]``; sentences that no row needs are forgotten."""
    if not cache:
        return
    kept_U, sentence_R = torch.unique(cache["sentence_R"].index_select(0, new_order), return_inverse=True)
    if kept_U.numel() < cache["w1"].size(0):
        for name in ("w1", "b1", "w2", "b2"):
            cache[name] = cache[name].index_select(0, kept_U)
    cache["sentence_R"] = sentence_R


def choices_merged(config: MoEConfig) -> int:
    """K: experts merged per sentence and map."""
    assert config.top_k is not None  # MoEConfig saw to it
    return config.top_k


def merge_flops(config: MoEConfig) -> int:
    """FLOPs of merging both maps for one sentence: a product and a sum per number of each merged matrix."""
    chosen = choices_merged(config)
    added = chosen if 2 * chosen < config.num_experts else config.num_experts  # as merge() computes
    return (2 * added - 1) * 2 * config.embed_dim * config.expert_dim


def merged_layer_flops(config: MoEConfig, num_tokens: int, num_sentences: int) -> int:
    """Forward FLOPs of one layer at inference: 2 per multiply-add; biases, activation and softmax not counted."""
    gates = 2 * 2 * config.num_experts * config.embed_dim
    adapters = 0
    if config.token_adapter:
        adapters = sum(4 * width * max(1, width // 64) for width in (config.embed_dim, config.expert_dim))
    return num_tokens * (config.flops_per_row + adapters) + num_sentences * (merge_flops(config) + gates)

"""Stock fairseq transformer layers with a MoELayer in place of their feed-forward part; no other part changes."""

from __future__ import annotations

from typing import Any, NamedTuple

from fairseq.modules.fairseq_dropout import FairseqDropout
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase, TransformerEncoderLayerBase
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..moe import MoEConfig, SentenceContext, build_layer
from ..moe.merged.cache import reorder_cache
from ..moe.merged.gate import masked_mean

IncrementalState = dict[str, dict[str, Tensor]]


class CurrentBatch(NamedTuple):
    """The batch that a stack is computing.

    Attributes:
        ids_TB: int64, the tokens of the hidden states.
        padding_TB: bool; None when nothing is padding.
        source_BC: float, mean of the encoder's final output over each source sentence; None in an encoder, and where no
            layer merges experts.
        incremental_state: fairseq's, in incremental decoding.
    """

    ids_TB: Tensor | None = None
    padding_TB: Tensor | None = None
    source_BC: Tensor | None = None
    incremental_state: IncrementalState | None = None


class CurrentTokens:
    """The batch that a stack is computing, shared by its layers.

    A fairseq layer gives its feed-forward part hidden states alone. Routing also needs the padding, the hash router the
    token ids, and merged experts in a decoder the source sentence.
    """

    def __init__(self) -> None:
        self.batch = CurrentBatch()

    def set(
        self,
        ids_BT: Tensor,
        padding_idx: int,
        source_BC: Tensor | None = None,
        incremental_state: IncrementalState | None = None,
    ) -> None:
        """Set the batch; ``ids_BT`` is int64 (batch, time), the rest as in ``CurrentBatch``."""
        padding_BT = ids_BT.eq(padding_idx)
        padding_TB = padding_BT.t() if padding_BT.any() else None
        self.batch = CurrentBatch(ids_BT.t(), padding_TB, source_BC, incremental_state)

    def clear(self) -> None:
        """Release the batch and state of a search that has ended."""
        self.batch = CurrentBatch()


def source_mean(encoder_out: Any) -> Tensor:
    """float32 (B, C): mean of fairseq's encoder output over the tokens that are not padding."""
    if not encoder_out or not encoder_out["encoder_out"]:
        raise ValueError(
            "moe_merge_experts in a decoder merges by the source sentence and there is no encoder output; "
            "set moe_sides encoder, or choose another method"
        )
    masks = encoder_out["encoder_padding_mask"]
    return masked_mean(encoder_out["encoder_out"][0], ~masks[0].t() if masks else None)


def _identity(x: Tensor) -> Tensor:
    return x


class _MoEFeedForward:
    """A mix-in for a fairseq layer: ``fc1`` runs the MoE layer, and ``fc2`` and the steps between change nothing."""

    def build_fc1(self, *_: Any) -> None:
        return None

    def build_fc2(self, *_: Any) -> None:
        return None

    def install_moe(self, config: MoEConfig, tokens: CurrentTokens, checkpoint_activations: bool) -> None:
        self.moe = build_layer(config)
        self.tokens = tokens
        self.checkpoint_activations = checkpoint_activations
        self.fc1 = self._feed_forward
        self.fc2 = _identity
        self.activation_fn = _identity
        self.activation_dropout_module = FairseqDropout(0.0)

    def _feed_forward(self, x_TBD: Tensor) -> Tensor:
        batch, context = self.tokens.batch, self.sentence_context(self.tokens.batch)
        y_TBD, _ = self.moe(x_TBD, padding=batch.padding_TB, token_ids=batch.ids_TB, context=context)
        return y_TBD

    def sentence_context(self, batch: CurrentBatch) -> SentenceContext | None:
        return None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not (self.checkpoint_activations and self.training):
            return super().forward(x, *args, **kwargs)
        # non-reentrant, so that the balance loss in the plan keeps its gradient
        return checkpoint(self._recomputed_forward, self.tokens.batch, x, args, kwargs, use_reentrant=False)

    def _recomputed_forward(self, batch: CurrentBatch, x: Tensor, args: Any, kwargs: Any) -> Any:
        current = self.tokens.batch
        self.tokens.batch = batch  # another one may have been set before the recomputation
        try:
            return super().forward(x, *args, **kwargs)
        finally:
            self.tokens.batch = current  # the recomputation runs last, and its batch and graph must not be kept


class MoEEncoderLayer(_MoEFeedForward, TransformerEncoderLayerBase):
    """``TransformerEncoderLayerBase`` with ``self.moe`` in place of fc1 and fc2."""

    def __init__(self, cfg: Any, config: MoEConfig, tokens: CurrentTokens, return_fc: bool = False) -> None:
        super().__init__(cfg, return_fc)
        self.install_moe(config, tokens, cfg.checkpoint_activations)


class MoEDecoderLayer(_MoEFeedForward, TransformerDecoderLayerBase):
    """``TransformerDecoderLayerBase`` with ``self.moe`` in place of fc1 and fc2."""

    def __init__(self, cfg: Any, config: MoEConfig, tokens: CurrentTokens, no_encoder_attn: bool = False) -> None:
        super().__init__(cfg, no_encoder_attn)
        if self.ffn_layernorm is not None:
            raise ValueError(
                "--scale-fc normalises the hidden units of a dense FFN; a MoE layer has none: leave it out"
            )
        self.install_moe(config, tokens, cfg.checkpoint_activations)

    def sentence_context(self, batch: CurrentBatch) -> SentenceContext | None:
        if batch.source_BC is None:
            return None
        return SentenceContext(batch.source_BC, self._merged_cache(batch.incremental_state))

    def reorder_incremental_state(self, incremental_state: IncrementalState, new_order: Tensor) -> None:
        """Reorder the cache; fairseq calls this when beams move and when finished sentences leave the batch."""
        cache = self._merged_cache(incremental_state)
        if cache:
            reorder_cache(cache, new_order)

    def _merged_cache(self, incremental_state: IncrementalState | None) -> dict[str, Tensor] | None:
        """This layer's merged matrices in fairseq's incremental state, which ends with the search."""
        if incremental_state is None or not self.moe.config.merge_experts:
            return None
        return incremental_state.setdefault(f"merged_experts.{id(self)}", {})

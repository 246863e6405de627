"""Stock fairseq transformer layers whose feed-forward part is a MoELayer; nothing else of them is touched."""

from __future__ import annotations

from typing import Any

from fairseq.modules.fairseq_dropout import FairseqDropout
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase, TransformerEncoderLayerBase
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..moe import MoEConfig, MoELayer


class CurrentTokens:
    """The token ids of the batch that a stack is working on, shared by its layers.

    A fairseq layer hands its feed-forward part hidden states alone; routing also needs to know what is padding, and the
    hash router the ids.
    """

    def __init__(self) -> None:
        self.ids_TB: Tensor | None = None
        self.padding_TB: Tensor | None = None

    def set(self, ids_BT: Tensor, padding_idx: int) -> None:
        """``ids_BT``: int64 (batch, time), the tokens whose hidden states the layers will see."""
        padding_BT = ids_BT.eq(padding_idx)
        self.ids_TB = ids_BT.t()
        self.padding_TB = padding_BT.t() if padding_BT.any() else None

    def get(self) -> tuple[Tensor | None, Tensor | None]:
        return self.ids_TB, self.padding_TB

    def restore(self, state: tuple[Tensor | None, Tensor | None]) -> None:
        self.ids_TB, self.padding_TB = state


def _identity(x: Tensor) -> Tensor:
    return x


class _MoEFeedForward:
    """Mixed into a fairseq layer: ``fc1`` runs the whole MoE layer, ``fc2`` and what stands between pass through."""

    def build_fc1(self, *_: Any) -> None:
        return None

    def build_fc2(self, *_: Any) -> None:
        return None

    def install_moe(self, config: MoEConfig, tokens: CurrentTokens, checkpoint_activations: bool) -> None:
        self.moe = MoELayer(config)
        self.tokens = tokens
        self.checkpoint_activations = checkpoint_activations
        self.fc1 = self._feed_forward
        self.fc2 = _identity
        self.activation_fn = _identity
        self.activation_dropout_module = FairseqDropout(0.0)

    def _feed_forward(self, x_TBD: Tensor) -> Tensor:
        ids_TB, padding_TB = self.tokens.get()
        return self.moe(x_TBD, padding=padding_TB, token_ids=ids_TB)[0]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not (self.checkpoint_activations and self.training):
            return super().forward(x, *args, **kwargs)
        # Non-reentrant: what the layer hands out beside its output (the balance loss of its plan) keeps its gradient.
        return checkpoint(self._recomputed_forward, self.tokens.get(), x, args, kwargs, use_reentrant=False)

    def _recomputed_forward(self, tokens: Any, x: Tensor, args: Any, kwargs: Any) -> Any:
        self.tokens.restore(tokens)  # another batch may have passed before the recomputation
        return super().forward(x, *args, **kwargs)


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
            raise ValueError("--scale-fc normalises the hidden units of a dense FFN; a MoE layer has none: leave it out")
        self.install_moe(config, tokens, cfg.checkpoint_activations)

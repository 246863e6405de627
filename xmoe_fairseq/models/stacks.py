"""Stock fairseq encoder and decoder stacks that build MoE layers in the places that the settings name."""

from __future__ import annotations

from typing import Any

from fairseq.distributed import fsdp_wrap
from fairseq.models.transformer import TransformerDecoderBase, TransformerEncoderBase
from torch import Tensor, nn

from ..moe_args import is_moe_layer, moe_config
from ..patches import expert_parallel
from .layers import CurrentTokens, MoEDecoderLayer, MoEEncoderLayer, source_mean


class _MoEStack:
    """A mix-in for a fairseq stack that counts its layers while they are built."""

    side: str

    def start_building(self) -> None:
        """Start the count; call this before the stack's own constructor, which builds the layers."""
        self.layers_built = 0
        self.tokens = CurrentTokens()

    def next_layer_config(self, cfg: Any) -> Any:
        """The MoEConfig of the layer to be built now, or None for a dense one."""
        index = self.layers_built
        self.layers_built += 1
        if not is_moe_layer(cfg, self.side, index):
            return None
        if cfg.moe_expert_parallel:
            expert_parallel.install()
        width = getattr(cfg, self.side)
        return moe_config(
            cfg, side=self.side, layer_index=index, embed_dim=width.embed_dim, dense_dim=width.ffn_embed_dim
        )


def _wrapped(layer: nn.Module, cfg: Any) -> nn.Module:
    """Wrap a layer for fully sharded training, as fairseq's own stacks do."""
    return fsdp_wrap(layer, min_num_params=0 if cfg.checkpoint_activations else cfg.min_params_to_wrap)


class MoEEncoder(_MoEStack, TransformerEncoderBase):
    """fairseq's transformer encoder with MoE layers."""

    side = "encoder"

    def register_backward_hook(self, hook: Any) -> Any:
        """Register torch's full hook: the old kind, which fairseq's search for a NaN uses, fails on a dict of lists."""
        return self.register_full_backward_hook(hook)

    def __init__(self, cfg: Any, dictionary: Any, embed_tokens: Any, return_fc: bool = False) -> None:
        self.start_building()
        super().__init__(cfg, dictionary, embed_tokens, return_fc)

    def build_encoder_layer(self, cfg: Any) -> nn.Module:
        config = self.next_layer_config(cfg)
        if config is None:
            return super().build_encoder_layer(cfg)
        return _wrapped(MoEEncoderLayer(cfg, config, self.tokens, self.return_fc), cfg)

    def forward(self, src_tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.tokens.set(src_tokens, self.padding_idx)
        return super().forward(src_tokens, *args, **kwargs)


class MoEDecoder(_MoEStack, TransformerDecoderBase):
    """fairseq's transformer decoder with MoE layers, which a language model consists of."""

    side = "decoder"

    def __init__(
        self, cfg: Any, dictionary: Any, embed_tokens: Any, no_encoder_attn: bool = False, **kwargs: Any
    ) -> None:
        self.start_building()
        super().__init__(cfg, dictionary, embed_tokens, no_encoder_attn, **kwargs)
        self.needs_source = cfg.moe_merge_experts and cfg.moe_sides != "encoder"

    def build_decoder_layer(self, cfg: Any, no_encoder_attn: bool = False) -> nn.Module:
        config = self.next_layer_config(cfg)
        if config is None:
            return super().build_decoder_layer(cfg, no_encoder_attn)
        return _wrapped(MoEDecoderLayer(cfg, config, self.tokens, no_encoder_attn), cfg)

    def extract_features(
        self,
        prev_output_tokens: Tensor,
        encoder_out: Any = None,
        incremental_state: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        # with an incremental state, fairseq computes the last position alone
        computed = prev_output_tokens if incremental_state is None else prev_output_tokens[:, -1:]
        source_BC = source_mean(encoder_out) if self.needs_source else None
        self.tokens.set(computed, self.padding_idx, source_BC, incremental_state)
        features = super().extract_features(prev_output_tokens, encoder_out, incremental_state, *args, **kwargs)
        self.tokens.clear()
        return features

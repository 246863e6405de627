"""``xmoe_transformer``: fairseq's encoder-decoder transformer with mixture-of-experts layers, and its named sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer import TransformerConfig, TransformerModelBase
from fairseq.models.transformer import base_architecture as fairseq_base_architecture

from ..moe import record_plans
from .moe_args import SETTINGS, add_moe_args, check_moe_names, fill_moe_defaults
from .stacks import MoEDecoder, MoEEncoder


class MoETransformerConfig(TransformerConfig):
    """fairseq's transformer settings and the flat ``moe_*`` ones."""

    @classmethod
    def from_settings(cls, args: Any) -> MoETransformerConfig:
        """From flags (Namespace) or YAML (DictConfig)."""
        config = cls.from_namespace(args)
        for name in SETTINGS:
            setattr(config, name, getattr(args, name))
        return config


@register_model("xmoe_transformer")
class MoETransformerModel(TransformerModelBase):
    """Transformer with a MoE layer in place of the feed-forward network of every n-th layer.

    The forward pass returns fairseq's usual pair; the plans of the MoE layers lie in ``extra["moe_plans"]``, layer name ->
    list of RoutingPlan, for the criterion and the analyses.
    """

    @classmethod
    def add_args(cls, parser: Any) -> None:
        """Flags without defaults: those come from the architecture."""
        gen_parser_from_dataclass(parser, TransformerConfig(), delete_default=True, with_prefix="")
        add_moe_args(parser)

    @classmethod
    def build_model(cls, args: Any, task: Any) -> MoETransformerModel:
        """From the settings of a command line, a YAML or a checkpoint."""
        check_moe_names(args)
        xmoe_transformer(args)  # settings that an older checkpoint lacks
        check_supported(args)
        return super().build_model(MoETransformerConfig.from_settings(args), task)

    @classmethod
    def build_encoder(cls, cfg: Any, src_dict: Any, embed_tokens: Any) -> MoEEncoder:
        return MoEEncoder(cfg, src_dict, embed_tokens)

    @classmethod
    def build_decoder(cls, cfg: Any, tgt_dict: Any, embed_tokens: Any) -> MoEDecoder:
        return MoEDecoder(cfg, tgt_dict, embed_tokens, no_encoder_attn=cfg.no_cross_attention)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with record_plans(self) as plans:
            x, extra = super().forward(*args, **kwargs)
        extra["moe_plans"] = plans
        return x, extra


def check_supported(args: Any) -> None:
    """Refuse fairseq options that a MoE layer cannot honour."""
    if getattr(args, "quant_noise_pq", 0):
        raise ValueError("--quant-noise-pq quantises dense FFN weights and does not reach experts; set it to 0")
    if getattr(args, "offload_activations", False):
        raise ValueError("--offload-activations does not work with MoE layers; --checkpoint-activations does")


@dataclass(frozen=True)
class Size:
    """Depth and width of a named architecture, shared by every method that is compared at it."""

    encoder_layers: int
    decoder_layers: int
    embed_dim: int
    heads: int
    ffn_dim: int

    def apply(self, args: Any) -> None:
        """Give ``args`` what it lacks, then fairseq's own defaults."""
        values = {"encoder_layers": self.encoder_layers, "decoder_layers": self.decoder_layers, "activation_fn": "gelu"}
        for side in ("encoder", "decoder"):
            values[f"{side}_embed_dim"] = self.embed_dim
            values[f"{side}_attention_heads"] = self.heads
            values[f"{side}_ffn_embed_dim"] = self.ffn_dim
        for name, value in values.items():
            if not hasattr(args, name):
                setattr(args, name, value)
        fairseq_base_architecture(args)


WMT23 = Size(encoder_layers=12, decoder_layers=6, embed_dim=512, heads=8, ffn_dim=2048)
TINY = Size(encoder_layers=2, decoder_layers=2, embed_dim=128, heads=4, ffn_dim=512)


def dense_architecture(name: str, size: Size) -> Callable[[Any], None]:
    """The stock dense transformer at ``size``: the baseline of every comparison."""

    def apply(args: Any) -> None:
        size.apply(args)

    return register_model_architecture("transformer", name)(apply)


def moe_architecture(name: str, size: Size, **moe_defaults: Any) -> Callable[[Any], None]:
    """Register ``--arch name``: ``size`` with these ``moe_*`` defaults."""

    def apply(args: Any) -> None:
        size.apply(args)
        fill_moe_defaults(args, **moe_defaults)

    return register_model_architecture("xmoe_transformer", name)(apply)


xmoe_transformer = moe_architecture("xmoe_transformer", WMT23)
moe_architecture(
    "xmoe_transformer_128x512", WMT23, moe_num_experts=128, moe_expert_dim=512, moe_capacity_factor=4.0
)
moe_architecture("xmoe_transformer_tiny", TINY, moe_num_experts=8, moe_expert_dim=256)
dense_architecture("dense_transformer_wmt23", WMT23)
dense_architecture("dense_transformer_tiny", TINY)

"""``xmoe_transformer``: fairseq's encoder-decoder transformer with mixture-of-experts layers."""

from __future__ import annotations

from typing import Any

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import register_model
from fairseq.models.transformer import TransformerConfig, TransformerModelBase

from ..moe import record_plans
from ..moe_args import add_moe_args, check_moe_names, check_supported, fill_moe_defaults, moe_places, moe_settings
from .int8 import hold_in_int8
from .stacks import MoEDecoder, MoEEncoder


class MoETransformerConfig(TransformerConfig):
    """fairseq's transformer settings and the flat ``moe_*`` ones."""

    @classmethod
    def from_settings(cls, args: Any, sides: tuple[str, ...] = ("encoder", "decoder")) -> MoETransformerConfig:
        """Make it from flags (Namespace) or YAML (DictConfig); ``sides`` names the stacks of the model."""
        config = cls.from_namespace(args)
        for name in moe_settings():
            setattr(config, name, getattr(args, name))
        config.moe_places = moe_places(args, sides)
        return config


@register_model("xmoe_transformer")
class MoETransformerModel(TransformerModelBase):
    """Transformer with a MoE layer in place of the feed-forward network of every n-th layer.

    The forward pass returns fairseq's usual pair. ``extra["moe_plans"]`` holds the plans of the MoE layers, layer name
    -> list of RoutingPlan, for the criterion and the analyses.
    """

    @classmethod
    def add_args(cls, parser: Any) -> None:
        """Add the flags without defaults, which the architecture gives."""
        gen_parser_from_dataclass(parser, TransformerConfig(), delete_default=True, with_prefix="")
        add_moe_args(parser)

    @classmethod
    def build_model(cls, args: Any, task: Any) -> MoETransformerModel:
        """Build the model from the settings of a command line, a YAML or a checkpoint."""
        check_moe_names(args)
        fill_moe_defaults(args)  # settings that an older checkpoint lacks
        check_supported(args)
        model = super().build_model(MoETransformerConfig.from_settings(args), task)
        if args.moe_linear_weights == "int8":
            hold_in_int8(model)
        return model

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

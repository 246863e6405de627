"""``xmoe_transformer_lm``: fairseq's decoder-only language model with mixture-of-experts layers."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import register_model
from fairseq.models.transformer_lm import (
    DEFAULT_MAX_TARGET_POSITIONS,
    TransformerLanguageModel,
    TransformerLanguageModelConfig,
)
from omegaconf import OmegaConf, open_dict

from ..moe import record_plans
from ..moe_args import add_moe_args, check_moe_names, check_supported, fill_moe_defaults
from .int8 import hold_in_int8
from .stacks import MoEDecoder
from .translation import MoETransformerConfig


@register_model("dense_lm")
class DenseLanguageModel(TransformerLanguageModel):
    """fairseq's ``transformer_lm``, at the sizes of our dense architectures also in a YAML.

    fairseq-hydra-train fills a ``transformer_lm`` with its dataclass's defaults before it looks at the architecture,
    which is then without effect. This model has no dataclass.
    """

    @classmethod
    def add_args(cls, parser: Any) -> None:
        """Flags without defaults: those come from the architecture."""
        gen_parser_from_dataclass(parser, TransformerLanguageModelConfig(), delete_default=True)

    @classmethod
    def build_model(cls, args: Any, task: Any) -> DenseLanguageModel:
        """From the settings of a command line, a YAML or a checkpoint."""
        settle_positions(args, task)
        return super().build_model(args, task)


@register_model("xmoe_transformer_lm")
class MoETransformerLanguageModel(TransformerLanguageModel):
    """``transformer_lm`` with a MoE layer in place of the feed-forward network of every n-th layer.

    ``extra["moe_plans"]`` holds the plans of the MoE layers, as in the translation model.
    """

    @classmethod
    def add_args(cls, parser: Any) -> None:
        """Add the flags without defaults, which the architecture gives."""
        gen_parser_from_dataclass(parser, TransformerLanguageModelConfig(), delete_default=True)
        add_moe_args(parser)

    @classmethod
    def build_model(cls, args: Any, task: Any) -> MoETransformerLanguageModel:
        """Build the model from the settings of a command line, a YAML or a checkpoint."""
        check_moe_names(args)
        fill_moe_defaults(args)  # settings that an older checkpoint lacks
        check_supported(args)
        check_language_model(args)
        settle_positions(args, task)
        cfg = MoETransformerConfig.from_settings(args, sides=("decoder",))
        embed_tokens = cls.build_embedding(args, task.source_dictionary, args.decoder_input_dim)
        model = cls(MoEDecoder(cfg, task.target_dictionary, embed_tokens, no_encoder_attn=True))
        if args.moe_linear_weights == "int8":
            hold_in_int8(model)
        return model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with record_plans(self) as plans:
            x, extra = super().forward(*args, **kwargs)
        extra["moe_plans"] = plans
        return x, extra


def check_language_model(args: Any) -> None:
    """Refuse settings that need an encoder or the stock model."""
    if args.moe_merge_experts:
        raise ValueError(
            "moe_merge_experts merges by the source sentence and a language model has none: every token would need its "
            "own merging, which costs more than not merging; leave moe_merge_experts out, or use moe_router top_k"
        )
    if args.moe_sides == "encoder":
        raise ValueError("moe_sides encoder leaves a language model without MoE layers; set moe_sides both")
    for name in ("character_embeddings", "adaptive_input"):
        if getattr(args, name, False):
            raise ValueError(f"{name} is not supported with MoE language models; leave --{name.replace('_', '-')} out")


def settle_positions(args: Any, task: Any) -> None:
    """Write the number of the model's positions into ``args``, and so into the checkpoint.

    Later commands may use samples of another length, and a YAML gives the length to the task alone.
    """
    sources = (args, getattr(task, "args", None))
    names = ("max_target_positions", "tokens_per_sample")
    found = (getattr(source, name, None) for source in sources for name in names)
    # a string is an unresolved reference to the task's setting
    positions = next((value for value in found if isinstance(value, int)), DEFAULT_MAX_TARGET_POSITIONS)
    with open_dict(args) if OmegaConf.is_config(args) else ExitStack():
        args.max_target_positions = positions

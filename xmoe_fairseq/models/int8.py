"""fairseq models whose linear maps and embeddings are int8, for inference (moe/quantised/linear.py)."""

from __future__ import annotations

from typing import Any

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer import TransformerConfig, TransformerModelBase
from fairseq.modules import MultiheadAttention
from torch import nn

from ..moe.quantised.linear import exchange_linear_maps

DENSE_ARCH = "int8_transformer"


def hold_in_int8(model: nn.Module) -> None:
    """Replace every linear map and embedding of a fairseq model by an int8 one, whose numbers the checkpoint gives."""
    exchange_linear_maps(model)
    for module in model.modules():
        if isinstance(module, MultiheadAttention):
            # makes fairseq's attention call its projections instead of reading their weights
            module.skip_embed_dim_check = True


@register_model(DENSE_ARCH)
class Int8Transformer(TransformerModelBase):
    """fairseq's dense ``transformer`` in int8; ``xmoe_fairseq.checkpoints.quantise --what all`` makes its files."""

    @classmethod
    def add_args(cls, parser: Any) -> None:
        """Add the stock model's flags."""
        gen_parser_from_dataclass(parser, TransformerConfig(), delete_default=True, with_prefix="")

    @classmethod
    def build_model(cls, args: Any, task: Any) -> Int8Transformer:
        model = super().build_model(TransformerConfig.from_namespace(args), task)
        hold_in_int8(model)
        return model


@register_model_architecture(DENSE_ARCH, DENSE_ARCH)
def _sizes_come_with_the_checkpoint(args: Any) -> None:
    """Add no defaults, since a quantised checkpoint holds every setting."""

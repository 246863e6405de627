"""Every named architecture (``--arch``): sizes shared by all methods, and the methods.

Within one size all methods have the same shared parameters, the same expert parameters (experts x hidden units; dense
has one) and the same FLOPs, as in Tables 1 and 3 of the paper. Capacity factors follow its Eq 6: a layer computes at
most gamma rows of one expert per token, so gamma times the hidden units of an expert are those of the dense FFN.
docs/methods.md has the table with the numbers; tests/models/test_architectures.py counts them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fairseq.models import register_model_architecture
from fairseq.models.transformer import base_architecture as fairseq_transformer_defaults
from fairseq.models.transformer_lm import base_lm_architecture as fairseq_lm_defaults

from ..moe_args import fill_moe_defaults
from . import language_model, translation  # noqa: F401  the models must be registered first


@dataclass(frozen=True)
class Size:
    """Depth and width of an architecture; a language model has no encoder."""

    encoder_layers: int
    decoder_layers: int
    embed_dim: int
    heads: int
    ffn_dim: int

    @property
    def is_language_model(self) -> bool:
        return self.encoder_layers == 0

    def apply(self, args: Any) -> None:
        """Give ``args`` the settings that it lacks, first from this size, then from fairseq's defaults."""
        values: dict[str, Any] = {"decoder_layers": self.decoder_layers, "activation_fn": "gelu"}
        if self.is_language_model:
            # as in GPT-2, learned positions, and one matrix for input and output embeddings
            values |= {"decoder_learned_pos": True, "share_decoder_input_output_embed": True}
        else:
            values["encoder_layers"] = self.encoder_layers
        for side in ("decoder",) if self.is_language_model else ("encoder", "decoder"):
            values[f"{side}_embed_dim"] = self.embed_dim
            values[f"{side}_attention_heads"] = self.heads
            values[f"{side}_ffn_embed_dim"] = self.ffn_dim
        for name, value in values.items():
            if not hasattr(args, name):
                setattr(args, name, value)
        (fairseq_lm_defaults if self.is_language_model else fairseq_transformer_defaults)(args)


# Tables 1 and 3 of the paper; the tiny ones are for tests and the demo.
WMT23 = Size(encoder_layers=12, decoder_layers=6, embed_dim=512, heads=8, ffn_dim=2048)
TINY = Size(encoder_layers=2, decoder_layers=2, embed_dim=128, heads=4, ffn_dim=512)
GPT2 = Size(encoder_layers=0, decoder_layers=12, embed_dim=768, heads=12, ffn_dim=3072)
GPT2_556M = Size(encoder_layers=0, decoder_layers=12, embed_dim=1024, heads=16, ffn_dim=4096)
TINY_LM = Size(encoder_layers=0, decoder_layers=2, embed_dim=128, heads=4, ffn_dim=512)

ARCHITECTURES: dict[str, Size] = {}


def _register(name: str, size: Size, model: str, apply: Callable[[Any], None]) -> None:
    register_model_architecture(model, name)(apply)
    ARCHITECTURES[name] = size


def register_dense(name: str, size: Size) -> None:
    """Register the stock dense transformer at ``size``, the baseline of every comparison."""

    def apply(args: Any) -> None:
        size.apply(args)

    _register(name, size, "dense_lm" if size.is_language_model else "transformer", apply)


def register_moe(name: str, size: Size, num_experts: int, expert_dim: int, gamma: float | None, **others: Any) -> None:
    """Register ``--arch name``: ``size`` with these experts, training capacity factor and other ``moe_*`` defaults."""

    def apply(args: Any) -> None:
        size.apply(args)
        shape = {"moe_num_experts": num_experts, "moe_expert_dim": expert_dim, "moe_capacity_factor": gamma}
        fill_moe_defaults(args, **shape, **others)

    _register(name, size, "xmoe_transformer_lm" if size.is_language_model else "xmoe_transformer", apply)


# Table 3. adamoe takes k n / (n + m) = 4 * 64 / 128 = 2 true experts per token at balance, as top-k does; m = n and a
# doubled k are the ratio of its paper's main setting. meo merges 4 experts, its official default. It computes one
# merged expert, so its 64 x 1024 row has fewer FLOPs than the others; 32 x 2048 merging 2 has equal FLOPs.
register_dense("dense_transformer_wmt23", WMT23)
register_moe("xmoe_transformer", WMT23, 64, 1024, 2.0)
register_moe("xmoe_transformer_128x512", WMT23, 128, 512, 4.0)
register_moe("switch_transformer_32x2048", WMT23, 32, 2048, 1.0, moe_router="switch")
register_moe("top_k_transformer_64x1024", WMT23, 64, 1024, 2.0, moe_router="top_k", moe_top_k=2)
register_moe("top_k_transformer_128x512", WMT23, 128, 512, 4.0, moe_router="top_k", moe_top_k=4)
register_moe("hash_transformer_32x2048", WMT23, 32, 2048, 1.0, moe_router="hash")
register_moe("base_transformer_32x2048", WMT23, 32, 2048, 1.0, moe_router="base")
register_moe("adamoe_transformer_64x1024", WMT23, 64, 1024, 2.0, moe_router="adamoe", moe_top_k=4, moe_null_experts=64)
for _name, _experts, _dim, _top_k in (
    ("meo_transformer_64x1024", 64, 1024, 4),
    ("meo_transformer_32x2048", 32, 2048, 2),
):
    register_moe(_name, WMT23, _experts, _dim, None, moe_router="top_k", moe_top_k=_top_k, moe_merge_experts=True)

for _size, _end in ((TINY, "tiny"), (TINY_LM, "tiny_lm")):
    register_dense(f"dense_transformer_{_end}", _size)
    register_moe(f"xmoe_transformer_{_end}", _size, 8, 256, 2.0)
    register_moe(f"switch_transformer_{_end}", _size, 4, 512, 1.0, moe_router="switch")
    register_moe(f"top_k_transformer_{_end}", _size, 8, 256, 2.0, moe_router="top_k", moe_top_k=2)
    register_moe(f"hash_transformer_{_end}", _size, 4, 512, 1.0, moe_router="hash")
    register_moe(f"base_transformer_{_end}", _size, 4, 512, 1.0, moe_router="base")
    register_moe(f"adamoe_transformer_{_end}", _size, 8, 256, 2.0, moe_router="adamoe", moe_top_k=4, moe_null_experts=8)
register_moe("meo_transformer_tiny", TINY, 4, 512, None, moe_router="top_k", moe_top_k=2, moe_merge_experts=True)

# Table 1: 8 experts of the FFN's size, also cut in 2, 4 and 8. The plain name is the paper's best row.
register_dense("dense_transformer_lm", GPT2)
register_moe("xmoe_transformer_lm", GPT2, 64, 384, 8.0)
for _size in (GPT2, GPT2_556M):
    for _method in ("switch", "hash", "base"):
        register_moe(f"{_method}_transformer_8x{_size.ffn_dim}_lm", _size, 8, _size.ffn_dim, 1.0, moe_router=_method)
    for _cut in (2, 4, 8):
        _shape = (8 * _cut, _size.ffn_dim // _cut)
        _row = f"{_shape[0]}x{_shape[1]}_lm"
        register_moe(f"xmoe_transformer_{_row}", _size, *_shape, float(_cut))
        register_moe(f"top_k_transformer_{_row}", _size, *_shape, float(_cut), moe_router="top_k", moe_top_k=_cut)

# Table 2: the dense FFN cut into experts, all of which training uses (t = 1, no drops); eval.sweep lowers t.
for _name, _size, _experts, _dim in (
    ("dense_xmoe_transformer_8x384_lm", GPT2, 8, 384),
    ("dense_xmoe_transformer_16x192_lm", GPT2, 16, 192),
    ("dense_xmoe_transformer_tiny_lm", TINY_LM, 8, 64),
    ("dense_xmoe_transformer_tiny", TINY, 8, 64),
):
    register_moe(_name, _size, _experts, _dim, None, moe_threshold=1.0)

"""A tiny xmoe_transformer and batches for it, without files."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests import tiny
from tests.tiny import dictionary
from xmoe_fairseq.models.translation import MoETransformerModel

WORDS = [f"w{number}" for number in range(36)]  # 40 with fairseq's own four
TASK = SimpleNamespace(source_dictionary=dictionary(WORDS), target_dictionary=dictionary(WORDS))
PAD, EOS = TASK.source_dictionary.pad(), TASK.source_dictionary.eos()


def tiny_model(seed: int = 0, **settings: Any) -> MoETransformerModel:
    small = {"moe_num_experts": 4, "moe_expert_dim": 16, "moe_capacity_factor": None, "dropout": 0.0}
    args = tiny.settings("xmoe_transformer_tiny", ffn_dim=32, positions=32, **{**small, **settings})
    model = tiny.build(args, TASK, seed)
    for name, parameter in model.named_parameters():
        if name.endswith("router.weight"):
            torch.nn.init.normal_(parameter, std=0.7)  # decided routing
    return model


def sentences(lengths: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.cat([torch.randint(4, 40, (n,), generator=generator), torch.tensor([EOS])]) for n in lengths]


def sample(sources: list[Tensor], targets: list[Tensor]) -> dict[str, Any]:
    """As fairseq's LanguagePairDataset collates: source padded left, target right."""
    src = torch.full((len(sources), max(map(len, sources))), PAD)
    tgt = torch.full((len(targets), max(map(len, targets))), PAD)
    prev = tgt.clone()
    for row, (source, target) in enumerate(zip(sources, targets, strict=True)):
        src[row, src.size(1) - len(source) :] = source
        tgt[row, : len(target)] = target
        prev[row, : len(target)] = torch.cat([target[-1:], target[:-1]])
    return {
        "net_input": {
            "src_tokens": src,
            "src_lengths": torch.tensor([len(source) for source in sources]),
            "prev_output_tokens": prev,
        },
        "target": tgt,
        "ntokens": sum(map(len, targets)),
        "nsentences": len(sources),
    }

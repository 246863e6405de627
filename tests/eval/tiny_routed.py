"""A tiny translation model whose routing is set by hand: which experts a token takes depends on its id alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from eval.routing.layers import moe_layers
from eval.text.loading import Loaded
from tests import tiny
from xmoe_fairseq.moe.plan import Choices
from xmoe_fairseq.moe.routers.router import real_choices

SYMBOLS = ("▁a", "b", "▁12", ",")
# token id -> {expert: weight}, first choice first; </s> is 2
TABLE = {2: {0: 0.5, 1: 0.3, 2: 0.1}, 4: {0: 0.9}, 5: {1: 0.6, 0: 0.25}, 6: {2: 1.0}, 7: {1: 0.75}}
COLLAPSED = {token: {3: 1.0} for token in TABLE}
EXPERTS = 4


class HandRouter(nn.Module):
    """Chooses by a table from token ids to experts and weights."""

    def __init__(self, table: dict[int, dict[int, float]]) -> None:
        super().__init__()
        self.table = table

    def forward(self, x_TD: Tensor, real_T: Tensor | None, token_ids_T: Tensor) -> Choices:
        size = (token_ids_T.numel(), EXPERTS)
        expert_TK = torch.arange(EXPERTS).expand(size).clone()
        chosen_TK, weight_TE = torch.zeros(size, dtype=torch.bool), torch.zeros(size)
        for row, token in enumerate(token_ids_T.tolist()):
            wanted = self.table.get(token, {})
            rest = [e for e in range(EXPERTS) if e not in wanted]
            expert_TK[row] = torch.tensor([*wanted, *rest])
            chosen_TK[row, : len(wanted)] = True
            for expert, weight in wanted.items():
                weight_TE[row, expert] = weight
        chosen_TK = real_choices(expert_TK, chosen_TK, real_T)
        score_TK = weight_TE.gather(1, expert_TK)
        return Choices(expert_TK, chosen_TK, score_TK, weight_TE, balance=None, entropy=torch.tensor(0.5))


def build(arch: str = "xmoe_transformer_tiny", **settings: Any) -> Loaded:
    """Two encoder layers and one decoder layer of width 8; experts of 4 hidden units for a dense FFN of 8."""
    words = tiny.dictionary(SYMBOLS)
    cfg = SimpleNamespace(left_pad_source=True, left_pad_target=False, source_lang="xx", target_lang="en")
    task = SimpleNamespace(source_dictionary=words, target_dictionary=words, cfg=cfg, max_positions=lambda: (16, 16))
    moe = {"moe_num_experts": EXPERTS, "moe_expert_dim": 4, "moe_interval": 1} if "moe" in arch else {}
    sizes = {"embed_dim": 8, "ffn_dim": 8, "positions": 16, "decoder_layers": 1, "dropout": 0.0}
    args = tiny.settings(arch, **sizes, **moe, **settings)
    model = tiny.build(args, task, seed=1).eval()
    return Loaded(("tiny.pt",), (model,), task, SimpleNamespace(model=args), 10, torch.device("cpu"))


def hand_routed() -> Loaded:
    """MoE layers in the encoder: the first by TABLE, the second collapsed onto expert 3; the decoder is dense."""
    loaded = build(moe_sides="encoder")
    for layer, table in zip(moe_layers(loaded.model).values(), (TABLE, COLLAPSED), strict=True):
        layer.router = HandRouter(table)
        experts = layer.experts
        with torch.no_grad():
            experts.w1.zero_()
            experts.w2.zero_()
            experts.b1[:] = torch.tensor([1.0, 1.0, -1.0, -1.0])  # half of the hidden units are positive
            experts.b1[3] = -1.0  # none of expert 3
            experts.b2[:] = torch.eye(8)[0]
            experts.b2[2] = -torch.eye(8)[0]
            experts.b2[3] = torch.eye(8)[1]
    dense = loaded.model.decoder.layers[0].fc1
    with torch.no_grad():
        dense.weight.zero_()
        dense.bias[:] = torch.tensor([1.0] * 6 + [-1.0] * 2)
    return loaded

"""``--optimizer fused_adam``: Adam with decoupled weight decay in one pass over memory.

Experts are most of a sparse model's parameters and few of its FLOPs, so the optimiser takes a larger share of an update
than in a dense model. fairseq's Adam reads and writes the parameters in a dozen passes unless apex is installed,
torch's fused kernel for CPU and CUDA in one. Flags are those of ``--optimizer adam``. There are two differences: eps is
added after the bias correction, as in the paper (arXiv 1412.6980) and in torch, while fairseq adds it before; and the
states of the two optimisers do not load into each other.
"""

# No "from __future__ import annotations" here: fairseq reads the types of dataclass fields.

import ast
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.optim import FairseqOptimizer, register_optimizer
from omegaconf import II, OmegaConf


@dataclass
class FusedAdamConfig(FairseqDataclass):
    adam_betas: Any = field(default=(0.9, 0.999), metadata={"help": "betas for Adam optimizer"})
    adam_eps: float = field(default=1e-8, metadata={"help": "epsilon for Adam optimizer"})
    weight_decay: float = field(default=0.0, metadata={"help": "weight decay, decoupled as in AdamW"})
    lr: list[float] = field(default=II("optimization.lr"))


@register_optimizer("fused_adam", dataclass=FusedAdamConfig)
class FusedAdam(FairseqOptimizer):
    """torch.optim.AdamW with ``fused=True`` behind fairseq's interface; float32 parameters."""

    supports_flat_params = True

    def __init__(self, cfg: FusedAdamConfig, params: Iterable[torch.nn.Parameter]) -> None:
        super().__init__(cfg)
        self._optimizer = torch.optim.AdamW(params, fused=True, **self.optimizer_config)

    @property
    def optimizer_config(self) -> dict[str, Any]:
        """The settings of the flags, which replace those of a loaded state."""
        lr, betas = (_plain(value) for value in (self.cfg.lr, self.cfg.adam_betas))
        return {
            "lr": lr[0] if isinstance(lr, (list, tuple)) else lr,
            "betas": tuple(betas),
            "eps": self.cfg.adam_eps,
            "weight_decay": self.cfg.weight_decay,
        }


def _plain(value: Any) -> Any:
    """The Python value of a flag's text or of a YAML's list."""
    if isinstance(value, str):
        return ast.literal_eval(value)
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value

"""Linear maps and embeddings with int8 weights for inference, and their exchange in a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..native.rows import Groups, Int8Weights, int8_linear_of_floats
from .weights import StoredNumbers, quantise_channels, with_sums


class _Int8Matrix(StoredNumbers):
    """State: ``q`` (O, I) int8 and ``scale`` (O,) float32. Loading also takes a float ``weight`` (O, I)."""

    q: Tensor
    scale: Tensor

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.register_buffer("q", torch.zeros(height, width, dtype=torch.int8))
        self.register_buffer("scale", torch.zeros(height))
        self._ready: Int8Weights | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._ready = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self._ready = None
        if prefix + "weight" in state_dict:
            q_1OI, scale_1O = quantise_channels(state_dict.pop(prefix + "weight").unsqueeze(0))
            state_dict.update({prefix + "q": q_1OI[0], prefix + "scale": scale_1O[0]})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class Int8Linear(_Int8Matrix):
    """``x @ (scale * q).t() + bias`` with each row of ``x`` quantised by itself; output like ``x``, no gradient."""

    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__(out_features, in_features)
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """``x``: floating point (..., I)."""
        refuse_training(self)
        if self._ready is None:
            bias = None if self.bias is None else self.bias.unsqueeze(0)
            self._ready = with_sums(self.q.unsqueeze(0), self.scale.unsqueeze(0), bias)
        with torch.no_grad():
            rows_RI = x.reshape(-1, x.size(-1)).float().contiguous()
            groups = Groups(None, torch.tensor([0, rows_RI.size(0)]), rows_RI.size(0))
            return int8_linear_of_floats(rows_RI, self._ready, groups).to(x.dtype).view(*x.shape[:-1], -1)


class Int8Embedding(_Int8Matrix):
    """Rows ``scale[v] * q[v]``; no gradient. ``padding_idx`` and sizes as ``nn.Embedding`` has them."""

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None, dtype: torch.dtype) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx, self.dtype = padding_idx, dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.dtype = fn(torch.zeros(1, dtype=self.dtype)).dtype  # the dtype in which the model computes
        return super()._apply(fn, recurse)

    def forward(self, ids: Tensor) -> Tensor:
        """(...,) int64 -> (..., D), in the dtype that the model was cast to."""
        refuse_training(self)
        rows = nn.functional.embedding(ids, self.q).float() * self.scale[ids].unsqueeze(-1)
        return rows.to(self.dtype)


def refuse_training(module: nn.Module) -> None:
    """Raise RuntimeError if ``module`` is in training mode."""
    if module.training:
        raise RuntimeError(
            "int8 weights are for inference and cannot be trained: train the float checkpoint and quantise the result "
            "(xmoe checkpoint quantise)"
        )


def exchange_linear_maps(model: nn.Module) -> None:
    """Put ``Int8Linear`` and ``Int8Embedding`` in the place of every ``nn.Linear`` and ``nn.Embedding``, in place.

    The numbers come with ``load_state_dict``. Matrices that were one tensor (tied embeddings) stay one. Subclasses, as
    learned positions are, keep their floats.
    """
    made: dict[int, nn.Module] = {}
    shared: dict[int, _Int8Matrix] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) not in (nn.Linear, nn.Embedding):
                continue
            if id(child) not in made:
                made[id(child)] = _counterpart(child, shared)
            setattr(parent, name, made[id(child)])


def _counterpart(child: nn.Module, shared: dict[int, _Int8Matrix]) -> nn.Module:
    new: _Int8Matrix
    if isinstance(child, nn.Embedding):
        new = Int8Embedding(child.num_embeddings, child.embedding_dim, child.padding_idx, child.weight.dtype)
    else:
        assert isinstance(child, nn.Linear)
        new = Int8Linear(child.in_features, child.out_features, child.bias is not None)
    first = shared.setdefault(id(child.weight), new)
    new.q, new.scale = first.q, first.scale
    return new.train(child.training)

"""The host side of gate.py: logits of the router, and the gradients of its input and weights."""

from __future__ import annotations

import torch
from torch import Tensor

from . import gate as gate_kernels
from .launch import Cost, launch
from .tiles import gate_tile, widens


def flags(padding_T: Tensor | None, like: Tensor) -> Tensor:
    """A pointer for the kernel to one byte a token, or to any tensor if nothing is padding."""
    return like if padding_T is None else padding_T.view(torch.int8)


def gate_precision(dtype: torch.dtype) -> str:
    """The precision of float32 products; see gate.py."""
    if dtype == torch.float16:
        return "tf32x3"
    if dtype == torch.bfloat16:
        return "split"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def gradient_precision(dtype: torch.dtype) -> str:
    """Precision of products of float32 tensors for a gradient, which half precision rounds more coarsely than TF32."""
    return gate_precision(dtype) if dtype == torch.float32 else "tf32"


def gate_logits(x_TD: Tensor, gate_GD: Tensor, padding_T: Tensor | None) -> Tensor:
    (num_tokens, width), num_gates = x_TD.shape, gate_GD.size(0)
    logits = torch.empty(num_tokens, num_gates, device=x_TD.device)
    block_t, (block_g, block_d) = 32, gate_tile(num_gates, width, x_TD.dtype)
    launch(
        gate_kernels.gate_logits, (-(-num_tokens // block_t), -(-num_gates // block_g)),
        x_TD, gate_GD.contiguous(), flags(padding_T, x_TD), logits, num_tokens, width, num_gates,
        HAS_PADDING=padding_T is not None, PRECISION=gate_precision(x_TD.dtype), WIDEN=widens(x_TD.dtype),
        BLOCK_T=block_t, BLOCK_G=block_g, BLOCK_D=block_d, num_warps=4, num_stages=2,
        cost=lambda: _gate_cost(x_TD, gate_GD, logits, block_t),
    )  # fmt: skip
    return logits


def _gate_cost(x_TD: Tensor, gate_GD: Tensor, logits: Tensor, block_t: int) -> Cost:
    fixed = float(x_TD.numel() * x_TD.element_size() + 4 * logits.numel())
    reads = -(-x_TD.size(0) // block_t)
    gate = float(gate_GD.numel() * gate_GD.element_size())
    return Cost(fixed + gate, fixed + gate * reads, 2.0 * logits.numel() * x_TD.size(1))


def gate_input_gradient(grad_logits: Tensor, gate_GD: Tensor, x_TD: Tensor, others: Tensor | None) -> Tensor:
    """Gradient of ``x_TD`` through the gate, plus ``others``."""
    (num_tokens, width), num_gates = x_TD.shape, gate_GD.size(0)
    grad_x = torch.empty_like(x_TD)
    block_t, (block_g, block_d) = 32, gate_tile(num_gates, width, x_TD.dtype)
    launch(
        gate_kernels.gate_input_gradient, (-(-num_tokens // block_t), -(-width // block_d)),
        grad_logits, gate_GD.contiguous(), grad_x if others is None else others.contiguous(), grad_x,
        num_tokens, width, num_gates, HAS_OTHERS=others is not None, PRECISION=gradient_precision(x_TD.dtype),
        BLOCK_T=block_t, BLOCK_G=block_g, BLOCK_D=block_d,
        num_warps=4, num_stages=2, cost=lambda: _gate_cost(x_TD, gate_GD, grad_logits, block_t),
    )  # fmt: skip
    return grad_x


def gate_weight_gradient(grad_logits: Tensor, x_TD: Tensor, gate_GD: Tensor, padding_T: Tensor | None) -> Tensor:
    (num_tokens, width), num_gates = x_TD.shape, gate_GD.size(0)
    block_g, block_d = gate_tile(num_gates, width, x_TD.dtype)
    block_t = block_d if x_TD.dtype == torch.float32 else 64
    chunk = max(256, block_t * -(-num_tokens // (64 * block_t)))
    parts = -(-num_tokens // chunk)
    precision = "split" if x_TD.dtype == torch.bfloat16 else gradient_precision(x_TD.dtype)
    partial = torch.empty(parts, num_gates, width, device=x_TD.device)
    launch(
        gate_kernels.gate_weight_gradient, (parts, -(-num_gates // block_g), -(-width // block_d)),
        grad_logits, x_TD, flags(padding_T, x_TD), partial, num_tokens, width, num_gates, chunk,
        HAS_PADDING=padding_T is not None, PRECISION=precision, WIDEN=widens(x_TD.dtype),
        BLOCK_T=block_t, BLOCK_G=block_g, BLOCK_D=block_d, num_warps=4, num_stages=3,
        cost=lambda: _gate_cost(x_TD, partial, grad_logits, num_tokens),
    )  # fmt: skip
    grad = torch.empty_like(gate_GD, memory_format=torch.contiguous_format)
    launch(
        gate_kernels.add_chunks, (-(-grad.numel() // 64),),
        partial, grad, parts, grad.numel(), BLOCK_S=64, BLOCK=64, num_warps=4,
        cost=lambda: Cost(float(partial.nbytes + grad.nbytes), float(partial.nbytes + grad.nbytes)),
    )  # fmt: skip
    return grad

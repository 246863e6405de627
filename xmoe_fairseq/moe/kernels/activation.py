"""Activation functions and their derivatives inside kernels; the names are those of ``moe.activations``."""

from __future__ import annotations

import triton
import triton.language as tl

ROOT_HALF = tl.constexpr(0.7071067811865476)
DENSITY_AT_0 = tl.constexpr(0.3989422804014327)  # of the standard normal
TANH_SCALE = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
TANH_CUBIC = tl.constexpr(0.044715)


@triton.jit
def _tanh(x):
    """tanh from exp alone: Triton has no tanh of its own, and the interpreter lacks its GPU libraries.

    Constants are on the right of a product, because the interpreter cannot multiply a constant by a tensor behind it.
    """
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _normal_cdf(x, EXACT: tl.constexpr):
    """The standard normal's distribution function at ``x``, and exp(-x^2 / 2).

    EXACT computes it by erf. Otherwise the rational approximation 7.1.26 of Abramowitz and Stegun is used, which shares
    its exponential with the density. It takes a third of the instructions, and its error of 1e-7 is far below half
    precision's rounding.
    """
    bell = tl.exp(-0.5 * x * x)
    if EXACT:
        return 0.5 * (1.0 + tl.erf(x * ROOT_HALF)), bell
    else:
        t = 1.0 / (1.0 + tl.abs(x) * 0.23164190)
        tail = ((((t * 0.530702715 - 0.726576013) * t + 0.710706871) * t - 0.142248369) * t + 0.127414796) * t * bell
        return tl.where(x > 0.0, 1.0 - tail, tail), bell


@triton.jit
def activate(pre, NAME: tl.constexpr, EXACT: tl.constexpr):
    """Hidden units, float32 like ``pre``."""
    if NAME == "gelu":
        below, bell = _normal_cdf(pre, EXACT)
        return pre * below
    elif NAME == "gelu_fast" or NAME == "gelu_accurate":
        return 0.5 * pre * (1.0 + _tanh((pre + pre * pre * pre * TANH_CUBIC) * TANH_SCALE))
    elif NAME == "relu":
        return tl.where(pre > 0.0, pre, 0.0)
    else:
        tl.static_assert(NAME == "silu" or NAME == "swish")
        return pre / (1.0 + tl.exp(-pre))


@triton.jit
def activate_with_slope(pre, NAME: tl.constexpr, EXACT: tl.constexpr):
    """Hidden units and their derivative by ``pre``, float32."""
    if NAME == "gelu":
        below, bell = _normal_cdf(pre, EXACT)
        return pre * below, below + pre * DENSITY_AT_0 * bell
    elif NAME == "gelu_fast" or NAME == "gelu_accurate":
        bend = _tanh((pre + pre * pre * pre * TANH_CUBIC) * TANH_SCALE)
        inner = (1.0 + pre * pre * TANH_CUBIC * 3.0) * TANH_SCALE
        return 0.5 * pre * (1.0 + bend), 0.5 * (1.0 + bend) + 0.5 * pre * (1.0 - bend * bend) * inner
    elif NAME == "relu":
        return tl.where(pre > 0.0, pre, 0.0), tl.where(pre > 0.0, 1.0, 0.0)
    else:
        tl.static_assert(NAME == "silu" or NAME == "swish")
        gate = 1.0 / (1.0 + tl.exp(-pre))
        return pre * gate, gate * (1.0 + pre * (1.0 - gate))


@triton.jit
def dropout_scale(seed, row, column, width, probability):
    """1 / (1 - probability) where a hidden unit is kept, else 0; the same for the same seed, row and column."""
    offset = row.to(tl.int64)[:, None] * width + column[None, :]
    kept = tl.rand(tl.load(seed), offset) >= probability
    return tl.where(kept, 1.0 / (1.0 - probability), 0.0)

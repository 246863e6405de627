"""Activation functions and their derivatives inside kernels; the names are those of ``moe.activations``.

They make up most instructions behind the main loop of a product with an activation. Unless ``EXACT`` (float32) they
use ``exp2`` and ``rsqrt``, which compile to one instruction each, where ``exp`` takes five and a division eight. The
errors are units in the last place of float32, which half precision rounds away.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROOT_HALF = tl.constexpr(0.7071067811865476)
DENSITY_AT_0 = tl.constexpr(0.3989422804014327)  # of the standard normal
TANH_SCALE = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
TANH_CUBIC = tl.constexpr(0.044715)
LOG2_E = tl.constexpr(1.4426950408889634)
MINUS_HALF_LOG2_E = tl.constexpr(-0.7213475204444817)


@triton.jit
def _exp(x, EXACT: tl.constexpr):
    # constants stand on the right of a product: the interpreter cannot multiply a constant by a tensor behind it
    return tl.exp(x) if EXACT else tl.exp2(x * LOG2_E)


@triton.jit
def _inverse(x, EXACT: tl.constexpr):
    """1 / x for x >= 1."""
    if EXACT:
        return 1.0 / x
    else:
        root = tl.rsqrt(x)
        return root * root


@triton.jit
def _tanh(x, EXACT: tl.constexpr):
    """tanh from exp alone: Triton has no tanh of its own, and the interpreter lacks its GPU libraries."""
    return 1.0 - _inverse(_exp(x * 2.0, EXACT) + 1.0, EXACT) * 2.0


@triton.jit
def _normal_cdf(x, EXACT: tl.constexpr):
    """The standard normal's distribution function at ``x``, and exp(-x^2 / 2).

    EXACT computes it by erf. Otherwise the rational approximation 7.1.26 of Abramowitz and Stegun is used, which shares
    its exponential with the density and errs by 1e-7.
    """
    if EXACT:
        return 0.5 * (1.0 + tl.erf(x * ROOT_HALF)), tl.exp(-0.5 * x * x)
    else:
        bell = tl.exp2(x * x * MINUS_HALF_LOG2_E)
        t = _inverse(1.0 + tl.abs(x) * 0.23164190, EXACT)
        tail = ((((t * 0.530702715 - 0.726576013) * t + 0.710706871) * t - 0.142248369) * t + 0.127414796) * t * bell
        return tl.where(x > 0.0, 1.0 - tail, tail), bell


@triton.jit
def activate(pre, NAME: tl.constexpr, EXACT: tl.constexpr):
    """Hidden units, float32 like ``pre``."""
    if NAME == "gelu":
        below, bell = _normal_cdf(pre, EXACT)
        return pre * below
    elif NAME == "gelu_fast" or NAME == "gelu_accurate":
        return 0.5 * pre * (1.0 + _tanh((pre + pre * pre * pre * TANH_CUBIC) * TANH_SCALE, EXACT))
    elif NAME == "relu":
        return tl.where(pre > 0.0, pre, 0.0)
    else:
        tl.static_assert(NAME == "silu" or NAME == "swish")
        return pre * _inverse(1.0 + _exp(-pre, EXACT), EXACT)


@triton.jit
def activate_with_slope(pre, NAME: tl.constexpr, EXACT: tl.constexpr):
    """Hidden units and their derivative by ``pre``, float32."""
    if NAME == "gelu":
        below, bell = _normal_cdf(pre, EXACT)
        return pre * below, below + pre * DENSITY_AT_0 * bell
    elif NAME == "gelu_fast" or NAME == "gelu_accurate":
        bend = _tanh((pre + pre * pre * pre * TANH_CUBIC) * TANH_SCALE, EXACT)
        inner = (1.0 + pre * pre * TANH_CUBIC * 3.0) * TANH_SCALE
        return 0.5 * pre * (1.0 + bend), 0.5 * (1.0 + bend) + 0.5 * pre * (1.0 - bend * bend) * inner
    elif NAME == "relu":
        return tl.where(pre > 0.0, pre, 0.0), tl.where(pre > 0.0, 1.0, 0.0)
    else:
        tl.static_assert(NAME == "silu" or NAME == "swish")
        gate = _inverse(1.0 + _exp(-pre, EXACT), EXACT)
        return pre * gate, gate * (1.0 + pre * (1.0 - gate))


@triton.jit
def dropout_scale(seed, row, column, width, probability):
    """1 / (1 - probability) where a hidden unit is kept, else 0; the same for the same seed, row and column."""
    offset = row.to(tl.int64)[:, None] * width + column[None, :]
    kept = tl.rand(tl.load(seed), offset) >= probability
    return tl.where(kept, 1.0 / (1.0 - probability), 0.0)

"""Every path gives what a slow loop gives; int8 paths give the same bits, and no row depends on another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from xmoe_fairseq.moe.native.library import available_paths
from xmoe_fairseq.moe.native.rows import Groups, Int8Weights, combine, float_linear, int8_linear, quantise_rows
from xmoe_fairseq.moe.quantised.weights import dequantise, quantise_channels, with_sums

PATHS = available_paths()
FAST = [path for path in PATHS if path != "torch"]
# widths that fill vectors, that leave a rest, and that are shorter than a vector
SHAPES = [(5, 70, 37), (2, 512, 128), (3, 16, 5), (2, 1100, 9), (1, 3, 1)]


def made_up(shape: tuple[int, int, int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Groups, Tensor]:
    """x (T, I), w (E, O, I), bias (E, O), groups with an idle expert where there are several, token of each row."""
    num_experts, width_in, width_out = shape
    generator = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(11, width_in, generator=generator) * torch.rand(11, 1, generator=generator) * 3
    w_EOI = torch.randn(num_experts, width_out, width_in, generator=generator)
    expert_A = torch.randint(0, max(1, num_experts - 1), (25,), generator=generator).sort().values
    token_A = torch.randint(0, 11, (25,), generator=generator)
    count_E = torch.bincount(expert_A, minlength=num_experts)
    start_E = torch.cat([count_E.new_zeros(1), count_E.cumsum(0)])
    bias_EO = torch.randn(num_experts, width_out, generator=generator)
    return x_TI, w_EOI, bias_EO, Groups(token_A, start_E, 25), expert_A


def weights_of(w_EOI: Tensor, bias_EO: Tensor | None) -> Int8Weights:
    return with_sums(*quantise_channels(w_EOI), bias_EO)


def one_by_one(x_TI: Tensor, w_EOI: Tensor, bias_EO: Tensor, groups: Groups, expert_A: Tensor) -> Tensor:
    rows = zip(groups.row_A.tolist(), expert_A.tolist(), strict=True)
    return torch.stack([w_EOI[expert].double() @ x_TI[row].double() + bias_EO[expert] for row, expert in rows])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("path", PATHS)
def test_int8_is_exactly_the_product_of_what_was_quantised(path: str, shape: tuple[int, int, int]) -> None:
    x_TI, w_EOI, bias_EO, groups, expert_A = made_up(shape)
    rows, weights = quantise_rows(x_TI, path), weights_of(w_EOI, bias_EO)
    stands_for = (rows.q_RI.double() + rows.shift_R.unsqueeze(1)) * rows.scale_R.unsqueeze(1).double()
    assert (stands_for - x_TI).abs().amax(dim=1).le(0.5001 * rows.scale_R.double()).all()  # half a step
    got = int8_linear(rows, weights, groups, path)
    want = one_by_one(stands_for, dequantise(weights.w_EOI, weights.scale_EO), bias_EO, groups, expert_A)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@pytest.mark.skipif(not FAST, reason="the library was not built here")
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_paths_give_the_same_bits(shape: tuple[int, int, int]) -> None:
    x_TI, w_EOI, bias_EO, groups, _ = made_up(shape)
    x_TI = torch.cat([x_TI, torch.randn(300, shape[1])])  # many, so that ties and near-ties of rounding occur
    x_TI[0], x_TI[1, 0], x_TI[2] = 0.0, 1e30, x_TI[2].abs()  # nothing, an outlier, no negative number
    x_TI[3] = x_TI[3] * 1e-36
    weights, weight_A = weights_of(w_EOI, bias_EO), torch.rand(groups.size)
    results = []
    for path in PATHS:
        rows = quantise_rows(x_TI, path)
        out = int8_linear(rows, weights, groups, path)
        results.append([*rows, out, combine(out, weight_A, groups.row_A, len(x_TI), path)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("path", PATHS)
def test_the_largest_sums_do_not_overflow(path: str) -> None:
    x_TI = torch.ones(3, 4096)
    x_TI[:, ::2] = -1.0  # both ends of the range
    w_EOI = torch.where(x_TI[:1] > 0, 127.0, -127.0).expand(1, 2, 4096)
    groups = Groups(None, torch.tensor([0, 3]), 3)
    got = int8_linear(quantise_rows(x_TI, path), weights_of(w_EOI, None), groups, path)
    torch.testing.assert_close(got, torch.full((3, 2), 127.0 * 4096), rtol=5e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("path", PATHS)
def test_float_matrices(path: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x_TI, w_EOI, bias_EO, groups, expert_A = made_up(shape)
    w_EIO = w_EOI.to(dtype).transpose(1, 2).contiguous()
    got = float_linear(x_TI, w_EIO, bias_EO, groups, path)
    want = one_by_one(x_TI, w_EIO.transpose(1, 2), bias_EO, groups, expert_A)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("path", FAST)
def test_a_row_does_not_depend_on_the_rows_beside_it(path: str) -> None:
    x_TI, w_EOI, bias_EO, groups, _ = made_up((4, 300, 70))
    weights, w_EIO = weights_of(w_EOI, bias_EO), w_EOI.transpose(1, 2).contiguous()
    together = int8_linear(quantise_rows(x_TI, path), weights, groups, path)
    in_float = float_linear(x_TI, w_EIO, bias_EO, groups, path)
    for row in range(groups.size):
        before = groups.start_E.clamp(max=row)
        alone = Groups(groups.row_A[row : row + 1].clone() * 0, groups.start_E.clamp(max=row + 1) - before, 1)
        x_1I = x_TI[groups.row_A[row]].unsqueeze(0)
        assert torch.equal(int8_linear(quantise_rows(x_1I, path), weights, alone, path)[0], together[row])
        assert torch.equal(float_linear(x_1I, w_EIO, bias_EO, alone, path)[0], in_float[row])


@pytest.mark.parametrize("path", PATHS)
def test_nan_and_infinity_spoil_their_own_row_only(path: str) -> None:
    x_TI, w_EOI, bias_EO, _, _ = made_up((1, 70, 37))
    x_TI[2, 5], x_TI[4, 69] = torch.nan, torch.inf
    got = int8_linear(
        quantise_rows(x_TI, path), weights_of(w_EOI, bias_EO), Groups(None, torch.tensor([0, 11]), 11), path
    )
    assert torch.isnan(got).all(dim=1).nonzero().flatten().tolist() == [2, 4]
    assert torch.isfinite(got).all(dim=1).sum() == 9


def test_weights_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantise_channels(torch.tensor([[[1.0, torch.nan]]]))

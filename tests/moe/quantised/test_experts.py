"""int8 and bfloat16 experts: near the float ones, the same on every path, independent of the batch, for inference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.moe.helpers import assert_near, tiny_layer, tokens
from xmoe_fairseq.moe import MoEConfig, MoELayer
from xmoe_fairseq.moe.experts import few_rows
from xmoe_fairseq.moe.native import library, rows
from xmoe_fairseq.moe.native.library import available_paths

NEAR = {"int8": 0.03, "bfloat16": 0.01}
SIZES = {"embed_dim": 64, "num_experts": 8, "expert_dim": 48}


def pair(weights: str, **settings: object) -> tuple[MoELayer, MoELayer]:
    """A float layer and the same one quantised, both in evaluation mode."""
    layer = tiny_layer(**{**SIZES, **settings}).eval()
    other = MoELayer(MoEConfig(**{**SIZES, "threshold": 0.7, **settings}, weights=weights)).eval()
    other.load_state_dict(layer.state_dict())
    return layer, other


@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
@pytest.mark.parametrize("count", [0, 1, 7, 400])
def test_near_the_float_layer(weights: str, count: int) -> None:
    layer, quantised = pair(weights)
    x_TD = tokens(count, width=64)
    (want, plan), (got, other_plan) = layer(x_TD), quantised(x_TD)
    assert torch.equal(plan.token_index_A, other_plan.token_index_A)  # the router stays float
    assert_near(got, want, NEAR[weights])


@pytest.mark.parametrize("path", available_paths())
def test_no_row_depends_on_its_batch(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "chosen_path", lambda: path)
    layer = pair("int8")[1]
    x_TD = tokens(30, width=64)
    x_TD[3] *= 100  # a scale of the whole batch would crush the others
    together, _ = layer(x_TD)
    for token in range(30):
        assert_near(layer(x_TD[token : token + 1])[0][0], together[token], 1e-5)  # the router's GEMM rounds by batch


def test_every_path_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = pair("int8")[1]
    x_TD = tokens(50, width=64)
    results = []
    for path in available_paths():
        monkeypatch.setattr(rows, "chosen_path", lambda path=path: path)
        results.append(layer(x_TD)[0])
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.skipif(available_paths()[0] == "torch", reason="the library was not built here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_of_float_experts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = tiny_layer(**SIZES).eval().to(dtype)
    x_TD = tokens(9, width=64).to(dtype)
    with torch.no_grad():
        got, plan = layer(x_TD)
        assert few_rows.serves(layer.config, plan, x_TD, layer.experts.w1)
        monkeypatch.setattr(few_rows, "serves", lambda *_: False)
        want, _ = layer(x_TD)
    assert got.dtype == dtype
    assert_near(got, want, 1e-5 if dtype == torch.float32 else 0.02)


def test_float_experts_keep_their_gradient() -> None:
    layer = tiny_layer(**SIZES)
    layer(tokens(9, width=64))[0].sum().backward()
    assert layer.experts.w1.grad is not None


@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
def test_training_is_refused(weights: str) -> None:
    layer = pair(weights)[1]
    with pytest.raises(RuntimeError, match="for inference and cannot be trained"):
        layer.train()(tokens(3, width=64))


@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
def test_casting_a_model_leaves_the_stored_numbers(weights: str) -> None:
    layer = pair(weights)[1]
    before = {name: tensor.clone() for name, tensor in layer.experts.state_dict().items()}
    y = layer.half().to("cpu")(tokens(4, width=64).half())[0]
    assert y.dtype == torch.float16
    after = layer.experts.state_dict()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


def test_a_quantised_state_loads_again_bit_for_bit() -> None:
    first = pair("int8")[1]
    second = MoELayer(first.config).eval()
    second.load_state_dict(first.state_dict())
    x_TD = tokens(5, width=64)
    assert torch.equal(first(x_TD)[0], second(x_TD)[0])


def test_the_path_is_chosen_once_and_logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XMOE_CPU_PATH", "torch")
    library.chosen_path.cache_clear()
    try:
        with caplog.at_level("INFO"):
            assert [library.chosen_path() for _ in range(3)] == ["torch"] * 3
        assert sum("few rows on the CPU: torch" in message for message in caplog.messages) == 1
        monkeypatch.setenv("XMOE_CPU_PATH", "mmx")
        library.chosen_path.cache_clear()
        with pytest.raises(ValueError, match=r"XMOE_CPU_PATH \('mmx'\) must be one of"):
            library.chosen_path()
    finally:
        library.chosen_path.cache_clear()


def test_merged_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="moe_weights"):
        MoEConfig(8, 4, 8, merge_experts=True, top_k=2, weights="int8")


def padded(x_TD: Tensor) -> Tensor:
    return torch.zeros(len(x_TD), dtype=torch.bool).index_fill(0, torch.tensor([0, 2]), True)


def test_padding_stays_zero() -> None:
    layer = pair("int8")[1]
    x_TD = tokens(6, width=64)
    y, _ = layer(x_TD, padding=padded(x_TD))
    assert not y[[0, 2]].any()
    assert y[[1, 3, 4, 5]].any(dim=1).all()


@pytest.mark.parametrize("weights", ["float", "int8", "bfloat16"])
def test_flops_of_few_rows_are_counted(weights: str) -> None:
    """FlopCounterMode sees torch's operators only, so a counted pass takes those."""
    layer = pair("int8")[0] if weights == "float" else pair(weights)[1]
    x_TD = tokens(5, width=64)
    with torch.no_grad():
        want, plan = layer(x_TD)
        if weights == "float":  # a batched GEMM would pad the rows, and the padding would count
            layer.experts.config = replace(layer.config, compute="loop")
        with FlopCounterMode(display=False) as counter:
            got, _ = layer(x_TD)
    rows = plan.token_index_A.numel()
    assert counter.get_total_flops() == rows * layer.config.flops_per_row + 2 * 5 * 8 * 64  # experts and router
    assert_near(got, want, 1e-5)

"""The measuring on cases whose answer is known, and the peers against our layer."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks import common, hf_peers, layer, peers
from xmoe_fairseq.moe import MoEConfig, MoELayer

ROOT = Path(__file__).parents[2]
WIDTH, HIDDEN, EXPERTS = 8, 12, 6
FLOAT = 4  # bytes


def test_candidates_take_turns_and_the_first_round_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def timed(run, _device: str) -> float:
        run()
        return float(len(calls))  # a clock that shows which call it was

    monkeypatch.setattr(common, "timed", timed)
    seconds = common.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3)
    assert "".join(calls) == "abababab"
    assert seconds == {"a": [3, 5, 7], "b": [4, 6, 8]}


def test_time_is_wall_seconds_of_the_call() -> None:
    assert common.timed(lambda: time.sleep(0.05)) >= 0.05


def test_ratios_are_taken_turn_by_turn() -> None:
    # the machine slows down tenfold in the last turn; "other" always takes twice as long, but for one stumble
    seconds = {"base": [0.010, 0.020, 0.100], "other": [0.020, 0.060, 0.200]}
    rows = common.summarise(seconds, beside="base")
    assert rows["base"] == pytest.approx({"ms": 20.0, "ratio": 1.0, "ratio_p10": 1.0, "ratio_p90": 1.0})
    assert rows["other"] == pytest.approx({"ms": 60.0, "ratio": 2.0, "ratio_p10": 2.0, "ratio_p90": 3.0})


def test_percentiles_leave_out_the_outermost_tenth() -> None:
    seconds = {"base": [1.0] * 11, "other": [float(number) for number in range(1, 12)]}
    row = common.summarise(seconds, beside="base")["other"]
    assert (row["ratio"], row["ratio_p10"], row["ratio_p90"]) == (6.0, 2.0, 10.0)


def test_a_linear_map_keeps_its_input_and_a_relu_its_output() -> None:
    x_TD = torch.randn(5, WIDTH)
    linear = nn.Linear(WIDTH, HIDDEN)
    assert common.kept_bytes(lambda: linear(x_TD), list(linear.parameters())) == FLOAT * 5 * WIDTH
    # the second map keeps what the relu keeps already: one storage, counted once
    network = nn.Sequential(linear, nn.ReLU(), nn.Linear(HIDDEN, WIDTH))
    kept = common.kept_bytes(lambda: network(x_TD), list(network.parameters()))
    assert kept == FLOAT * (5 * WIDTH + 5 * HIDDEN)


def test_parameters_are_not_kept_memory() -> None:
    linear = nn.Linear(WIDTH, HIDDEN)
    x_TD = torch.randn(5, WIDTH, requires_grad=True)  # so that the weight is kept for the input's gradient
    assert common.kept_bytes(lambda: linear(x_TD), list(linear.parameters())) == FLOAT * 5 * WIDTH
    assert common.kept_bytes(lambda: linear(x_TD), []) == FLOAT * (5 * WIDTH + WIDTH * HIDDEN)


def test_peak_is_the_worst_moment_and_not_the_sum() -> None:
    one = 1 << 20

    def two_at_a_time() -> None:
        for _ in range(3):
            first, second = torch.empty(one, dtype=torch.uint8), torch.empty(one, dtype=torch.uint8)
            del first, second

    assert common.peak_bytes(two_at_a_time) == pytest.approx(2 * one, rel=0.01)


def test_table_shows_three_digits_and_leaves_gaps() -> None:
    rows = [{"method": "dense", "ms": 1234.5}, {"method": "ours", "ms": 0.98765, "more": 3}]
    assert common.table(rows, ["method", "ms", "more"]).splitlines() == [
        "| method | ms | more |",
        "|---|---|---|",
        "| dense | 1.23e+03 |  |",
        "| ours | 0.988 | 3 |",
    ]


def test_result_file_says_where_it_was_measured(tmp_path: Path) -> None:
    out = tmp_path / "new" / "result.json"
    assert common.write_result("layer", {"rows": [{"ms": 1.5}]}, str(out)) == out
    record = json.loads(out.read_text())
    assert record["benchmark"] == "layer"
    assert record["rows"] == [{"ms": 1.5}]
    assert record["machine"]["torch"] == torch.__version__
    assert {"date", "cpu", "threads", "gpu", "python", "commit"} <= record["machine"].keys()
    assert list(out.parent.iterdir()) == [out]  # nothing half-written stays


def test_a_result_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    out.write_text("old")
    with pytest.raises(TypeError):
        common.write_result("layer", {"rows": [object()]}, str(out))
    assert out.read_text() == "old"


def our_layer(threshold: float, gamma: float) -> MoELayer:
    """Peaked routing and random biases; capacity in force."""
    torch.manual_seed(0)
    config = MoEConfig(WIDTH, EXPERTS, HIDDEN, threshold=threshold, capacity_factor=gamma, eval_capacity_factor=gamma)
    ours = MoELayer(config)
    nn.init.normal_(ours.router.weight, std=0.6)
    return ours


def copied_loop(ours: MoELayer, *arguments: float) -> peers.LoopOverExperts:
    peer = peers.LoopOverExperts(WIDTH, EXPERTS, HIDDEN, *arguments)
    with torch.no_grad():
        peer.route.gate.weight.copy_(ours.router.weight)
        for number, expert in enumerate(peer.experts):
            expert.fc1.weight.copy_(ours.experts.w1[number].t())
            expert.fc1.bias.copy_(ours.experts.b1[number])
            expert.fc2.weight.copy_(ours.experts.w2[number].t())
            expert.fc2.bias.copy_(ours.experts.b2[number])
    return peer


def copied_batched(ours: MoELayer, *arguments: float) -> peers.PlainBatched:
    peer = peers.PlainBatched(WIDTH, EXPERTS, HIDDEN, *arguments)
    with torch.no_grad():
        peer.route.gate.weight.copy_(ours.router.weight)
        for name in ("w1", "b1", "w2", "b2"):
            weight = getattr(peer, name)
            weight.copy_(getattr(ours.experts, name).view_as(weight))
    return peer


def outputs_and_gradients(module: nn.Module, gate: Tensor, x_TD: Tensor, grad_TD: Tensor) -> list[Tensor]:
    """Output, its gradient with respect to the input, and with respect to the router's weight."""
    leaf = x_TD.clone().requires_grad_()
    output = layer.output_of(module, leaf)
    return [output.detach(), *torch.autograd.grad(output, [leaf, gate], grad_TD)]


@pytest.mark.parametrize("copied", [copied_loop, copied_batched])
@pytest.mark.parametrize(("threshold", "gamma"), [(0.0, 1.0), (0.7, 1.0), (0.7, 2.0), (0.9, 100.0)])
@pytest.mark.parametrize("num_tokens", [3, 50])
def test_peers_compute_what_our_layer_does(copied, threshold: float, gamma: float, num_tokens: int) -> None:
    ours = our_layer(threshold, gamma)
    peer = copied(ours, threshold, gamma)
    x_TD, grad_TD = torch.randn(2, num_tokens, WIDTH)
    dropped = (ours(x_TD)[1].wanted_E - ours(x_TD)[1].count_E).sum().item()
    assert (dropped > 0) == (num_tokens == 50 and gamma <= 2.0)  # the cases are with and without drops
    want = outputs_and_gradients(ours, ours.router.weight, x_TD, grad_TD)
    got = outputs_and_gradients(peer, peer.route.gate.weight, x_TD, grad_TD)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_gemms_alone_multiply_each_experts_rows_by_its_matrices() -> None:
    module = peers.ExpertGemms(WIDTH, num_experts=3, hidden=HIDDEN, rows_per_expert=2)
    rows = torch.randn(6, WIDTH)
    want = [rows[2 * e : 2 * e + 2] @ module.w1[e] @ module.w2[e] for e in range(3)]
    torch.testing.assert_close(module(rows), torch.cat(want))


@pytest.fixture
def process_group_ends() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.usefixtures("process_group_ends")
def test_fairscale_mixes_two_experts_by_weights_that_sum_to_one() -> None:
    torch.manual_seed(0)
    # of two experts every token takes both and a capacity of 2 T / E is T, so equal experts must give the expert itself
    module = peers.fairscale_moe(WIDTH, num_experts=2, hidden=HIDDEN)
    first, second = module.layer.experts
    second.load_state_dict(first.state_dict())
    x_TD = torch.randn(10, WIDTH)
    output = module(x_TD)
    torch.testing.assert_close(output, first(x_TD))
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_cases_of_the_layer_benchmark_have_the_dense_ffns_flops() -> None:
    for case in layer.CASES:
        assert case.gamma * case.expert_dim == layer.DENSE
        assert case.num_experts * case.expert_dim == 32 * layer.DENSE


def test_gated_experts_have_the_flops_of_plain_ones() -> None:
    for setting in hf_peers.SETTINGS:
        assert setting.top_k * setting.expert_dim == layer.DENSE
        hidden = hf_peers.gated_hidden(setting.expert_dim)
        assert hidden % 8 == 0
        assert 3 * hidden == pytest.approx(2 * setting.expert_dim, rel=0.005)


def test_peers_of_another_environment_find_our_layer_without_fairseq() -> None:
    script = (
        "import sys; sys.modules['fairseq'] = None\n"  # as if it were not installed
        "from benchmarks import hf_peers\n"
        "import torch\n"
        "layer = hf_peers.our_layer(hf_peers.Setting(4, 6, 2), width=8)\n"
        "print(tuple(layer(torch.randn(5, 8))[0].shape))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(5, 8)"


def test_a_peer_that_computes_something_else_is_refused() -> None:
    values = torch.tensor([1.0, 2.0])
    hf_peers.require_same("both", values, values + 1e-5)
    with pytest.raises(ValueError, match="both: outputs differ"):
        hf_peers.require_same("both", values, values + 0.1)
    with pytest.raises(ValueError, match="nan"):
        hf_peers.require_same("both", values, values * float("nan"))

"""A layer on a real GPU: no wait for the device, torch's decisions, graphs, repeatability, training, memory.

Skipped without one; needs neither fairseq nor other files. ``bash benchmarks/gpu.sh --part tests`` runs it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.common import kept_bytes, peak_bytes
from benchmarks.peers import DenseFFN
from tests.moe.helpers import ROUTERS
from xmoe_fairseq.moe import MoEConfig, MoELayer, RoutingPlan

pytestmark = [
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
WIDTH, TOKENS = 64, 500
NEAR = {torch.float32: 3e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}
# Their choices are made with torch and wait for the device: an auction, a table of token ids.
LOOKS = ("base",)


@pytest.fixture(scope="module", autouse=True)
def _says_which_device(request: pytest.FixtureRequest) -> None:
    name = torch.cuda.get_device_name()
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{name}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    pytest.importorskip("triton", reason="triton is not installed")
    torch.backends.cuda.matmul.allow_tf32 = False


@contextmanager
def no_waits() -> Iterator[None]:
    """Any wait of the host for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def build(case: str, dtype: torch.dtype = torch.float32, *, width: int = WIDTH, **settings: Any) -> MoELayer:
    """A layer on the GPU with a peaked router in float32 and experts in ``dtype``."""
    torch.manual_seed(0)
    chosen: dict[str, Any] = {"router": case, "embed_dim": width, "num_experts": 8, "expert_dim": 96}
    layer = MoELayer(MoEConfig(**{**chosen, **ROUTERS.get(case, {}), "compute": "triton", **settings}))
    if hasattr(layer.router, "weight"):
        torch.nn.init.normal_(layer.router.weight, std=0.3)
    layer.experts.to(dtype)
    return layer.cuda()


def by_torch(layer: MoELayer) -> MoELayer:
    twin = copy.deepcopy(layer)
    for module in (twin, twin.router, twin.experts):
        module.config = replace(module.config, compute="loop")
    return twin


def inputs(dtype: torch.dtype, count: int = TOKENS, width: int = WIDTH) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(count, width, generator=generator).to("cuda", dtype) for _ in range(2))
    token = torch.arange(count, device="cuda")
    return {"x": x.requires_grad_(), "grad": grad, "padding": token % 9 == 0, "ids": token}


def step(layer: MoELayer, given: dict[str, Tensor]) -> tuple[Tensor, RoutingPlan, list[Tensor]]:
    y, plan = layer(given["x"], given["padding"], given["ids"])
    loss = (y * given["grad"]).float().sum() + plan.balance_loss
    found = torch.autograd.grad(loss, [given["x"], *layer.parameters()], allow_unused=True)
    return y.detach(), plan, [grad for grad in found if grad is not None]


def assert_close(got: Tensor, want: Tensor, relative: float) -> None:
    got, want = got.detach().double(), want.detach().double()
    worst, scale = (float(t.abs().max()) if t.numel() else 0.0 for t in (got - want, want))
    assert worst <= relative * max(scale, 1e-20), f"differs by {worst:.3g}, largest value {scale:.3g}"


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("case", ROUTERS)
def test_a_training_step_never_waits_and_does_as_torch(case: str, dtype: torch.dtype) -> None:
    layer = build(case, dtype, capacity_factor=0.8, min_capacity=1)
    given = inputs(dtype)
    first = step(layer, given)  # compiles, checks itself
    if case not in LOOKS:
        with no_waits():
            first = step(layer, given)
    y, plan, grads = first
    want_y, want_plan, want_grads = step(by_torch(layer), given)
    for name in ("token_index_A", "expert_index_A", "count_E", "wanted_E"):
        assert torch.equal(getattr(plan, name), getattr(want_plan, name)), name
    assert int(plan.wanted_E.sum()) > int(plan.count_E.sum())
    assert_close(plan.weight_A, want_plan.weight_A, 3e-5)
    for got, want in zip([y, *grads], [want_y, *want_grads], strict=True):
        assert_close(got, want, NEAR[dtype])


@pytest.mark.parametrize("dtype", NEAR, ids=str)
def test_decoding_never_waits_and_does_as_torch(dtype: torch.dtype) -> None:
    layer = build("threshold", dtype).eval()
    twin = by_torch(layer)
    with torch.no_grad():
        for count in (5, 320):
            x = inputs(dtype, count)["x"]
            layer(x)
            with no_waits():
                y, plan = layer(x)
            want, want_plan = twin(x)
            assert torch.equal(plan.token_index_A, want_plan.token_index_A)
            assert_close(y, want, NEAR[dtype])


def test_autocast_is_the_same_as_half_experts_and_never_waits() -> None:
    layer, given = build("threshold"), inputs(torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        step(layer, given)
        with no_waits():
            y, plan, grads = step(layer, given)
    want_y, want_plan, want_grads = step(layer, given)
    assert torch.equal(plan.expert_index_A, want_plan.expert_index_A)
    for got, want in zip([y, *grads], [want_y, *want_grads], strict=True):
        assert got.dtype == want.dtype == torch.float32
        assert_close(got, want, NEAR[torch.bfloat16])


@pytest.mark.parametrize("case", ["threshold", "hash"])
def test_a_captured_graph_replays_to_the_last_bit(case: str) -> None:
    """Capture allows no wait and no change of sizes; the replay sees new tokens in the old place."""
    layer, given = build(case, torch.bfloat16), inputs(torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(layer, given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, plan, grads = step(layer, given)
    with torch.no_grad():
        given["x"].copy_(given["x"].roll(3, dims=0) * 1.5)
    graph.replay()
    torch.cuda.synchronize()
    want_y, want_plan, want_grads = step(layer, given)
    assert torch.equal(plan.count_E, want_plan.count_E)
    assert all(torch.equal(got, want) for got, want in zip([y, *grads], [want_y, *want_grads], strict=True))


@pytest.mark.parametrize("dtype", NEAR, ids=str)
def test_two_runs_give_the_same_bits_in_deterministic_mode_too(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    layer, given = build("threshold", dtype), inputs(dtype, 3000)
    free = step(layer, given)
    torch.use_deterministic_algorithms(True)  # torch.empty then holds NaN, or the largest integer
    try:
        strict = step(layer, given)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(free[0], strict[0])
    assert all(torch.equal(one, other) for one, other in zip(free[2], strict[2], strict=True))


def test_dropout_repeats_with_the_seed_and_in_a_checkpointed_step() -> None:
    layer, given = build("threshold", activation_dropout=0.3), inputs(torch.float32)

    def seeded(checkpointed: bool) -> list[Tensor]:
        torch.manual_seed(7)
        call = (lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)) if checkpointed else layer
        y = call(given["x"])[0]
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [given["x"], *layer.parameters()])]

    plain = seeded(checkpointed=False)
    for other in (seeded(checkpointed=False), seeded(checkpointed=True)):
        assert all(torch.equal(one, two) for one, two in zip(plain, other, strict=True))


def test_two_hundred_updates_reach_the_loss_of_torchs_way() -> None:
    """A small regression; two ways of float32 drift apart by rounding alone, so the whole curve stays together."""
    curves = {}
    for compute in ("triton", "loop"):
        layer = build("threshold", width=32, compute=compute, capacity_factor=1.5)
        target = DenseFFN(32, 64).cuda()
        optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
        generator = torch.Generator().manual_seed(3)
        losses = []
        for _ in range(200):
            x = torch.randn(256, 32, generator=generator).cuda()
            y, plan = layer(x)
            with torch.no_grad():
                want = target(x)
            loss = (y - want).square().mean() + 0.01 * plan.balance_loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        curves[compute] = torch.stack(losses).cpu()
    ours, theirs = curves["triton"], curves["loop"]
    assert theirs[-20:].mean() < 0.8 * theirs[:20].mean()  # it learns
    assert_close(ours[:10], theirs[:10], 1e-4)
    assert abs(float(ours[-20:].mean() / theirs[-20:].mean()) - 1) < 0.02


def test_memory_kept_and_at_its_peak() -> None:
    """64x1024 under autocast, beside the dense FFN of equal FLOPs (docs/gpu.md)."""
    torch.manual_seed(0)
    layer = MoELayer(MoEConfig(512, 64, 1024, threshold=0.9, capacity_factor=2.0, compute="triton")).cuda()
    dense = DenseFFN(512, 2048).cuda()
    x = torch.randn(8192, 512, device="cuda", requires_grad=True)
    found = {}
    for name, module in (("layer", layer), ("dense", dense)):

        def forward(module: torch.nn.Module = module) -> Tensor:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                y = module(x)
            return y[0] if isinstance(y, tuple) else y

        forward()
        kept = kept_bytes(forward, list(module.parameters()))
        peak = peak_bytes(lambda f=forward, m=module: torch.autograd.grad(f().sum(), list(m.parameters())), "cuda")
        found[name] = (kept, peak)
    gradients = sum(p.numel() * 4 for p in layer.parameters())
    half_weights = sum(p.numel() * 2 for p in layer.experts.parameters())
    assert found["layer"][0] <= 1.2 * found["dense"][0], found
    # gradients, one half-precision copy of the weights at a time, and a few matrices of rows x hidden units
    assert found["layer"][1] <= gradients + half_weights + 12 * found["dense"][0], found


@pytest.mark.parametrize("hidden", [1, 7, 33])
def test_odd_expert_sizes(hidden: int) -> None:
    layer = build("threshold", expert_dim=hidden, num_experts=5, width=19)
    given = inputs(torch.float32, 77, 19)
    y, plan, grads = step(layer, given)
    want_y, want_plan, want_grads = step(by_torch(layer), given)
    assert torch.equal(plan.expert_index_A, want_plan.expert_index_A)
    for got, want in zip([y, *grads], [want_y, *want_grads], strict=True):
        assert_close(got, want, NEAR[torch.float32])

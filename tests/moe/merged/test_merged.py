"""MEO against plain loops, and the invariants of its specification."""

import copy
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from xmoe_fairseq.moe import MergedMoELayer, MoEConfig, MoELayer, SentenceContext
from xmoe_fairseq.moe.balance import SpreadTerms
from xmoe_fairseq.moe.merged import gemm
from xmoe_fairseq.moe.merged.cache import reorder_cache
from xmoe_fairseq.moe.merged.flops import merge_flops, merged_layer_flops
from xmoe_fairseq.moe.merged.gemm import merge

D, F = 6, 10


def build(num_experts=5, top_k=2, **settings):
    """A layer in inference mode whose gates are not at their zero start."""
    torch.manual_seed(0)
    config = MoEConfig(embed_dim=D, num_experts=num_experts, expert_dim=F, merge_experts=True, top_k=top_k, **settings)
    layer = MoELayer(config).eval()
    for gate in (layer.gate1, layer.gate2):
        torch.nn.init.normal_(gate.weight)
        torch.nn.init.normal_(gate.noise_weight)
    return layer


def gates_slow(gate, vector, top_k):
    """One sentence's gate weights: softmax over the k largest logits, 0 elsewhere."""
    logits = (gate.weight.detach() @ vector.detach()).tolist()
    chosen = sorted(range(len(logits)), key=lambda e: (-logits[e], e))[:top_k]
    total = sum(math.exp(logits[e]) for e in chosen)
    return {e: math.exp(logits[e]) / total for e in chosen}


def layer_slow(layer, x_TD, vector, top_k):
    """A mixture of each linear map by itself: every chosen expert computes, the outputs are weighted."""
    experts = layer.experts
    first, second = gates_slow(layer.gate1, vector, top_k), gates_slow(layer.gate2, vector, top_k)
    rows = []
    for x in x_TD:
        pre = sum(g * (x @ experts.w1[e] + experts.b1[e]) for e, g in first.items())
        hidden = torch.nn.functional.gelu(pre)
        rows.append(sum(g * (hidden @ experts.w2[e] + experts.b2[e]) for e, g in second.items()))
    return torch.stack(rows)


# 5 experts: k = 2 looks up, k = 3 takes the GEMM over all
@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
def test_output_is_the_mixture_of_each_linear_map(top_k):
    layer, x_TBD = build(top_k=top_k), torch.randn(4, 3, D)
    y_TBD, plan = layer(x_TBD)
    for sentence in range(3):
        x_TD = x_TBD[:, sentence]
        torch.testing.assert_close(y_TBD[:, sentence], layer_slow(layer, x_TD, x_TD.mean(dim=0), top_k))
    assert isinstance(layer, MergedMoELayer)
    assert plan.count_E.sum() == 4 * 3 * top_k


@pytest.mark.parametrize("top_k", [2, 4])
def test_gradients_are_those_of_autograd_through_merged_matrices(top_k, monkeypatch):
    layer, x_BTD = build(top_k=top_k), torch.randn(5, 4, D, requires_grad=True)
    monkeypatch.setattr(gemm, "CHUNK_NUMBERS", 2 * D * F)  # chunks of 2, 2 and 1 sentences
    choice = layer.gate1(x_BTD.mean(dim=1))
    weight_ME = torch.zeros(5, 5).scatter(1, choice.expert_BK, choice.gate_BK)
    slow = torch.einsum("bti,be,eio->bto", x_BTD, weight_ME, layer.experts.w1)
    slow = slow + (weight_ME @ layer.experts.b1).unsqueeze(1)
    choice = layer.gate1(x_BTD.mean(dim=1))
    fast = gemm.merged_linear(x_BTD, choice, layer.experts.w1, layer.experts.b1)
    torch.testing.assert_close(fast, slow)
    leaves, cotangent = [x_BTD, layer.gate1.weight, layer.experts.w1, layer.experts.b1], torch.randn_like(fast)
    got, want = (torch.autograd.grad(y, leaves, cotangent) for y in (fast, slow))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)  # sums run in another order
    idle = [e for e in range(5) if not (choice.expert_BK == e).any()]
    assert all((got[2][e] == 0).all() for e in idle)


def test_one_choice_is_the_likeliest_expert_and_gives_the_gate_no_gradient():
    layer, x_TD = build(top_k=1), torch.randn(3, D)
    y_TD, plan = layer(x_TD)
    first = int((layer.gate1.weight @ x_TD.mean(dim=0)).argmax())
    second = int((layer.gate2.weight @ x_TD.mean(dim=0)).argmax())
    experts = layer.experts
    hidden = torch.nn.functional.gelu(x_TD @ experts.w1[first] + experts.b1[first])
    torch.testing.assert_close(y_TD, hidden @ experts.w2[second] + experts.b2[second])
    assert plan.expert_index_A.tolist() == [first] * 3
    y_TD.sum().backward()
    assert not layer.gate1.weight.grad.any()


@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
def test_identical_experts_are_the_dense_layer(top_k):
    layer, x_TBD = build(top_k=top_k), torch.randn(4, 2, D)
    with torch.no_grad():
        for bank in layer.experts.parameters():
            bank.copy_(bank[0].expand_as(bank).clone())
    w1, b1, w2, b2 = (bank[0] for bank in (layer.experts.w1, layer.experts.b1, layer.experts.w2, layer.experts.b2))
    torch.testing.assert_close(layer(x_TBD)[0], torch.nn.functional.gelu(x_TBD @ w1 + b1) @ w2 + b2)


def test_merging_whole_networks_would_be_another_function():
    layer, x_TD = build(top_k=3), torch.randn(4, D)
    with torch.no_grad():
        layer.gate2.weight.copy_(layer.gate1.weight)
    gates, experts = gates_slow(layer.gate1, x_TD.mean(dim=0), 3), layer.experts
    mixture = sum(
        g * (torch.nn.functional.gelu(x_TD @ experts.w1[e] + experts.b1[e]) @ experts.w2[e] + experts.b2[e])
        for e, g in gates.items()
    )
    assert (layer(x_TD)[0] - mixture).abs().max() > 1e-3


def test_padding_and_neighbours_do_not_matter():
    layer, x_TBD = build(), torch.randn(5, 3, D)
    padding_TB = torch.zeros(5, 3, dtype=torch.bool)
    padding_TB[3:, 1] = True
    x_TBD[3:, 1] = float("nan")
    y_TBD, plan = layer(x_TBD, padding=padding_TB)
    torch.testing.assert_close(y_TBD[:3, 1], layer(x_TBD[:3, 1])[0])
    torch.testing.assert_close(y_TBD[:, 2], layer(x_TBD[:, 2])[0])
    assert not y_TBD[3:, 1].any()
    assert int(plan.num_real_tokens) == 13
    assert plan.count_E.sum() == 13 * 2
    y_TBD.sum().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_adapter_starts_as_the_identity_and_then_changes_the_output():
    layer, x_TBD = build(token_adapter=True), torch.randn(4, 2, D)
    plain = build()
    plain.load_state_dict(layer.state_dict(), strict=False)
    assert torch.equal(layer(x_TBD)[0], plain(x_TBD)[0])
    torch.nn.init.ones_(layer.adapter2.up.weight)
    assert not torch.equal(layer(x_TBD)[0], plain(x_TBD)[0])


def decoding_context(rows, cache):
    """Sentences 0 and 1 with two beams each."""
    torch.manual_seed(1)
    return SentenceContext(torch.randn(2, D)[torch.tensor(rows)], cache)


def test_step_by_step_equals_all_at_once_and_beams_share_their_matrices():
    layer, x_TRD = build(), torch.randn(5, 4, D)
    whole = layer(x_TRD, context=decoding_context([0, 0, 1, 1], None))[0]
    cache: dict = {}
    for step in range(5):
        y, plan = layer(x_TRD[step : step + 1], context=decoding_context([0, 0, 1, 1], cache))
        torch.testing.assert_close(y[0], whole[step])
        merging = merge_flops(layer.config) * 4 if step == 0 else 0
        cost = float(plan.count_E.sum() * plan.row_cost) * layer.config.flops_per_row
        assert cost == pytest.approx(4 * layer.config.flops_per_row + merging)
    assert cache["w1"].shape == (2, D, F)


def test_reordering_follows_beams_and_forgets_finished_sentences():
    layer, x_RD = build(), torch.randn(4, D)
    cache: dict = {}
    layer(x_RD.unsqueeze(0), context=decoding_context([0, 0, 1, 1], cache))
    reorder_cache(cache, torch.tensor([3, 2, 2]))  # sentence 0 is finished; three rows of sentence 1
    assert cache["w1"].size(0) == 1
    y = layer(x_RD[:3].unsqueeze(0), context=decoding_context([1, 1, 1], cache))[0]
    torch.testing.assert_close(y, layer(x_RD[:3].unsqueeze(0), context=decoding_context([1, 1, 1], None))[0])


def test_a_later_token_changes_nothing_before_it():
    layer, x_TBD = build(), torch.randn(5, 2, D)
    context = decoding_context([0, 1], None)
    before = layer(x_TBD, context=context)[0]
    x_TBD[4] += 1.0
    assert torch.equal(layer(x_TBD, context=context)[0][:4], before[:4])


def test_balance_loss_counts_importance_and_load_of_both_gates():
    layer, x_TBD = build(num_experts=4, top_k=2), torch.randn(3, 5, D)
    _, plan = layer(x_TBD)
    want = 0.0
    for gate in (layer.gate1, layer.gate2):
        gates = [gates_slow(gate, x_TBD[:, b].mean(dim=0), 2) for b in range(5)]
        for amount in (
            [sum(g.get(e, 0.0) for g in gates) for e in range(4)],
            [sum(e in g for g in gates) for e in range(4)],
        ):
            mean = sum(amount) / 4
            want += sum((a - mean) ** 2 for a in amount) / 3 / mean**2
    assert plan.balance_loss.item() == pytest.approx(want, rel=1e-5)
    plan.balance_loss.backward()
    assert layer.gate2.weight.grad.any()


def test_balance_loss_over_ranks_is_that_of_the_whole_batch():
    amount_QE = torch.rand(2, 6, 4, requires_grad=True)  # per sentence; ranks have sentences 0-2 and 3-5
    whole = SpreadTerms(amount_QE.sum(dim=1))
    (want,) = torch.autograd.grad(whole.loss(), amount_QE)
    ranks = [SpreadTerms(part.sum(dim=1)) for part in amount_QE.split(3, dim=1)]
    summed = ranks[0].counts() + ranks[1].counts()
    losses = [rank.with_counts(summed).loss() for rank in ranks]
    torch.testing.assert_close(losses, [whole.loss()] * 2)
    torch.testing.assert_close(torch.autograd.grad(sum(losses), amount_QE)[0], want)


def test_noise_and_smooth_load_in_training_only():
    layer, x_TBD = build(num_experts=4, top_k=2), torch.randn(3, 200, D)
    assert torch.equal(layer(x_TBD)[0], layer(x_TBD)[0])
    layer.train()
    assert not torch.equal(layer(x_TBD)[0], layer(x_TBD)[0])
    choice = layer.gate1(x_TBD.mean(dim=0))
    assert ((choice.load_BE > 0) & (choice.load_BE < 1)).any()
    # the smooth load estimates how often an expert is chosen
    torch.testing.assert_close(choice.load_BE.sum(dim=0), (choice.weight_BE > 0).float().sum(dim=0), rtol=0.1, atol=5)


def test_every_choice_counts_though_its_gate_rounds_to_nothing():
    layer = build(top_k=2)
    with torch.no_grad():
        layer.gate1.weight.copy_(torch.arange(5.0).unsqueeze(1) * 1000)
    _, plan = layer(torch.ones(1, D))
    assert plan.expert_index_A.tolist() == [3, 4]  # a weight of exp(-6000) is 0 in float32


def test_ties_go_to_the_lower_expert():
    layer = build(top_k=2)
    torch.nn.init.zeros_(layer.gate1.weight)
    assert layer.gate1(torch.randn(1, D)).expert_BK.tolist() == [[0, 1]]


class LargestTensor(TorchDispatchMode):
    """The size of the largest tensor that any operation returned."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def test_an_update_never_holds_more_merged_matrices_than_a_chunk(monkeypatch):
    layer, x_TBD = build(num_experts=4).train(), torch.randn(2, 64, D, requires_grad=True)
    monkeypatch.setattr(gemm, "CHUNK_NUMBERS", 4 * D * F)
    with LargestTensor() as largest:
        layer(x_TBD)[0].sum().backward()
    assert largest.numbers <= max(4 * D * F, 2 * 64 * F)  # a chunk, or the hidden units; all would be 64 * D * F


@pytest.mark.parametrize("top_k", [2, 3])
def test_merge_of_matrices_and_biases(top_k):
    bank, gate_BK = torch.randn(5, 3, 2), torch.rand(4, top_k)
    expert_BK = torch.stack([torch.randperm(5)[:top_k] for _ in range(4)])
    want = torch.stack(
        [sum(g * bank[e] for g, e in zip(*row, strict=True)) for row in zip(gate_BK, expert_BK, strict=True)]
    )
    torch.testing.assert_close(merge(bank, gate_BK, expert_BK), want)


def test_autocast_keeps_gates_in_float32():
    layer, x_TBD = build(), torch.randn(4, 2, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, plan = layer(x_TBD)
    assert plan.weight_A.dtype == torch.float32
    torch.testing.assert_close(plan.weight_A, layer(x_TBD)[1].weight_A)
    torch.testing.assert_close(y, layer(x_TBD)[0], rtol=0.05, atol=0.05)  # three roundings to bfloat16


def test_flops_are_those_of_bert_base_with_128_tokens():
    d, f, s = 768, 3072, 128
    config = MoEConfig(embed_dim=d, num_experts=16, expert_dim=f, merge_experts=True, top_k=4)
    attention = 8 * s * d * d + 4 * s * s * d
    head = 2 * s * d * d + 2 * s * d * 30522

    def whole(feed_forward):
        return round((12 * (attention + feed_forward) + head) / 1e9, 2)

    gates = merged_layer_flops(config, 0, 1) - merge_flops(config)
    assert whole(4 * s * d * f) == 28.50  # dense
    assert whole(4 * 4 * s * d * f) == 71.99  # four experts by themselves
    assert whole(merged_layer_flops(config, s, 1) - gates) == 28.90


def test_defaults_suit_merging_and_copies_work():
    layer = build()
    assert (layer.config.router, layer.config.capacity_factor) == ("top_k", None)
    twin, x_TBD = copy.deepcopy(layer), torch.randn(2, 2, D)
    assert torch.equal(twin(x_TBD)[0], layer(x_TBD)[0])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top_k": None}, ("moe_merge_experts", "moe_top_k")),
        ({"capacity_factor": 2.0}, ("moe_merge_experts", "moe_capacity_factor", "none")),
        ({"eval_capacity_factor": 1.0}, ("moe_merge_experts", "moe_eval_capacity_factor", "none")),
        ({"router": "hash"}, ("moe_merge_experts", "moe_router hash", "moe_router top_k")),
        ({"top_k": 6}, ("moe_top_k (6)", "moe_num_experts (5)")),
        ({"shared_expert_dim": 4}, ("moe_merge_experts", "moe_shared_expert_dim (4)")),
        ({"compute": "loop"}, ("moe_merge_experts", "moe_compute (loop)")),
    ],
)
def test_settings_that_merging_cannot_serve(settings, words):
    with pytest.raises(ValueError, match="moe_") as error:
        build(**{"top_k": 2, **settings})
    assert all(word in str(error.value) for word in words), str(error.value)


def test_inputs_that_do_not_fit():
    layer = build()
    with pytest.raises(ValueError, match=r"\(T, B, D\)"):
        layer(torch.randn(2, 2, 2, D))
    with pytest.raises(ValueError, match="one vector per sentence"):
        layer(torch.randn(2, 3, D), context=SentenceContext(torch.randn(2, D)))


@pytest.mark.parametrize("shape", [(0, D), (0, 3, D), (4, 0, D)])
def test_a_batch_without_tokens_gives_an_empty_output_and_no_nan(shape):
    layer = build().train()
    x = torch.zeros(shape, requires_grad=True)
    y, plan = layer(x)
    assert y.shape == x.shape
    assert plan.token_index_A.numel() == 0
    assert torch.isfinite(plan.balance_loss)
    y.sum().backward()

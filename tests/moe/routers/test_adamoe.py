"""AdaMoE: the invariants of its paper (arXiv 2406.13233)."""

from __future__ import annotations

import pytest
import torch

from tests import reference
from tests.moe.helpers import EXPERTS, assert_near, slow_forward, tiny_layer, tokens
from xmoe_fairseq.moe import MoELayer
from xmoe_fairseq.moe.balance import balance_loss, null_averaged_terms


def true_experts_T(layer: MoELayer, count: int = 200) -> torch.Tensor:
    return layer.eval()(tokens(count))[1].experts_per_token_T


def test_without_nulls_it_is_top_k_with_normalised_weights() -> None:
    adamoe = tiny_layer("adamoe", num_null_experts=0, top_k=2)
    top_k = tiny_layer("top_k", top_k=2, normalize_weights=True)
    x = tokens(40)
    (y, plan), (expected_y, expected) = adamoe(x), top_k(x)
    assert torch.equal(y, expected_y)
    for name in ("token_index_A", "expert_index_A", "weight_A", "count_E", "wanted_E"):
        assert torch.equal(getattr(plan, name), getattr(expected, name))


@pytest.mark.parametrize(("nulls", "k"), [(1, 2), (3, 2), (3, 5), (8, 3), (2, 8)])
def test_number_of_true_experts_is_bounded(nulls: int, k: int) -> None:
    taken_T = true_experts_T(tiny_layer("adamoe", num_null_experts=nulls, top_k=k))
    assert int(taken_T.min()) >= max(0, k - nulls)
    assert int(taken_T.max()) <= min(k, EXPERTS)
    assert len(set(taken_T.tolist())) > 1 or min(k, EXPERTS) == max(0, k - nulls)


def test_weights_sum_to_1_or_the_output_is_exactly_0() -> None:
    layer = tiny_layer("adamoe", num_null_experts=8, top_k=2, capacity_factor=None)
    y, plan = layer(tokens(200))
    total_T = torch.zeros(200).index_add(0, plan.token_index_A, plan.weight_A.detach())
    nothing_T = plan.experts_per_token_T == 0
    assert nothing_T.any()
    assert torch.equal(y[nothing_T], torch.zeros_like(y[nothing_T]))
    assert_near(total_T, (~nothing_T).float(), 1e-6)
    chosen_logits = tokens(200) @ layer.router.weight.t()
    # softmax over all gates, renormalised, is the softmax over the chosen true logits
    kept = torch.zeros(200, EXPERTS, dtype=torch.bool)
    kept[plan.token_index_A, plan.expert_index_A] = True
    share = chosen_logits[:, :EXPERTS].masked_fill(~kept, -torch.inf).softmax(-1)
    assert_near(plan.weight_A, share[plan.token_index_A, plan.expert_index_A])


def test_null_rows_get_no_gradient_from_the_task() -> None:
    layer = tiny_layer("adamoe", capacity_factor=None)
    y, plan = layer(tokens(60))
    gradient = torch.autograd.grad(y.square().sum(), layer.router.weight, retain_graph=True)[0]
    assert gradient[:EXPERTS].abs().max() > 0.01
    assert gradient[EXPERTS:].abs().max() < 1e-5 * gradient.abs().max()
    gradient = torch.autograd.grad(plan.balance_loss, layer.router.weight)[0]
    assert gradient[EXPERTS:].abs().max() > 1e-3


def terms(prob_TG: torch.Tensor, chosen: list[list[int]], num_true: int) -> torch.Tensor:
    got = balance_loss(null_averaged_terms(prob_TG, torch.tensor(chosen), num_true, None))
    assert_near(got, reference.null_balance_loss(chosen, prob_TG.double(), num_true, list(range(len(chosen)))), 1e-6)
    return got


def test_which_null_was_chosen_does_not_change_the_loss_but_true_experts_do() -> None:
    prob_TG = torch.tensor([[4, 2, 0, 1, 1], [1, 1, 2, 3, 1], [0, 2, 4, 0, 2]]) / 8
    loss = terms(prob_TG, [[0, 3], [3, 2], [2, 4]], 3)
    assert torch.equal(terms(prob_TG, [[0, 4], [3, 2], [2, 3]], 3), loss)
    assert torch.equal(terms(prob_TG, [[0, 3], [3, 2], [2, 3]], 3), loss)
    assert terms(prob_TG, [[2, 3], [3, 2], [2, 4]], 3) > loss
    # one null: nothing to average
    single = terms(prob_TG, [[0, 4], [3, 2], [2, 4]], 4)
    load = torch.tensor([1, 0, 2, 1, 2]) / 3
    assert_near(single, 5 * (load * prob_TG.mean(0)).sum(), 1e-6)


def test_skewed_nulls_are_averaged() -> None:
    # all tokens take null expert 3 and none null expert 4; probabilities are skewed alike, so averaging lowers the loss
    prob_TG = torch.tensor([[2, 1, 1, 4, 0]] * 4) / 8
    got = terms(prob_TG, [[3, 0], [3, 0], [3, 1], [3, 2]], 3)
    plain = 5 * (torch.tensor([0.5, 0.25, 0.25, 1, 0]) * prob_TG[0]).sum()
    assert got < plain
    assert_near(got, 5 * (torch.tensor([0.5, 0.25, 0.25, 0.5, 0.5]) * prob_TG[0]).sum(), 1e-6)


def test_even_probabilities_give_a_loss_of_k() -> None:
    layer = tiny_layer("adamoe", num_null_experts=3, top_k=4)
    torch.nn.init.zeros_(layer.router.weight)
    assert_near(layer(tokens(10))[1].balance_loss, torch.tensor(4.0), 1e-6)


def test_a_null_that_takes_all_the_mass_leaves_finite_gradients() -> None:
    layer = tiny_layer("adamoe", num_null_experts=1, top_k=2, capacity_factor=None)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[:, 0] = torch.linspace(-95, -90, EXPERTS + 1)
        layer.router.weight[EXPERTS:, 0] = 0
    x = torch.zeros(5, layer.config.embed_dim)
    x[:, 0] = torch.linspace(0.9, 1.15, 5)
    y, _ = layer(x)
    y.square().sum().backward()
    assert torch.isfinite(layer.router.weight.grad).all()


def test_capacity_orders_by_true_choices() -> None:
    layer = tiny_layer("adamoe", num_null_experts=3, top_k=3, capacity_factor=0.5, min_capacity=1)
    x = tokens(50)
    _, plan = layer(x)
    slow = slow_forward(layer, x)
    assert plan.wanted_E.tolist() == slow.wanted
    assert list(zip(plan.expert_index_A.tolist(), plan.token_index_A.tolist(), strict=True)) == slow.pairs
    assert int(plan.count_E.max()) == plan.capacity


def test_a_null_first_choice_does_not_send_a_token_behind_second_choices() -> None:
    """Worked by hand: room for one row an expert, two true experts (0, 1) and a null one (2), two choices."""
    layer = tiny_layer(
        "adamoe", num_experts=2, num_null_experts=1, top_k=2, capacity_factor=0.01, min_capacity=1, embed_dim=3
    ).train()
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(3))
    # token 0: null, then expert 0 (its first true choice); token 1: expert 1, then expert 0 (its second)
    _, plan = layer(torch.tensor([[1.0, 0.0, 2.0], [2.0, 3.0, 0.0]]))
    assert plan.wanted_E.tolist() == [2, 1]
    assert list(zip(plan.expert_index_A.tolist(), plan.token_index_A.tolist(), strict=True)) == [(0, 0), (1, 1)]

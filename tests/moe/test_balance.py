"""Balance losses and the z-loss."""

from __future__ import annotations

import pytest
import torch

from tests import reference
from tests.moe.helpers import EXPERTS, assert_near, tiny_layer, tokens
from xmoe_fairseq.moe.balance import BalanceTerms, balance_loss, first_choice_terms, null_averaged_terms


def test_eq_7_by_hand() -> None:
    prob_TE = torch.tensor([[4, 2, 2], [1, 6, 1], [5, 2, 1], [8, 0, 0]]) / 8
    # the first three tokens are real: first choices 0, 1, 0; mean probabilities 10/24, 10/24, 4/24
    terms = first_choice_terms(prob_TE, torch.tensor([0, 1, 0, 0]), torch.tensor([1, 1, 1, 0]).bool())
    assert balance_loss(terms).item() == pytest.approx(3 * (2 / 3 * 10 / 24 + 1 / 3 * 10 / 24))


def test_even_load_is_1_and_all_on_one_expert_is_the_number_of_experts() -> None:
    prob_TE = torch.full((8, 4), 0.25)
    assert balance_loss(first_choice_terms(prob_TE, torch.arange(8) % 4, None)).item() == 1
    one = torch.zeros(8, 4)
    one[:, 2] = 1
    assert balance_loss(first_choice_terms(one, torch.full((8,), 2), None)).item() == 4


def test_terms_of_two_batches_add_up() -> None:
    prob_TE = torch.rand(20, 5).softmax(-1)
    first_T = prob_TE.argmax(1)
    whole = first_choice_terms(prob_TE, first_T, None)
    parts = [first_choice_terms(prob_TE[half], first_T[half], None) for half in (slice(0, 7), slice(7, 20))]
    summed = BalanceTerms(*(getattr(parts[0], name) + getattr(parts[1], name) for name in vars(whole)))
    assert_near(balance_loss(summed), balance_loss(whole), 1e-6)


@pytest.mark.parametrize("case", ["threshold", "adamoe"])
def test_capacity_does_not_change_the_balance_loss(case: str) -> None:
    x = tokens(50)
    tight, free = (tiny_layer(case, capacity_factor=gamma, min_capacity=1) for gamma in (0.1, None))
    assert torch.equal(tight(x)[1].balance_loss, free(x)[1].balance_loss)


def test_no_tokens_no_loss() -> None:
    none = torch.zeros(0, 4)
    assert balance_loss(first_choice_terms(none, torch.zeros(0, dtype=torch.int64), None)).item() == 0
    assert balance_loss(null_averaged_terms(none, none[:, :2].long(), 3, torch.zeros(0, dtype=torch.bool))).item() == 0


@pytest.mark.parametrize("case", ["threshold", "top_k", "adamoe"])
def test_z_loss_equals_the_slow_one_with_gradient(case: str) -> None:
    layer = tiny_layer(case, z_loss_weight=0.25)
    x = tokens(12).requires_grad_()
    padding = torch.arange(12) % 5 == 0
    leaves = [x, layer.router.weight]
    got = layer(x, padding)[1].z_loss
    logits = x.double() @ layer.router.weight.double().t()
    want = 0.25 * reference.z_loss(logits, [token for token in range(12) if not padding[token]])
    assert_near(got, want)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        assert_near(a, b)
    assert tiny_layer(case)(x)[1].z_loss is None


def test_its_gradient_evens_the_load() -> None:
    layer = tiny_layer("switch", capacity_factor=None)
    with torch.no_grad():
        layer.router.weight[0] += 0.5
    x = tokens(500) + 0.3
    optimizer = torch.optim.Adam([layer.router.weight], lr=0.02)
    before = layer(x)[1]
    for _ in range(60):
        optimizer.zero_grad()
        layer(x)[1].balance_loss.backward()
        optimizer.step()
    after = layer(x)[1]
    assert before.count_E.float().std() > 3 * after.count_E.float().std()
    assert after.balance_loss < 1.01 < 1.05 < before.balance_loss
    assert int(after.count_E.min()) > 500 / EXPERTS / 2

"""The criterion: how the balance loss is scaled, switched off and logged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import metrics
from torch import Tensor

from tests.models.tiny import TASK, sample, sentences, tiny_model
from xmoe_fairseq.criterions.load_balance import (
    LabelSmoothedLoadBalanceCriterion,
    LoadBalanceCriterion,
    _global_balance,
    layer_label,
)
from xmoe_fairseq.moe.balance import balance_loss, first_choice_terms
from xmoe_fairseq.moe.registry import ROUTERS
from xmoe_fairseq.moe.routers.top_k import TopKRouter

SIDES = ("moe_encoder_1", "moe_decoder_1")
FIGURES = ("wanted", "used", "dropped", "load_cv", "entropy", "balance", "flops")


def criterion(weight: float = 0.5, sentence_avg: bool = False, smoothing: float = 0.1) -> Any:
    return LabelSmoothedLoadBalanceCriterion(TASK, weight, sentence_avg=sentence_avg, label_smoothing=smoothing)


def batch(lengths: list[int], seed: int = 0) -> dict[str, Any]:
    return sample(sentences(lengths, seed), sentences([length + 1 for length in lengths], seed + 100))


def doubled(half: dict[str, Any]) -> dict[str, Any]:
    whole = {name: torch.cat([value, value]) for name, value in half["net_input"].items()}
    return {
        "net_input": whole,
        "target": torch.cat([half["target"], half["target"]]),
        "ntokens": 2 * half["ntokens"],
        "nsentences": 2 * half["nsentences"],
    }


def update(model: Any, samples: list[dict[str, Any]], made: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one update as fairseq makes it: sums over micro-batches, divided by the sample size."""
    model.zero_grad()
    total, size = torch.zeros(()), 0
    for part in samples:
        loss, sample_size, _ = made(model, part)
        loss.backward()
        total, size = total + loss.detach(), size + sample_size
    return total / size, {name: p.grad / size for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("sentence_avg", [False, True])
@pytest.mark.parametrize("router", [{}, {"moe_router": "adamoe", "moe_top_k": 2, "moe_null_experts": 2}])
def test_two_equal_half_batches_equal_one_full_batch(sentence_avg: bool, router: dict[str, Any]) -> None:
    model, half = tiny_model(moe_z_loss_weight=0.1, **router), batch([5, 3, 7])
    made = criterion(weight=2.0, sentence_avg=sentence_avg)
    halves_loss, halves = update(model, [half, half], made)
    full_loss, full = update(model, [doubled(half)], made)
    torch.testing.assert_close(halves_loss, full_loss)
    assert halves.keys() == full.keys()
    for name in full:
        torch.testing.assert_close(halves[name], full[name], rtol=1e-4, atol=1e-6)  # sums run in another order


def test_unequal_micro_batches_are_weighted_by_their_sample_size() -> None:
    model, made, plain = tiny_model(), criterion(weight=2.0), criterion(weight=0.0)
    parts = [batch([9, 8], seed=1), batch([2], seed=2)]
    loss, _ = update(model, parts, made)
    without, _ = update(model, parts, plain)
    balances, sizes = [], []
    for part in parts:
        _, extra = model(**part["net_input"])
        balances.append(sum(plan.balance_loss.detach() for plans in extra["moe_plans"].values() for plan in plans))
        sizes.append(part["ntokens"])
    mean = sum(balance * size for balance, size in zip(balances, sizes, strict=True)) / sum(sizes)
    torch.testing.assert_close(loss - without, 2.0 * mean)


def test_batch_size_does_not_change_the_balance_part() -> None:
    model, half = tiny_model(), batch([5, 3, 7])
    parts = []
    for given in (half, doubled(half), doubled(doubled(half))):
        with_balance, without = (update(model, [given], criterion(weight=w))[0] for w in (1.0, 0.0))
        parts.append(with_balance - without)
    torch.testing.assert_close(parts[1], parts[0])
    torch.testing.assert_close(parts[2], parts[0])


def test_weight_0_is_the_stock_criterion_and_the_router_still_learns_from_the_task() -> None:
    from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion

    model, given = tiny_model(), batch([5, 3])
    stock = LabelSmoothedCrossEntropyCriterion(TASK, sentence_avg=False, label_smoothing=0.1)
    want_loss, want = update(model, [given], stock)
    loss, grads = update(model, [given], criterion(weight=0.0))
    assert torch.equal(loss, want_loss)
    assert all(torch.equal(grads[name], want[name]) for name in want)
    assert grads["encoder.layers.1.moe.router.weight"].abs().max() > 0
    _, balanced = update(model, [given], criterion(weight=1.0))
    assert not torch.equal(balanced["encoder.layers.1.moe.router.weight"], want["encoder.layers.1.moe.router.weight"])


def test_the_logged_loss_is_the_cross_entropy_alone() -> None:
    model, given = tiny_model(), batch([5, 3])
    logs = [criterion(weight=weight)(model, given)[2] for weight in (0.0, 3.0)]
    assert float(logs[0]["loss"]) == float(logs[1]["loss"])
    assert float(logs[0]["nll_loss"]) == float(logs[1]["nll_loss"])


def reduced(outputs: list[dict[str, Any]]) -> dict[str, float]:
    with metrics.aggregate(new_root=True) as found:
        LabelSmoothedLoadBalanceCriterion.reduce_metrics(outputs)
        return dict(found.get_smoothed_values())


def test_figures_are_logged_per_layer_and_overall() -> None:
    model, given = tiny_model(moe_capacity_factor=0.5), batch([12, 9, 14])
    shown = reduced([criterion()(model, given)[2]])
    for label in ("moe", *SIDES):
        for figure in FIGURES:
            assert f"{label}_{figure}" in shown
    assert shown["moe_dropped"] > 0
    assert shown["moe_used"] < shown["moe_wanted"]
    tokens = {
        side: (given["net_input"][name] != 1).sum()
        for side, name in zip(SIDES, ("src_tokens", "prev_output_tokens"), strict=True)
    }
    mean = sum(tokens[side] * shown[f"{side}_wanted"] for side in SIDES) / sum(tokens.values())
    assert shown["moe_wanted"] == pytest.approx(float(mean), abs=2e-3)  # shown with three digits


def test_logging_outputs_of_two_ranks_add_up() -> None:
    model, made = tiny_model(), criterion()
    outputs = [made(model, part)[2] for part in (batch([5, 9], seed=1), batch([4], seed=2))]
    assert outputs[0].keys() == outputs[1].keys()
    assert made.logging_outputs_can_be_summed()
    summed = {key: outputs[0][key] + outputs[1][key] for key in outputs[0]}  # as fairseq's fast reduction does
    assert reduced([summed]) == pytest.approx(reduced(outputs), rel=1e-4)


def test_a_dropped_layer_logs_zeros_so_that_every_rank_has_every_key() -> None:
    model, given = tiny_model(encoder_layerdrop=0.999), batch([5, 3])
    _, _, dropped = criterion()(model, given)
    _, _, whole = criterion()(tiny_model(), given)
    assert dropped.keys() == whole.keys()
    assert float(dropped["moe_encoder_1/tokens"]) == 0
    assert reduced([dropped])["moe_encoder_1_used"] == 0


def test_validation_logs_the_same_keys_without_gradient() -> None:
    model, given = tiny_model().eval(), batch([5, 3])
    with torch.no_grad():
        loss, _, logged = criterion()(model, given)
    assert not loss.requires_grad
    assert all(not value.requires_grad for value in logged.values() if torch.is_tensor(value))
    assert {f"{side}/tokens" for side in SIDES} <= logged.keys()


def test_two_ranks_together_have_the_loss_and_gradient_of_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(30, 5, requires_grad=True)
    halves = (slice(0, 11), slice(11, 30))

    def terms_of(rows: slice) -> Any:
        prob_TE = logits[rows].softmax(-1)
        return first_choice_terms(prob_TE, (-prob_TE).argsort(dim=1).argsort(dim=1).int(), None)

    want = torch.autograd.grad(balance_loss(terms_of(slice(0, 30))) * 30, logits)[0] / 30
    got = torch.zeros_like(logits)
    value = 0.0
    for mine, other in (halves, halves[::-1]):
        theirs = terms_of(other)
        vector = torch.cat([theirs.counts(), torch.zeros(5), torch.tensor([float(other.stop - other.start)])])
        monkeypatch.setattr(distributed_utils, "get_data_parallel_group", lambda: None)
        monkeypatch.setattr(distributed_utils, "all_reduce", lambda summed, group, v=vector: summed.add_(v))
        loss = _global_balance([[terms_of(mine)]], [5], mine.stop - mine.start, is_dummy=False)
        value += float(loss.detach()) / 30
        got += torch.autograd.grad(loss.sum(), logits)[0] / 30  # fairseq adds the ranks, divides by the sample size
    torch.testing.assert_close(got, want)
    assert value == pytest.approx(float(balance_loss(terms_of(slice(0, 30)))))


def test_a_router_with_further_gates_is_balanced_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    class ThreeMoreGates(TopKRouter):
        @classmethod
        def num_gates(cls, config: Any) -> int:
            return int(config.num_experts) + 3

        def choose(self, prob_TG: Tensor, real_T: Any, token_ids_T: Any) -> Any:
            own = super().choose(prob_TG[:, :-3], real_T, token_ids_T)
            return own._replace(balance=first_choice_terms(prob_TG, own.expert_TK[:, 0], real_T))

    monkeypatch.setitem(ROUTERS, "three_more", ThreeMoreGates)
    model, given = tiny_model(moe_router="three_more", moe_top_k=1), batch([5, 3, 7])
    alone = criterion()(model, given)[0]
    monkeypatch.setattr(distributed_utils, "get_data_parallel_world_size", lambda: 2)
    monkeypatch.setattr(distributed_utils, "get_data_parallel_group", lambda: None)
    monkeypatch.setattr(distributed_utils, "all_reduce", lambda summed, group: None)  # the other rank has nothing
    torch.testing.assert_close(criterion()(model, given)[0], alone)


@pytest.mark.parametrize("weight", [-0.01, float("nan"), float("inf")])
def test_a_weight_that_is_no_weight_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match=r"balance_loss_weight \(.*\) must not be negative; .* 0 turns it off"):
        criterion(weight=weight)


def test_a_layer_that_runs_twice_is_refused_on_several_ranks() -> None:
    terms = first_choice_terms(torch.rand(3, 5), torch.zeros(3, dtype=torch.int64), None)
    with pytest.raises(ValueError, match="a MoE layer ran 2 times in one forward pass"):
        _global_balance([[terms, terms]], [5], 3, is_dummy=False)


def test_dense_models_pass_with_nothing_logged() -> None:
    model, given = tiny_model(moe_interval=3), batch([5])
    _, _, logged = criterion()(model, given)
    assert not [key for key in logged if key.startswith("moe")]
    assert "loss" in reduced([logged])


def test_plain_cross_entropy_has_the_same_balance_part() -> None:
    model, given = tiny_model(), batch([5, 3])
    parts = []
    for make in (lambda w: LoadBalanceCriterion(TASK, False, w), lambda w: criterion(weight=w, smoothing=0.0)):
        parts.append(update(model, [given], make(1.5))[0] - update(model, [given], make(0.0))[0])
    torch.testing.assert_close(parts[0], parts[1])


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("encoder.layers.1.moe", "moe_encoder_1"),
        ("decoder.layers.11.moe", "moe_decoder_11"),
        ("module.decoder.layers.3.moe", "moe_decoder_3"),
        ("my.block", "moe_my_block"),
    ],
)
def test_labels(name: str, label: str) -> None:
    assert layer_label(name) == label

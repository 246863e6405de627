"""The encoder-decoder: places of MoE layers, and fairseq's features with them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.tiny import EOS, PAD, TASK, sample, sentences, tiny_model
from xmoe_fairseq.criterions.load_balance import LabelSmoothedLoadBalanceCriterion
from xmoe_fairseq.moe import MoELayer
from xmoe_fairseq.moe_args import moe_settings

ROUTERS: dict[str, dict[str, Any]] = {
    "threshold": {},
    "top_k": {"moe_top_k": 2},
    "switch": {},
    "hash": {},
    "base": {},
    "adamoe": {"moe_top_k": 2, "moe_null_experts": 2},
}
every_router = pytest.mark.parametrize("router", ROUTERS)


def model_with(router: str, **settings: Any) -> Any:
    return tiny_model(moe_router=router, **{**ROUTERS[router], **settings})


def logits(model: Any, given: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**given["net_input"])[0]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["encoder.layers.1", "decoder.layers.1"]),
        ({"moe_interval": 1, "moe_sides": "encoder"}, ["encoder.layers.0", "encoder.layers.1"]),
        ({"moe_sides": "decoder", "decoder_layers": 4}, ["decoder.layers.1", "decoder.layers.3"]),
        ({"moe_interval": 3}, []),
    ],
)
def test_moe_layers_stand_where_the_settings_say(settings: dict[str, Any], expected: list[str]) -> None:
    model = tiny_model(**settings)
    assert [
        name.removesuffix(".moe") for name, module in model.named_modules() if isinstance(module, MoELayer)
    ] == expected
    for name in expected:
        assert not [key for key in model.state_dict() if key.startswith((f"{name}.fc1", f"{name}.fc2"))]


def test_a_list_of_thresholds_goes_to_the_layers_in_their_order() -> None:
    settings: dict[str, Any] = {"moe_interval": 1, "encoder_layers": 3}
    model = tiny_model(moe_threshold=moe_settings()["moe_threshold"].parse("0.1,0.2,0.3,0.4,0.5"), **settings)
    found = [module.config.threshold for module in model.modules() if isinstance(module, MoELayer)]
    assert found == [0.1, 0.2, 0.3, 0.4, 0.5]
    given = sample(sentences([5, 3]), sentences([4, 6], seed=1))
    one = tiny_model(moe_threshold=0.4, **settings)
    same = tiny_model(moe_threshold=[0.4] * 5, **settings)
    torch.testing.assert_close(logits(same, given), logits(one, given), rtol=0, atol=0)


def test_state_names_of_a_layer() -> None:
    state = tiny_model().state_dict()
    found = {key.removeprefix("encoder.layers.1.moe.") for key in state if key.startswith("encoder.layers.1.moe.")}
    assert found == {"router.weight", "experts.w1", "experts.b1", "experts.w2", "experts.b2"}
    assert tuple(state["decoder.layers.1.moe.experts.w1"].shape) == (4, 16, 16)


@every_router
def test_changing_a_later_target_token_never_changes_an_earlier_output(router: str) -> None:
    model = model_with(router).eval()
    given = sample(sentences([5, 8]), sentences([7, 7], seed=3))
    before = logits(model, given)
    for position in range(1, 8):
        changed = copy.deepcopy(given)
        changed["net_input"]["prev_output_tokens"][:, position] = 39
        after = logits(model, changed)
        # bit-equal but for GEMMs whose shape follows the loads of experts
        torch.testing.assert_close(after[:, :position], before[:, :position], rtol=0, atol=2e-6)
        assert not torch.equal(after[:, position], before[:, position])


@every_router
def test_a_sentence_alone_equals_the_same_sentence_in_a_padded_batch(router: str) -> None:
    model = model_with(router).eval()
    sources, targets = sentences([3, 12, 6]), sentences([4, 2, 9], seed=5)
    together = logits(model, sample(sources, targets))
    for row in range(3):
        alone = logits(model, sample(sources[row : row + 1], targets[row : row + 1]))
        torch.testing.assert_close(together[row, : len(targets[row])], alone[0], rtol=1e-5, atol=2e-6)


@every_router
def test_incremental_decoding_equals_teacher_forcing(router: str) -> None:
    model = model_with(router).eval()
    given = sample(sentences([5, 9]), sentences([6, 6], seed=2))
    inputs = given["net_input"]
    whole = logits(model, given)
    state: dict[str, Any] = {}
    with torch.no_grad():
        encoded = model.encoder(inputs["src_tokens"], src_lengths=inputs["src_lengths"])
        for step in range(1, 8):
            now, _ = model.decoder(inputs["prev_output_tokens"][:, :step], encoder_out=encoded, incremental_state=state)
            torch.testing.assert_close(now[:, -1], whole[:, step - 1], rtol=1e-5, atol=2e-6)


@every_router
def test_checkpointed_activations_give_the_same_loss_and_gradients(router: str) -> None:
    given = sample(sentences([5, 9]), sentences([6, 3], seed=2))
    made = LabelSmoothedLoadBalanceCriterion(TASK, 2.0, sentence_avg=False, label_smoothing=0.1)
    found = []
    for checkpointed in (False, True):
        model = model_with(router, checkpoint_activations=checkpointed, dropout=0.2, moe_capacity_factor=1.0)
        torch.manual_seed(7)
        loss, _, logged = made(model, given)
        loss.backward()
        found.append(
            (loss.detach(), {name: p.grad for name, p in model.named_parameters()}, logged["moe_encoder_1/forwards"])
        )
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-4, atol=1e-5)  # gradients add in another order
    assert float(found[1][2]) == 1


def test_two_batches_before_the_backward_of_the_first_keep_their_padding_apart() -> None:
    batches = [sample(sentences([5, 9]), sentences([6, 3])), sample(sentences([2, 4, 4]), sentences([3, 8, 1]))]
    found = []
    for checkpointed in (False, True):
        model = tiny_model(checkpoint_activations=checkpointed)
        outputs = [model(**given["net_input"])[0].square().sum() for given in batches]
        for output in outputs:
            output.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_plans_come_with_the_output_one_per_layer() -> None:
    model = tiny_model()
    given = sample(sentences([5, 9]), sentences([6, 3]))
    _, extra = model(**given["net_input"])
    plans = extra["moe_plans"]
    assert {name: len(found) for name, found in plans.items()} == {"encoder.layers.1.moe": 1, "decoder.layers.1.moe": 1}
    assert int(plans["encoder.layers.1.moe"][0].num_real_tokens) == 6 + 10
    assert int(plans["decoder.layers.1.moe"][0].num_real_tokens) == 7 + 4
    assert plans["encoder.layers.1.moe"][0].balance_loss.requires_grad


def test_a_target_that_is_all_padding_and_a_single_token() -> None:
    model = tiny_model()
    given = sample(sentences([0, 4]), sentences([0, 3]))
    given["net_input"]["prev_output_tokens"][0] = PAD
    out, extra = model(**given["net_input"])
    assert torch.isfinite(out[1]).all()
    assert int(extra["moe_plans"]["decoder.layers.1.moe"][0].num_real_tokens) == 4
    alone, _ = model.eval()(**sample([torch.tensor([EOS])], [torch.tensor([EOS])])["net_input"])
    assert torch.isfinite(alone).all()


def test_a_copy_or_a_pickle_is_a_model_of_its_own() -> None:
    model = tiny_model().eval()
    given = sample(sentences([5, 9]), sentences([6, 3]))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, given), logits(model, given))
        before = logits(model, given)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert torch.equal(logits(model, given), before)  # its feed-forward parts are not the original's
        assert not torch.equal(logits(other, given), before)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_merged_experts_are_copied_after_a_step_with_activation_checkpointing(checkpointed: bool) -> None:
    merging = {"moe_router": "top_k", "moe_top_k": 2, "moe_merge_experts": True}
    model = tiny_model(checkpoint_activations=checkpointed, **merging).train()
    given = sample(sentences([5, 9]), sentences([6, 3]))
    model(**given["net_input"])[0].square().mean().backward()
    twin = copy.deepcopy(model)  # the mean of the source, with its graph, must not have stayed behind
    assert torch.equal(logits(twin.eval(), given), logits(model.eval(), given))


def test_hash_layers_have_different_hashes() -> None:
    model = model_with("hash")
    seeds = [int(module.router.seed) for module in model.modules() if isinstance(module, MoELayer)]
    assert len(set(seeds)) == len(seeds) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"moe_treshold": 0.5}, "unknown settings moe_treshold; the moe_. settings are .*moe_threshold"),
        ({"moe_interval": 0}, r"moe_interval \(0\) must be at least 1"),
        ({"moe_sides": "middle"}, r"moe_sides \('middle'\) must be one of encoder, decoder, both"),
        ({"quant_noise_pq": 0.1}, "--quant-noise-pq .* set it to 0"),
        (
            {"offload_activations": True},
            "--offload-activations does not work with MoE layers; --checkpoint-activations does",
        ),
        ({"scale_fc": True}, "--scale-fc .* leave it out"),
        ({"moe_threshold": [0.5]}, r"moe_threshold has 1 values .* 2 MoE layers \(encoder 1, decoder 1\)"),
        ({"moe_threshold": [0.5, 2.0]}, r"moe_threshold \(2.0\) must be a probability mass in \[0, 1\]"),
        ({"moe_threshold": "half"}, r"moe_threshold \('half'\) must be a probability mass in"),
        ({"activation_fn": "tanh"}, r"activation \('tanh'\) must be one of"),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model(**settings)


def test_activation_dropout_reaches_the_experts() -> None:
    model = tiny_model(activation_dropout=0.3)
    assert {m.config.activation_dropout for m in model.modules() if isinstance(m, MoELayer)} == {0.3}
    given = sample(sentences([5]), sentences([6]))
    assert not torch.equal(logits(model, given), logits(model, given))

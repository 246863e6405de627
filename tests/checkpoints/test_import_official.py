"""The import against a slow layer of our own, and against recorded outputs of the official code where they are."""

import argparse
import os
from pathlib import Path

import pytest
import torch

from xmoe_fairseq.checkpoints.files import CheckpointError, load_checkpoint, save_checkpoint
from xmoe_fairseq.checkpoints.import_official import convert_tensors, import_official, main
from xmoe_fairseq.checkpoints.official import OfficialMoELayer
from xmoe_fairseq.checkpoints.structure import MissingExpertError, WrongSizeError
from xmoe_fairseq.moe import MoEConfig, MoELayer

CASES = Path(os.environ.get("XMOE_OFFICIAL_CASES", Path(__file__).parents[3] / "shared" / "data" / "official_cases"))
ROUTERS = {
    "threshold": lambda case: {"router": "threshold", "threshold": case["threshold"]},
    "topk": lambda case: {"router": "top_k", "top_k": case["k"]},
    "base": lambda case: {"router": "base"},
}
needs_cases = pytest.mark.skipif(
    not CASES.is_dir(), reason="no recorded outputs of the official code; set XMOE_OFFICIAL_CASES to their folder"
)


def released_names(weights, layer="encoder.layers.1"):
    """One layer's stacked tensors under the names of the official code."""
    model = {f"{layer}.gate.wg.weight": weights["wg"]}
    for theirs, key in (("fc1.weight", "fc1_w"), ("fc1.bias", "fc1_b"), ("fc2.weight", "fc2_w"), ("fc2.bias", "fc2_b")):
        for expert, tensor in enumerate(weights[key]):
            model[f"{layer}.experts.yyh_local_experts.{expert}.{theirs}"] = tensor
    return model


def layer_of(weights, config, kind=MoELayer):
    model = convert_tensors(released_names(weights), config.num_experts)
    layer = kind(config)
    layer.load_state_dict({name.removeprefix("encoder.layers.1.moe."): tensor for name, tensor in model.items()})
    return layer


def random_weights(experts=3, width=5, hidden=4):
    generator = torch.Generator().manual_seed(0)
    shapes = {"wg": (width,), "fc1_w": (hidden, width), "fc1_b": (hidden,), "fc2_w": (width, hidden), "fc2_b": (width,)}
    return {name: torch.randn(experts, *shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def released_state(tiny):
    """A checkpoint in the official layout: two encoder layers, the second with 4 experts of 12."""
    state = tiny.state("dense_transformer_tiny", activation_fn="relu")
    weights = random_weights(4, 16, 12)
    replaced = ("encoder.layers.1.fc1", "encoder.layers.1.fc2")
    model = {name: tensor for name, tensor in state["model"].items() if not name.startswith(replaced)}
    settings = vars(state["cfg"]["model"]) | {
        "arch": "transformer_moe_tiny", "moe_type": "threshold", "moe_k": 1, "num_experts": 4, "ffn_split_ratio": 2,
        "expert_interval": 2, "capacity_factor": 2, "eval_capacity_factor": 2, "threshold": 0.9, "no_decoder_moe": True,
        "moe_loss_coeff": 0.01,
    }  # fmt: skip
    criterion = {"_name": "label_smoothed_cross_entropy", "label_smoothing": 0.1, "moe_loss_coeff": 0.02}
    cfg = {**state["cfg"], "model": argparse.Namespace(**settings), "criterion": criterion}
    return {**state, "model": {**model, **released_names(weights)}, "cfg": cfg}


def test_the_layout_is_read_right():
    weights = random_weights()
    config = MoEConfig(embed_dim=5, num_experts=3, expert_dim=4, threshold=1.0, activation="relu")
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    probs = (x @ weights["wg"].t()).softmax(-1)
    expected = torch.zeros(6, 5)
    for e in range(3):
        hidden = torch.relu(x @ weights["fc1_w"][e].t() + weights["fc1_b"][e])
        expected += probs[:, e : e + 1] * (hidden @ weights["fc2_w"][e].t() + weights["fc2_b"][e])
    for kind in (MoELayer, OfficialMoELayer):
        torch.testing.assert_close(layer_of(weights, config, kind).eval()(x)[0], expected)


def test_an_imported_checkpoint_loads_in_fairseq(tiny, released_state, tmp_path):
    save_checkpoint(released_state, tmp_path / "official.pt")
    main(["--checkpoint", str(tmp_path / "official.pt"), "--out", str(tmp_path / "ours.pt")])
    ours = load_checkpoint(tmp_path / "ours.pt")
    settings = ours["cfg"]["model"]
    assert (settings.arch, settings.moe_sides, settings.moe_interval) == ("xmoe_transformer", "encoder", 2)
    assert (settings.moe_num_experts, settings.moe_expert_dim, settings.activation_fn) == (4, 12, "relu")
    assert (settings.moe_capacity_factor, settings.moe_eval_capacity_factor) == (2.0, None)
    assert ours["cfg"]["criterion"]["balance_loss_weight"] == 0.02
    assert ours["last_optimizer_state"] is None
    assert tiny.logits(tmp_path / "ours.pt").isfinite().all()


def test_as_official_drops_and_routes_padding_like_the_released_code(tiny, released_state, tmp_path):
    save_checkpoint(import_official(released_state, as_official=True), tmp_path / "as_official.pt")
    model = tiny.load(tmp_path / "as_official.pt")
    layer = model.encoder.layers[1].moe
    assert isinstance(layer, OfficialMoELayer)
    x = torch.randn(20, 1, 16, generator=torch.Generator().manual_seed(0))
    y, plan = layer(x, padding=torch.ones(20, 1, dtype=torch.bool))
    assert plan.num_real_tokens == 20
    assert plan.count_E.max() <= 10  # ceil(2 * 20 / 4)
    assert y.abs().sum() > 0


def test_what_is_not_whole_is_refused(released_state, dense_state):
    model = released_state["model"]
    name = "encoder.layers.1.experts.yyh_local_experts.2.fc2.bias"
    with pytest.raises(MissingExpertError, match=r"encoder.layers.1 fc2.bias: experts \[2\] of 4 are missing"):
        import_official({**released_state, "model": {n: t for n, t in model.items() if n != name}})
    with pytest.raises(WrongSizeError, match="4 experts of shapes"):
        import_official({**released_state, "model": {**model, name: torch.zeros(3)}})
    with pytest.raises(CheckpointError, match="not a checkpoint of the official code"):
        import_official(dense_state)
    settings = argparse.Namespace(**{**vars(released_state["cfg"]["model"]), "moe_type": "base"})
    base = {**released_state, "cfg": {**released_state["cfg"], "model": settings}}
    assert import_official(base)["cfg"]["model"].moe_router == "base"
    with pytest.raises(CheckpointError, match="--as-official repeats moe_type threshold"):
        import_official(base, as_official=True)


def recorded_layers():
    names = sorted(path.name for pattern in ("thr*", "top*") for path in CASES.glob(f"{pattern}_[et]*a*.pt"))
    return names if CASES.is_dir() else []


def case_config(case):
    return MoEConfig(
        embed_dim=case["d"], num_experts=case["N"], expert_dim=case["ff"], activation=case["activation"],
        capacity_factor=float(case["capacity_factor"]), eval_capacity_factor=float(case["eval_capacity_factor"]),
        **ROUTERS[case["moe_type"]](case),
    )  # fmt: skip


@needs_cases
@pytest.mark.parametrize("name", recorded_layers())
def test_our_layer_equals_the_recorded_released_layer(name):
    case = torch.load(CASES / name, weights_only=True)
    config = case["config"]
    layer = layer_of(case["weights"], case_config(config)).train(config["training"])
    x = case["x"].clone().requires_grad_()
    y, plan = layer(x)
    torch.testing.assert_close(y, case["y"], rtol=0, atol=1e-5)
    weights = torch.zeros(config["T"], config["N"])
    weights[plan.token_index_A, plan.expert_index_A] = plan.weight_A.detach()
    assert torch.equal(weights > 0, case["combine_weights"] > 0)
    torch.testing.assert_close(float(plan.balance_loss), float(case["l_aux"]), rtol=0, atol=1e-5)
    if config["training"]:
        loss = (y * case["grad_out"]).sum() + config["aux_coeff"] * plan.balance_loss
        loss.backward()
        torch.testing.assert_close(x.grad, case["grad_x"], rtol=1e-5, atol=1e-5)


@needs_cases
def test_base_equals_the_recorded_layer_where_that_one_served_the_token():
    # the official code drops tokens of a full expert in an arbitrary order; ours, at inference, drops none
    case = torch.load(CASES / "base_cf1_eval.pt", weights_only=True)
    config = {**case["config"]}
    layer = layer_of(case["weights"], case_config(config)).eval()
    layer.config = MoEConfig(embed_dim=config["d"], num_experts=config["N"], expert_dim=config["ff"], router="base")
    served = case["combine_weights"].sum(dim=-1) > 0
    torch.testing.assert_close(layer(case["x"])[0][served], case["y"][served], rtol=0, atol=1e-5)


@needs_cases
@pytest.mark.parametrize("batch", ["B1", "B8", "B100"])
def test_as_official_equals_the_recorded_whole_model(batch, tmp_path):
    from fairseq import checkpoint_utils

    path = tmp_path / "model.pt"
    save_checkpoint(import_official(load_checkpoint(CASES / "official_ckpt_ep64_small.pt"), as_official=True), path)
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(path)], arg_overrides={"data": str(CASES)})
    recorded = torch.load(CASES / "official_model_io.pt", weights_only=True)[batch]
    model.eval()
    with torch.no_grad():
        encoder_out = model.encoder(recorded["src_tokens"], recorded["src_lengths"])["encoder_out"][0]
        logits, extra = model(recorded["src_tokens"], recorded["src_lengths"], recorded["prev_output_tokens"])
        for name, layer in recorded["layers"].items():
            y = model.encoder.layers[int(name.removeprefix("layer"))].moe(layer["x"])[0]
            torch.testing.assert_close(y, layer["y"], rtol=0, atol=1e-5)
    torch.testing.assert_close(encoder_out, recorded["encoder_out"], rtol=0, atol=1e-5)
    # six decoder layers on, float32 sums in another order reach 2.3e-5 where logits reach 8
    torch.testing.assert_close(logits, recorded["logits"], rtol=1e-5, atol=5e-5)
    balance = sum(float(plan.balance_loss) for plans in extra["moe_plans"].values() for plan in plans)
    torch.testing.assert_close(balance, recorded["moe_loss"], rtol=1e-5, atol=1e-5)

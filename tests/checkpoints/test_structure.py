"""Tensors against settings of a checkpoint, counted parameters, descriptions."""

import pytest
import torch

from xmoe_fairseq.checkpoints import inspect
from xmoe_fairseq.checkpoints.files import save_checkpoint
from xmoe_fairseq.checkpoints.structure import (
    MissingExpertError,
    WrongSizeError,
    check_structure,
    count_parameters,
    moe_layers,
)

W1 = "encoder.layers.1.moe.experts.w1"


def test_a_sound_checkpoint_passes_and_names_its_layers(moe_state, dense_state):
    check_structure(moe_state)
    check_structure(dense_state)
    assert moe_layers(moe_state) == [("encoder", 1), ("decoder", 1)]
    assert moe_layers(dense_state) == []


def test_a_missing_expert_is_named(moe_state):
    fewer = {**moe_state["model"], W1: moe_state["model"][W1][:3]}
    with pytest.raises(MissingExpertError, match=rf"{W1} holds 3 of 4 experts"):
        check_structure({**moe_state, "model": fewer})
    without = {name: tensor for name, tensor in moe_state["model"].items() if name != W1}
    with pytest.raises(MissingExpertError, match=rf"{W1} is missing"):
        check_structure({**moe_state, "model": without})


@pytest.mark.parametrize("name", [W1, "encoder.layers.1.moe.router.weight", "decoder.layers.0.fc1.weight"])
def test_a_tensor_of_another_size_is_named(moe_state, name):
    wrong = torch.cat([moe_state["model"][name]] * 2, dim=1)
    with pytest.raises(WrongSizeError, match=rf"{name} is \(.*its own settings make it \("):
        check_structure({**moe_state, "model": {**moe_state["model"], name: wrong}})


def test_inspect_tells_what_a_checkpoint_is(moe_state, tmp_path):
    path = tmp_path / "checkpoint_last.pt"
    save_checkpoint(moe_state, path)
    facts = inspect.inspect_checkpoint(path)
    model = moe_state["model"]
    not_counted = (
        "decoder.embed_tokens.weight",
        "decoder.output_projection.weight",
        "encoder.version",
        "decoder.version",
    )
    once = sum(t.numel() for name, t in model.items() if name not in not_counted)
    assert facts["parameters"] == once
    assert facts["expert_parameters"] == 2 * 4 * (16 * 6 + 6 + 6 * 16 + 16)
    assert (facts["updates"], facts["score"], facts["optimizer_state"]) == (10, 5.0, True)
    assert facts["method"].startswith("threshold, 4 experts of 6, t 0.9, gamma 2.0")


def test_parameters_are_those_of_the_model_whether_or_not_a_file_shares_its_tied_tensors(tiny):
    state = tiny.state("xmoe_transformer_tiny", moe_num_experts=4, moe_expert_dim=6)
    loaded = tiny.task.build_model(state["cfg"]["model"])
    want = sum(parameter.numel() for parameter in loaded.parameters())
    assert count_parameters(state["model"])["total"] == want
    from_a_gpu = {name: tensor.clone() for name, tensor in state["model"].items()}
    assert count_parameters(from_a_gpu)["total"] == want
    not_tied = {**from_a_gpu, "decoder.output_projection.weight": torch.rand(24, 16)}
    assert count_parameters(not_tied)["total"] == want + 24 * 16


def test_inspect_exits_with_1_and_says_why(moe_state, tmp_path, capsys):
    path = tmp_path / "checkpoint_last.pt"
    save_checkpoint(moe_state, path)
    assert inspect.main([str(path)]) == 0
    path.write_bytes(path.read_bytes()[:-10])
    assert inspect.main([str(path)]) == 1
    assert "was cut off" in capsys.readouterr().err

"""Quantised checkpoints: near the float model, safe, recognised, loadable by fairseq, exportable, not trainable."""

import json

import pytest
import torch

from xmoe_fairseq.checkpoints import export_safetensors, import_safetensors, inspect, quantise
from xmoe_fairseq.checkpoints.files import CheckpointError, CorruptCheckpointError, load_checkpoint, save_checkpoint
from xmoe_fairseq.checkpoints.quantise import layer_errors, quantise_checkpoint
from xmoe_fairseq.checkpoints.structure import WrongSizeError, check_structure, count_parameters
from xmoe_fairseq.patches import checkpoint_files

KINDS = [("int8", "experts"), ("int8", "all"), ("bfloat16", "experts")]


@pytest.fixture(scope="module")
def float_file(moe_state, tmp_path_factory):
    path = tmp_path_factory.mktemp("float") / "float.pt"
    save_checkpoint(moe_state, path)
    return path


def quantised(source, folder, to="int8", what="experts"):
    quantise.main(["--checkpoint", str(source), "--out", str(folder / "q.pt"), "--to", to, "--what", what])
    return folder / "q.pt"


@pytest.mark.parametrize(("to", "what"), KINDS)
def test_fairseq_loads_it_and_it_computes_nearly_the_same(tiny, float_file, tmp_path, to, what):
    path = quantised(float_file, tmp_path, to, what)
    want, got = tiny.logits(float_file), tiny.logits(path)
    assert not torch.equal(got, want)
    assert (got - want).norm() / want.norm() < 0.05
    assert load_checkpoint(path)["last_optimizer_state"] is None


@pytest.mark.parametrize(("to", "what"), KINDS)
def test_a_float_checkpoint_can_be_held_quantised_by_override(tiny, float_file, tmp_path, to, what):
    """The same numbers as from the quantised file."""
    path = quantised(float_file, tmp_path, to, what)
    overrides = {"moe_weights": to, "moe_linear_weights": "int8" if what == "all" else "float"}
    assert torch.equal(tiny.logits(float_file, overrides), tiny.logits(path))


def test_dense_models_too(tiny, dense_state, tmp_path):
    save_checkpoint(dense_state, tmp_path / "dense.pt")
    path = quantised(tmp_path / "dense.pt", tmp_path, what="all")
    want, got = tiny.logits(tmp_path / "dense.pt"), tiny.logits(path)
    assert 0 < (got - want).norm() / want.norm() < 0.05
    assert inspect.inspect_checkpoint(path)["weights"] == "linear maps and embeddings int8; for inference"


def test_inspect_says_what_it_is(moe_state, float_file, tmp_path, capsys):
    path = quantised(float_file, tmp_path, what="all")
    facts = inspect.inspect_checkpoint(path)
    assert facts["weights"] == "experts int8, linear maps and embeddings int8; for inference"
    assert inspect.inspect_checkpoint(float_file)["weights"] == "float"
    floats = count_parameters(moe_state["model"])
    assert facts["parameters"] == floats["total"]  # scales are no parameters
    assert facts["expert_parameters"] == floats["experts"]
    assert "relative error" in capsys.readouterr().out


def test_tied_matrices_are_stored_once(float_file, tmp_path):
    model = load_checkpoint(quantised(float_file, tmp_path, what="all"))["model"]
    assert model["encoder.embed_tokens.q"].data_ptr() == model["decoder.output_projection.q"].data_ptr()
    assert not any(name.endswith("q_proj.weight") for name in model)


def test_through_safetensors_and_back(tiny, float_file, tmp_path):
    path = quantised(float_file, tmp_path, what="all")
    export_safetensors.main(["--checkpoint", str(path), "--out", str(tmp_path / "out")])
    import_safetensors.main(["--input", str(tmp_path / "out"), "--out", str(tmp_path / "after.pt")])
    assert torch.equal(tiny.logits(tmp_path / "after.pt"), tiny.logits(path))
    assert "experts int8" in (tmp_path / "out" / "README.md").read_text()


def test_a_changed_bit_and_a_wrong_shape_are_found(float_file, tmp_path):
    path = quantised(float_file, tmp_path)
    state = load_checkpoint(path)
    state["model"]["encoder.layers.1.moe.experts.scale1"] = torch.ones(4, 7)
    with pytest.raises(WrongSizeError, match="scale1"):
        check_structure(state)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    with pytest.raises(CorruptCheckpointError):
        load_checkpoint(path)


def test_errors_per_layer(moe_state, float_file, tmp_path, capsys):
    quantise.main(["--checkpoint", str(float_file), "--out", str(tmp_path / "q.pt"), "--json"])
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert [row["layer"] for row in layers] == ["encoder 1", "decoder 1"]
    assert all(0.001 < row["w1"] < 0.01 and 0.002 < row["output"] < 0.05 for row in layers)
    exact = layer_errors(moe_state, moe_state | {"model": moe_state["model"]})
    assert all(row["w1"] == row["w2"] == 0 for row in exact)


def test_training_on_is_refused(float_file, tmp_path, monkeypatch):
    path = quantised(float_file, tmp_path)
    monkeypatch.setattr(checkpoint_files, "_resuming", True)
    from fairseq import checkpoint_utils

    with pytest.raises(CheckpointError, match="experts int8; for inference: it cannot be trained"):
        checkpoint_utils.load_checkpoint_to_cpu(str(path))
    assert checkpoint_utils.load_checkpoint_to_cpu(str(float_file))["model"]


def test_what_cannot_be_quantised_is_refused(tiny, moe_state, dense_state):
    with pytest.raises(CheckpointError, match="quantised already"):
        quantise_checkpoint(quantise_checkpoint(moe_state))
    with pytest.raises(CheckpointError, match="--what all for a dense one"):
        quantise_checkpoint(dense_state)
    with pytest.raises(CheckpointError, match="is for experts"):
        quantise_checkpoint(moe_state, "bfloat16", "all")
    merged = tiny.state("meo_transformer_tiny", moe_num_experts=4, moe_expert_dim=6)
    with pytest.raises(CheckpointError, match="merged experts"):
        quantise_checkpoint(merged)

"""Export to safetensors and back: equal tensors, no machine paths, checksums."""

import json

import pytest
import torch
from safetensors.torch import load_file

from xmoe_fairseq.checkpoints import export_safetensors as export_command
from xmoe_fairseq.checkpoints import import_safetensors as import_command
from xmoe_fairseq.checkpoints.files import CheckpointError, CorruptCheckpointError, load_checkpoint, save_checkpoint
from xmoe_fairseq.checkpoints.safetensors_format import export_safetensors, import_safetensors
from xmoe_fairseq.checkpoints.structure import MissingExpertError


def test_round_trip_is_bit_equal_and_fairseq_loads_it(tiny, moe_state, tmp_path):
    state = {**moe_state, "model": dict(moe_state["model"])}
    save_checkpoint(state, tmp_path / "before.pt")
    export_command.main(["--checkpoint", str(tmp_path / "before.pt"), "--out", str(tmp_path / "out")])
    import_command.main(["--input", str(tmp_path / "out"), "--out", str(tmp_path / "after.pt")])
    after = load_checkpoint(tmp_path / "after.pt")
    assert after["model"].keys() == state["model"].keys()
    for name, tensor in after["model"].items():
        assert tensor.dtype == state["model"][name].dtype
        assert torch.equal(tensor, state["model"][name])
    model = after["model"]
    assert model["encoder.embed_tokens.weight"].data_ptr() == model["decoder.output_projection.weight"].data_ptr()
    assert torch.equal(tiny.logits(tmp_path / "after.pt"), tiny.logits(tmp_path / "before.pt"))


def test_half_precision_survives(moe_state, tmp_path):
    half = {name: tensor.to(torch.bfloat16) for name, tensor in moe_state["model"].items()}
    export_safetensors({**moe_state, "model": half}, tmp_path)
    assert all(torch.equal(tensor, half[name]) for name, tensor in import_safetensors(tmp_path)["model"].items())


def test_the_export_says_what_it_is_and_not_where_it_was_made(moe_state, tmp_path):
    export_safetensors(moe_state, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["cfg"]["model"]["moe_num_experts"] == 4
    assert "/home/someone" not in (tmp_path / "config.json").read_text()
    card = (tmp_path / "README.md").read_text()
    assert "threshold, 4 experts of 6" in card
    assert "xx to yy" in card
    assert "decoder.embed_tokens.weight" not in load_file(tmp_path / "model.safetensors")  # tied: stored once


def test_damage_is_told_apart(moe_state, tmp_path):
    export_safetensors(moe_state, tmp_path)
    tensors, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CorruptCheckpointError, match=r"sha256 is not that of config.json"):
        import_safetensors(tmp_path)
    tensors.write_bytes(whole)
    facts = json.loads(config.read_text())
    facts["cfg"]["model"]["moe_num_experts"] = 8
    config.write_text(json.dumps(facts))
    with pytest.raises(MissingExpertError, match="4 of 8 experts"):
        import_safetensors(tmp_path)
    config.write_text("{}")
    with pytest.raises(CheckpointError, match="is not of format"):
        import_safetensors(tmp_path)
    tensors.unlink()
    config.unlink()
    with pytest.raises(CheckpointError, match=r"config.json is missing"):
        import_safetensors(tmp_path)


def test_a_second_export_keeps_the_card_and_a_foreign_folder_stays(moe_state, tmp_path, capsys):
    save_checkpoint(moe_state, tmp_path / "model.pt")
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    (ours / "README.md").write_text("filled in")
    theirs.mkdir()
    (theirs / "config.json").write_text('{"model_type": "bert"}')
    for _ in range(2):
        assert export_command.main(["--checkpoint", str(tmp_path / "model.pt"), "--out", str(ours)]) == 0
        assert "README.md is there already and stays as it is" in capsys.readouterr().err
    assert (ours / "README.md").read_text() == "filled in"
    assert export_command.main(["--checkpoint", str(tmp_path / "model.pt"), "--out", str(theirs)]) == 1
    assert [path.name for path in theirs.iterdir()] == ["config.json"]

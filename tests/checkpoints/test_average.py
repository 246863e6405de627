"""Averaging checkpoints: exact means, the choice of checkpoints, and refusals."""

import pytest
import torch

from xmoe_fairseq.checkpoints.average import average_checkpoints, choose_best, choose_last, main
from xmoe_fairseq.checkpoints.files import CheckpointError, load_checkpoint, save_checkpoint

SETTINGS = {"moe_num_experts": 4, "moe_expert_dim": 6}


@pytest.fixture
def run(tiny, tmp_path):
    """Three checkpoints of one run, at updates 10, 20, 30 with falling losses, and fairseq's copies of the last."""
    for seed in (1, 2, 3):
        save_checkpoint(tiny.state("xmoe_transformer_tiny", seed, **SETTINGS), tmp_path / f"checkpoint{seed}.pt")
    for name in ("best", "last"):
        (tmp_path / f"checkpoint_{name}.pt").write_bytes((tmp_path / "checkpoint3.pt").read_bytes())
    return tmp_path


def test_every_tensor_is_the_mean_and_fairseq_loads_it(run, tiny):
    main(["--checkpoints", *(str(run / f"checkpoint{i}.pt") for i in (1, 2, 3)), "--out", str(run / "averaged.pt")])
    inputs = [load_checkpoint(run / f"checkpoint{i}.pt")["model"] for i in (1, 2, 3)]
    averaged = load_checkpoint(run / "averaged.pt")
    for name, tensor in averaged["model"].items():
        expected = sum(model[name].double() for model in inputs) / 3
        assert tensor.dtype == inputs[0][name].dtype
        torch.testing.assert_close(tensor, expected.to(tensor.dtype), rtol=0, atol=0)
    model = averaged["model"]
    assert model["encoder.embed_tokens.weight"].data_ptr() == model["decoder.output_projection.weight"].data_ptr()
    assert averaged["last_optimizer_state"] is None
    assert tiny.logits(run / "averaged.pt").isfinite().all()


def test_half_precision_is_averaged_without_half_precision_sums(run):
    for seed, value in ((1, 60000.0), (2, 60000.0), (3, 59968.0)):
        state = load_checkpoint(run / f"checkpoint{seed}.pt")
        state["model"]["encoder.layers.0.fc1.bias"] = torch.full((24,), value, dtype=torch.float16)
        save_checkpoint(state, run / f"checkpoint{seed}.pt")
    averaged = average_checkpoints([run / f"checkpoint{i}.pt" for i in (1, 2, 3)])
    bias = averaged["model"]["encoder.layers.0.fc1.bias"]
    assert bias.dtype == torch.float16
    assert bias.tolist() == [60000.0] * 24  # the sum would overflow


def test_best_and_last_count_copies_once(run):
    assert [candidate.updates for candidate in choose_last(run, 2)] == [20, 30]
    assert [candidate.updates for candidate in choose_best(run, 2)] == [20, 30]
    for seed in (1, 2, 3):
        state = load_checkpoint(run / f"checkpoint{seed}.pt")
        state["cfg"]["checkpoint"]["maximize_best_checkpoint_metric"] = True
        save_checkpoint(state, run / f"checkpoint{seed}.pt")
    assert [candidate.updates for candidate in choose_best(run, 2)] == [20, 10]
    with pytest.raises(CheckpointError, match="holds 3 different checkpoints, --num asks for 4"):
        choose_last(run, 4)


def test_fewer_than_wanted_are_averaged_only_if_allowed_and_said_so(run, capsys):
    command = ["--last-of", str(run), "--num", "5", "--out", str(run / "averaged.pt")]
    assert main(command) == 1
    assert main([*command, "--allow-fewer"]) == 0
    assert "warning: 3 checkpoints instead of 5" in capsys.readouterr().err
    names = load_checkpoint(run / "averaged.pt")["extra_state"]["averaged_from"]
    assert len(names) == 3
    (run / "empty").mkdir()
    command[1] = str(run / "empty")
    assert main([*command, "--allow-fewer"]) == 1


def test_other_models_are_refused_by_name(run, tiny, capsys):
    other = tiny.state("xmoe_transformer_tiny", 2, moe_num_experts=8, moe_expert_dim=6)
    save_checkpoint(other, run / "checkpoint2.pt")
    with pytest.raises(CheckpointError, match=r"is float32 \(8, .*but float32 \(4, "):
        average_checkpoints([run / "checkpoint1.pt", run / "checkpoint2.pt"])
    save_checkpoint(tiny.state("dense_transformer_tiny", 2), run / "checkpoint2.pt")
    paths = [str(run / f"checkpoint{seed}.pt") for seed in (1, 2)]
    assert main(["--checkpoints", *paths, "--out", str(run / "out.pt")]) == 1
    assert "decoder.layers.1.fc1.bias" in capsys.readouterr().err
    assert not (run / "out.pt").exists()

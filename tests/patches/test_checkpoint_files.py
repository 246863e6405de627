"""Stock fairseq reads, resumes, copies and broadcasts checkpoints safely."""

import argparse
import logging
import os

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.dataclass.configs import CheckpointConfig
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager

from xmoe_fairseq.checkpoints.fallback import latest_good
from xmoe_fairseq.checkpoints.files import (
    CheckpointError,
    TruncatedCheckpointError,
    UnsafeCheckpointError,
    load_checkpoint,
    save_checkpoint,
)
from xmoe_fairseq.patches import checkpoint_files


@pytest.fixture
def folder(tiny, tmp_path):
    """Checkpoints at updates 10 and 20, a copy of the second as checkpoint_last.pt, and an average."""
    checkpoint_files.install()
    for seed in (1, 2):
        state = tiny.state("xmoe_transformer_tiny", seed, moe_num_experts=4, moe_expert_dim=6)
        save_checkpoint(state, tmp_path / f"checkpoint{seed}.pt")
    save_checkpoint(state, tmp_path / "checkpoint_last.pt")
    save_checkpoint({**state, "last_optimizer_state": None}, tmp_path / "checkpoint_averaged.pt")
    return tmp_path


@pytest.mark.parametrize("from_yaml", [False, True])
def test_overrides_set_what_the_checkpoint_does_not_hold_and_refuse_what_nothing_reads(tiny, tmp_path, from_yaml):
    checkpoint_files.install()
    state = tiny.state("xmoe_transformer_tiny", moe_num_experts=4, moe_expert_dim=6)
    del state["cfg"]["model"].moe_max_experts  # of a release without this setting
    if from_yaml:
        state["cfg"]["model"] = {**vars(state["cfg"]["model"])}
    save_checkpoint(state, tmp_path / "old.pt")
    limited = tiny.load(tmp_path / "old.pt", {"moe_max_experts": 1})
    assert limited.encoder.layers[1].moe.config.max_experts == 1
    with pytest.raises(ValueError, match="unknown settings moe_max_expert;"):
        tiny.load(tmp_path / "old.pt", {"moe_max_expert": 1})


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


class Trainer:
    """As much of fairseq's trainer as resuming calls."""

    checkpoint_suffix = ""

    def load_checkpoint(self, path, *_args, **_kwargs):
        self.state = checkpoint_utils.load_checkpoint_to_cpu(path)

    def get_train_iterator(self, epoch, **_kwargs):
        return argparse.Namespace(epoch=epoch, load_state_dict=lambda _state: None)

    def lr_step(self, epoch):
        pass


def updates_after_resuming(folder):
    trainer = Trainer()
    checkpoint_utils.load_checkpoint(CheckpointConfig(save_dir=str(folder)), trainer)
    return trainer.state["optimizer_history"][-1]["num_updates"]


def test_resuming_takes_the_last_good_checkpoint_and_says_so(folder, caplog):
    assert updates_after_resuming(folder) == 20
    cut(folder / "checkpoint_last.pt")
    cut(folder / "checkpoint2.pt")
    with caplog.at_level(logging.WARNING):
        assert updates_after_resuming(folder) == 10
    assert f"CONTINUING FROM {folder / 'checkpoint1.pt'}" in caplog.text
    assert "was cut off" in caplog.text


def test_without_a_good_checkpoint_resuming_stops(folder):
    for path in folder.glob("checkpoint*.pt"):
        cut(path)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        updates_after_resuming(folder)


def test_translating_never_takes_another_checkpoint_than_asked_for(folder, tiny):
    cut(folder / "checkpoint_last.pt")
    with pytest.raises(TruncatedCheckpointError):
        tiny.load(folder / "checkpoint_last.pt")


def test_the_last_good_one_has_the_most_updates_and_its_optimiser(folder):
    assert latest_good(folder).name == "checkpoint_last.pt"
    whole = bytearray((folder / "checkpoint_last.pt").read_bytes())
    weights = load_checkpoint(folder / "checkpoint_last.pt")["model"]["encoder.layers.0.fc1.weight"]
    whole[whole.index(weights.numpy().tobytes())] ^= 1
    (folder / "checkpoint_last.pt").write_bytes(whole)
    assert latest_good(folder).name == "checkpoint2.pt"


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_stock_loading_refuses_code_with_our_message(folder, tiny, tmp_path):
    state = load_checkpoint(folder / "checkpoint1.pt")
    state["extra_state"] = Malicious(str(tmp_path / "trace"))
    torch.save(state, folder / "evil.pt")
    with pytest.raises(UnsafeCheckpointError, match="Nothing was run"):
        tiny.load(folder / "evil.pt")
    assert not (tmp_path / "trace").exists()


def test_a_copy_that_is_interrupted_leaves_the_old_file(folder, monkeypatch):
    before = (folder / "checkpoint_last.pt").read_bytes()

    def killed(_source, partial):
        partial.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_files.shutil, "copyfile", killed)
    with pytest.raises(KeyboardInterrupt):
        PathManager.copy(str(folder / "checkpoint1.pt"), str(folder / "checkpoint_last.pt"), overwrite=True)
    assert (folder / "checkpoint_last.pt").read_bytes() == before
    monkeypatch.undo()
    assert PathManager.copy(str(folder / "checkpoint1.pt"), str(folder / "checkpoint_last.pt"), overwrite=True)
    assert (folder / "checkpoint_last.pt").read_bytes() == (folder / "checkpoint1.pt").read_bytes()


def test_a_copy_onto_a_link_keeps_the_link(folder):
    (folder / "other").mkdir()
    target, link = folder / "other" / "checkpoint_best.pt", folder / "checkpoint_best.pt"
    target.write_bytes(b"old")
    link.symlink_to(target)
    assert PathManager.copy(str(folder / "checkpoint1.pt"), str(link), overwrite=True)
    assert link.is_symlink()
    assert target.read_bytes() == (folder / "checkpoint1.pt").read_bytes()


def test_the_other_rank_receives_what_the_first_one_read(folder, monkeypatch):
    # both ends of fairseq's broadcast, one after the other, over a wire that is a list
    wire, rank = [], {}
    monkeypatch.setattr(distributed_utils, "get_rank", lambda _group: rank["here"])

    def broadcast(tensor, src, group):
        if rank["here"] == src:
            wire.append(tensor.clone())
        else:
            tensor.copy_(wire.pop(0).reshape(tensor.shape))  # fairseq receives flat

    monkeypatch.setattr(distributed_utils, "broadcast", broadcast)
    state = checkpoint_utils.load_checkpoint_to_cpu(str(folder / "checkpoint1.pt"))
    rank["here"] = 0
    distributed_utils.broadcast_object(state, src_rank=0, group=None, dist_device=torch.device("cpu"))
    rank["here"] = 1
    received = distributed_utils.broadcast_object(None, src_rank=0, group=None, dist_device=torch.device("cpu"))
    assert not wire
    assert received["model"].keys() == state["model"].keys()
    assert all(torch.equal(tensor, state["model"][name]) for name, tensor in received["model"].items())
    assert received["cfg"]["model"].moe_num_experts == 4

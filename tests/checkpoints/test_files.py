"""Reading and writing checkpoint files: damage, truncation and unsafe types are refused, writing is atomic."""

import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from xmoe_fairseq.checkpoints import average, files, import_dense, import_official, quantise
from xmoe_fairseq.checkpoints.files import (
    CheckpointError,
    CorruptCheckpointError,
    TruncatedCheckpointError,
    UnsafeCheckpointError,
    load_checkpoint,
    save_checkpoint,
)


@pytest.fixture
def path(moe_state, tmp_path):
    path = tmp_path / "checkpoint_last.pt"
    save_checkpoint(moe_state, path)
    return path


def test_what_was_saved_comes_back_bit_for_bit(path, moe_state):
    loaded = load_checkpoint(path)
    assert vars(loaded["cfg"]["model"]) == vars(moe_state["cfg"]["model"])
    assert loaded["model"].keys() == moe_state["model"].keys()
    assert all(torch.equal(tensor, moe_state["model"][name]) for name, tensor in loaded["model"].items())


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_cut_file_is_called_truncated(path, share):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(TruncatedCheckpointError, match=r"nothing was written|was cut off"):
        load_checkpoint(path)


def test_a_flipped_bit_in_a_tensor_is_called_corrupt(path, moe_state):
    whole = bytearray(path.read_bytes())
    weights = moe_state["model"]["encoder.layers.1.moe.experts.w1"].contiguous().numpy().tobytes()
    place = whole.index(weights) + len(weights) // 2
    whole[place] ^= 1
    path.write_bytes(whole)
    with pytest.raises(CorruptCheckpointError, match=r"checksum of a record does not agree.*--fallback"):
        load_checkpoint(path)


def test_no_flipped_bit_changes_what_is_loaded(path, moe_state):
    # in padding between records and in dates a flip is harmless; everywhere else it must be seen
    whole = path.read_bytes()
    chance = random.Random(1)
    for _ in range(60):
        place = len(whole) - 1 - chance.randrange(20000)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << chance.randrange(8))]) + whole[place + 1 :])
        try:
            loaded = load_checkpoint(path)
        except CheckpointError:
            continue
        assert all(torch.equal(tensor, moe_state["model"][name]) for name, tensor in loaded["model"].items())


def test_counts_of_eval_bleu_are_loaded(moe_state, tmp_path):
    counts = np.array([3, 1, 0, 0])
    save_checkpoint({**moe_state, "extra_state": {"metrics": [counts, counts / 2]}}, tmp_path / "bleu.pt")
    loaded = load_checkpoint(tmp_path / "bleu.pt")["extra_state"]["metrics"]
    assert [array.tolist() for array in loaded] == [[3, 1, 0, 0], [1.5, 0.5, 0, 0]]


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zip_format", [True, False])
def test_a_pickle_that_would_run_code_is_refused(moe_state, tmp_path, zip_format):
    path, trace = tmp_path / "evil.pt", tmp_path / "trace"
    state = {**moe_state, "extra_state": Malicious(trace)}
    torch.save(state, path, _use_new_zipfile_serialization=zip_format)
    with pytest.raises(UnsafeCheckpointError, match=r"refused: loading it would call posix.mkdir.*Nothing was run"):
        load_checkpoint(path)
    assert not trace.exists()


class Builtin:
    def __reduce__(self):
        return eval, ("1 + 1",)


def test_a_pickle_that_names_a_builtin_is_called_unsafe_not_damaged(moe_state, tmp_path):
    path = tmp_path / "evil.pt"
    torch.save({**moe_state, "extra_state": Builtin()}, path)
    with pytest.raises(UnsafeCheckpointError, match=r"refused: loading it would call eval, which is not on the list"):
        load_checkpoint(path)


def test_a_bare_pickle_is_refused_without_running(tmp_path):
    path, trace = tmp_path / "evil.pt", tmp_path / "trace"
    path.write_bytes(pickle.dumps(Malicious(trace)))
    with pytest.raises(CheckpointError, match="not a torch checkpoint"):
        load_checkpoint(path)
    assert not trace.exists()


def test_the_protection_holds_against_the_variable_that_turns_it_off(moe_state, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path, trace = tmp_path / "evil.pt", tmp_path / "trace"
    torch.save({**moe_state, "extra_state": Malicious(trace)}, path)
    with pytest.raises(UnsafeCheckpointError):
        load_checkpoint(path)
    assert not trace.exists()


def test_other_files_are_named_as_such(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("no checkpoint")
    with pytest.raises(CheckpointError, match="not a checkpoint that torch wrote"):
        load_checkpoint(text)
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="holds no 'model'"):
        load_checkpoint(tmp_path / "other.pt")
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "absent.pt")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(path, moe_state, monkeypatch):
    before = path.read_bytes()

    def full_disk(_state, partial):
        partial.write_bytes(before[:100])
        raise RuntimeError("PytorchStreamWriter failed writing file: No space left on device")

    monkeypatch.setattr(files.torch, "save", full_disk)
    with pytest.raises(OSError, match=r"could not be written.*is the disk full"):
        save_checkpoint(moe_state, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_writing_to_a_link_writes_what_it_points_to(path, moe_state, tmp_path):
    link = tmp_path / "best.pt"
    link.symlink_to(path.name)
    save_checkpoint({**moe_state, "extra_state": {"note": "new"}}, link)
    assert link.is_symlink()
    assert load_checkpoint(path)["extra_state"] == {"note": "new"}


@pytest.mark.parametrize("command", [average, import_dense, import_official, quantise])
def test_no_command_replaces_its_input(command, moe_state, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(moe_state, "model.pt")
    before = Path("model.pt").read_bytes()
    flag = "--checkpoints" if command is average else "--checkpoint"
    more = ["--num-experts", "4"] if command is import_dense else []
    assert command.main([flag, "model.pt", "--out", str(tmp_path / "model.pt"), *more]) == 1
    assert "model.pt: is an input; give another name" in capsys.readouterr().err
    assert Path("model.pt").read_bytes() == before

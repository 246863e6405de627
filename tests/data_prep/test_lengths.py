"""Lengths tell before the training what training and validation leave out, and what would end it."""

import json

import numpy as np
import pytest
import torch
from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder

from data_prep import lengths as module


@pytest.fixture
def check(tmp_path):
    """Write the lengths of the source lines of train and valid (targets have 3 subwords), and check them."""

    def run(train, valid, *flags):
        for split, sizes in (("train", train), ("valid", valid)):
            for code, column in (("uk", sizes), ("en", [3] * len(sizes))):
                prefix = str(tmp_path / f"{split}.uk-en.{code}")
                builder = MMapIndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
                for size in column:
                    builder.add_item(torch.ones(size))
                builder.finalize(f"{prefix}.idx")
        out = tmp_path / "lengths.json"
        code = module.main(["--data", str(tmp_path), "--pair", "uk-en", "--out", str(out), *flags])
        return code, json.loads(out.read_text()) if out.exists() else None

    return run


def test_pairs_beyond_positions_or_a_batch_are_counted(check, capsys):
    code, found = check([5, 11, 9, 10], [10, 11], "--max-source-positions", "10")
    assert code == 0
    assert found["train"] == {"pairs": 4, "longest": [11, 3], "left_out": 1}
    assert found["valid"] == {"pairs": 2, "longest": [11, 3], "left_out": 1}
    assert "train: 4 pairs, up to 11 source and 3 target subwords; 1 too long and left out" in capsys.readouterr().out
    assert (
        check([5, 11, 9, 10], [4], "--max-source-positions", "10", "--batch-tokens", "8")[1]["train"]["left_out"] == 3
    )


@pytest.mark.parametrize(
    ("train", "valid", "message"),
    [
        ([5], [9, 4], "1 pairs of valid have more subwords (up to 9) than a batch takes (8); raise"),
        ([9, 12], [4], "every pair of train is longer than the model takes (10 source and 1024 target"),
        ([5], [11], "every pair of valid is longer"),
    ],
)
def test_what_would_end_the_training_stops_before_it(check, capsys, train, valid, message):
    code, found = check(train, valid, "--max-source-positions", "10", "--batch-tokens", "8")
    assert (code, found) == (1, None)
    assert message in capsys.readouterr().err

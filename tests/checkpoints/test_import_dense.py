"""Dense checkpoints as mixtures of experts: equal outputs at the start, and refusals."""

import pytest
import torch

from xmoe_fairseq.checkpoints.files import CheckpointError, save_checkpoint
from xmoe_fairseq.checkpoints.import_dense import DenseImport, group_units, import_dense, main

NO_DROPS = {"moe_capacity_factor": None}
ALL = {"moe_threshold": 1.0, **NO_DROPS}


def logits_of(tiny, state, tmp_path):
    save_checkpoint(state, tmp_path / "model.pt")
    return tiny.logits(tmp_path / "model.pt")


@pytest.mark.parametrize("grouping", ["contiguous", "random", "kmeans"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_split_computes_exactly_the_dense_model_at_t_1(tiny, tmp_path, grouping, activation):
    dense = tiny.state("dense_transformer_tiny", activation_fn=activation)
    moe = import_dense(dense, DenseImport(4, grouping=grouping), ALL)
    assert moe["model"]["encoder.layers.1.moe.experts.w1"].shape == (4, 16, 6)
    assert "encoder.layers.1.fc1.weight" not in moe["model"]
    torch.testing.assert_close(logits_of(tiny, moe, tmp_path), logits_of(tiny, dense, tmp_path))


@pytest.mark.parametrize(
    ("start", "moe"),
    [
        ("zero", {"moe_router": "switch"}),
        ("zero", {"moe_router": "top_k", "moe_top_k": 3}),
        ("zero", {"moe_router": "threshold", "moe_threshold": 0.5}),
        ("random", {"moe_router": "top_k", "moe_top_k": 2, "moe_normalize_weights": True}),
    ],
)
def test_copies_compute_the_dense_model(tiny, dense_state, tmp_path, start, moe):
    copies = import_dense(dense_state, DenseImport(4, mode="copy", router_start=start), {**moe, **NO_DROPS})
    assert copies["model"]["encoder.layers.1.moe.experts.w1"].shape == (4, 16, 24)
    torch.testing.assert_close(logits_of(tiny, copies, tmp_path), logits_of(tiny, dense_state, tmp_path))


def test_a_router_that_differs_from_zero_moves_the_model_as_far_as_it_is_scaled(tiny, dense_state, tmp_path):
    dense = logits_of(tiny, dense_state, tmp_path)
    distance = []
    for scale in (0.001, 0.1):
        how = DenseImport(4, grouping="kmeans", router_start="centroids", router_scale=scale)
        moe = import_dense(dense_state, how, ALL)
        router = moe["model"]["encoder.layers.1.moe.router.weight"]
        assert router.square().mean().sqrt().item() == pytest.approx(scale)
        distance.append((logits_of(tiny, moe, tmp_path) - dense).abs().max().item())
    assert 0 < distance[0] < 0.1 * distance[1]


def test_kmeans_finds_groups_that_are_there_and_keeps_them_even():
    directions = torch.eye(4, 8)
    generator = torch.Generator().manual_seed(0)
    rows = directions[torch.tensor([2, 0, 1, 3] * 5)] + 0.01 * torch.randn(20, 8, generator=generator)
    groups = group_units(rows, 4, "kmeans", generator)
    assert sorted(groups.flatten().tolist()) == list(range(20))
    assert all((group % 4 == group[0] % 4).all() for group in groups)


def test_only_the_chosen_layers_change(dense_state):
    moe = import_dense(dense_state, DenseImport(2), {**ALL, "moe_sides": "decoder", "moe_interval": 1})
    changed = {name.split(".moe.")[0] for name in moe["model"] if ".moe." in name}
    assert changed == {"decoder.layers.0", "decoder.layers.1"}
    assert torch.equal(moe["model"]["encoder.layers.0.fc1.weight"], dense_state["model"]["encoder.layers.0.fc1.weight"])
    assert moe["last_optimizer_state"] is None


@pytest.mark.parametrize(
    ("how", "moe", "message"),
    [
        ({"num_experts": 5}, {}, "24 hidden units cannot be cut into 5 equal experts"),
        ({"num_experts": 4, "mode": "half"}, {}, "mode .'half'. must be one of split, copy"),
        ({"num_experts": 4, "mode": "copy", "router_start": "centroids"}, {}, "copies have equal centroids"),
        ({"num_experts": 0}, {}, "num_experts .0. must be at least 1"),
        (
            {"num_experts": 4, "mode": "copy", "grouping": "kmeans"},
            {},
            "grouping .kmeans. has no effect with mode copy",
        ),
        ({"num_experts": 4, "router_scale": 0.1}, {}, "router_scale .0.1. has no effect with router_start zero"),
        ({"num_experts": 4, "router_scale": float("nan")}, {}, "router_scale .nan. must be > 0"),
        ({"num_experts": 4}, {"moe_router": "hash"}, "does not weight experts by a softmax"),
        ({"num_experts": 4}, {"moe_threshold": 1.5}, "moe_threshold .1.5. must be"),
        ({"num_experts": 4}, {"moe_interval": 9}, "choose no layer"),
    ],
)
def test_what_cannot_be_is_refused(dense_state, how, moe, message):
    with pytest.raises(ValueError, match=message):
        import_dense(dense_state, DenseImport(**how), {**NO_DROPS, **moe})


def test_a_mixture_is_not_imported_again_and_the_command_writes_a_model(tiny, moe_state, dense_state, tmp_path):
    with pytest.raises(CheckpointError, match="already a mixture"):
        import_dense(moe_state, DenseImport(4), ALL)
    save_checkpoint(dense_state, tmp_path / "dense.pt")
    main(["--checkpoint", str(tmp_path / "dense.pt"), "--out", str(tmp_path / "moe.pt"), "--num-experts", "4"])
    torch.testing.assert_close(tiny.logits(tmp_path / "moe.pt"), tiny.logits(tmp_path / "dense.pt"))

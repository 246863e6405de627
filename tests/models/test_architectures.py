"""The comparison is fair: parameters and FLOPs of the built models, row by row."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from eval.method_table import SIZES, Parameters, build, layer_flops, rows_per_token, table, token_flops
from xmoe_fairseq.models.architectures import ARCHITECTURES
from xmoe_fairseq.moe import MergedMoELayer, MoEConfig, MoELayer
from xmoe_fairseq.moe.flops import counted_flops

LENGTH = 32
# The comparison of the paper and of AdaMoE: these must cost what the dense FFN costs.
EQUAL = {
    "wmt23": """xmoe_transformer xmoe_transformer_128x512 switch_transformer_32x2048 top_k_transformer_64x1024
        top_k_transformer_128x512 hash_transformer_32x2048 base_transformer_32x2048 adamoe_transformer_64x1024""",
    "tiny": """xmoe_transformer_tiny switch_transformer_tiny top_k_transformer_tiny hash_transformer_tiny
        base_transformer_tiny adamoe_transformer_tiny""",
    "gpt2": """xmoe_transformer_lm switch_transformer_8x3072_lm hash_transformer_8x3072_lm base_transformer_8x3072_lm
        xmoe_transformer_16x1536_lm xmoe_transformer_32x768_lm xmoe_transformer_64x384_lm
        top_k_transformer_16x1536_lm top_k_transformer_32x768_lm top_k_transformer_64x384_lm""",
    "gpt2-556m": """switch_transformer_8x4096_lm hash_transformer_8x4096_lm base_transformer_8x4096_lm
        xmoe_transformer_16x2048_lm xmoe_transformer_32x1024_lm xmoe_transformer_64x512_lm
        top_k_transformer_16x2048_lm top_k_transformer_32x1024_lm top_k_transformer_64x512_lm""",
    "tiny-lm": """xmoe_transformer_tiny_lm switch_transformer_tiny_lm top_k_transformer_tiny_lm
        hash_transformer_tiny_lm base_transformer_tiny_lm adamoe_transformer_tiny_lm""",
}
# Merging costs beside the one expert that is computed (docs/methods.md); the cut dense FFN costs the dense FFN.
OTHER_COST = {
    "meo_transformer_64x1024": 0.5 + 0.5 * 7 / 64,
    "meo_transformer_32x2048": 1 + 3 / 64,
    "meo_transformer_tiny": 1 + 7 / 64,
    "dense_xmoe_transformer_8x384_lm": 1.0,
    "dense_xmoe_transformer_16x192_lm": 1.0,
    "dense_xmoe_transformer_tiny_lm": 1.0,
    "dense_xmoe_transformer_tiny": 1.0,
}


def on_meta(arch, vocabulary=100):
    with torch.device("meta"):
        return build(arch, vocabulary, LENGTH)


def moe_layers(model):
    return [module for module in model.modules() if isinstance(module, MoELayer)]


@pytest.mark.parametrize("size", EQUAL)
def test_equal_parameters_and_equal_flops(size):
    names = EQUAL[size].split()
    models = {name: on_meta(name) for name in names}
    counts = {name: Parameters.of(model) for name, model in models.items()}
    assert len({count.shared for count in counts.values()}) == 1
    for name in names:
        assert counts[name].experts == pytest.approx(counts[names[0]].experts, rel=2.5e-3), name  # biases differ
        for layer in moe_layers(models[name]):
            experts, _ = layer_flops(layer, LENGTH, training=True)
            assert experts == 4 * SIZES[size].embed_dim * SIZES[size].ffn_dim, name
            if layer.config.router != "threshold":
                assert layer_flops(layer, LENGTH, training=False)[0] == experts, name


@pytest.mark.parametrize("name", OTHER_COST)
def test_rows_of_another_cost(name):
    size = ARCHITECTURES[name]
    for layer in moe_layers(on_meta(name)):
        for training in (True, False):
            experts, _ = layer_flops(layer, LENGTH, training)
            assert experts == pytest.approx(OTHER_COST[name] * 4 * size.embed_dim * size.ffn_dim)


def test_every_architecture_is_in_the_comparison():
    listed = {name for names in EQUAL.values() for name in names.split()} | set(OTHER_COST)
    assert listed == {name for name in ARCHITECTURES if not name.startswith("dense_transformer")}


@pytest.mark.parametrize(
    ("name", "millions"),
    [("dense_transformer_lm", 124), ("xmoe_transformer_16x1536_lm", 323), ("switch_transformer_8x4096_lm", 556)],
)
def test_language_models_have_the_sizes_of_table_1(name, millions):
    with torch.device("meta"):
        counts = Parameters.of(build(name, 50257, 1024))
    assert (counts.shared + counts.gates + counts.experts) / 1e6 == pytest.approx(millions, rel=0.004)


def test_every_second_layer_is_a_moe_layer_with_the_paper_s_settings():
    model = on_meta("xmoe_transformer")
    assert (len(model.encoder.layers), len(model.decoder.layers)) == (12, 6)
    for stack in (model.encoder, model.decoder):
        assert [hasattr(layer, "moe") for layer in stack.layers] == [False, True] * (len(stack.layers) // 2)
    config = model.encoder.layers[1].moe.config
    assert config == MoEConfig(
        *(512, 64, 1024), threshold=0.9, capacity_factor=2.0, dense_dim=2048, hash_seed=config.hash_seed
    )


def inputs(model, batch=4):
    tokens = torch.randint(4, 100, (batch, LENGTH))
    if hasattr(model, "encoder"):
        return tokens, torch.full((batch,), LENGTH), tokens
    return (tokens,)


def count_forward(arch, training):
    torch.manual_seed(0)
    model = build(arch, 100, LENGTH).train(training)
    for layer in moe_layers(model):
        object.__setattr__(layer.config, "compute", "loop")  # the others also multiply padding
    batch = inputs(model)
    # torch's counter does not know the fused attention of CPUs
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        return model, counted_flops(lambda: model(*batch)) / (4 * LENGTH)


@pytest.mark.parametrize("name", ["dense", "switch", "top_k", "hash", "base"])
def test_counted_flops_are_those_of_the_formula_at_inference(name):
    model, counted = count_forward(f"{name}_transformer_tiny", training=False)
    assert counted == pytest.approx(token_flops(model, LENGTH, training=False), rel=1e-6)


def test_counted_flops_of_adamoe_are_near_its_balanced_load():
    model, counted = count_forward("adamoe_transformer_tiny", training=False)
    assert counted == pytest.approx(token_flops(model, LENGTH, training=False), rel=0.05)  # an untrained router


def test_counted_flops_of_meo():
    model, counted = count_forward("meo_transformer_tiny", training=False)
    merging = [layer for layer in moe_layers(model) if isinstance(layer, MergedMoELayer)]
    # a GEMM counts the first product as a sum too: 2 N instead of 2 N - 1 per merged number, and merges the biases
    extra = sum(
        2 * layer.config.embed_dim * layer.config.expert_dim
        + 2 * layer.config.num_experts * (layer.config.embed_dim + layer.config.expert_dim)
        for layer in merging
    )
    assert counted == pytest.approx(token_flops(model, LENGTH, training=False) + extra / LENGTH, rel=1e-6)


@pytest.mark.parametrize("name", ["xmoe", "dense_xmoe", "base"])
def test_counted_flops_in_training_where_experts_are_full(name):
    model, counted = count_forward(f"{name}_transformer_tiny", training=True)
    assert counted == pytest.approx(token_flops(model, LENGTH, training=True), rel=1e-6)


@pytest.mark.parametrize("name", ["switch", "hash", "top_k"])
def test_counted_flops_in_training_never_exceed_the_capacity(name):
    model, counted = count_forward(f"{name}_transformer_tiny", training=True)
    assert counted <= token_flops(model, LENGTH, training=True)


def test_rows_of_a_threshold_depend_on_the_run_unless_capacity_bounds_them():
    config = MoEConfig(8, 4, 8, capacity_factor=2.0)
    assert rows_per_token(config, training=True) == 2.0
    assert rows_per_token(config, training=False) is None


@pytest.mark.parametrize("size", ["wmt23", "gpt2"])
def test_the_documented_table_is_what_the_command_prints(size):
    documented = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    vocabulary, length = {"wmt23": (32000, 32), "gpt2": (50257, 1024)}[size]
    assert table(size, vocabulary, length) in documented

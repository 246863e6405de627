"""eval/routing: every number of a hand-set routing, sweeps, every method."""

import json
import math
from argparse import Namespace

import numpy as np
import pytest
import torch

from eval import analyse
from eval.routing import corpus as corpora
from eval.routing import forward_passes, tokens, translation
from eval.routing.layers import moe_layers
from eval.routing.sums import AgreementSums, normalised_mutual_information
from tests.eval import tiny_routed
from tests.tiny import dictionary

SOURCE, TARGET = ["▁a b ▁12 ,", "▁a"], ["b", "▁a ▁a"]


@pytest.fixture(scope="module")
def observed() -> dict:
    loaded = tiny_routed.hand_routed()
    corpus = corpora.from_lines(loaded, SOURCE, TARGET)
    return forward_passes.observe(loaded, corpus, max_tokens=100)


def test_load_and_experts_per_token_are_counted(observed):
    # seven encoder tokens: a, b, 12, comma, </s> and a, </s>
    layer = observed["layers"]["encoder 0"]
    assert observed["tokens"] == {"encoder": 7, "decoder": 5}
    assert layer["tokens"] == 7
    assert layer["rows"] == layer["rows_wanted"] == [5, 4, 3, 0]
    assert layer["wanted"] == layer["used"] == pytest.approx(12 / 7)
    assert layer["dropped"] == layer["unserved"] == 0
    assert layer["flops"] == pytest.approx(12 / 7 * 4 / 8)
    assert layer["load_cv_total"] == pytest.approx(math.sqrt(((5 - 3) ** 2 + 1 + 0 + 9) / 4) / 3)
    assert layer["entropy"] == pytest.approx(0.5)
    assert layer["tokens_by_experts_used"] == [0, 4, 1, 2, 0]
    assert layer["dead_experts"] == [3]
    assert observed["layers"]["encoder 1"]["dead_experts"] == [0, 1, 2]
    assert observed["layers"]["encoder 1"]["load_cv_total"] == pytest.approx(math.sqrt(3))


def test_groups_are_counted(observed):
    groups = observed["layers"]["encoder 0"]["groups"]
    kinds = dict(zip(groups["kind"]["names"], groups["kind"]["tokens"], strict=True))
    assert kinds == {"word start": 2, "continuation": 1, "punctuation": 1, "digits": 1, "special": 2}
    assert groups["kind"]["experts_per_token"] == [1, 2, 1, 1, 3]
    assert groups["kind"]["rows"] == [[2, 0, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [2, 2, 2, 0]]
    # tenths of a, b, 12, comma, </s> in five places, and of a, </s> in two
    assert groups["position"]["tokens"] == [2, 0, 1, 0, 1, 1, 1, 0, 1, 0]
    assert groups["position"]["experts_per_token"] == [1, None, 2, None, 1, 3, 1, None, 3, None]
    assert groups["frequency"]["tokens"] == [7, 0, 0, 0, 0, 0, 0]  # nothing occurs more than twice
    assert groups["frequency"]["experts_per_token"][0] == pytest.approx(12 / 7)


def test_relations_of_experts_are_counted(observed):
    layer = observed["layers"]["encoder 0"]
    together = np.array(layer["co_selection"])
    assert together[0, 1] == pytest.approx(3 / 6)  # b and both </s>; six tokens take 0 or 1
    assert together[1, 2] == pytest.approx(2 / 5)
    assert together[0, 3] == 0
    outputs = np.array(layer["similarity"]["outputs"])
    np.testing.assert_allclose(outputs, [[1, 1, -1, 0], [1, 1, -1, 0], [-1, -1, 1, 0], [0, 0, 0, 1]])
    assert layer["typical_tokens"][2][0] == ["▁12", 1, 1.0]
    assert layer["typical_tokens"][3] == []


def test_positive_hidden_units_are_counted(observed):
    assert observed["layers"]["encoder 0"]["positive_share"] == {"share": 0.5, "rows": 12}
    assert observed["layers"]["encoder 1"]["positive_share"] == {"share": 0.0, "rows": 7}
    assert observed["dense_layers"] == {"decoder 0": {"share": 0.75, "rows": 5}}


def test_loss_is_that_of_single_sentences(observed):
    loaded = tiny_routed.hand_routed()
    nats = 0.0
    for source, target in zip(SOURCE, TARGET, strict=True):
        corpus = corpora.from_lines(loaded, [source], [target])
        sample = next(corpus.samples([[0]], loaded.device))
        logits = loaded.model(**sample["net_input"])[0].float()
        nats += float(torch.nn.functional.cross_entropy(logits[0], sample["target"][0], reduction="sum"))
    assert observed["quality"]["loss_bits"] == pytest.approx(nats / 5 / math.log(2), rel=1e-5)
    assert observed["quality"]["perplexity"] == pytest.approx(math.exp(nats / 5), rel=1e-5)
    assert observed["quality"]["target_tokens"] == 5


def test_agreement_of_layers():
    assert normalised_mutual_information(torch.tensor([[2.0, 0], [0, 3]])) == pytest.approx(1)
    assert normalised_mutual_information(torch.tensor([[1.0, 1], [1, 1]])) == pytest.approx(0)
    assert normalised_mutual_information(torch.tensor([[2.0, 3], [0, 0]])) is None
    sums = AgreementSums([2, 2], torch.device("cpu"))
    used = [torch.tensor([1, 2, 3, 9]), torch.tensor([3, 2, 1, 9])]
    first = [torch.tensor([0, 1, 0, 1]), torch.tensor([1, 0, 1, 0])]
    sums.add(used, first, torch.tensor([True, True, True, False]))
    figures = sums.figures(["encoder 0", "encoder 1"])
    assert figures["first_choice"][0][1] == pytest.approx(1)  # the same up to names
    assert figures["experts_used"][0][1] == pytest.approx(-1)


@pytest.mark.parametrize(
    ("setting", "wanted", "used"),
    [
        ({"threshold": 0.0}, 7, 7),
        ({"threshold": 0.5}, 14, 14),
        ({"threshold": 1.0}, 28, 28),
        # C = max(ceil(1 * 7 / 4), 4) = 4 rows for each of the two experts that all seven tokens want
        ({"threshold": 0.5, "eval_capacity_factor": 1.0}, 14, 8),
        ({"threshold": 0.5, "eval_capacity_factor": 3.0}, 14, 12),
    ],
)
def test_sweeps_count_rows_and_leave_the_model_as_it_was(setting, wanted, used):
    loaded = tiny_routed.build(moe_sides="encoder")
    for layer in moe_layers(loaded.model).values():
        torch.nn.init.zeros_(layer.router.weight)  # all four experts at 1/4: ties go to the lower index
    corpus = corpora.from_lines(loaded, SOURCE, TARGET)
    with forward_passes.routing_settings(loaded.model, **setting):
        point = forward_passes.evaluate(loaded, corpus, corpus.indices, max_tokens=100)
    for figures in (point, point["layers"]["encoder 0"]):
        assert figures["wanted"] == pytest.approx(wanted / 7)
        assert figures["used"] == pytest.approx(used / 7)
        assert figures["dropped"] == pytest.approx(1 - used / wanted)
        assert figures["flops"] == pytest.approx(used / 7 / 2)
    assert {layer.config.threshold for layer in moe_layers(loaded.model).values()} == {0.9}


def test_kinds_of_subword_nmt_pieces():
    table = tokens.vocabulary(dictionary(["foo@@", "bar", "7@@", "."]), torch.zeros(8, dtype=torch.int64))
    ids = torch.tensor([[4, 5, 5, 6, 7, 2]])
    kinds = [tokens.KINDS[k] for k in tokens.groups(ids, table)["kind"].tolist()]
    assert kinds == ["word start", "continuation", "word start", "digits", "punctuation", "special"]


def test_routing_of_sentences_is_the_plan():
    loaded = tiny_routed.hand_routed()
    first, second = translation.routing_of(loaded, SOURCE, TARGET)
    assert first["source"] == ["▁a", "b", "▁12", ",", "</s>"]
    assert first["target"] == ["</s>", "b"]
    assert first["routing"]["encoder 0"] == [
        [1, 0, 0.9], [2, 1, 0.6, 0, 0.25], [1, 2, 1.0], [1, 1, 0.75], [3, 0, 0.5, 1, 0.3, 2, 0.1],
    ]  # fmt: skip
    assert second["routing"]["encoder 0"] == [[1, 0, 0.9], [3, 0, 0.5, 1, 0.3, 2, 0.1]]
    assert second["routing"]["encoder 1"] == [[1, 3, 1.0], [1, 3, 1.0]]


def test_a_dense_model_has_figures_but_no_layers():
    loaded = tiny_routed.build("dense_transformer_tiny")
    corpus = corpora.from_lines(loaded, SOURCE, TARGET)
    result = forward_passes.observe(loaded, corpus, max_tokens=100)
    assert result["layers"] == {}
    assert list(result["dense_layers"]) == ["encoder 0", "encoder 1", "decoder 0"]
    assert forward_passes.evaluate(loaded, corpus, corpus.indices, max_tokens=100)["flops"] is None


def test_problems_name_dead_experts_and_nan(observed):
    found = analyse.problems({**observed, "history": {"first_nan_update": 40}})
    assert any("encoder 1: 3 of 4 experts are dead" in text and "collapsed" in text for text in found)
    assert any("update 40" in text for text in found)
    broken = {"layers": {}, "quality": {"loss_bits": math.nan}}
    assert analyse.problems(broken) == ["the loss on the test set is not a number"]
    assert analyse.finite({"a": [1.0, math.nan, math.inf], "b": "x"}) == {"a": [1.0, None, None], "b": "x"}


def test_describe_reads_a_namespace():
    loaded = tiny_routed.build()
    loaded.cfg.model = Namespace(arch="xmoe_transformer_tiny")
    assert analyse.describe(loaded)["num_experts"] == 4


@pytest.mark.parametrize(
    "settings",
    [
        {"moe_router": "top_k", "moe_top_k": 2},
        {"moe_router": "switch"},
        {"moe_router": "hash"},
        {"moe_router": "base"},
        {"moe_router": "adamoe", "moe_top_k": 2, "moe_null_experts": 1},
        {"moe_router": "top_k", "moe_top_k": 2, "moe_merge_experts": True, "moe_capacity_factor": None},
    ],
)
def test_every_method_is_analysed(settings):
    loaded = tiny_routed.build(**settings)
    corpus = corpora.from_lines(loaded, SOURCE, TARGET)
    result = analyse.finite(forward_passes.observe(loaded, corpus, max_tokens=100))
    assert list(result["layers"]) == ["encoder 0", "encoder 1", "decoder 0"]
    assert all(
        sum(layer["rows"]) == pytest.approx(layer["used"] * layer["tokens"]) for layer in result["layers"].values()
    )
    json.dumps(result, allow_nan=False)
    assert analyse.describe(loaded)["router"] == settings["moe_router"]

"""eval.analyse: every number of a hand-set routing, sweeps, the explorer's weights, errors."""

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
from eval.run.history import read_history
from eval.text.loading import load
from tests.eval import tiny_routed
from tests.eval.conftest import NUMBERS
from tests.tiny import dictionary
from xmoe_fairseq.moe import record_plans

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


def test_history_reads_a_training_log(tmp_path):
    lines = [
        f'2026-01-01 | INFO | train_inner | {{"epoch": 1, "loss": "{loss}", "num_updates": "{n}", '
        f'"moe_encoder_1_wanted": "{wanted}", "moe_wanted": "{wanted}"}}'
        for n, loss, wanted in ((10, "3.5", "4"), (20, "2.5", "3.25"), (30, "nan", "1"))
    ]
    (tmp_path / "log").write_text("\n".join(lines))
    history = read_history(str(tmp_path / "log"))
    assert history["layers"] == {"encoder 1": {"updates": [10, 20, 30], "wanted": [4, 3.25, 1]}}
    assert history["train"]["moe_wanted"] == [4, 3.25, 1]
    assert history["first_nan_update"] == 30
    (tmp_path / "empty").write_text("nothing\n")
    with pytest.raises(ValueError, match="log_format"):
        read_history(str(tmp_path / "empty"))


@pytest.fixture(scope="module")
def arguments(tiny_model, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("analysis")
    line = [
        "--checkpoint",
        tiny_model.checkpoint,
        "--data",
        tiny_model.data,
        "--user-dir",
        tiny_model.user_dir,
        "--device",
        "cpu",
    ]
    line += ["--subwords", tiny_model.subwords, "--out", folder / "analysis.json", "--beam", 2]
    line += ["--eval-capacity-factors", "0.5", "--thresholds", "0", "0.9", "--translate", 4, "--explore", 3]
    return [str(item) for item in line]


@pytest.fixture(scope="module")
def analysis(arguments) -> dict:
    assert analyse.main([*arguments, "--more-checkpoints", arguments[1]]) == 0
    with open(arguments[arguments.index("--out") + 1], encoding="utf-8") as file:
        return json.load(file, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_the_command_writes_all_figures(analysis):
    assert analysis["schema"] == analyse.SCHEMA
    assert analysis["data"] == {"set": "test", "sentences": 20, "skipped": 0}
    assert analysis["checkpoint"]["num_updates"] == 60
    assert list(analysis["layers"]) == ["encoder 0", "decoder 0"]
    assert [point["eval_capacity_factor"] for point in analysis["sweeps"]["capacity"]] == [0.5, None]
    assert analysis["sweeps"]["threshold"][0]["used"] == 1
    assert set(analysis["sweeps"]["threshold"][1]["translation"]) == {"sentences", "flops", "bleu", "chrf++"}
    # the same checkpoint again, over the same sentences, gives the same loss
    assert analysis["checkpoints"][0]["loss_bits"] == pytest.approx(analysis["quality"]["loss_bits"], rel=1e-6)
    assert analysis["sweeps"]["threshold"][1]["loss_bits"] == pytest.approx(analysis["quality"]["loss_bits"])
    assert len(analysis["explorer"]) == 3


def test_the_explorer_holds_the_weights_of_the_plan(analysis, tiny_model):
    loaded = load(
        str(tiny_model.checkpoint), data=str(tiny_model.data), user_dir=str(tiny_model.user_dir), device="cpu"
    )
    sentence = analysis["explorer"][0]
    pieces = [" ".join(sentence["source"][:-1]), " ".join(sentence["target"][1:])]
    sample = next(corpora.from_lines(loaded, pieces[:1], pieces[1:]).samples([[0]], loaded.device))
    with torch.no_grad(), record_plans(loaded.model) as plans:
        loaded.model(**sample["net_input"])
    for name, (plan,) in plans.items():
        for token, row in enumerate(sentence["routing"][forward_passes.short_label(name)]):
            of_token = plan.token_index_A == token  # one sentence: rows are its tokens
            want = dict(zip(plan.expert_index_A[of_token].tolist(), plan.weight_A[of_token].tolist(), strict=True))
            assert row[0] == len(want)
            assert dict(zip(row[1::2], row[2::2], strict=True)) == pytest.approx(want, abs=1e-3)


def test_raw_text_gives_the_figures_of_the_binarised_set(analysis, arguments, tiny_model, tmp_path):
    lines = tiny_model.source
    raw = tmp_path / "test.uk"
    raw.write_text("\n".join(lines) + "\n", encoding="utf-8")
    reference = tmp_path / "test.en"
    reference.write_text(
        "\n".join(" ".join(NUMBERS[w] for w in line.split()) for line in lines) + "\n", encoding="utf-8"
    )
    output = tmp_path / "raw.json"
    more = [
        "--source",
        str(raw),
        "--references",
        str(reference),
        "--out",
        str(output),
        "--translate",
        "0",
        "--explore",
        "0",
    ]
    assert analyse.main([*arguments, *more]) == 0
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["layers"]["encoder 0"]["rows"] == analysis["layers"]["encoder 0"]["rows"]
    assert found["quality"] == pytest.approx(analysis["quality"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--checkpoint", "absent.pt"], "no such file or folder: absent.pt"),
        (["--source", "x"], "needs --references and --subwords"),
        (["--explore", "-1"], "--explore (-1) must be at least 0"),
        (["--gen-subset", "absent"], "absent"),
    ],
)
def test_bad_arguments_are_named(arguments, more, message, capsys, tmp_path):
    output = tmp_path / "none.json"
    line = [part for part in arguments if part not in ("--subwords", arguments[arguments.index("--subwords") + 1])]
    assert analyse.main([*line, *more, "--out", str(output)]) == 1
    assert message in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--thresholds", "0.5,1.5"], "1.5 must be a probability mass"),
        (["--eval-capacity-factors", "0"], "must be > 0"),
    ],
)
def test_values_out_of_range_are_bad_arguments(arguments, more, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        analyse.main([*arguments, *more])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_with_nan_or_cut_short_is_refused(arguments, tiny_model, tmp_path, capsys):
    state = torch.load(tiny_model.checkpoint, weights_only=True)
    state["model"]["encoder.layers.0.moe.router.weight"][0, 0] = math.nan
    torch.save(state, tmp_path / "nan.pt")
    assert analyse.main([*arguments, "--checkpoint", str(tmp_path / "nan.pt")]) == 1
    assert "hold NaN or infinity" in capsys.readouterr().err
    (tmp_path / "cut.pt").write_bytes(tiny_model.checkpoint.read_bytes()[:5000])
    assert analyse.main([*arguments, "--checkpoint", str(tmp_path / "cut.pt")]) == 1
    assert "cut.pt" in capsys.readouterr().err


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

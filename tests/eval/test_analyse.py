"""eval.analyse: the command's figures, the explorer's weights, raw text, errors."""

import json
import math

import pytest
import torch

from eval import analyse
from eval.routing import corpus as corpora
from eval.routing import forward_passes
from eval.text.loading import load
from tests.eval.conftest import NUMBERS
from xmoe_fairseq.moe import record_plans

SOURCE, TARGET = ["▁a b ▁12 ,", "▁a"], ["b", "▁a ▁a"]


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
        (["--explore", "-1"], "--explore: must be 0 or more, got -1"),
    ],
)
def test_values_out_of_range_are_bad_arguments(arguments, more, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        analyse.main([*arguments, *more])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("change", [-1, 1])
def test_references_of_another_length_are_refused(arguments, tiny_model, tmp_path, capsys, change):
    count = len(tiny_model.source) + change
    (tmp_path / "test.en").write_text("one\n" * count)
    output = tmp_path / "none.json"
    assert analyse.main([*arguments, "--references", str(tmp_path / "test.en"), "--out", str(output)]) == 1
    assert f"test.en has {count} lines, the test set {count - change} sentences" in capsys.readouterr().err
    assert not output.exists()


def test_a_checkpoint_with_nan_or_cut_short_is_refused(arguments, tiny_model, tmp_path, capsys):
    state = torch.load(tiny_model.checkpoint, weights_only=True)
    state["model"]["encoder.layers.0.moe.router.weight"][0, 0] = math.nan
    torch.save(state, tmp_path / "nan.pt")
    assert analyse.main([*arguments, "--checkpoint", str(tmp_path / "nan.pt")]) == 1
    assert "hold NaN or infinity" in capsys.readouterr().err
    (tmp_path / "cut.pt").write_bytes(tiny_model.checkpoint.read_bytes()[:5000])
    assert analyse.main([*arguments, "--checkpoint", str(tmp_path / "cut.pt")]) == 1
    assert "cut.pt" in capsys.readouterr().err

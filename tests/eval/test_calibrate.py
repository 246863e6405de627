"""eval.calibrate: counted masses against the router's own count, budgets, tolerances, the copy that needs no flags."""

import json

import pytest
import torch

from eval import calibrate
from eval.routing.calibration import Calibration, Setting
from eval.routing.corpus import binarised
from eval.routing.layers import moe_layers
from eval.routing.masses import RouterMasses
from eval.text.loading import load
from eval.text.translator import Translator, TranslatorConfig
from tests.eval import tiny_routed
from xmoe_fairseq.moe.routers.threshold import count_to_reach


@pytest.fixture(scope="module")
def calibrated(tiny_model, tmp_path_factory):
    """Runs eval.calibrate on the tiny model, whose experts cost half of the dense FFN each; returns copy and report."""
    folder = tmp_path_factory.mktemp("calibrated")

    def run(*goal):
        copy, report = folder / f"{len(list(folder.iterdir()))}.pt", folder / "report.json"
        places = ["--checkpoint", str(tiny_model.checkpoint), "--out", str(copy), "--report", str(report)]
        data = ["--data", str(tiny_model.data), "--gen-subset", "test"]
        code = calibrate.main([*data, *places, "--device", "cpu", *goal])
        assert code == 0
        return copy, json.loads(report.read_text())

    return run


def test_counted_masses_give_the_routers_own_experts_per_token():
    loaded = tiny_routed.build(moe_sides="encoder")
    layers = moe_layers(loaded.model)
    name, layer = next(iter(layers.items()))
    torch.nn.init.normal_(layer.router.weight)
    x_TD, real_T = torch.randn(300, 8), torch.rand(300) < 0.8
    masses = RouterMasses({name: layer})
    with masses.watching():
        layer.router(x_TD, real_T, None)
    sorted_TE = (x_TD @ layer.router.weight.t()).softmax(-1)[real_T].sort(-1, descending=True).values
    assert masses.tokens(name) == int(real_T.sum())
    for threshold in (0.0, 0.25, 0.5, 0.75, 1.0):
        for limit in (4, 2):
            wanted_T = count_to_reach(sorted_TE, threshold).clamp(max=limit)
            assert masses.experts(name, threshold, limit) == pytest.approx(float(wanted_T.float().mean()), abs=0.01)
    assert masses.flops([1.0], 3) == pytest.approx(3 * layer.config.row_cost)
    assert masses.experts(name, masses.layer_threshold_for(name, 1.7, None), None) == pytest.approx(1.7, abs=1e-6)


def test_a_budget_is_met_here_and_nearly_met_elsewhere(calibrated):
    for budget, goal in ((0.75, []), (1.25, ["--per-layer"])):
        _, report = calibrated("--budget", str(budget), "--check-subset", "train", *goal)
        assert report["budget_met"]
        assert report["after"]["flops"] == pytest.approx(budget, rel=0.02)
        assert report["check"]["after"]["flops"] == pytest.approx(budget, rel=0.1)
        rivals = [p for p in report["measured"] if p["moe_threshold"] != report["before"]["moe_threshold"]]
        near = [p["loss_bits"] for p in rivals if abs(p["flops"] / budget - 1) < 0.005]
        assert report["after"]["loss_bits"] <= min(near)


def test_the_copy_needs_no_flags_and_no_batch(calibrated, tiny_model):
    copy, report = calibrated("--budget", "0.8")
    loaded = load(str(copy), data=str(tiny_model.data), device="cpu")
    setting = {layer.config.threshold for layer in moe_layers(loaded.model).values()}
    assert setting == {report["after"]["moe_threshold"]} != {0.9}
    again = Calibration(loaded, binarised(loaded, "test")).before
    assert again.loss_bits == pytest.approx(report["after"]["loss_bits"], rel=1e-9)
    assert again.flops == report["after"]["flops"]
    texts = []
    for size in (1, 200):
        config = TranslatorConfig(
            [str(copy)], str(tiny_model.data), "uk", "en", str(tiny_model.subwords), batch_size=size, beam=2
        )
        texts.append([each.text for each in Translator(config).translate(tiny_model.source)])
    assert texts[0] == texts[1]


def test_tolerance_takes_the_cheapest_that_keeps_the_loss(calibrated):
    _, free = calibrated("--max-loss", "9")
    assert free["after"]["flops"] == pytest.approx(0.5)  # one expert a token
    _, strict = calibrated("--max-loss", "0.002", "--per-layer")
    assert strict["after"]["flops"] < strict["before"]["flops"]
    assert strict["after"]["loss_bits"] <= strict["before"]["loss_bits"] + 0.002


def test_refusals(tiny_model, tmp_path, capsys):
    common = ["--data", str(tiny_model.data), "--checkpoint", str(tiny_model.checkpoint)]
    common += ["--gen-subset", "test", "--device", "cpu"]
    copy, report = tmp_path / "copy.pt", tmp_path / "report.json"

    def fails(*words, code=1):
        assert calibrate.main([*common, "--out", str(copy), "--report", str(report), *words]) == code
        return capsys.readouterr().err

    assert "--budget (0.4) is less than one expert a token, 0.5 of the dense FLOPs" in fails("--budget", "0.4")
    assert "--max-loss (-1.0) must be at least 0" in fails("--max-loss", "-1")
    switch = ["--model-overrides", "{'moe_router': 'switch'}"]
    assert "has moe_router switch: only moe_router threshold" in fails(*switch)
    assert not copy.exists()
    assert not report.exists()
    copy.symlink_to(tiny_model.checkpoint)
    assert "is an input; give another name" in fails("--budget", "1")
    copy.unlink()
    assert "nothing to do" in fails(*switch, "--skip-others", code=0)
    assert json.loads(report.read_text())["after"] is None
    assert not copy.exists()


def test_settings_are_one_number_or_a_list():
    assert Setting((0.5, 0.5), None).as_settings() == {"moe_threshold": 0.5, "moe_max_experts": None}
    assert Setting((0.5, 0.25), 3).as_settings() == {"moe_threshold": [0.5, 0.25], "moe_max_experts": 3}

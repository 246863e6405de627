"""eval.report: one offline page; numbers, call-outs, runs without MoE layers or with NaN, hostile text."""

import json
import math
import re

import pytest

from eval import analyse, report
from eval.page import figures, render
from eval.page.layer_figures import load_heatmap
from eval.page.sweep_figures import speed_figure
from eval.routing import corpus as corpora
from eval.routing import forward_passes, translation
from eval.run.record import Run
from tests.eval import tiny_routed

SOURCE, TARGET = ["▁a b ▁12 ,", "▁a"], ["b", "▁a ▁a"]


def make_analysis(loaded, **more) -> dict:
    corpus = corpora.from_lines(loaded, SOURCE, TARGET)
    result = {
        "schema": 1,
        "checkpoint": analyse.describe(loaded),
        "data": {"set": "test", "sentences": 2, "skipped": 0},
    }
    result |= forward_passes.observe(loaded, corpus, max_tokens=100)
    result |= {"history": None, "sweeps": {}, "checkpoints": [], "explorer": [], **more}
    result["problems"] = analyse.problems(result)
    return analyse.finite(result)


@pytest.fixture(scope="module")
def routed() -> dict:
    loaded = tiny_routed.hand_routed()
    sentences = [
        {"id": i, **sentence, "translation": "<b>text</b></script>", "score": -0.5, "reference": "ref\u2028erence"}
        for i, sentence in enumerate(translation.routing_of(loaded, SOURCE, TARGET))
    ]
    return make_analysis(loaded, explorer=sentences)


SCORES = {
    "scores": {
        "bleu": {"name": "BLEU", "score": 31.25, "mean": 31.2, "ci95": 1.5, "signature": "sig|a",
                 "bootstrap_signature": "sig|bs"},
        "chrf++": {"name": "chrF2++", "score": 55.0, "mean": None, "ci95": None, "signature": "sig|c"},
    },
    "training": {"valid_loss": 2.5, "train_loss": 2.0, "words_per_second": 1234.5},
    "generation": {"tokens_per_second": 99.0},
    "config": {"model": {"arch": "x", "moe_threshold": 0.9}, "task": {"data": "/somewhere"}},
}  # fmt: skip


def write_run(folder, analysis=None, scores=None):
    folder.mkdir()
    for name, content in (("analysis.json", analysis), ("scores.json", scores)):
        if content is not None:
            (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


def embedded(page: str, name: str) -> list:
    return json.loads(re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.S).group(1))


def test_a_page_holds_scores_figures_and_sentences_and_asks_no_network(routed, tmp_path):
    run = write_run(tmp_path / "xmoe", routed, SCORES)
    assert report.main([str(run), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert len(page.encode()) < render.MAX_BYTES
    assert "31.25 (95% interval 31.20 ± 1.50)" in page
    assert "sig|bs" in page
    assert not re.search(r'<(script|link|img|iframe)[^>]+(src|href)="(?!data:)', page)
    assert embedded(page, "sentences")[0]["sentences"] == routed["explorer"]
    keys = {figure["id"] for figure in embedded(page, "figures")}
    assert {"all-experts-per-layer", "all-positive-share", "run-0-load", "run-0-by-kind", "run-0-similarity"} <= keys


def test_dead_experts_are_called_out(routed):
    page = render.render([Run("r", routed)], title="t")
    assert "Look at this first" in page
    assert "encoder 1: 3 of 4 experts are dead" in page
    load = load_heatmap(Run("r", routed))
    assert load.traces[0]["text"] == [["", "", "", "✕"], ["✕", "✕", "✕", ""]]
    assert load.rows[0][-2:] == ["3", "none"]


def test_text_of_a_translation_cannot_become_markup(routed):
    page = render.render([Run("<i>r</i>", routed)], title="</title><script>")
    assert "<b>text</b>" not in page
    assert "<i>r</i>" not in page
    assert "</title><script>" not in page
    assert "\u2028" not in page


def test_comparison_shows_what_differs(routed, tmp_path):
    other = json.loads(json.dumps(SCORES))
    other["config"]["model"]["moe_threshold"] = 0.5
    other["config"]["task"]["data"] = "/elsewhere"
    runs = [Run("a", routed, SCORES), Run("b", routed, other)]
    assert render.configuration(runs)["differing"] == [["model.moe_threshold", "0.9", "0.5"]]
    page = render.render(runs, title="both")
    bars = next(figure for figure in embedded(page, "figures") if figure["id"] == "all-experts-per-layer")
    assert [trace["name"] for trace in bars["traces"]] == ["a", "b"]
    assert bars["traces"][0]["y"] == [pytest.approx(12 / 7), 1.0]
    with pytest.raises(ValueError, match="same name"):
        render.render([runs[0], runs[0]], title="x")


def test_a_dense_run_and_a_run_with_nan_have_sensible_pages(tmp_path):
    dense = make_analysis(tiny_routed.build("dense_transformer_tiny"))
    broken = json.loads(json.dumps(SCORES))
    broken["training"]["valid_loss"] = math.nan
    first = write_run(tmp_path / "dense", dense)
    second = write_run(tmp_path / "nan", None, broken)
    assert report.main([str(first), f"broken={second}", "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "dense: no mixture-of-experts layer" in page
    assert "broken: the last valid loss is not a number" in page
    assert "broken: no analysis.json" in page
    assert "not a number</td>" in page


def test_sweeps_and_benchmarks_become_figures(routed):
    point = {"flops": 0.5, "loss_bits": 3.0, "layers": {"encoder 0": {"dropped": 0.25}}}
    capacity = [{"eval_capacity_factor": 1.0, **point}, {"eval_capacity_factor": None, **point, "flops": 0.8}]
    run = Run("r", {**routed, "sweeps": {"capacity": capacity}})
    found = {figure.key: figure for figure in figures.comparison_figures([run])}
    assert found["capacity"].traces[0]["x"] == [0.5, 0.8]
    assert found["capacity"].traces[0]["text"] == ["capacity 1", "no limit"]
    assert found["dropped"].traces[0] | {"x": [1.0], "y": [0.25]} == found["dropped"].traces[0]
    speed = speed_figure([{"method": "ours", "case": "64 x 1024", "ms": 4.0, "flops": 2.0}])
    assert (speed.traces[0]["x"], speed.traces[0]["y"], speed.traces[0]["name"]) == ([2.0], [4.0], "ours")


def test_a_page_too_large_loses_sentences_first(routed, monkeypatch):
    many = {**routed, "explorer": [{**routed["explorer"][0], "id": i, "reference": "x" * 5000} for i in range(64)]}
    run = Run("r", many)
    full = len(render.render([run], title="t").encode())
    monkeypatch.setattr(render, "MAX_BYTES", full - 100_000)
    page = render.render([run], title="t")
    assert len(page.encode()) <= full - 100_000
    assert 1 <= len(embedded(page, "sentences")[0]["sentences"]) < 64


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no analysis.json and no scores.json"), ("{", "not valid JSON"), ('{"schema": 0}', "run it again")],
)
def test_a_run_that_cannot_be_read_is_named(content, message, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    if content:
        (folder / "analysis.json").write_text(content)
    assert report.main([str(folder), "--out", str(tmp_path / "page.html")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()

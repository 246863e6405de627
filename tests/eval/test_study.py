"""Studies: the YAML and its refusals, the commands, the statistics by hand, what the cells add up to."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from threading import Thread

import pytest
from scipy import stats

from eval.studies import collect, page, text
from eval.studies.reading import load_study
from eval.studies.running import SAVED, Job, Runner, duration
from eval.studies.statistics import holm, paired_test, spread

STUDY = """
title: Two methods
pairs:
  de-en: {train: t, valid: v, test: TEST, test_set: mix}
methods:
  dense: {config: dense.yaml, seeds: [1, 2, 3]}
  xmoe:
    {config: xmoe.yaml, title: XMoE 4 x 16, paper: xmoe_64x1024, set: {model.moe_top_k: null, optimization.lr: [0.1]}}
seeds: [1, 2]
set: {optimization.max_update: 20}
run: {vocab-size: 40, beam: 2}
calibrate: ["budget:1.0"]
"""


@pytest.fixture
def study_file(tmp_path: Path) -> Path:
    for name in ("dense", "xmoe"):
        (tmp_path / f"{name}.yaml").write_text("model: {}\n")
    path = tmp_path / "study.yaml"
    path.write_text(STUDY.replace("TEST", f"{tmp_path}/test"))
    return path


def test_a_study_is_runs_of_run_pair(study_file):
    study = load_study(study_file)
    assert [cell.name for cell in study.cells()] == [
        f"de-en/{name}" for name in ("dense/seed-1", "xmoe/seed-1", "dense/seed-2", "xmoe/seed-2", "dense/seed-3")
    ]
    command = " ".join(study.cell_command(study.cells()[3], Path("/out")))
    assert "--data-bin /out/data/de-en/data-bin --subword-model /out/data/de-en/subwords --test-set mix" in command
    assert "--seed 2 --set optimization.max_update=20 --set model.moe_top_k=null --set optimization.lr=[0.1]" in command
    assert command.endswith("--calibrate budget:1.0 --no-analysis --beam 2")
    assert "--no-analysis" not in study.cell_command(study.cells()[1], Path("/out"))
    assert study.data_command(study.pairs[0], Path("/out"))[-3:] == ["--vocab-size", "40", "--data-only"]


def test_a_pair_may_have_several_texts_with_methods_subwords_and_settings_of_their_own(study_file):
    own = "vocab-size: 30, methods: [xmoe], set: {optimization.max_update: 90}"
    small = f"  de-en.30k: {{train: t, valid: v, test: t, {own}}}\nmethods:"
    study_file.write_text(study_file.read_text().replace("methods:", small, 1))
    study = load_study(study_file)
    found = [cell.name for cell in study.cells() if cell.pair.name != "de-en"]
    assert found == ["de-en.30k/xmoe/seed-1", "de-en.30k/xmoe/seed-2"]
    data = study.data_command(study.pairs[1], Path("/out"))
    assert data[data.index("--pair") :][:4] == ["--pair", "de-en", "--out", "/out/data/de-en.30k"]
    assert data[-3:] == ["--vocab-size", "30", "--data-only"]
    commands = {cell.name: study.cell_command(cell, Path("/out")) for cell in study.cells()}
    assert "optimization.max_update=90" not in commands["de-en/xmoe/seed-1"]
    # the last --set of a key counts
    given = [word for word in commands["de-en.30k/xmoe/seed-1"] if word.startswith("optimization.max_update")]
    assert given == ["optimization.max_update=20", "optimization.max_update=90"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds: [1, 2]\n", "", "seeds is missing or empty"),
        ("test_set: mix", "set: {max_update: 20}", "pair de-en: set must be a mapping of GROUP.KEY to values"),
        ("test_set: mix", "methods: [moe]", r"pair de-en: methods must be a list of dense, xmoe, found \['moe'\]"),
        ("seeds: [1, 2]\n", "seeds: [1, 1]\n", r"seeds must be a list of different whole numbers .* found \[1, 1\]"),
        ("title:", "titel:", "unknown titel; known are title, pairs"),
        ("valid: v,", "", "pair de-en: valid missing"),
        ("config: dense.yaml", "config: other.yaml", "method dense: config 'other.yaml' is no file"),
        ("  dense:", "  a b:", "its names become folders"),
        ("beam: 2", "beem: 2", "run: beem is not one of subwords, vocab-size"),
        ("run:", "baseline: switch\nrun:", "baseline 'switch' is none of the methods dense, xmoe"),
        ("set: {optimization.max_update: 20}", "set: {max_update: 20}", "set must be a mapping of GROUP.KEY to values"),
        ("title:", "title: [", "not valid YAML"),
    ],
)
def test_refusals(study_file, old, new, message):
    study_file.write_text(study_file.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        load_study(study_file)


def test_statistics_by_hand_and_by_scipy():
    assert spread([1.0, 3.0]) == {"mean": 2.0, "sd": pytest.approx(2**0.5), "n": 2}
    assert spread([1.0])["sd"] is None
    group = [0.3, 0.5, -0.1]
    found, known = paired_test([group]), stats.ttest_1samp(group, 0.0)
    assert found["p"] == pytest.approx(known.pvalue)
    assert (found["low"], found["high"]) == pytest.approx(tuple(known.confidence_interval()))
    # means 2 and 6; squares 2 + 8 over 4 degrees of freedom: variance 2.5, error sqrt(2.5 (1/3 + 1/3)) / 2
    pooled = paired_test([[1.0, 2.0, 3.0], [4.0, 6.0, 8.0]])
    assert (pooled["mean"], pooled["df"]) == (4.0, 4)
    assert pooled["high"] - 4.0 == pytest.approx(2.776445 * 0.645497, rel=1e-5)
    assert paired_test([[0.5]])["p"] is None
    assert paired_test([[0.0, 0.0]])["p"] == 1.0
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": None}) == {
        "a": pytest.approx(0.03),
        "b": pytest.approx(0.06),
        "c": pytest.approx(0.06),
        "d": None,
    }


def write_cell(folder: Path, loss: float, lines: list[str], price: float | None) -> None:
    score = {"score": 10 * loss, "signature": "s"}
    scores = {"bleu": score, "chrf++": score}
    setting = {"moe_threshold": 0.5, "moe_max_experts": 2, "experts": 1.5}
    prices = {} if price is None else {
        "budget:1": {
            "before": {**setting, "loss_bits": loss, "flops": 3.0},
            "after": {**setting, "loss_bits": price, "flops": 1.0},
            "scores": scores,
        }
    }  # fmt: skip
    flops, used = (3.0, 6.0) if prices else (None, None)
    training = {"overall": {"flops": 3.0} if prices else {}, "layers": {}}
    report = {
        "training": {"best_valid_nll_loss": loss + 0.1, "updates": 20, "words_per_second": 100.0, "seconds": 9.0},
        "generation": {"tokens_per_second": 50.0},
        "evaluation": {"valid": {"loss_bits": loss, "flops": flops, "experts": used}},
        "routing": {"train": training},
        "flops_per_token": {"shared": 1e6, "moe_as_dense": 2e6 if prices else 0.0},
        "scores": scores,
        "calibrated": prices,
        "num_parameters": 7,
        "hypotheses": {"sha256": "h"},
        "commit": "c",
        "versions": {},
        "config": {},
    }
    (folder / "translations").mkdir(parents=True)
    (folder / "translations" / "test.en").write_text("".join(f"{line}\n" for line in lines))
    (folder / "scores.json").write_text(json.dumps(report))


def test_cells_add_up(study_file, tmp_path):
    study, out = load_study(study_file), tmp_path / "out"
    with pytest.raises(ValueError, match="no cell of the study is finished"):
        collect.collect(study, out)
    lines = [f"the {word} house is on the hill" for word in ("red", "old", "new", "big")]
    (tmp_path / "test.en").write_text("".join(f"{line}\n" for line in lines))
    for seed, dense, sparse in ((1, 3.0, 2.5), (2, 3.2, 2.8)):
        write_cell(out / "cells" / "de-en" / "dense" / f"seed-{seed}", dense, [line[4:] for line in lines], None)
        write_cell(out / "cells" / "de-en" / "xmoe" / f"seed-{seed}", sparse, lines, sparse + 0.01)
    content, speeds = collect.collect(study, out), collect.speeds(study, out)
    assert content["missing"] == ["de-en/dense/seed-3"]
    found = content["pairs"]["de-en"]["methods"]["xmoe"]
    assert found["over_seeds"]["dev_loss"]["mean"] == pytest.approx(2.65)
    assert found["seeds"]["1"]["mflops_inference"] == pytest.approx(1 + 2 * 3)
    assert found["seeds"]["1"]["mflops_training"] == pytest.approx(3 * 7)
    assert found["over_seeds"]["prices"]["budget:1"]["mflops"]["mean"] == pytest.approx(1 + 2 * 1)
    test = content["over_seeds"]["dev_loss"]["de-en"]["xmoe"]
    assert test["mean"] == pytest.approx(-0.45)
    assert test["p"] == pytest.approx(stats.ttest_rel([2.5, 2.8], [3.0, 3.2]).pvalue)
    assert "all pairs" not in content["over_seeds"]["dev_loss"]
    assert [row["method"] for row in content["order"]["dev_loss"]["de-en"]] == ["xmoe", "dense"]
    assert [row["method"] for row in content["order"]["bleu"]["de-en"]] == ["dense", "xmoe"]
    assert set(content["within_seeds"]["de-en"]["2"]["xmoe"]) == {"BLEU", "chrF2++"}
    shown = text.markdown(content, speeds)
    assert "| XMoE 4 x 16 " in shown
    assert "29.4/53.3" in shown  # the paper's cell
    assert "de-en: xmoe (2.650) —[p" in shown
    html = page.render(content, speeds, [])
    assert "(Fig 8 of the paper)" in html
    assert "Differences over seeds" in html
    assert '"name":"XMoE 4 x 16"' in html


def test_a_failed_job_does_not_stop_the_others_and_a_stop_starts_no_more(tmp_path):
    def job(name: str, code: str) -> Job:
        return Job(name, [sys.executable, "-c", code], tmp_path / f"{name}.log")

    told: list[str] = []
    jobs = [job("bad", "print('no disk'); raise SystemExit(3)"), job("good", "pass")]
    assert {done.name: done.code for done in Runner(jobs, 2, told.append).run()} == {"bad": 3, "good": 0}
    assert any("bad: failed (exit 3)" in line and "no disk" in line for line in told)
    saves = f"import signal, time\nsignal.signal(signal.SIGUSR1, lambda *_: exit({SAVED}))\nprint('up', flush=True)\n"
    runner = Runner([job(name, f"{saves}time.sleep(60)") for name in ("first", "second")], 1, told.append)

    def stop_when_up() -> None:
        while not (tmp_path / "first.log").exists() or "up" not in (tmp_path / "first.log").read_text():
            time.sleep(0.02)
        runner.stop()

    Thread(target=stop_when_up).start()
    ended = runner.run()
    assert [(one.name, one.code) for one in ended] == [("first", SAVED)]
    assert [duration(s) for s in (45, 600, 12000)] == ["45 s", "10 min", "3 h 20 min"]


def test_the_time_left_is_that_of_cells_which_an_earlier_run_has_not_finished(tmp_path):
    jobs = [Job(str(number), [], tmp_path / "log", done_before=number < 2) for number in range(6)]
    runner = Runner(jobs, 2, print)
    runner.waiting, runner.running, runner.ended = jobs[4:], jobs[3:4], jobs[:2]
    for job, seconds in zip(jobs, (1.0, 2.0, 600.0), strict=False):
        job.code, job.seconds = 0, seconds
    assert runner._seconds_left() is None  # nothing but what was done before
    runner.ended = jobs[:3]
    assert runner._seconds_left() == 600 * (2 + 0.5) / 2


LM_STUDY = """
pairs:
  en: {train: t, valid: v, test: TEST}
methods:
  dense: {config: dense.yaml, paper: dense, sweep: []}
  xmoe: {config: xmoe.yaml, paper: xmoe_64x384}
seeds: [1]
sweep: [0.5, 0.75, 1.0]
run: {vocab-size: 40, average: "last:2"}
"""


@pytest.fixture
def lm_study(study_file: Path) -> Path:
    study_file.write_text(LM_STUDY)
    return study_file


def test_a_study_of_language_models_is_runs_of_run_lm(lm_study):
    study = load_study(lm_study)
    data = " ".join(study.data_command(study.pairs[0], Path("/out")))
    assert "run_lm.sh --language en --out /out/data/en --train" in data
    assert data.endswith("--vocab-size 40 --data-only")
    dense, xmoe = (" ".join(study.cell_command(cell, Path("/out"))) for cell in study.cells())
    assert "--data-bin /out/data/en/data-bin --test-set TEST --config" in xmoe
    assert "--sweep 0.5 --sweep 0.75 --sweep 1 --calibrate loss:0.01" in xmoe
    assert "--sweep" not in dense


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("pairs:", "pairs:\n  de-en: {train: t, valid: v, test: w}", "a study is of one kind"),
        ("  en:", "  english:", "english must be two languages such as de-en, or one such as en"),
        ("average:", "beam:", "run: beam is not one of subwords, vocab-size, workers, average, max-tokens"),
        ("0.75, 1.0]", "0.75, 2]", r"sweep must be a list of different thresholds in \[0, 1\]"),
        ("  en:", "  de-en:", "sweep: thresholds are swept for language models"),
    ],
)
def test_refusals_of_language_models(lm_study, old, new, message):
    lm_study.write_text(lm_study.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        load_study(lm_study)


def write_lm_cell(folder: Path, perplexity: float, sweep: list[tuple[float, float, float]]) -> None:
    """``sweep``: threshold, FLOPs, perplexity on both sets."""
    points = [
        {"threshold": t, "flops": flops, "experts": 8 * flops, "perplexity": p, "loss_bits": math.log2(p)}
        for t, flops, p in sweep
    ]
    part = {
        "loss_bits": math.log2(perplexity), "perplexity": perplexity, "word_perplexity": 9 * perplexity,
        "bits_per_byte": 1.5, "flops": 2.0 if sweep else None, "experts": 4.0 if sweep else None, "sweep": points,
    }  # fmt: skip
    report = {
        "evaluation": {"valid": part, "test": part},
        "training": {"updates": 20, "words_per_second": 100.0, "seconds": 9.0},
        "routing": {"train": {"overall": {"flops": 1.5} if sweep else {}, "layers": {}}},
        "flops_per_token": {"shared": 1e6, "moe_as_dense": 2e6 if sweep else 0.0},
        "calibrated": {},
        "num_parameters": 7,
        "commit": "c",
        "versions": {},
        "config": {},
    }
    folder.mkdir(parents=True)
    (folder / "scores.json").write_text(json.dumps(report))


def test_cells_of_language_models_add_up(lm_study, tmp_path):
    study, out = load_study(lm_study), tmp_path / "out"
    write_lm_cell(out / "cells/en/dense/seed-1", 20.0, [])
    # 1 % above the perplexity at t = 1 is 19.19: 0.75 is the cheapest that keeps to it, though 0.5 is cheaper
    sweep = [(0.5, 0.25, 19.3), (0.75, 0.5, 19.1), (1.0, 1.0, 19.0)]
    write_lm_cell(out / "cells/en/xmoe/seed-1", 18.5, sweep)
    content, speeds = collect.collect(study, out), collect.speeds(study, out)
    assert (content["kind"], content["within_seeds"]) == ("language model", {})
    found = content["pairs"]["en"]["methods"]["xmoe"]["over_seeds"]
    assert found["sweep"]["cheapest"] == 0.75
    assert found["sweep"]["points"][1]["mflops"]["mean"] == pytest.approx(1 + 2 * 0.5)
    assert found["mflops_inference"]["mean"] == pytest.approx(1 + 2 * 2.0)
    assert found["mflops_training"]["mean"] == pytest.approx(3 * (1 + 2 * 1.5))
    assert content["over_seeds"]["perplexity"]["en"]["xmoe"]["mean"] == pytest.approx(-1.5)
    assert [row["method"] for row in content["order"]["perplexity"]["en"]] == ["xmoe", "dense"]
    shown = text.markdown(content, speeds)
    assert "There is one seed of each method, so no test over seeds" in shown
    assert "| p (Holm)" not in shown
    assert "xmoe (18.50) → dense (20.00)" in shown
    assert (
        "down to t = 0.75, where MoE FLOPs / dense are 0.500 instead of 1.000 and the test perplexity differs" in shown
    )
    assert "19.46/19.97" in shown  # the paper's cell
    html = page.render(content, speeds, [])
    assert "test perplexity as the threshold falls" in html
    assert "Differences within seeds" not in html

"""eval.quantisation and eval.translate with int8 weights: the report, one translation per sentence on every path."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from eval import quantisation, serve
from eval.translate import Translator, TranslatorConfig
from xmoe_fairseq.checkpoints import quantise
from xmoe_fairseq.moe.native import rows
from xmoe_fairseq.moe.native.library import available_paths


@pytest.fixture(scope="module")
def int8_file(tiny_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("int8") / "int8.pt"
    quantise.main(["--checkpoint", str(tiny_model.checkpoint), "--out", str(path), "--what", "all"])
    return path


@pytest.fixture(scope="module")
def config(tiny_model, int8_file) -> TranslatorConfig:
    return TranslatorConfig(
        paths=[str(int8_file)],
        data=str(tiny_model.data),
        source_lang="uk",
        target_lang="en",
        subwords=str(tiny_model.subwords),
        user_dir=str(tiny_model.user_dir),
        max_len_b=40,
        device="cpu",
    )


def test_translations_depend_neither_on_the_batch_nor_on_the_instructions(tiny_model, config, monkeypatch):
    results = []
    for path in available_paths():
        monkeypatch.setattr(rows, "chosen_path", lambda path=path: path)
        for batch_size in (1, 3, 20):
            translator = Translator(replace(config, batch_size=batch_size))
            results.append([line.tokens for line in translator.translate(tiny_model.source)])
    assert len(results) == 3 * len(available_paths())
    assert all(other == results[0] for other in results[1:])
    assert len(set(results[0])) > 10


def test_the_report(tiny_model, config, int8_file, tmp_path, capsys):
    references = tmp_path / "ref.en"
    references.write_text("one two three\n" * len(tiny_model.source), "utf-8")
    source = tmp_path / "source.uk"
    source.write_text("".join(f"{line}\n" for line in tiny_model.source), "utf-8")
    out = tmp_path / "report.json"
    arguments = ["--checkpoints", tiny_model.checkpoint, int8_file, "--data", tiny_model.data, "--source", source]
    arguments += ["--source-lang", "uk", "--target-lang", "en", "--subwords", tiny_model.subwords, "--device", "cpu"]
    arguments += ["--references", references, "--gen-subset", "train", "--out", out]
    assert quantisation.main([str(argument) for argument in arguments]) == 0
    report = json.loads(out.read_text())
    before, after = report["models"]
    assert before["weights"] == "float"
    assert after["weights"] == "experts int8, linear maps and embeddings int8; for inference"
    assert before["same_translations"] == 1.0
    assert abs(before["loss_bits"] - after["loss_bits"]) < 0.05
    assert after["loss_bits"] != before["loss_bits"]
    scores = report["tests"]["bootstrap"]["systems"][1]["scores"]
    assert {"BLEU", "chrF2++"} <= scores.keys()
    assert "approximate-randomisation" in capsys.readouterr().out


def test_one_checkpoint_is_too_few(tiny_model, capsys):
    arguments = ["--checkpoints", "a.pt", "--data", "d", "--source", "s", "--references", "r", "--subwords", "m"]
    assert quantisation.main([*arguments, "--source-lang", "uk", "--target-lang", "en"]) == 1
    assert "at least one quantised one" in capsys.readouterr().err


def test_the_page_serves_int8(tiny_model, int8_file):
    arguments = ["--checkpoint", int8_file, "--data", tiny_model.data, "--subwords", tiny_model.subwords]
    page = serve.build_page(serve._parser().parse_args([*map(str, arguments), "--device", "cpu"]))
    text = tiny_model.source[0]
    answer = page.answer(json.dumps({"text": text, "threshold": 0}).encode())
    assert answer["translation"]
    assert answer["used"] == 1
    assert answer["moe_flops"] > 0

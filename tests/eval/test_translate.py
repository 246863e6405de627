"""eval.translate: the same hypotheses as fairseq-generate, order, long lines, processes, errors."""

import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_prep import subword_models
from eval import translate
from eval.text.subwords import load_subwords
from eval.translate import Translator, TranslatorConfig


@pytest.fixture(scope="module")
def config(tiny_model) -> TranslatorConfig:
    return TranslatorConfig(
        paths=[str(tiny_model.checkpoint)],
        data=str(tiny_model.data),
        source_lang="uk",
        target_lang="en",
        subwords=str(tiny_model.subwords),
        user_dir=str(tiny_model.user_dir),
        beam=4,
        max_len_b=40,
        device="cpu",
    )


@pytest.fixture(scope="module")
def translator(config: TranslatorConfig) -> Translator:
    return Translator(config)


def arguments(config: TranslatorConfig, *more: object) -> list[str]:
    line = ["--checkpoint", *config.paths, "--user-dir", config.user_dir, "--data", config.data]
    line += ["--source-lang", config.source_lang, "--target-lang", config.target_lang, "--cpu"]
    line += ["--subwords", config.subwords, "--beam", config.beam, "--max-len-b", config.max_len_b, *more]
    return [str(item) for item in line]


def test_hypotheses_and_scores_are_those_of_fairseq_generate(tiny_model, config, translator, run_fairseq):
    output = run_fairseq(
        "generate", config.data, "--path", config.paths[0], "--user-dir", config.user_dir, "--cpu",
        "--source-lang", "uk", "--target-lang", "en", "--beam", 4, "--max-len-b", 40, "--batch-size", 7,
        "--required-batch-size-multiple", 1, "--num-workers", 0,
        "--bpe", "sentencepiece", "--sentencepiece-model", tiny_model.subwords / "joint.model",
    )  # fmt: skip
    found = {int(n): (text, float(score)) for n, score, text in re.findall(r"^D-(\d+)\t(\S+)\t(.*)$", output, re.M)}
    translations = translator.translate(tiny_model.source)
    assert [t.text for t in translations] == [found[n][0] for n in range(len(tiny_model.source))]
    assert len({t.text for t in translations}) > 10  # a model with one translation for everything would prove nothing
    for n, translation in enumerate(translations):  # fairseq prints base 2
        assert translation.score / math.log(2) == pytest.approx(found[n][1], rel=1e-4)
        assert translation.text == translator.decode(translation.tokens)


def test_a_model_file_serves_as_well_as_the_folder(tiny_model, config, translator):
    single = Translator(replace(config, subwords=str(tiny_model.subwords / "joint.model")))
    assert single.translate(tiny_model.source[:5]) == translator.translate(tiny_model.source[:5])


def test_subword_nmt_codes_are_read(tmp_path):
    lines = "low lower lowest new newer newest wide wider widest\n" * 9
    (tmp_path / "raw").write_text(lines)
    settings = subword_models.Settings("uk", "en", tool="subword-nmt", vocab_size=24)
    subword_models.learn([tmp_path / "raw", tmp_path / "raw"], tmp_path / "codes", settings)
    for path in (tmp_path / "codes", tmp_path / "codes" / "joint.codes"):
        loaded = load_subwords(str(path), "uk", "en")
        assert "@@" in loaded.encode("lowest wider")
        assert loaded.decode(loaded.encode("lowest wider")) == "lowest wider"


def test_empty_lines_stay_and_order_is_kept(tiny_model, translator):
    lines = ["", tiny_model.source[3], "   ", tiny_model.source[0], tiny_model.source[3]]
    texts = [t.text for t in translator.translate(lines)]
    alone = [translator.translate([line])[0].text for line in lines]
    assert texts == alone
    assert texts[0] == texts[2] == ""
    assert texts[1] == texts[4] != ""
    assert translator.translate([]) == []


def test_a_long_line_is_cut_at_sentences_and_joined(tiny_model, config):
    short = Translator(replace(config, max_length=30))
    sentences = [line + "." for line in tiny_model.source if len(short.encode(line + ".")) > 15][:3]
    whole = short.translate([" ".join(sentences)])[0]
    parts = short.translate(sentences)
    assert whole.num_chunks == 3
    assert whole.text == " ".join(part.text for part in parts)
    assert min(p.score for p in parts) <= whole.score <= max(p.score for p in parts)


def test_a_line_beyond_the_positions_of_the_model_is_translated(translator):
    assert translator.max_length == 63
    long = translator.translate(["один два три чотири " * 100])[0]
    assert long.num_chunks > 5
    assert long.text


def test_a_long_line_is_an_error_on_request(config):
    strict = Translator(replace(config, max_length=5, split_long=False))
    with pytest.raises(ValueError, match=r"line 2 has \d+ subwords, the limit is 5"):
        strict.translate(["два", "один два три чотири"])


def test_truncated_output_is_marked(config):
    assert Translator(replace(config, max_len_b=2)).translate(["один два три чотири"])[0].truncated
    assert not Translator(config).translate(["один"])[0].truncated


@pytest.mark.slow  # two more interpreters import torch and fairseq
def test_the_command_with_two_processes_gives_the_same_text(tiny_model, config, translator, tmp_path, capsys):
    lines = [*tiny_model.source, "", tiny_model.source[0]]
    (tmp_path / "in.uk").write_text("\n".join(lines), "utf-8")  # no newline at the end
    files = ["--input", tmp_path / "in.uk", "--out", tmp_path / "out.en"]
    assert translate.main(arguments(config, "--workers", 2, *files)) == 0
    expected = [translation.text for translation in translator.translate(lines)]
    assert (tmp_path / "out.en").read_text("utf-8") == "".join(f"{line}\n" for line in expected)
    assert "1 of 22 lines are empty" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.uk", "out.en"]


def failing(config: TranslatorConfig, tmp_path: Path, raw: bytes, capsys, *more: object) -> str:
    """Standard error of a run that must fail and leave an older output as it was."""
    (tmp_path / "in").write_bytes(raw)
    (tmp_path / "out").write_text("older\n")
    code = translate.main(arguments(config, "--input", tmp_path / "in", "--out", tmp_path / "out", *more))
    assert code == 1
    assert (tmp_path / "out").read_text() == "older\n"
    assert not list(tmp_path.glob(".out*"))
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"good\nbad \xff\n", "line 2: invalid UTF-8"),
        (b"\xef\xbb\xbfgood\n", "byte order mark"),
        (b"a\0b\n", "line 1: holds a NUL"),
        ("a\u2028b\n".encode(), "U+2028"),
        (b"", "has no lines"),
    ],
)
def test_bad_input_is_named(config, tmp_path, capsys, raw, message):
    assert message in failing(config, tmp_path, raw, capsys)


def test_bad_settings_are_named(config, tmp_path, capsys):
    def message(**change):
        return failing(replace(config, **change), tmp_path, "два\n".encode(), capsys)

    assert "no such file: nowhere.pt" in message(paths=["nowhere.pt"])
    assert "no dict.xx.txt; it has en, uk" in message(source_lang="xx")
    assert "trained for uk-en, asked for en-uk" in message(source_lang="en", target_lang="uk")
    with pytest.raises(SystemExit, match="2"):
        message(beam=0)
    assert "argument --beam: must be 1 or more, got 0" in capsys.readouterr().err
    assert "--device cuda:64: torch sees" in failing(config, tmp_path, b"a\n", capsys, "--device", "cuda:64")
    assert "max_len_a (0.0) and max_len_b (0) must not be negative, nor both 0" in message(max_len_b=0)
    replace(config, max_len_a=1.5, max_len_b=0).check()
    assert "lenpen (nan) must be a number" in failing(config, tmp_path, b"a\n", capsys, "--lenpen", "nan")
    assert "out: is an input; give another name" in failing(
        config, tmp_path, b"a\n", capsys, "--input", tmp_path / "out"
    )
    assert "expected a dictionary" in failing(config, tmp_path, b"a\n", capsys, "--model-overrides", "[1")


def test_broken_files_are_named(tiny_model, config, tmp_path):
    def message(**change) -> str:
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            Translator(replace(config, **change))
        return str(caught.value)

    whole = tiny_model.checkpoint.read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    assert "without the table that ends the file" in message(paths=[str(tmp_path / "cut.pt")])
    (tmp_path / "text.pt").write_text("no checkpoint")
    assert "not a checkpoint that torch wrote" in message(paths=[str(tmp_path / "text.pt")])
    (tmp_path / "empty").mkdir()
    assert "cannot be read as a folder of data_prep" in message(subwords=str(tmp_path / "empty"))
    (tmp_path / "spm.model").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as a sentencepiece model" in message(subwords=str(tmp_path / "spm.model"))
    (tmp_path / "codes").write_text("one two three four\n")
    assert "cannot be read as subword-nmt codes" in message(subwords=str(tmp_path / "codes"))
    shutil.copytree(tiny_model.data, tmp_path / "other")
    (tmp_path / "other" / "dict.uk.txt").write_text("один 1\n")
    (tmp_path / "other" / "dict.en.txt").write_text("один 1\n")
    assert "does not fit the dictionaries" in message(data=str(tmp_path / "other"))


def test_a_checkpoint_with_forbidden_types_is_refused(tiny_model, config, tmp_path):
    state = torch.load(tiny_model.checkpoint)
    state["intruder"] = Path("x")
    torch.save(state, tmp_path / "intruder.pt")
    with pytest.raises(ValueError, match=r"refused: loading it would call pathlib.* harmless types"):
        Translator(replace(config, paths=[str(tmp_path / "intruder.pt")]))


def test_overrides_reach_the_model(config, translator):
    changed = Translator(replace(config, model_overrides={"max_source_positions": 32}))
    assert (translator.max_length, changed.max_length) == (63, 31)

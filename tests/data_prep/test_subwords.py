"""Round trips, dictionaries that agree with the models, errors that name the largest vocabulary."""

import io
import json
import re

import pytest
from fairseq.data import Dictionary

from data_prep import phrases, subword_coding, subword_models, subwords
from data_prep.textio import DataError


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    phrases.write_corpus(folder, "uk", phrases.make_corpus("uk", {"test": 50, "train": 300}, seed=1))
    return folder


def learn(text, out, *flags, split="train"):
    inputs = ["--inputs", str(text / f"{split}.uk"), str(text / f"{split}.en")]
    return subwords.main(["learn", *inputs, "--out", str(out), *flags])


@pytest.fixture(scope="module", params=["sentencepiece", "subword-nmt"])
def folder(request, text, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param)
    assert learn(text, out, "--tool", request.param, "--vocab-size", "500") == 0
    return out


def test_decode_undoes_encode_line_by_line(text, folder, tmp_path):
    lines = (text / "train.uk").read_text(encoding="utf-8") + "\n   \nx  y\n"
    (tmp_path / "raw").write_text(lines, encoding="utf-8")
    for command, source, sink in (("encode", "raw", "pieces"), ("decode", "pieces", "back")):
        paths = ["--input", str(tmp_path / source), "--out", str(tmp_path / sink)]
        assert subwords.main([command, "--subwords", str(folder), *paths]) == 0
    expected = [" ".join(line.split()) for line in lines.split("\n")]
    assert (tmp_path / "back").read_text(encoding="utf-8").split("\n") == expected
    assert (tmp_path / "pieces").read_text(encoding="utf-8").count("\n") == lines.count("\n")


def test_separators_inside_a_line_never_make_a_second_line(folder):
    coder = subword_coding.Coder(folder)
    source, sink = io.BytesIO("три\u2028два\u0085один\x0bраз\n\nкінець".encode()), io.BytesIO()
    assert subword_coding.transform(coder.encode, source, sink, "text") == 3
    assert len(sink.getvalue().decode().splitlines()) == 3
    assert coder.decode(sink.getvalue().decode().split("\n")[:3]) == ["три два один раз", "", "кінець"]


def test_fairseq_reads_the_dictionary_and_knows_every_piece(text, folder):
    dictionary, coder = Dictionary.load(str(folder / "dict.txt")), subword_coding.Coder(folder)
    lines = [line for language in ("uk", "en") for line in (text / f"train.{language}").read_text("utf-8").split("\n")]
    pieces = {piece for line in coder.encode(lines) for piece in line.split(" ") if piece}
    assert pieces
    assert [piece for piece in pieces if dictionary.index(piece) == dictionary.unk()] == []


def test_sentencepiece_dictionary_is_the_model_without_special_pieces(text, tmp_path):
    learn(text, tmp_path, "--vocab-size", "500")
    tokens = [line.rsplit(" ", 1)[0] for line in (tmp_path / "dict.txt").read_text("utf-8").split("\n")[:-1]]
    assert len(tokens) == 497
    assert not {"<unk>", "<s>", "</s>"} & set(tokens)


def test_a_token_named_like_a_special_one_gets_its_own_index(tmp_path):
    (tmp_path / "dict.txt").write_text(subword_models.dictionary_text([("a", 9), ("<pad>", 5)]))
    dictionary = Dictionary.load(str(tmp_path / "dict.txt"))
    assert dictionary.index("<pad>") not in (dictionary.pad(), dictionary.unk())


def test_learning_twice_gives_equal_files(text, folder, tmp_path):
    tool = json.loads((folder / "subwords.json").read_text())["tool"]
    learn(text, tmp_path, "--tool", tool, "--vocab-size", "500")
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


@pytest.mark.parametrize("tool", ["sentencepiece", "subword-nmt"])
def test_too_large_a_vocabulary_names_the_largest(text, tmp_path, tool, capfd):
    assert learn(text, tmp_path / "out", "--tool", tool, "--vocab-size", "90000", split="test") == 1
    assert not (tmp_path / "out").exists()
    found = re.search(r"--vocab-size 90000 for uk\+en: the text yields at most (\d+); give", capfd.readouterr().err)
    most = found[1]
    assert learn(text, tmp_path / "out", "--tool", tool, "--vocab-size", most, split="test") == 0


@pytest.mark.parametrize("tool", ["sentencepiece", "subword-nmt"])
def test_too_small_a_vocabulary(text, tmp_path, tool, capfd):
    assert learn(text, tmp_path, "--tool", tool, "--vocab-size", "20") == 1
    needed = r"--vocab-size 20 for uk\+en: the characters alone need \d+; give more than"
    assert re.search(needed, capfd.readouterr().err)


def test_separate_models_want_the_language(text, tmp_path):
    learn(text, tmp_path, "--vocab-size", "400", "--separate")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["dict.en.txt", "dict.uk.txt", "en.model", "subwords.json", "uk.model"]
    assert subword_coding.Coder(tmp_path, "en").encode(["and"]) == ["▁and"]
    with pytest.raises(DataError, match="--language None: these subwords want uk or en"):
        subword_coding.Coder(tmp_path)


def test_byte_fallback_restores_unseen_characters(text, tmp_path):
    learn(text, tmp_path, "--vocab-size", "700", "--byte-fallback", "--normalization", "identity")
    coder = subword_coding.Coder(tmp_path)
    line = "日本 ½ ²"
    assert coder.decode(coder.encode([line])) == [line]
    dictionary = Dictionary.load(str(tmp_path / "dict.txt"))
    assert all(dictionary.index(piece) != dictionary.unk() for piece in coder.encode([line])[0].split())


def test_sampling_is_even_and_keeps_everything_below_the_limit(tmp_path):
    (tmp_path / "numbers").write_text("".join(f"{number}\n" for number in range(100)))
    assert list(subword_models.sampled_lines(tmp_path / "numbers", 4)) == ["0", "25", "50", "75"]
    assert len(list(subword_models.sampled_lines(tmp_path / "numbers", 100))) == 100
    assert len(list(subword_models.sampled_lines(tmp_path / "numbers", 0))) == 100


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--byte-fallback"], "--byte-fallback: subword-nmt has no such setting"),
        (["--normalization", "nfkc"], "--normalization: subword-nmt has no such setting"),
    ],
)
def test_settings_the_tool_does_not_have(text, tmp_path, flags, message, capfd):
    assert learn(text, tmp_path, "--tool", "subword-nmt", *flags) == 1
    assert message in capfd.readouterr().err


def test_missing_or_damaged_subwords(folder, tmp_path):
    with pytest.raises(DataError, match=r"subwords\.json: no such file; learn subwords first"):
        subword_coding.Coder(tmp_path)
    with pytest.raises(DataError, match="--language de: these subwords want uk or en"):
        subword_coding.Coder(folder, "de")
    for damaged in ("{", "[]", '{"source": "uk"}', '{"source": "uk", "target": "en", "more": 1}'):
        (tmp_path / "subwords.json").write_text(damaged)
        with pytest.raises(DataError, match=r"subwords\.json: not settings of subwords, or damaged"):
            subword_coding.Coder(tmp_path)
    (tmp_path / "subwords.json").write_text('{"source": "uk", "target": "en"}')
    (tmp_path / "joint.model").write_bytes(b"no model")
    with pytest.raises(DataError, match="no sentencepiece model, or a damaged one; learn it again"):
        subword_coding.Coder(tmp_path)


def test_invalid_text_says_where_to_look(folder):
    with pytest.raises(DataError, match=r"text: invalid UTF-8 after line 0; check it with xmoe prepare validate"):
        subword_coding.transform(subword_coding.Coder(folder).encode, io.BytesIO(b"\xff\n"), io.BytesIO(), "text")


def test_encode_cuts_longer_lines_and_counts_them(text, folder, tmp_path, capsys):
    (tmp_path / "raw").write_text("one two three four five six seven\none\n", encoding="utf-8")
    paths = ["--subwords", str(folder), "--input", str(tmp_path / "raw"), "--out", str(tmp_path / "pieces")]
    assert subwords.main(["encode", *paths]) == 0
    whole = [line.split(" ") for line in (tmp_path / "pieces").read_text(encoding="utf-8").splitlines()]
    most = len(whole[0]) - 1
    flags = ["--max-length", str(most), "--report", str(tmp_path / "report.json")]
    assert subwords.main(["encode", *paths, *flags]) == 0
    cut = [line.split(" ") for line in (tmp_path / "pieces").read_text(encoding="utf-8").splitlines()]
    assert cut == [whole[0][:most], whole[1]]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == {"lines": 2, "longest": most + 1, "max_length": most, "cut": 1}
    assert "1 of 2 lines cut" in capsys.readouterr().err


def test_subwords_of_one_language(text, tmp_path):
    out = tmp_path / "subwords"
    assert subwords.main(["learn", "--inputs", str(text / "train.en"), "--out", str(out), "--vocab-size", "300"]) == 0
    coder = subwords.Coder(out, "en")
    assert coder.decode(coder.encode(["the first of May"])) == ["the first of May"]
    assert len(Dictionary.load(str(out / "dict.txt"))) == 300 - 3 + 4  # sentencepiece's own three, fairseq's four
    with pytest.raises(DataError, match="--language uk: these subwords want en"):
        subwords.Coder(out, "uk")

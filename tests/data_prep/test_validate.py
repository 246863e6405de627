"""Every problem of raw parallel text gets its own error: file, line, value, what is allowed, the way out."""

import json

import pytest

from data_prep import validate as module


def write_pair(folder, source: bytes, target: bytes):
    (folder / "text.uk").write_bytes(source)
    (folder / "text.en").write_bytes(target)
    return str(folder / "text")


def problems(folder, source: bytes, target: bytes = b"one\ntwo\n", **limits):
    return module.validate(write_pair(folder, source, target), "uk", "en", **limits).problems


def test_valid_text_prints_its_count(tmp_path, capsys):
    prefix = write_pair(tmp_path, "один\nдва".encode(), b"one\ntwo\n")
    assert module.main(["--pair", "uk-en", prefix]) == 0
    assert capsys.readouterr().out == f"{prefix}.{{uk,en}}: 2 valid pairs of lines\n"


def test_unequal_counts_say_both(tmp_path):
    (problem,) = problems(tmp_path, b"a\nb\nc\n")
    assert "text.uk has 3 lines" in problem
    assert "text.en has 2" in problem
    assert "export both sides together again" in problem


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (b"ok\nab\xffcd\n", "text.uk:2: byte 2 of the line is 0xFF, not valid UTF-8; convert with iconv"),
        (
            b"\xff\xfea\x00\nb\n",
            "text.uk:1: byte 0 of the line is 0xFF, not valid UTF-8 (the file looks like UTF-16)",
        ),
        (
            b"\xef\xbb\xbfok\nb\n",
            "text.uk:1: begins with a byte order mark (EF BB BF); plain UTF-8 is needed",
        ),
        (b"ok\na\x00b\n", "text.uk:2: NUL at character 2"),
        (b"ok\na\rb\n", "text.uk:2: a bare carriage return (U+000D) at character 2"),
        (b"ok\na\x0bb\n", "text.uk:2: a vertical tab (U+000B) at character 2"),
        (b"ok\na\x0cb\n", "text.uk:2: a form feed (U+000C) at character 2"),
        ("ok\na\u0085b\n".encode(), "text.uk:2: a next-line control (U+0085) at character 2"),
        ("ok\na\u2028b\n".encode(), "text.uk:2: a line separator (U+2028) at character 2"),
        ("ok\na\u2029b\n".encode(), "text.uk:2: a paragraph separator (U+2029) at character 2"),
        (b"ok\n \t\n", "text.uk:2: empty line; every line needs text on both sides"),
        (b"ok\nb\r\n", "text.uk:2: Windows line ends (CR LF), said once a file"),
    ],
)
def test_each_bad_line_gets_its_error(tmp_path, source, expected):
    (problem,) = problems(tmp_path, source)
    assert expected in problem
    assert "xmoe prepare clean --pair uk-en" in problem


def test_over_long_line_names_length_and_limit(tmp_path):
    (problem,) = problems(tmp_path, b"ok\n" + b"x" * 12 + b"\n", max_chars=10)
    assert "text.uk:2: 12 characters, at most 10 are allowed; raise --max-chars" in problem


def test_missing_language_names_what_is_there(tmp_path):
    (tmp_path / "text.en").write_text("one\n")
    (problem,) = module.validate(tmp_path / "text", "uk", "en").problems
    assert "text.uk: no such file" in problem
    assert "has text.en" in problem


def test_empty_file(tmp_path):
    (problem,) = problems(tmp_path, b"")
    assert "text.uk: empty file; at least one line is needed" in problem


def test_lists_ten_problems_and_counts_the_rest(tmp_path, capsys):
    prefix = write_pair(tmp_path, b"\n" * 13, b"x\n" * 13)
    assert module.main(["--pair", "uk-en", prefix]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 11
    assert errors[-1].endswith("3 more problems not listed")


def test_the_suggested_command_mends_the_text(tmp_path):
    from data_prep import clean

    prefix = write_pair(
        tmp_path,
        "\ufeffперше речення\r\nдруге\u2028речення\nтретє\x00речення\n".encode(),
        b"a first\na second\na third\n",
    )
    assert module.validate(prefix, "uk", "en").total == 4
    assert clean.main(["--pair", "uk-en", "--input", prefix, "--out", f"{prefix}.clean", "--workers", "1"]) == 0
    assert module.validate(f"{prefix}.clean", "uk", "en").total == 0


@pytest.mark.parametrize("pair", ["uk", "uk-uk", "UK-EN", "uk_en"])
def test_bad_pairs_exit_with_2(pair, capsys):
    with pytest.raises(SystemExit) as exit_info:
        module.main(["--pair", pair, "text"])
    assert exit_info.value.code == 2
    assert "argument --pair" in capsys.readouterr().err


def test_a_line_in_which_nothing_can_be_seen_is_empty(tmp_path):
    (problem,) = problems(tmp_path, "ok\n\u200e\n".encode())
    assert "text.uk:2: no visible character; every line needs text on both sides" in problem


DEUTSCH = "Das ist der Hund, der mit der Katze in dem Garten spielt.\n"
ENGLISH = "This is the dog that plays with the cat in the garden.\n"


@pytest.mark.parametrize(
    ("pair", "source", "target", "swapped"),
    [
        ("uk-en", "Це собака\n", "This is a dog\n", False),
        ("uk-en", "This is a dog\n", "Це собака\n", True),
        ("uk-en", "Mozilla Firefox\n", "Mozilla Firefox\n", False),
        ("uk-en", "1984\n", "1984\n", False),
        ("zh-en", "They left.\n", "他们走了。\n", True),
        ("de-en", DEUTSCH, ENGLISH, False),
        ("de-en", ENGLISH, DEUTSCH, True),
        ("xx-en", ENGLISH, DEUTSCH, False),
    ],
)
def test_swapped_languages_are_noticed(tmp_path, capsys, pair, source, target, swapped):
    for code, text in zip(pair.split("-"), (source, target), strict=True):
        (tmp_path / f"text.{code}").write_text(text * 30, encoding="utf-8")
    assert module.main(["--pair", pair, str(tmp_path / "text")]) == int(swapped)
    error = capsys.readouterr().err
    assert ("the languages are swapped" in error) == swapped
    assert (f"give --pair en-{pair[:2]}" in error) == swapped


def test_held_out_pairs_in_the_training_text_are_counted(tmp_path, capsys):
    texts = {"train": [("один", "one"), ("два", "two"), ("три", "three")], "test": [("два", "two"), ("три", "3")]}
    texts |= {"same": [("один", "one"), ("два", "two"), ("п'ять", "five")], "new": [("шість", "six")]}
    for name, pairs in texts.items():
        for side, code in enumerate(("uk", "en")):
            (tmp_path / f"{name}.{code}").write_text("".join(f"{pair[side]}\n" for pair in pairs), encoding="utf-8")
    prefixes = {name: str(tmp_path / name) for name in texts}
    out = tmp_path / "overlap.json"
    arguments = ["--pair", "uk-en", prefixes["train"], "--out", str(out), "--held-out"]
    assert module.main([*arguments, prefixes["test"], prefixes["new"]]) == 0
    error = capsys.readouterr().err
    assert f"warning: 1 of 2 pairs of {prefixes['test']} are in the training text (2 by their source)" in error
    assert "new" not in error
    assert json.loads(out.read_text())["held_out"] == [
        {"text": prefixes["test"], "lines": 2, "pairs": 1, "sources": 2},
        {"text": prefixes["new"], "lines": 1, "pairs": 0, "sources": 0},
    ]
    assert module.main([*arguments, prefixes["same"]]) == 1
    assert "error: 2 of 3 pairs" in capsys.readouterr().err


def test_text_of_one_language_is_checked_measured_and_compared(tmp_path, capsys):
    for name, content in {"train": "a cat\nthe dog\n", "test": "the dog\n п\nnew\n"}.items():
        (tmp_path / f"{name}.en").write_text(content, encoding="utf-8")
    train, test, out = (str(tmp_path / name) for name in ("train", "test", "text.json"))
    assert module.main(["--language", "en", train, "--held-out", test, "--out", out]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [f"{train}.en: 2 valid lines", f"{test}.en: 3 valid lines"]
    assert f"warning: 1 of 3 lines of {test} are in the training text" in captured.err
    content = json.loads((tmp_path / "text.json").read_text())
    assert content["texts"][1] == {"text": test, "lines": 3, "words": 4, "bytes": 16}
    assert content["held_out"] == [{"text": test, "lines": 3, "pairs": 1, "sources": 1}]
    (tmp_path / "train.en").write_bytes(b"a\n\n\xff\n")
    assert module.main(["--language", "en", train]) == 1
    assert "train.en:2: empty line" in capsys.readouterr().err

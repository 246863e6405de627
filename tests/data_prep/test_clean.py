"""Each rule on hand-made lines; the output in the input's order, for any number of workers."""

import json
import random
from collections import Counter

import numpy as np
import pytest

from data_prep import clean
from data_prep.languages import script_share
from data_prep.rules import length_ratio, mend
from data_prep.seen import SeenHashes

GOOD = ("Це звичайне речення.", "This is an ordinary sentence.")


def arguments(folder):
    return ["--pair", "uk-en", "--input", f"{folder}/in", "--out", f"{folder}/out", "--workers", "1"]


def run(tmp_path, pairs, *flags):
    for side, language in enumerate(("uk", "en")):
        (tmp_path / f"in.{language}").write_text("".join(f"{pair[side]}\n" for pair in pairs), encoding="utf-8")
    assert clean.main([*arguments(tmp_path), *flags]) == 0
    sides = [(tmp_path / f"out.{language}").read_text(encoding="utf-8").split("\n")[:-1] for language in ("uk", "en")]
    report = json.loads((tmp_path / "out.report.json").read_text())
    dropped = {rule: count for rule, count in report["dropped"].items() if count}
    return list(zip(*sides, strict=True)), dropped, report


@pytest.mark.parametrize(
    ("rule", "pair", "flags"),
    [
        ("empty", ("  ", "nothing there"), []),
        ("empty", ("\u200e", "a mark of direction alone"), []),
        ("empty", ("щось", "\u2060\ufe0f \u3164"), []),
        ("control", ("знак \x07 дзвоника", "a bell sign"), []),
        ("control", ("знак \ufffd заміни", "a replacement sign"), []),
        ("length", ("слово " * 201, "word " * 201), []),
        ("length", ("одне", "one word"), ["--min-words", "2"]),
        ("length", ("слово" * 30, "wordy" * 30), ["--max-chars", "100"]),
        ("ratio", ("коротке", "this is a very much longer side than the other one could ever become"), []),
        ("identical", ("Mozilla Firefox", "mozilla firefox"), []),
        ("script", ("Mozilla Firefox браузер", "The Firefox browser"), []),
        ("script", ("Просте речення", "Просте речення або два"), []),
        ("held_out", ("нове", "Held out text"), ["--exclude", "HELD"]),
        ("duplicate", GOOD, []),
        ("duplicate", (GOOD[0], "Another translation."), ["--duplicates", "source"]),
        ("duplicate", ("Ще одне джерело.", GOOD[1]), ["--duplicates", "target"]),
        ("duplicate", ("Ще одне джерело.", GOOD[1]), ["--duplicates", "either"]),
    ],
)
def test_rule_drops_its_pair_and_only_that(tmp_path, rule, pair, flags):
    (tmp_path / "held.uk").write_text("інше\n", encoding="utf-8")
    (tmp_path / "held.en").write_text("Held  out text\n", encoding="utf-8")
    flags = [str(tmp_path / "held") if flag == "HELD" else flag for flag in flags]
    other = ("Друге звичайне речення.", "A second ordinary sentence.")
    kept, dropped, _ = run(tmp_path, [GOOD, pair, other], *flags)
    assert kept == [GOOD, other]
    assert dropped == {rule: 1}


@pytest.mark.parametrize("rule", ["control", "length", "ratio", "identical", "script"])
def test_a_skipped_rule_drops_nothing(tmp_path, rule):
    pair = {
        "control": ("знак \x07 дзвоника", "a bell sign"),
        "length": ("слово " * 201, "word " * 201),
        "ratio": ("коротке", "this is a very much longer side than the other one could ever become"),
        "identical": ("1984", "1984"),
        "script": ("Mozilla Firefox браузер", "The Firefox browser"),
    }[rule]
    assert run(tmp_path, [GOOD, pair])[1] == {rule: 1}
    assert run(tmp_path, [GOOD, pair], "--skip", rule)[1] == {}


def test_other_translations_of_one_source_are_no_duplicates_of_the_pair(tmp_path):
    pairs = [GOOD, (GOOD[0], "Another translation."), ("Інше джерело.", GOOD[1])]
    assert run(tmp_path, pairs)[0] == pairs


def test_mends(tmp_path):
    pairs = [
        ("Сіль &amp; перець", "Salt &amp; pepper"),
        ("Й\u200b це\u00adй", "This \ufeffone"),  # zero-width space, soft hyphen, byte order mark
        ("два  \u00a0 пробіли\u2028тут", " two\tspaces here "),
    ]
    kept, dropped, report = run(tmp_path, pairs)
    assert kept == [
        ("Сіль & перець", "Salt & pepper"),
        ("Й цей", "This one"),
        ("два пробіли тут", "two spaces here"),
    ]
    assert dropped == {}
    assert report["mended_lines"] == {"entities": 2, "nfc": 0, "invisible": 2, "white_space": 2}
    counts = Counter()
    assert mend("\u0438\u0306", counts) == "\u0439"
    assert counts == {"nfc": 1}


def test_invalid_utf8_is_dropped(tmp_path):
    (tmp_path / "in.uk").write_bytes("добре\n".encode() + b"\xff\xfe\n")
    (tmp_path / "in.en").write_bytes(b"good\nbad\n")
    assert clean.main(arguments(tmp_path)) == 0
    assert (tmp_path / "out.en").read_text() == "good\n"


def test_any_number_of_workers_writes_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(clean, "CHUNK_LINES", 7)
    rng = random.Random(5)
    words = ["кіт", "пес", "дім", "ліс", "річка"]
    pairs = [
        (" ".join(rng.choices(words, k=rng.randrange(4))), " ".join(rng.choices(["cat", "dog"], k=2)))
        for _ in range(300)
    ]
    one = run(tmp_path, pairs, "--duplicates", "either")
    three = run(tmp_path, pairs, "--duplicates", "either", "--workers", "3")
    assert one[:2] == three[:2]
    assert one[2]["sha256"] == three[2]["sha256"]
    seen, expected = (set(), set()), []
    for pair in pairs:  # the rule told slowly
        if pair[0] and not any(side in known for side, known in zip(pair, seen, strict=True)):
            expected.append(pair)
            for side, known in zip(pair, seen, strict=True):
                known.add(side)
    assert one[0] == expected


def test_seen_hashes_equal_a_plain_set():
    rng, seen, slow = np.random.default_rng(0), SeenHashes(), set()
    for _ in range(40):
        hashes = rng.integers(0, 500, size=30, dtype=np.uint64)
        assert seen.contains(hashes).tolist() == [int(value) in slow for value in hashes]
        new = np.unique(hashes[~seen.contains(hashes)])
        seen.add(new)
        slow |= set(new.tolist())
    assert len(seen._sorted) < 12


def test_chinese_is_long_enough_in_characters():
    assert length_ratio("他明天不来", "He is not coming tomorrow", "zh", "en") < 1.6
    assert script_share("他 Tom 明天", "Han") == 0.5
    assert script_share("1984", "Han") == 1.0


def test_unequal_sides_stop_and_older_results_stay(tmp_path, capsys):
    run(tmp_path, [GOOD])
    (tmp_path / "in.uk").write_text("a\nb\nc\n")
    assert clean.main(arguments(tmp_path)) == 1
    assert "in.uk has 3 lines" in (error := capsys.readouterr().err)
    assert "in.en has 1: both sides need equal counts; nothing was written" in error
    assert (tmp_path / "out.en").read_text() == GOOD[1] + "\n"
    assert not list(tmp_path.glob("*.partial*"))


def test_nothing_left_is_an_error(tmp_path, capsys):
    for language in ("uk", "en"):
        (tmp_path / f"in.{language}").write_text("same text\n")
    assert clean.main(arguments(tmp_path)) == 1
    assert "is left ({'identical': 1}); nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "out.en").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pair", "xx-en"], "no script known for 'xx'; give --script xx=NAME, or --skip script"),
        (["--out", "in"], "--out in: is the input"),
        (["--min-words", "9", "--max-words", "3"], "--min-words 9 must not be above --max-words 3"),
        (["--max-ratio", "nan"], "must be a number from 1 to 1000, got 'nan'"),
        (
            ["--script", "uk=Klingon"],
            "wants LANGUAGE=Script with a Unicode script, such as th=Thai; got 'uk=Klingon'",
        ),
        (["--workers", "0"], "must be 1 or more, got 0"),
    ],
)
def test_bad_arguments(flags, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        clean.main(["--pair", "uk-en", "--input", "in", "--out", "out", *flags])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_language_identification_drops_sure_strangers(tmp_path):
    pytest.importorskip("py3langid", reason="optional: pip install py3langid==0.4.0")
    russian = (
        "Действие переименовать устанавливает локализованное имя объекта.",
        "The rename action sets a local name.",
    )
    kept, dropped, _ = run(tmp_path, [GOOD, russian], "--language-id", "py3langid")
    assert kept == [GOOD]
    assert dropped == {"language": 1}
    assert run(tmp_path, [GOOD, russian])[1] == {}

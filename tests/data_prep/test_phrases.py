"""The demo corpus: equal bytes every time, no held-out line in training, sources that determine targets."""

import collections
import os
import subprocess
import sys

import pytest

from data_prep import phrase_formats, phrase_maker, phrases
from data_prep.textio import DataError

SIZES = {"test": 40, "valid": 40, "train": 400}


@pytest.fixture(scope="module", params=phrase_maker.SOURCES)
def corpus(request):
    return request.param, phrases.make_corpus(request.param, SIZES, seed=3)


def test_no_line_occurs_twice_on_either_side(corpus):
    _, splits = corpus
    for side in (0, 1):
        counts = collections.Counter(line[side] for lines in splits.values() for line in lines)
        assert [line for line, count in counts.items() if count > 1] == []


def test_sizes_words_and_plain_characters(corpus):
    _, splits = corpus
    assert {split: len(lines) for split, lines in splits.items()} == SIZES
    for source, target in (line for lines in splits.values() for line in lines):
        assert 3 <= len(target.split()) <= 20
        assert source == phrase_formats.plain(source)
        assert target == phrase_formats.plain(target)
        assert not {"\u202f", "\u200f", "\u2009", "\n"} & set(source + target)


def test_only_real_names_are_used(corpus):
    language, splits = corpus
    identifiers = [*phrase_formats.UNITS, *phrase_formats.PER_UNITS, *phrase_formats.RATE_UNITS]
    shown = [name for name in identifiers for lines in splits.values() for line in lines if name in line[0] + line[1]]
    assert shown == [], f"{language}: Babel has no pattern for these"


def test_another_process_locale_and_time_zone_write_the_same_bytes(tmp_path):
    command = [
        sys.executable,
        "-m",
        "data_prep.phrases",
        "--train",
        "50",
        "--valid",
        "5",
        "--test",
        "5",
        "--out",
    ]
    for folder, changes in (
        ("a", {}),
        ("b", {"PYTHONHASHSEED": "11", "TZ": "Asia/Tokyo", "LANG": "de_DE.UTF-8"}),
    ):
        subprocess.run([*command, tmp_path / folder], env={**os.environ, **changes}, check=True, capture_output=True)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["test.en", "test.uk", "train.en", "train.uk", "valid.en", "valid.uk"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_seed_changes_the_corpus_and_train_size_leaves_the_test_set():
    one = phrases.make_corpus("uk", {"test": 20, "train": 20}, seed=1)
    assert phrases.make_corpus("uk", {"test": 20, "train": 30}, seed=1)["test"] == one["test"]
    assert phrases.make_corpus("uk", {"test": 20, "train": 20}, seed=2)["test"] != one["test"]


def test_styles_that_look_alike_in_the_source_share_one_target():
    maker = phrase_maker.phrase_maker("uk")
    targets = {maker.same_in_both(phrases.random.Random(seed), ("first", "second"), show)[1] for seed in range(9)}
    assert targets == {"en first"}


def show(locale, style):
    return "uk" if locale.language == "uk" else f"en {style}"


def test_chinese_has_no_spelled_numbers_and_ukrainian_has():
    assert not phrase_maker.phrase_maker("zh").spells_numbers
    assert phrase_maker.phrase_maker("uk").spells_numbers


def test_gives_up_with_an_error_when_no_new_line_is_found(monkeypatch):
    monkeypatch.setattr(phrases, "MAX_MISSES", 50)
    monkeypatch.setattr(phrase_maker.PhraseMaker, "line", lambda self, rng: ("один два три", "one two three"))
    with pytest.raises(DataError, match=r"--test 2: no new line after 1 lines; ask for fewer"):
        phrases.make_corpus("uk", {"test": 2}, seed=1)


def test_an_unknown_pair_is_a_bad_argument(capsys):
    with pytest.raises(SystemExit) as exit_info:
        phrases.main(["--pair", "fr-en", "--out", "x"])
    assert exit_info.value.code == 2
    assert "must be one of uk-en, de-en, ru-en, he-en, zh-en; got 'fr-en'" in capsys.readouterr().err

"""eval.text.split_long: chunks fit, nothing is lost, sentences before commas before words before letters."""

import pytest

from eval.text.split_long import split_text


def count_words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize(
    ("text", "limit", "chunks"),
    [
        ("One two. Three four. Five six.", 4, ["One two. Three four.", "Five six."]),
        ("He said “go.” She went.", 3, ["He said “go.”", "She went."]),
        ("a b, c d, e f g.", 4, ["a b, c d,", "e f g."]),
        ("a b c d e", 2, ["a b", "c d", "e"]),
        ("Version 2.5 is out.", 4, ["Version 2.5 is out."]),
        ("   ", 4, []),
    ],
)
def test_words(text, limit, chunks):
    assert split_text(text, limit, count_words) == chunks


def test_chinese_needs_no_spaces():
    assert split_text("他来了。她走了，很快。", 5, len) == ["他来了。", "她走了，", "很快。"]


def test_a_word_without_any_boundary_is_cut_inside():
    chunks = split_text("x" * 1000, 64, len)
    assert "".join(chunks) == "x" * 1000
    assert max(map(len, chunks)) <= 64


def test_a_million_characters_take_no_time():
    text = "." * 200_000 + " слово," * 100_000
    chunks = split_text(text, 500, len)
    assert max(map(len, chunks)) <= 500
    assert "".join(chunks).replace(" ", "") == text.replace(" ", "")


def test_a_character_that_cannot_fit_is_an_error():
    with pytest.raises(ValueError, match="alone needs 4 tokens, the limit is 3"):
        split_text("é", 3, lambda text: 4 * len(text))

"""eval.score and eval.check_oracle against sacreBLEU's own command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from eval import check_oracle, compare, score
from eval.text import metrics, scoring

HYPOTHESES = [
    "The parliament met on Monday to discuss the new budget.",
    "She bought 3.5 kg of apples, didn't she?",
    "It rains.",
    "",
    "Nobody knew that the old bridge would be closed for two years",
    "\u201cStop\u201d, he said \u2014 and the train (No. 12) stopped.",
]
REFERENCES = [
    "Parliament met on Monday to debate the new budget.",
    "She has bought 3.5 kilos of apples, hasn't she?",
    "It is raining.",
    "Good morning!",
    "No one knew the old bridge would stay closed for two years.",
    "\u201cStop!\u201d he said \u2014 and train No. 12 stopped.",
]
OTHER_REFERENCES = [f"{line} Indeed." for line in REFERENCES]
CLI_METRICS = {
    "bleu": ["-m", "bleu"],
    "chrf++": ["-m", "chrf", "--chrf-word-order", "2"],
    "chrf": ["-m", "chrf"],
    "ter": ["-m", "ter"],
}


@pytest.fixture
def texts(tmp_path):
    """Paths of the hypotheses and two references."""
    paths = [str(tmp_path / name) for name in ("hyp.en", "ref.en", "ref2.en")]
    for path, lines in zip(paths, (HYPOTHESES, REFERENCES, OTHER_REFERENCES), strict=True):
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
    return paths


def sacrebleu_cli(*arguments: str) -> dict:
    command = [sys.executable, "-m", "sacrebleu", *arguments, "-f", "json", "-w", "12"]
    return json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def scored(tmp_path, *arguments: str) -> dict:
    out = tmp_path / "scores.json"
    assert score.main([*arguments, "--out", str(out)]) == 0
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", metrics.METRICS)
def test_score_signature_and_interval_equal_sacrebleu_cli(tmp_path, texts, name):
    hypotheses, *references = texts
    want = sacrebleu_cli(*references, "-i", hypotheses, *CLI_METRICS[name], "--confidence", "--confidence-n", "50")
    found = scored(
        tmp_path, "--hypotheses", hypotheses, "--references", *references, "--target-lang", "en",
        "--metrics", name, "--bootstrap", "50",
    )["scores"][name]  # fmt: skip
    assert found["score"] == pytest.approx(want["score"], abs=1e-11)
    assert found["mean"] == pytest.approx(want["confidence_mean"], abs=1e-11)
    assert found["ci95"] == pytest.approx(want["confidence_var"], abs=1e-11)
    assert (found["name"], found["bootstrap_signature"]) == (want["name"], want["signature"])


def test_signatures_are_those_of_the_paper(tmp_path, texts, capsys):
    report = scored(tmp_path, "--hypotheses", texts[0], "--references", texts[1], "--target-lang", "en")
    signatures = {name: entry["signature"] for name, entry in report["scores"].items()}
    assert signatures["bleu"] == "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0"
    assert signatures["chrf++"] == "nrefs:1|case:mixed|eff:yes|nc:6|nw:2|space:no|version:2.6.0"
    assert (report["hypotheses"]["lines"], report["hypotheses"]["empty_lines"]) == (6, 1)
    printed = capsys.readouterr()
    assert "1 of 6 hypotheses are empty" in printed.err
    assert f"{report['scores']['bleu']['score']:.2f}" in printed.out


def test_the_seed_decides_the_interval_and_leaves_the_environment_alone(tmp_path, texts, monkeypatch):
    monkeypatch.delenv("SACREBLEU_SEED", raising=False)
    line = [
        "--hypotheses",
        texts[0],
        "--references",
        texts[1],
        "--target-lang",
        "en",
        "--metrics",
        "bleu",
    ]
    runs = [scored(tmp_path, *line, "--seed", seed)["scores"]["bleu"] for seed in ("1", "1", "2")]
    assert runs[0] == runs[1] != runs[2]
    assert "seed:1|" in runs[0]["bootstrap_signature"]
    assert "SACREBLEU_SEED" not in metrics.os.environ


@pytest.mark.parametrize(("language", "tokenizer"), [("zh", "zh"), ("zho_Hans", "zh"), ("uk", "13a"), ("en", "13a")])
def test_bleu_takes_the_tokenizer_of_the_language(language, tokenizer):
    scores = scoring.score_corpus(["他来了。"], [["他来了。"]], target_language=language, names=["bleu"])
    assert f"|tok:{tokenizer}|" in scores["bleu"].signature


def test_ter_counts_characters_of_chinese():
    scores = scoring.score_corpus(["他来了"], [["她来了"]], target_language="zh", names=["ter"])
    assert scores["ter"].score == pytest.approx(100 / 3)


@pytest.mark.parametrize(
    ("hypotheses", "references", "language", "message"),
    [
        (b"a\nb\n", b"a\n", "en", "line counts differ"),
        (b"", b"a\n", "en", "has no lines"),
        (b"a\n", b"", "en", "has no lines"),
        (b"\n \n", b"a\nb\n", "en", "all 2 hypotheses are empty"),
        (b"a\n\xc3(\n", b"a\nb\n", "en", "line 2: invalid UTF-8 (byte 0xc3 at column 1)"),
        (b"\xef\xbb\xbfa\n", b"a\n", "en", "byte order mark"),
        (b"a\n", b"a\n", "English!", "expected a code"),
        (b"a\n", None, "en", "no such file"),
    ],
)
def test_bad_input_stops_before_anything_is_overwritten(tmp_path, capsys, hypotheses, references, language, message):
    (tmp_path / "hyp").write_bytes(hypotheses)
    if references is not None:
        (tmp_path / "ref").write_bytes(references)
    (tmp_path / "out.json").write_text("older")
    line = [
        "--hypotheses",
        tmp_path / "hyp",
        "--references",
        tmp_path / "ref",
        "--out",
        tmp_path / "out.json",
    ]
    assert score.main([*map(str, line), "--target-lang", language]) == 1
    assert message in capsys.readouterr().err
    assert (tmp_path / "out.json").read_text() == "older"


@pytest.mark.parametrize("main", [score.main, compare.main])
def test_translations_are_not_replaced_by_their_scores(texts, capsys, main):
    path = Path(texts[0])
    before = path.read_bytes()
    systems = ["--hypotheses", texts[0]]
    if main is compare.main:
        systems = ["--systems", f"a={texts[1]}", f"b={texts[0]}", "--method", "bootstrap"]
    assert main([*map(str, systems), "--references", str(texts[1]), "--target-lang", "en", "--out", str(path)]) == 1
    assert "is an input; give another name" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_resamples_without_any_match_have_an_interval_too():
    """The first checkpoints of a training repeat one character; sacreBLEU alone stops here with a TypeError."""
    found = scoring.score_corpus(
        ["yes it is so", ")))))", "))))"], [["yes it is so", "no", "not"]], target_language="en", bootstrap=50, seed=1
    )
    assert 0 < found["chrf++"].mean < 100
    assert all(metric.ci95 > 0 for metric in found.values())


def test_a_carriage_return_or_line_separator_does_not_make_a_line(tmp_path):
    (tmp_path / "hyp").write_bytes(b"a\rb\r\nc\x0bd\r\n")
    assert metrics.check_not_empty("hyp", score.files.read_lines(tmp_path / "hyp")) == 0
    assert score.files.read_lines(tmp_path / "hyp") == ["a\rb", "c\x0bd"]


def make_oracle(tmp_path, texts, published_bleu: float):
    """A folder as check_oracle wants it, with one system."""
    chrf = sacrebleu_cli(texts[1], "-i", texts[0], "-m", "chrf")["score"]
    rows = f"pair\tsystem\tbleu_published\tchrf_published\nuk-en\tours\t{published_bleu}\t{chrf}\n"
    (tmp_path / "published.tsv").write_text(rows)
    for path, name in ((texts[0], "uk-en.ours.en"), (texts[1], "wmt22.uk-en.en")):
        (tmp_path / name).write_bytes(score.files.read_bytes(path))
    return ["--folder", str(tmp_path), "--references", str(tmp_path)]


def test_check_oracle_finds_a_difference_and_its_absence(tmp_path, texts, capsys):
    bleu = sacrebleu_cli(texts[1], "-i", texts[0], "-m", "bleu")["score"]
    assert check_oracle.main(make_oracle(tmp_path, texts, bleu)) == 0
    assert "1 of 1 systems within" in capsys.readouterr().out
    assert check_oracle.main(make_oracle(tmp_path, texts, bleu + 2e-6)) == 1
    assert "uk-en ours" in capsys.readouterr().err
    assert check_oracle.main(["--folder", str(tmp_path / "absent")]) == 1
    assert "no such folder" in capsys.readouterr().err

"""eval.compare: sacreBLEU's paired tests, to the digit, by seed."""

import json
import random
import subprocess
import sys

import pytest

from eval import compare

WORDS = [
    "the",
    "river",
    "house",
    "green",
    "old",
    "walks",
    "sings",
    "under",
    "over",
    "seven",
    "nobody",
    "winter",
]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Reference, a good system, a bad system and a copy of the good one: 40 made-up lines each."""
    generator = random.Random(5)
    reference = [[generator.choice(WORDS) for _ in range(generator.randint(6, 14))] for _ in range(40)]

    def noisy(share):
        return [[generator.choice(WORDS) if generator.random() < share else w for w in line] for line in reference]

    folder = tmp_path_factory.mktemp("compare")
    good = noisy(0.1)
    for name, lines in (("ref", reference), ("good", good), ("bad", noisy(0.4)), ("same", good)):
        (folder / name).write_text("".join(" ".join(line) + "\n" for line in lines))
    return folder


def compared(texts, *arguments: object, systems=("good", "bad", "same")) -> dict:
    out = texts / "out.json"
    named = [f"{name}={texts / name}" for name in systems]
    line = ["--references", texts / "ref", "--systems", *named, "--out", out, *arguments]
    assert compare.main([str(item) for item in line]) == 0
    return json.loads(out.read_text())


@pytest.mark.parametrize(
    ("method", "flag", "metrics"),
    [
        ("bootstrap", "bs", ["BLEU"]),  # the command line cannot write chrF's float32 means as JSON
        ("approximate-randomisation", "ar", ["BLEU", "chrF2++"]),
    ],
)
def test_figures_are_those_of_the_sacrebleu_cli(texts, method, flag, metrics, monkeypatch, capsys):
    monkeypatch.setenv("SACREBLEU_SEED", "77")
    command = [sys.executable, "-m", "sacrebleu", str(texts / "ref"), "-i"]
    command += [str(texts / name) for name in ("good", "bad", "same")]
    command += ["-m", "bleu", *(["chrf"] if "chrF2++" in metrics else []), "--chrf-word-order", "2"]
    command += ["-f", "json", f"--paired-{flag}"]
    command += [f"--paired-{flag}-n", "60"]
    want = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    monkeypatch.delenv("SACREBLEU_SEED")
    report = compared(texts, "--method", method, "--trials", 60, "--seed", 77)
    for system, expected in zip(report["systems"], want, strict=True):
        for metric in metrics:
            found = system["scores"][metric]
            assert found["score"] == expected[metric]["score"]
            # sacreBLEU calls a copy of the baseline significantly different
            assert found["p_value"] == (1.0 if system["name"] == "same" else expected[metric]["p_value"])
            if flag == "bs":  # the command line gives no interval with the other test
                assert (found["mean"], found["ci95"]) == (expected[metric]["mean"], expected[metric]["ci"])
    assert f"|{flag}:60|seed:77|" in report["signatures"]["BLEU"]
    assert report["systems"][0]["scores"]["BLEU"]["p_value"] is None
    assert report["systems"][1]["scores"]["BLEU"]["p_value"] < 0.05  # bad against good
    assert [system["same_text_as_baseline"] for system in report["systems"]] == [False, False, True]
    assert "warning: same is the baseline's very text" in capsys.readouterr().err


def test_the_seed_decides(texts):
    def run(seed):
        return compared(texts, "--method", "bootstrap", "--trials", 50, "--metrics", "bleu", "--seed", seed)

    assert run(3) == run(3) != run(4)


@pytest.mark.parametrize(
    ("systems", "arguments", "message"),
    [
        (["good"], [], "at least two systems, got 1"),
        (["good", "good"], [], "share a name"),
        (["good", "short"], [], "line counts differ"),
        (["good", "blank"], [], "all 40 hypotheses are empty"),
        (["good", "bad"], ["--seed", "0"], "must be a positive integer"),
    ],
)
def test_bad_input_is_named(texts, capsys, systems, arguments, message):
    (texts / "short").write_text("a\n")
    (texts / "blank").write_text("\n" * 40)
    named = [f"{name}={texts / name}" for name in systems]
    out = texts / "untouched.json"
    line = [
        "--references",
        texts / "ref",
        "--systems",
        *named,
        "--method",
        "bootstrap",
        "--out",
        out,
        *arguments,
    ]
    assert compare.main([str(item) for item in line]) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()

"""--eval-bleu: words are scored, not pieces, and checkpoints are selected by BLEU or chrF2++."""

from __future__ import annotations

import json
import logging
import random
import re
from pathlib import Path

import pytest
from sacrebleu.metrics import BLEU, CHRF

from tests.e2e import stock
from xmoe_fairseq.checkpoints.files import load_checkpoint
from xmoe_fairseq.patches.validation_scores import check_detokenised

SIZES = [
    f"--{side}-{name}={value}"
    for side in ("encoder", "decoder")
    for name, value in {"embed-dim": 32, "ffn-embed-dim": 32, "attention-heads": 2, "layers": 1}.items()
]


def pieces(folder: Path) -> Path:
    """A data-bin of SentencePiece pieces: each word is two of them, and the target repeats the source."""
    draw = random.Random(1)
    for split, count in (("train", 60), ("valid", 8)):
        lines = [
            " ".join(f"\u2581{draw.choice('abcd')} {draw.choice('efg')}" for _ in range(draw.randint(5, 8)))
            for _ in range(count)
        ]
        for language in ("xx", "yy"):
            (folder / f"{split}.{language}").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    prefixes = [f"--{split}pref={folder / split}" for split in ("train", "valid")]
    stock.run(
        "fairseq-preprocess", "-s", "xx", "-t", "yy", *prefixes, "--joined-dictionary", "--destdir", folder / "bin"
    )
    return folder / "bin"


@pytest.mark.e2e
def test_scores_are_sacrebleus_of_detokenised_text_and_select_checkpoints(tmp_path, caplog):
    data = pieces(tmp_path)
    search = {"beam": 2, "max_len_a": 0, "max_len_b": 20}
    with caplog.at_level(logging.INFO, logger="fairseq"):
        checkpoint = stock.train(
            *(data, "xmoe_transformer_tiny", tmp_path / "checkpoints", *SIZES, "--moe-interval", 1, "--dropout", 0),
            *("--eval-bleu", "--eval-bleu-remove-bpe=sentencepiece", "--eval-bleu-args", json.dumps(search)),
            *("--best-checkpoint-metric", "chrf", "--maximize-best-checkpoint-metric", "--keep-best-checkpoints", 1),
            *("--max-update", 60, "--lr", 0.02, "--save-interval-updates", 60, "--validate-interval", 1000),
        )
    chosen = load_checkpoint(checkpoint)["extra_state"]["val_loss"]
    logged = float(re.findall(r"bleu (\d+\.?\d*)", caplog.text)[-1])
    printed = stock.run(
        *("fairseq-generate", data, "--user-dir", stock.USER_DIR, "--path", checkpoint, "--gen-subset", "valid"),
        *("--beam", 2, "--max-len-a", 0, "--max-len-b", 20, "--remove-bpe=sentencepiece", "--cpu"),
        *("--required-batch-size-multiple", 1, "--num-workers", 0),
    )
    hypotheses = re.findall(r"^H-(\d+)\t\S+\t(.*)$", printed, re.MULTILINE)
    references = dict(re.findall(r"^T-(\d+)\t(.*)$", printed, re.MULTILINE))
    texts = [text for _, text in hypotheses], [[references[number] for number, _ in hypotheses]]
    assert re.fullmatch(r"([a-d][e-g] ?)+", texts[1][0][0])  # words
    assert chosen == pytest.approx(CHRF(word_order=2).corpus_score(*texts).score, abs=0.006)
    assert logged == pytest.approx(BLEU().corpus_score(*texts).score, abs=0.006)
    assert 1 < chosen < 99.9  # a score that says something
    assert [path.name for path in (tmp_path / "checkpoints").glob("checkpoint.best_chrf_*.pt")]


@pytest.mark.parametrize("remove", [None, "@@ ", "subword_nmt"])
def test_pieces_are_never_scored(remove):
    with pytest.raises(ValueError, match=r"would score pieces instead of words.*set it to sentencepiece"):
        check_detokenised(remove, ["<s>", "\u2581a", "b"])


def test_what_undoes_the_subwords_passes():
    check_detokenised("sentencepiece", ["<s>", "\u2581a", "b"])
    check_detokenised("@@ ", ["<s>", "a@@", "b"])
    check_detokenised(None, ["<s>", "word"])
    with pytest.raises(ValueError, match="set it to subword_nmt"):
        check_detokenised(None, ["a@@"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--best-checkpoint-metric", "bleu"), "selects the lowest score; add --maximize-best-checkpoint-metric"),
        (
            ("--best-checkpoint-metric", "chrf", "--maximize-best-checkpoint-metric"),
            "needs translations of the validation set: add --eval-bleu",
        ),
    ],
)
def test_a_selection_that_cannot_work_is_refused_at_the_start(flags, message):
    from tests.e2e import ranks

    with pytest.raises(ValueError, match=message):
        ranks.build(list(flags), 0, 1, ranks.dictionary())

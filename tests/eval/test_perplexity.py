"""eval.perplexity: losses in units of text by hand, thresholds on a trained model, and the refusal of other routers."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from eval import perplexity
from tests.eval import tiny_routed


def test_losses_in_units_of_text_by_hand(tmp_path):
    # 4 tokens of 8 bits are 32 bits: over 3 words and 1 end of a line 8 bits each, over 16 bytes 2 bits each
    size = {"lines": 1, "words": 3, "bytes": 16}
    assert perplexity.in_units_of_text(8.0, 4, size) == {"word_perplexity": 256.0, "bits_per_byte": 2.0}
    assert perplexity.in_units_of_text(8.0, 4, None) == {"word_perplexity": None, "bits_per_byte": None}
    assert perplexity.text_sizes(tmp_path) == {}
    (tmp_path / "text.json").write_text(json.dumps({"texts": [{"lines": n} for n in (1, 2, 3)]}))
    assert perplexity.text_sizes(tmp_path)["valid"] == {"lines": 2}


def test_thresholds_are_evaluated_beside_the_model_as_it_is(tiny_model, tmp_path, capsys):
    out = tmp_path / "figures.json"
    given = ["--checkpoint", str(tiny_model.checkpoint), "--data", str(tiny_model.data), "--gen-subset", "test"]
    given += ["--device", "cpu", "--out", str(out), "--thresholds", "0", "0.9", "1"]
    assert perplexity.main(given) == 0
    found = json.loads(out.read_text())["subsets"]["test"]
    one, own, every = found["sweep"]
    assert one["experts"] == 1 < own["experts"] < every["experts"] == 4
    # the model was trained at 0.9
    assert (own["loss_bits"], own["flops"]) == (found["loss_bits"], found["flops"])
    assert found["perplexity"] == pytest.approx(2 ** found["loss_bits"])
    assert len(capsys.readouterr().out.splitlines()) == 2 + 4


def test_a_router_without_a_threshold_is_refused_or_left_as_it_is():
    loaded = tiny_routed.build(moe_router="top_k", moe_top_k=2)
    args = SimpleNamespace(thresholds=[0.5], skip_others=False, checkpoint="model.pt")
    with pytest.raises(ValueError, match=r"--thresholds: model\.pt has moe_router top_k; only moe_router threshold"):
        perplexity.swept(loaded, args)
    args.skip_others = True
    assert list(perplexity.swept(loaded, args)) == []

"""The language model, and merged experts inside a whole translation model."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.models import build_model
from fairseq.sequence_generator import SequenceGenerator

from xmoe_fairseq.moe import MergedMoELayer, MoELayer


def dictionary(size=30):
    symbols = Dictionary()
    for index in range(size - len(symbols)):
        symbols.add_symbol(str(index))
    return symbols


def build(arch, **settings):
    torch.manual_seed(0)
    words = dictionary()
    task = SimpleNamespace(
        source_dictionary=words, target_dictionary=words, args=settings.pop("task_args", Namespace())
    )
    return build_model(Namespace(arch=arch, **settings), task).eval(), words


@pytest.mark.parametrize("method", ["xmoe", "top_k", "hash", "adamoe"])
def test_language_model_sees_no_later_token_and_decodes_step_by_step(method):
    model, words = build(f"{method}_transformer_tiny_lm", tokens_per_sample=16)
    tokens_BT = torch.randint(4, len(words), (2, 7))
    whole, extra = model(tokens_BT)
    assert list(extra["moe_plans"]) == ["decoder.layers.1.moe"]
    changed_BT = tokens_BT.clone()
    changed_BT[:, 5:] = 4
    torch.testing.assert_close(model(changed_BT)[0][:, :5], whole[:, :5])
    state: dict = {}
    for step in range(7):
        one = model.decoder(tokens_BT[:, : step + 1], incremental_state=state)[0]
        torch.testing.assert_close(one[:, 0], whole[:, step], rtol=1e-4, atol=1e-5)  # sums run in another order


def test_positions_come_from_the_task_and_stay_with_the_checkpoint():
    by_flags, _ = build("xmoe_transformer_tiny_lm", tokens_per_sample=16, max_target_positions=None)
    by_yaml, _ = build("xmoe_transformer_tiny_lm", task_args=Namespace(tokens_per_sample=24))
    assert (by_flags.max_positions(), by_yaml.max_positions()) == (16, 24)


def test_thresholds_of_a_language_model_are_those_of_its_decoder():
    model, _ = build("xmoe_transformer_tiny_lm", tokens_per_sample=16, moe_interval=1, moe_threshold=[0.25, 0.75])
    assert [layer.config.threshold for layer in model.modules() if isinstance(layer, MoELayer)] == [0.25, 0.75]


def meo(**settings):
    model, words = build("meo_transformer_tiny", share_all_embeddings=True, **settings)
    for layer in model.modules():
        if isinstance(layer, MergedMoELayer):
            for gate in (layer.gate1, layer.gate2):
                torch.nn.init.normal_(gate.weight)  # the zero start would merge alike for every sentence
    return model, words


def sentences(words, lengths=(9, 4, 6)):
    source_BS = torch.full((len(lengths), max(lengths)), words.pad())
    for row, length in enumerate(lengths):
        source_BS[row, -length:] = torch.randint(4, len(words), (length,))
        source_BS[row, -1] = words.eos()
    return source_BS, torch.tensor(lengths)


def test_merged_experts_decode_step_by_step_as_in_training():
    model, words = meo(moe_interval=1)
    source_BS, lengths_B = sentences(words)
    target_BT = torch.randint(4, len(words), (3, 8))
    whole, _ = model(source_BS, lengths_B, target_BT)
    changed_BT = target_BT.clone()
    changed_BT[:, 6:] = 4
    assert torch.equal(model(source_BS, lengths_B, changed_BT)[0][:, :6], whole[:, :6])
    encoded = model.encoder(source_BS, lengths_B)
    state: dict = {}
    for step in range(8):
        one = model.decoder(target_BT[:, : step + 1], encoder_out=encoded, incremental_state=state)[0]
        torch.testing.assert_close(one[:, 0], whole[:, step], rtol=1e-4, atol=1e-5)  # sums run in another order


def test_merged_experts_in_beam_search_merge_once_per_sentence(monkeypatch):
    model, words = meo()
    source_BS, lengths_B = sentences(words)
    merged_rows: list[tuple[bool, int, int]] = []
    original = MergedMoELayer._compute_cached

    def watch(layer, x_RTD, vector_RD, choice1, choice2, cache):
        before = bool(cache)
        y = original(layer, x_RTD, vector_RD, choice1, choice2, cache)
        merged_rows.append((before, x_RTD.size(0), cache["w1"].size(0)))
        return y

    monkeypatch.setattr(MergedMoELayer, "_compute_cached", watch)
    generator = SequenceGenerator([model], words, beam_size=4, max_len_b=12)

    def translate(source, lengths):
        sample = {"net_input": {"src_tokens": source, "src_lengths": lengths}}
        found = generator.generate([model], sample)
        return [[(hypothesis["tokens"].tolist(), float(hypothesis["score"])) for hypothesis in row] for row in found]

    together = translate(source_BS, lengths_B)
    assert merged_rows[0] == (False, 12, 3)
    assert all(known for known, *_ in merged_rows[1:])
    assert all(sentences * 4 == rows for _, rows, sentences in merged_rows)
    for row, length in enumerate(lengths_B.tolist()):
        (alone,) = translate(source_BS[row : row + 1, -length:], torch.tensor([length]))
        assert [tokens for tokens, _ in alone] == [tokens for tokens, _ in together[row]]
        assert [score for _, score in alone] == pytest.approx([score for _, score in together[row]], abs=1e-4)


def test_merged_experts_need_an_encoder():
    with pytest.raises(ValueError, match=r"moe_merge_experts .* language model has none"):
        build("xmoe_transformer_tiny_lm", moe_merge_experts=True, moe_top_k=2)


def test_merge_flag_brings_router_and_capacity_to_any_architecture():
    model, _ = build("xmoe_transformer_tiny", share_all_embeddings=True, moe_merge_experts=True, moe_top_k=3)
    configs = [layer.config for layer in model.modules() if isinstance(layer, MergedMoELayer)]
    assert [(config.router, config.capacity_factor, config.top_k) for config in configs] == [("top_k", None, 3)] * 2

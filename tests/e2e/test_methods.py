"""Every architecture through the stock commands: train, save, load, generate; and what a user may change."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from eval import analyse, sweep
from eval.page.render import summary
from eval.run.record import Run
from eval.text.loading import load
from tests.e2e import stock
from xmoe_fairseq.checkpoints.inspect import inspect_checkpoint
from xmoe_fairseq.moe import MoEConfig, MoELayer
from xmoe_fairseq.moe.registry import ROUTERS

TRANSLATION = ["dense", "xmoe", "switch", "top_k", "hash", "base", "adamoe", "meo", "dense_xmoe"]
LANGUAGE = ["dense", "xmoe", "switch", "top_k", "hash", "base", "adamoe", "dense_xmoe"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return stock.binarised_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return stock.binarised_text(tmp_path_factory.mktemp("text"))


def assert_same(got, want):
    assert [words for words, _ in got] == [words for words, _ in want]
    assert [score for _, score in got] == pytest.approx([score for _, score in want], abs=2e-4)


@pytest.mark.e2e
@pytest.mark.parametrize("method", TRANSLATION)
def test_trains_and_translates_whatever_the_batch(method, pairs, tmp_path):
    checkpoint = stock.train(pairs, f"{method}_transformer_tiny", tmp_path)
    together = stock.generate(pairs, checkpoint)
    assert len(together) == 7
    assert_same(stock.generate(pairs, checkpoint, "--batch-size", 1), together)


@pytest.mark.e2e
@pytest.mark.parametrize("method", LANGUAGE)
def test_language_model_trains_and_is_evaluated(method, text, tmp_path, caplog):
    checkpoint = stock.train(text, f"{method}_transformer_tiny_lm", tmp_path)

    def word_scores(*arguments):
        caplog.clear()
        with caplog.at_level("INFO", "fairseq_cli.eval_lm"):
            stock.run(
                "fairseq-eval-lm",
                *(text, "--user-dir", stock.USER_DIR, "--path", checkpoint, "--cpu", "--output-word-probs"),
                *("--sample-break-mode", "eos", "--num-workers", 0, *arguments),
            )
        rows = [message for message in caplog.messages if re.match(r"\d+ .*\[", message)]
        return [[float(x) for x in re.findall(r"\[(\S+)\]", row)] for row in sorted(rows)]

    together, alone = (word_scores(*batch) for batch in (("--max-tokens", 200), ("--batch-size", 1)))
    assert len(together) == 7
    for row, row_alone in zip(together, alone, strict=True):
        assert row_alone == pytest.approx(row, abs=1e-4)


@pytest.mark.e2e
def test_meo_with_every_option_trains_and_translates(pairs, tmp_path):
    checkpoint = stock.train(
        *(pairs, "meo_transformer_tiny", tmp_path, "--moe-num-experts", 8, "--moe-expert-dim", 256),
        *("--moe-token-adapter", "--checkpoint-activations", "--moe-interval", 1, "--update-freq", 2),
    )
    assert_same(stock.generate(pairs, checkpoint, "--batch-size", 1), stock.generate(pairs, checkpoint))


@pytest.mark.e2e
def test_threshold_and_top_k_run_each_others_checkpoints(pairs, tmp_path):
    by_threshold = stock.train(pairs, "xmoe_transformer_tiny", tmp_path / "threshold")
    by_top_k = stock.train(pairs, "top_k_transformer_tiny", tmp_path / "top_k")

    def override(**settings):
        return "--model-overrides", repr({f"moe_{name}": value for name, value in settings.items()})

    one = stock.generate(pairs, by_threshold, *override(router="top_k", top_k=1))
    assert_same(one, stock.generate(pairs, by_threshold, *override(threshold=0.0)))
    everything = stock.generate(pairs, by_top_k, *override(router="threshold", threshold=1.0))
    assert_same(everything, stock.generate(pairs, by_top_k, *override(top_k=8)))
    assert one != everything


@pytest.mark.e2e
@pytest.mark.parametrize("arch", ["dense_xmoe_transformer_tiny", "dense_xmoe_transformer_tiny_lm"])
def test_dense_as_xmoe_trades_flops_for_quality(arch, pairs, text, tmp_path, capsys):
    data = text if arch.endswith("_lm") else pairs
    checkpoint = stock.train(data, arch, tmp_path)
    arguments = [
        "--data",
        str(data),
        "--checkpoint",
        str(checkpoint),
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "sweep"),
    ]
    assert sweep.main([*arguments, "--thresholds", "0", "0.5", "1"]) == 0
    points = json.loads((tmp_path / "sweep.json").read_text(encoding="utf-8"))["points"]
    assert [point["experts_per_token"] for point in points][::2] == [1.0, 8.0]
    assert [point["moe_flops"] for point in points][::2] == [0.125, 1.0]
    assert 0.125 < points[1]["moe_flops"] < 1.0
    assert len({point["nll"] for point in points}) == 3
    assert sweep.main([*arguments, "--eval-capacity-factors", "none", "1"]) == 0
    whole, capped = json.loads((tmp_path / "sweep.json").read_text(encoding="utf-8"))["points"]
    assert (whole["nll"], whole["dropped"]) == (points[2]["nll"], 0.0)
    assert capped["moe_flops"] < 0.2
    assert capped["dropped"] > 0.8
    assert (tmp_path / "sweep.png").stat().st_size > 1000
    assert sweep.main([*arguments, "--model-overrides", "{'moe_router': 'switch'}", "--thresholds", "0.5"]) == 1
    assert "--thresholds has no effect on moe_router switch" in capsys.readouterr().err


@pytest.mark.e2e
def test_any_text_becomes_data_of_a_language_model(tmp_path):
    for split, count in (("train", 40), ("valid", 6), ("test", 7)):
        lines = "\n\n".join(source.replace(" ", "") for source, _ in stock.made_up_pairs(count, seed=count))
        (tmp_path / split).write_text(lines + "\n", encoding="utf-8")
    files = [part for split in ("train", "valid", "test") for part in (f"--{split}", tmp_path / split)]
    script = ["bash", stock.ROOT / "data_prep" / "wikitext103.sh", "--out", tmp_path / "out", "--workers", "1"]
    subprocess.run([*script, *files, "--merges", "5"], check=True, capture_output=True)
    assert len((tmp_path / "out" / "text" / "train").read_text(encoding="utf-8").splitlines()) == 40
    assert stock.train(tmp_path / "out" / "bin", "xmoe_transformer_tiny_lm", tmp_path / "saved").is_file()
    failed = subprocess.run([*script, "--train", tmp_path / "none"], check=False, capture_output=True, text=True)
    assert failed.returncode == 2
    assert "give all three or none" in failed.stderr


OWN_YAML = """
common: {{user_dir: {own}, cpu: true, no_progress_bar: true}}
task: {{_name: translation, data: {data}, source_lang: xx, target_lang: yy}}
dataset: {{max_tokens: 200, num_workers: 0, disable_validation: true}}
optimization: {{max_update: 1, lr: [0.001]}}
optimizer: {{_name: adam}}
lr_scheduler: {{_name: fixed}}
bpe: null
criterion: {{_name: label_smoothed_cross_entropy_with_load_balance}}
checkpoint: {{save_dir: {out}}}
model: {{_name: xmoe_transformer_tiny, moe_router: above_average, moe_margin: [1.5, 1.25], share_all_embeddings: true}}
"""


@pytest.mark.e2e
def test_a_yaml_sets_what_a_router_from_outside_declares(pairs, tmp_path):
    """In a process of its own, which imports the router after fairseq has read the file."""
    own = stock.ROOT / "tests" / "e2e" / "own_router"
    (tmp_path / "own.yaml").write_text(OWN_YAML.format(own=own, data=pairs, out=tmp_path / "out"), encoding="utf-8")
    program = "from fairseq_cli.hydra_train import cli_main; cli_main()"
    command = [sys.executable, "-c", program, "--config-dir", tmp_path, "--config-name", "own"]
    environment = {**os.environ, "PYTHONPATH": str(stock.ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    saved = torch.load(tmp_path / "out" / "checkpoint_last.pt", weights_only=True)["cfg"]["model"]
    assert saved["moe_margin"] == [1.5, 1.25]


@pytest.fixture
def known_routers():
    """Forgets afterwards what a test registered: later checkpoints would hold settings that other processes lack."""
    before = dict(ROUTERS)
    yield
    ROUTERS.clear()
    ROUTERS.update(before)


@pytest.mark.e2e
@pytest.mark.usefixtures("known_routers")
def test_a_router_from_outside_the_package(pairs, tmp_path):
    own = stock.ROOT / "tests" / "e2e" / "own_router"
    flags = ("--moe-router", "above_average", "--moe-margin", "1.01")
    checkpoint = stock.train(pairs, "xmoe_transformer_tiny", tmp_path, *flags, user_dir=own)
    together = stock.generate(pairs, checkpoint, user_dir=own)
    assert_same(together, stock.generate(pairs, checkpoint, "--batch-size", 1, user_dir=own))
    saved = torch.load(checkpoint, weights_only=True)["cfg"]["model"]
    assert (saved.moe_router, saved.moe_margin) == ("above_average", 1.01)
    assert inspect_checkpoint(checkpoint)["method"].startswith(
        "above_average, 8 experts of 256, margin 1.01, gamma 2.0"
    )

    def overridden(margin):
        overrides = f"{{'moe_margin': {margin}}}"
        return stock.generate(pairs, checkpoint, "--model-overrides", overrides, user_dir=own)

    assert [score for _, score in overridden(7.9)] != [score for _, score in together]  # nearly top-1
    assert_same(overridden([1.01, 1.01]), together)  # one for each MoE layer
    with pytest.raises(ValueError, match=r"moe_margin \(0\) must be > 0; 1 is the average itself"):
        overridden(0)
    with pytest.raises(ValueError, match=r"moe_margin \(8\) must be below moe_num_experts \(8\)"):
        overridden(8)
    with pytest.raises(ValueError, match=r"moe_margin \(1.01\) works with moe_router above_average, not switch"):
        stock.generate(pairs, checkpoint, "--model-overrides", "{'moe_router': 'switch'}", user_dir=own)
    loaded = load(str(checkpoint), data=str(pairs), user_dir=str(own), device="cpu")
    described = analyse.describe(loaded)
    assert described["router_settings"] == {"moe_margin": 1.01}
    assert ["router settings", "moe_margin 1.01"] in summary([Run("own", {"checkpoint": described})])["rows"]


@pytest.mark.e2e
def test_a_package_of_ones_own_in_the_table_of_sizes_and_in_inspect(pairs, tmp_path):
    """In processes of their own: the second one does not know the router."""
    own = tmp_path / "own"
    shutil.copytree(stock.ROOT / "tests" / "e2e" / "own_router", own)
    with (own / "__init__.py").open("a") as file:
        file.write("from xmoe_fairseq.models.architectures import TINY, register_moe\n")
        file.write("register_moe('mine_tiny', TINY, 8, 256, 2.0, moe_router='above_average', moe_margin=1.5)\n")
    environment = {**os.environ, "PYTHONPATH": str(stock.ROOT)}
    command = [sys.executable, "-m", "eval.method_table", "--size", "tiny", "--user-dir", own]
    printed = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout
    assert re.search(r"\| `mine_tiny` +\| \S+M +\| \S+M +\| \S+M +\| \S+M +\| set by t +\| 1.000", printed)
    state = torch.load(stock.train(pairs, "xmoe_transformer_tiny", tmp_path / "out"), weights_only=True)
    state["cfg"]["model"].moe_router, state["cfg"]["model"].moe_margin = "above_average", [1.5, 1.25]
    torch.save(state, tmp_path / "own.pt")
    assert (
        "above_average, 8 experts of 256, moe_margin [1.5, 1.25], gamma"
        in inspect_checkpoint(tmp_path / "own.pt")["method"]
    )


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("arch", "flags", "words"),
    [
        ("xmoe_transformer_tiny", "--moe-router top_k", "moe_router top_k needs moe_top_k"),
        ("xmoe_transformer_tiny", "--moe-router switch --moe-top-k 2", "moe_router switch .* moe_top_k is 2"),
        ("xmoe_transformer_tiny", "--moe-router top_k --moe-top-k 9", "moe_top_k .9. .* moe_num_experts .8."),
        ("xmoe_transformer_tiny", "--moe-null-experts 2", "moe_null_experts .2. .* moe_router adamoe"),
        ("adamoe_transformer_tiny", "--moe-top-k 17", "moe_top_k .17. .* moe_num_experts .8. . moe_null_experts .8."),
        ("xmoe_transformer_tiny", "--moe-router hashed", "moe_router 'hashed' .*choose one of .*hash"),
        ("xmoe_transformer_tiny", "--moe-merge-experts", "moe_merge_experts needs moe_top_k"),
        ("meo_transformer_tiny", "--moe-capacity-factor 2", "moe_merge_experts .* moe_capacity_factor .2.0. .*none"),
        ("meo_transformer_tiny", "--moe-router base", "moe_merge_experts .* moe_router base; set moe_router top_k"),
        ("xmoe_transformer_tiny", "--moe-token-adapter", "moe_token_adapter needs moe_merge_experts"),
        (
            "hash_transformer_tiny",
            "--moe-router-noise gumbel",
            "moe_router_noise .gumbel. works with .* not hash; set moe_router_noise none",
        ),
        ("xmoe_transformer_tiny", "--moe-threshold 1.5", "moe_threshold .1.5. .*0, 1"),
        ("xmoe_transformer_tiny", "--moe-capacity-factor 0", "moe_capacity_factor .0.0. .*> 0"),
        ("xmoe_transformer_tiny", "--moe-interval 0", "moe_interval .0."),
        ("xmoe_transformer_tiny_lm", "--moe-merge-experts --moe-top-k 2", "moe_merge_experts .* language model"),
        ("xmoe_transformer_tiny_lm", "--moe-sides encoder", "moe_sides encoder .* moe_sides both"),
        ("xmoe_transformer_tiny_lm", "--adaptive-input", "adaptive_input .* --adaptive-input out"),
    ],
)
def test_bad_combinations_name_both_flags_and_the_way_out(arch, flags, words, pairs, text, tmp_path):
    data = text if arch.endswith("_lm") else pairs
    with pytest.raises(ValueError, match=words):
        stock.train(data, arch, tmp_path / "none", *flags.split())
    assert not list(tmp_path.glob("none/*"))


@pytest.mark.e2e
def test_a_misspelt_setting_is_refused(pairs, tmp_path):
    checkpoint = stock.train(pairs, "xmoe_transformer_tiny", tmp_path)
    with pytest.raises(ValueError, match=r"moe_treshold; the moe_\* settings are .*moe_threshold"):
        stock.generate(pairs, checkpoint, "--model-overrides", "{'moe_treshold': 0.5}")


@pytest.mark.slow
@pytest.mark.parametrize(("num_experts", "num_null", "top_k"), [(8, 8, 3), (8, 16, 4), (4, 5, 4), (8, 8, 4)])
def test_adamoe_trained_with_its_loss_alone_reaches_the_balanced_load(num_experts, num_null, top_k):
    torch.manual_seed(0)
    layer = MoELayer(
        MoEConfig(*(16, num_experts, 4), router="adamoe", top_k=top_k, num_null_experts=num_null, capacity_factor=None)
    )
    with torch.no_grad():
        layer.router.weight[:num_experts] += 0.2  # an uneven start
    optimizer = torch.optim.Adam([layer.router.weight], lr=0.02)
    x_TD = torch.randn(4096, 16) + 0.3

    def load():
        return layer(x_TD)[1].count_E.sum().item() / len(x_TD)

    balanced = top_k * num_experts / (num_experts + num_null)
    assert abs(load() / balanced - 1) > 0.1
    for _ in range(150):
        optimizer.zero_grad()
        layer(x_TD)[1].balance_loss.backward()
        optimizer.step()
    assert load() == pytest.approx(balanced, rel=0.03)

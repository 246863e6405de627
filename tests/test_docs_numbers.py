"""Measured and counted numbers of the pages are those of the result files and of the code; lists of stages, too."""

from __future__ import annotations

import json
import re

from benchmarks.cost_formulas import NODES, Model, break_even_tokens
from eval import method_table
from tests.test_docs import ROOT, page_text, table_rows

RESULTS = ROOT / "benchmarks" / "results"
BENCHMARKS = "benchmarks/README.md"


def result_rows(ending: str) -> list[dict]:
    """Rows of the newest result file whose name ends so."""
    return json.loads(sorted(RESULTS.glob(f"*{ending}"))[-1].read_text(encoding="utf-8"))["rows"]


def in_order(pattern: str, page: str) -> list[float]:
    """Numbers that the groups of ``pattern`` find on the page, whose line breaks count as spaces."""
    found = re.search(pattern, " ".join(page_text(page).split()))
    assert found, f"{page} does not say {pattern}"
    return [float(number.replace(",", "")) for number in found.groups()]


def assert_shown(shown: list[float], values: list[float], step: float) -> None:
    """``shown`` are ``values`` rounded to ``step``."""
    assert len(shown) == len(values)
    for told, value in zip(shown, values, strict=True):
        assert abs(told - value) <= 0.51 * step, (told, value)


def test_decoding_times_are_those_of_the_result_file():
    rows = {(row["method"], row["tokens"]): row["ms"] for row in result_rows("-layer-decode-cpu.json")}
    methods = ("dense", "ours", "loop over experts (official code's way)", "ours, a GEMM per expert")
    methods += ("ours, bfloat16 experts", "ours, int8 experts")
    table = table_rows(page_text(BENCHMARKS), "Decoding (64x1024")[1:]
    for tokens, *cells in table:
        assert_shown([float(cell) for cell in cells], [rows[method, int(tokens)] for method in methods], 0.1)
    times = in_order(r"few rows: ([\d.]+), ([\d.]+) and ([\d.]+) times at 5, 20 and 80 tokens", BENCHMARKS)
    ratios = [rows[methods[2], tokens] / rows["ours", tokens] for tokens in (5, 20, 80)]
    assert_shown(times, [round(ratio, 0 if ratio > 10 else 1) for ratio in ratios], 0.1)


def test_how_much_faster_than_the_official_way_follows_from_the_table():
    table = {row[0]: row[1:3] for row in table_rows(page_text(BENCHMARKS), "Time of one layer relative")[1:]}
    for tokens in ("1024", "4096"):
        ours, peer = (
            [float(x) for x in cell.split(" / ")] for cell in table[f"float32, T {tokens}, forward + backward"]
        )
        pattern = rf"Target: T {tokens} .*? Reached: ([\d.]+), ([\d.]+) and ([\d.]+) times"
        assert_shown(in_order(pattern, BENCHMARKS), [theirs / own for own, theirs in zip(ours, peer, strict=True)], 0.1)


def test_whole_programs_are_those_of_the_result_files():
    for ending, pattern in (
        ("-train-cpu.json", r"parameters\) ([\d.]+) words/s, `dense_transformer_wmt23` ([\d.]+): a ratio of ([\d.]+)"),
        ("-train-cpu-fairseq-adam.json", r"own Adam ([\d.]+) and ([\d.]+), a ratio of ([\d.]+)"),
    ):
        dense, sparse = result_rows(ending)
        shown = in_order(pattern, BENCHMARKS)
        assert_shown(shown[:2], [sparse["words/s"], dense["words/s"]], 1)
        assert_shown(shown[2:], [sparse["ratio"]], 0.01)
    ratios = {row["model"]: row["ratio"] for row in result_rows("-generate-cpu.json")}
    pattern = (
        r"XMoE as trained ([\d.]+) .*? at the dense price ([\d.]+), Switch ([\d.]+), top-2 ([\d.]+) \(`generate-cpu"
    )
    names = ("xmoe", "xmoe, dense price", "switch", "top-2")
    assert_shown(in_order(pattern, BENCHMARKS), [ratios[name] for name in names], 0.01)
    dense, sparse, int8 = result_rows("-generate-random-cpu.json")
    pattern = (
        r"dense float32 \(([\d.]+)\): .* ([\d.]+) in float32 and ([\d.]+) with .* of ([\d.]+), ([\d,]+) and ([\d.]+) MB"
    )
    first, *both, of_dense, of_sparse, of_int8 = in_order(pattern, BENCHMARKS)
    assert_shown([first], [dense["sentences/s"]], 0.1)
    assert_shown(both, [sparse["ratio"], int8["ratio"]], 0.01)
    assert_shown([of_dense, of_sparse, of_int8], [row["file_MB"] for row in (dense, sparse, int8)], 1)


def test_times_beside_transformers_are_those_of_the_result_file():
    rows = {(row["case"][:7], row["method"]): row["ratio"] for row in result_rows("-hf-peers-float32-cpu.json")}
    names = {"ours": "ours", "Switch": "transformers Switch", "loop": "transformers Mixtral, loop"}
    names["grouped"] = "transformers Mixtral, grouped"
    text = " ".join(page_text(BENCHMARKS).split())
    shown = re.search(r"32x2048 top-1 (ours .*?); 64x1024 top-2 (ours .*?\d)\. ", text)
    for case, part in zip(("32x2048", "64x1024"), shown.groups(), strict=True):
        for name, number in re.findall(r"(ours|Switch|loop|grouped) (\d\.\d\d)", part):
            assert_shown([float(number)], [rows[case, names[name]]], 0.01)


def test_gpu_times_are_those_of_the_result_files():
    """Milliseconds and ratios of docs/gpu.md's table beside those that the machine printed."""
    printed = {}
    for name in ("layer", "decode"):
        for line in sorted(RESULTS.glob(f"*-h100-{name}.txt"))[-1].read_text(encoding="utf-8").splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if len(cells) == 11:
                printed[tuple(cells[:4])] = cells[4:]
    compared = 0
    modes = {"forward and backward": "train", "forward": "infer", "decoding": "decode"}
    for label, dense, *cells in table_rows(page_text("docs/gpu.md"), "**On hardware**")[1:]:
        found = re.fullmatch(r"(forward and backward|forward|decoding),? (?:T )?([\d,]+)(?: tokens)?, (\w+)", label)
        key = (modes[found[1]], found[2].replace(",", ""), found[3])
        graph, eager, torch_way, peer = cells
        shown = {("dense", 2): dense, ("ours by kernels", 2): graph, ("ours by kernels", 0): eager}
        shown |= {("ours by torch, grouped", 0): torch_way, ("transformers Mixtral, grouped, no drops", 2): peer}
        for (method, place), cell in shown.items():
            values = printed.get((*key, method), [""] * 7)[place : place + 2]
            for told, value in zip(re.findall(r"[\d.]+", cell), values, strict=False):
                step = 10.0 ** -len(told.partition(".")[2])
                assert abs(float(told) - float(value)) <= 0.51 * step, (label, method, told, value)
                compared += 1
    assert compared >= 45


def test_sizes_of_the_recipes_follow_from_the_counted_table():
    rows = table_rows(page_text("docs/methods.md"), "Translation, `xmoe sizes")[1:]
    totals = {row[0].strip("`"): sum(float(cell.rstrip("M")) for cell in row[1:4]) for row in rows}
    least, most, dense = in_order(
        r"have (\d+) to (\d+) million parameters .* dense one (\d+) million", "train_configs/README.md"
    )
    of_sparse = [total for name, total in totals.items() if name != "dense_transformer_wmt23"]
    assert (int(min(of_sparse)), round(max(of_sparse))) == (least, most)
    assert int(totals["dense_transformer_wmt23"]) == dense
    assert "wmt23" in method_table.table("wmt23", 32000, 32)
    shared, experts = in_order(r"D 512, ([\d.]+) M shared and ([\d.]+) M expert parameters\)", "docs/scaling.md")
    assert_shown([shared, experts], [Model().shared_parameters / 1e6, Model().expert_parameters / 1e6], 0.1)


def test_settings_that_pages_repeat_are_those_of_the_code():
    data, pipeline = page_text("data_prep/phrases.py"), page_text("docs/pipeline.md")
    lines = in_order(r"no download: ([\d,]+) / (\d+) / (\d+) lines", "docs/data.md")
    assert [
        int(number.replace("_", "")) for number in re.findall(r'\("(?:train|valid|test)", ([\d_]+)\)', data)
    ] == lines
    corpora = [line.split("\t") for line in page_text("data_prep/wmt23.tsv").splitlines() if not line.startswith("#")]
    pairs = {name[:2]: int(value) // 10**6 for name, part, value in corpora if part == "pairs"}
    assert pairs == {"uk": 10, "ru": 10, "he": 10, "de": 30, "zh": 30}
    assert "(10 million for uk, ru and he, 30 million for de and zh" in " ".join(page_text("docs/data.md").split())
    for page in ("README.md", "docs/install.md", "scripts/setup.sh", "CHANGELOG.md"):
        assert "3.10 to 3.12" in page_text(page), page
    assert 'requires-python = ">=3.10,<3.13"' in page_text("pyproject.toml")
    assert "max_len_a=0\nmax_len_b=200 " in page_text("scripts/run_pair.sh")
    assert "(defaults 0 and 200, as in fairseq)" in pipeline
    wmt23 = page_text("scripts/train_wmt23.sh")
    assert "max_len_b=400 " in wmt23
    assert "(default: 400; WMT22 has references of up to 244 words)" in wmt23
    assert re.search(r"takes\s+400, because WMT22's zh-en references have up to 244 words", pipeline)
    product = in_order(r"has (\d+) tokens x (\d+) batches x (\d+) GPUs = ([\d,]+) tokens", "train_configs/README.md")
    assert product[0] * product[1] * product[2] == product[3]
    recipe = in_order(
        r"262,144 \(8192 x 8 batches x 4 GPUs\) \| ([\d,]+) \((\d+) x (\d+) x (\d+);", "train_configs/README.md"
    )
    assert recipe[1] * recipe[2] * recipe[3] == recipe[0]


def test_break_even_points_are_those_of_the_cost_model():
    shown = in_order(
        r"bound is ([\d,]+) tokens for .* ([\d,]+) for `switch_.* and ([\d,]+) for 128 x 512 .* falls to ([\d,]+) "
        r"\(([\d,]+); ([\d,]+)\), over four to ([\d,]+),",
        "docs/scaling.md",
    )
    models = [Model(), Model(num_experts=32, expert_dim=2048, rows_per_token=1)]
    models.append(Model(num_experts=128, expert_dim=512, rows_per_token=4))
    points = [break_even_tokens(model, NODES[0], ranks) for ranks in (8, 16) for model in models]
    assert_shown(shown, [*points, break_even_tokens(models[0], NODES[0], 32)], 1)


def test_signatures_are_those_of_the_evidence():
    evidence = page_text("docs/results/2026-11-22-small-cpu.json")
    signatures = set(re.findall(r'"signature": "([^"]+)"', evidence))
    shown = [
        signature
        for page in ("docs/evaluation.md", "docs/results.md", "docs/results-earlier.md", "docs/training.md")
        for signature in re.findall(r"`(nrefs:[^`]+)`", page_text(page))
    ]
    assert len(shown) >= 5
    assert all(any(full.startswith(signature) for full in signatures) for signature in shown), shown


def test_the_benchmarks_quote_the_experts_per_token_of_the_results():
    study = json.loads(page_text("docs/results/2026-11-26-table3-tiny.json"))
    cell = study["pairs"]["zh-en"]["methods"]["xmoe32"]["seeds"]["1"]
    shown = in_order(r"a token wants ([\d.]+) of 32 experts, ([\d.]+) times the dense FLOPs", BENCHMARKS)
    assert_shown(shown, [cell["experts_inference"], cell["moe_flops_inference"]], 0.1)


def test_the_stages_that_the_page_lists_are_those_of_the_scripts():
    page = " ".join(page_text("docs/pipeline.md").split())
    train = re.findall(r"^ *stage (\w+)", page_text("scripts/model_run.sh"), re.MULTILINE)
    for script, pattern in (("run_pair", r"Its stages are ([\w, ]+)\."), ("run_lm", r"with the stages ([\w, ]+)\.")):
        code = page_text(f"scripts/{script}.sh")
        stages = re.findall(r"^ *stage (\w+)", code, re.MULTILINE)
        told = re.search(pattern, page)[1].split(", ")
        assert [name for name in told if name not in train] == [name for name in stages if name != "test_data"]
        assert set(train) <= set(told)
        assert re.search(rf"model:\s+{', '.join(told)}\.", " ".join(code.split())), f"{script}: its usage lists others"

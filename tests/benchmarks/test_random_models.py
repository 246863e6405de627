"""The models that benchmarks.generate makes: what each is said to hold, and one file for each."""

from __future__ import annotations

from pathlib import Path

from benchmarks.random_models import MODELS, make_checkpoints
from xmoe_fairseq.checkpoints.inspect import inspect_checkpoint

TINY = {"encoder_layers": 2, "decoder_layers": 2, "moe_num_experts": 4, "moe_expert_dim": 64}
TINY |= {f"{side}_embed_dim": 32 for side in ("encoder", "decoder")}
TINY |= {f"{side}_ffn_embed_dim": 128 for side in ("encoder", "decoder")}


def test_every_model_is_made_once_and_is_what_its_name_says(tmp_path: Path) -> None:
    (tmp_path / "dict.xx.txt").write_text("".join(f"w{number} 1\n" for number in range(50)))
    paths = make_checkpoints(tmp_path, tmp_path, list(MODELS), TINY)
    facts = {name: inspect_checkpoint(path) for name, path in paths.items()}
    weights = {name: fact["weights"].removesuffix("; for inference") for name, fact in facts.items()}
    assert weights == {
        "dense float32": "float",
        "dense int8": "linear maps and embeddings int8",
        "sparse float32": "float",
        "sparse bfloat16 experts": "experts bfloat16",
        "sparse int8 experts": "experts int8",
        "sparse int8 all": "experts int8, linear maps and embeddings int8",
    }
    assert facts["sparse float32"]["parameters"] == facts["sparse int8 all"]["parameters"]
    assert facts["sparse int8 all"]["bytes"] < facts["sparse int8 experts"]["bytes"] < facts["sparse float32"]["bytes"]
    before = {path: Path(path).stat().st_mtime_ns for path in paths.values()}
    make_checkpoints(tmp_path, tmp_path, list(MODELS), TINY)
    assert before == {path: Path(path).stat().st_mtime_ns for path in paths.values()}

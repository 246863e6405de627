"""Real tiny models and the checkpoints that fairseq would write of them, without training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from tests import tiny as tiny_models


class Tiny:
    """Builds, wraps and loads models of one task with 20 words."""

    def __init__(self) -> None:
        words = tiny_models.dictionary(f"w{index}" for index in range(20))
        self.task = TranslationTask(TranslationConfig(data="unused", source_lang="xx", target_lang="yy"), words, words)

    def state(self, arch: str, seed: int = 1, **settings: Any) -> dict[str, Any]:
        """A checkpoint of a freshly initialised model, as fairseq 0.12 lays it out."""
        cfg = tiny_models.settings(arch, ffn_dim=24, positions=64, share_all_embeddings=True, **settings)
        model = tiny_models.build(cfg, self.task, seed)
        task = {"_name": "translation", "data": "/home/someone/bin", "source_lang": "xx", "target_lang": "yy"}
        return {
            "args": None,
            "cfg": {"model": cfg, "task": task, "checkpoint": {"maximize_best_checkpoint_metric": False}},
            "model": model.state_dict(),
            "criterion": None,
            "optimizer_history": [
                {"criterion_name": "c", "optimizer_name": "o", "lr_scheduler_state": {}, "num_updates": 10 * seed}
            ],
            "task_state": {},
            "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}, "val_loss": 5.0 / seed},
            "last_optimizer_state": {"state": {}},
        }

    def load(self, path: Any, overrides: dict[str, Any] | None = None) -> Any:
        """The model of a file, built and filled by fairseq's own loader, as in fairseq-generate."""
        models, _, _ = checkpoint_utils.load_model_ensemble_and_task([str(path)], overrides, task=self.task)
        return models[0].eval()

    def logits(self, path: Any, overrides: dict[str, Any] | None = None) -> torch.Tensor:
        """float (B, T, V) for a fixed batch with padding."""
        generator = torch.Generator().manual_seed(0)
        source = torch.randint(4, 24, (3, 7), generator=generator)
        source[0, :3] = self.task.source_dictionary.pad()
        target = torch.randint(4, 24, (3, 5), generator=generator)
        with torch.no_grad():
            return self.load(path, overrides)(source, torch.tensor([4, 7, 7]), target)[0]


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    return Tiny()


@pytest.fixture(scope="session")
def moe_state(tiny: Tiny) -> dict[str, Any]:
    return tiny.state("xmoe_transformer_tiny", moe_num_experts=4, moe_expert_dim=6)


@pytest.fixture(scope="session")
def dense_state(tiny: Tiny) -> dict[str, Any]:
    return tiny.state("dense_transformer_tiny")

"""Names that nothing reads are refused when a training starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from fairseq.dataclass.configs import FairseqConfig
from omegaconf import OmegaConf, open_dict

import xmoe_fairseq  # noqa: F401  registers the models
from xmoe_fairseq.patches.known_settings import check_known

CONFIGS = Path(__file__).parents[2] / "train_configs"


def composed(name="demo/xmoe", **changes):
    """fairseq's settings with those of a YAML and ``group__name`` changes, as hydra composes them."""
    cfg = OmegaConf.create(OmegaConf.to_container(OmegaConf.structured(FairseqConfig), enum_to_str=True))
    cfg = OmegaConf.merge(cfg, yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")))
    with open_dict(cfg):
        for path, value in changes.items():
            OmegaConf.update(cfg, path.replace("__", "."), value, force_add=True)
    return cfg


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("model__dropuot", "did you mean model.dropout"),
        ("model__moe_treshold", "did you mean model.moe_threshold"),
        ("optimization__max_updaet", "did you mean optimization.max_update"),
        ("datset__max_tokens", "did you mean dataset"),
    ],
)
def test_a_misspelt_name_is_refused_with_the_right_one(name, hint):
    shown = name.partition("__")[0] if name.startswith("datset") else name.replace("__", ".")
    with pytest.raises(ValueError, match=f"settings that nothing reads: {shown}; {hint}"):
        check_known(composed(**{name: 1}))


@pytest.mark.parametrize(
    "name",
    sorted(
        str(path.relative_to(CONFIGS).with_suffix(""))
        for path in CONFIGS.glob("*/*.yaml")
        if path.parent.name != "studies"
    ),
)
def test_the_configurations_of_the_project_pass(name):
    cfg = composed(name, model__activation_dropout=0.1, common__cpu=True)
    if "lm/" in name:
        cfg.model.max_target_positions = 64  # the model writes it before the training starts
    check_known(cfg)

"""The settings of a YAML of train_configs/ with ``--set`` applied, as fairseq-hydra-train will read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

Settings = dict[str, Any]


def quoted(text: str) -> str:
    """``text`` as a quoted string of hydra's override grammar, taken literally: ``${`` is no interpolation."""
    if "\n" in text:
        raise ValueError(f"{text!r}: a line break in a setting or path; rename it")
    return str(QuotedString(text=text.replace("${", r"\${"), quote=Quote.single).with_quotes())


def parse_override(override: str) -> tuple[str, Any, str]:
    """Key and value of ``KEY=VALUE``, and the word for hydra; a value outside its grammar (``it's``) is a string."""
    key, _, text = override.partition("=")
    try:
        parsed = OverridesParser.create().parse_override(override)
        if not parsed.is_sweep_override():
            return key, parsed.value(), override
    except HydraException:
        pass
    return key, text, f"{key}={quoted(text)}"


def flat(content: Mapping[str, Any], prefix: str = "") -> Settings:
    """Nested groups as ``{"group.key": value}``."""
    result: Settings = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


def read_settings(config: str | Path, overrides: Sequence[str]) -> Settings:
    """The flat settings of a YAML of train_configs/ with ``--set`` applied. Raises: ValueError."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(config), resolve=False)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(f"{config}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{config}: holds no groups of settings such as model and optimization")
    settings = flat({str(key): value for key, value in content.items()})
    for override in overrides:
        key, value, _ = parse_override(override)
        settings |= flat({key: value}) if isinstance(value, Mapping) else {key: value}
    return settings


def limits(settings: Settings) -> tuple[int, int, int]:
    """The most positions of source and target, end mark included, and tokens of a training batch (0: no limit)."""
    sides = [
        min(int(settings.get(f"{group}.max_{side}_positions") or 1024) for group in ("model", "task"))
        for side in ("source", "target")
    ]
    return sides[0], sides[1], int(settings.get("dataset.max_tokens") or 0)

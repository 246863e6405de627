"""Settings of a training: as hydra reads them, and whether a training that was begun can be continued with them.

``overrides`` prints KEY=VALUE words quoted for hydra, ``signature`` the settings that decide the trained model, and
``check`` compares with the settings that a training keeps in CHECKPOINTS/settings.json. What a resume takes over
(more updates, patience, save intervals, workers, devices, precision) may change, everything else may not.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from eval.text import files

Settings = dict[str, Any]
FILE = "settings.json"
MAKE_LONGER = (
    "optimization.max_update",
    "optimization.max_epoch",
    "optimization.stop_*",
    "checkpoint.patience",
)
# Which checkpoint is best, what is learned from and the seed stay; the rest of these groups is how, not what.
STAY = (
    "checkpoint.best_checkpoint_metric",
    "checkpoint.maximize_best_checkpoint_metric",
    "dataset.*subset",
    "common.seed",
)
MAY_CHANGE = (
    *MAKE_LONGER,
    "optimization.update_freq",
    "checkpoint.*",
    "dataset.*",
    "distributed_training.*",
    "common.*",
    "hydra.*",
    "job_logging_cfg.*",
    "model.checkpoint_activations",
    "model.offload_activations",
    "model.moe_expert_parallel",
    "model.moe_compute",
)
_ABSENT = object()


class OtherTraining(Exception):
    """A training cannot be continued with the new settings. ``differences``: one line each."""

    def __init__(self, updates: int | None, differences: Sequence[str]) -> None:
        super().__init__("\n".join(differences))
        self.updates, self.differences = updates, differences


def may_change(name: str) -> bool:
    """Whether a begun training can take over another value of the setting ``name`` (``group.key``)."""
    return not _matches(name, STAY) and _matches(name, MAY_CHANGE)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def quoted(text: str) -> str:
    """``text`` as a quoted string of hydra's override grammar, taken literally: ``${`` is no interpolation."""
    if "\n" in text:
        raise ValueError(f"{text!r}: a line break in a setting or path; rename it")
    return str(QuotedString(text=text.replace("${", r"\${"), quote=Quote.single).with_quotes())


def parse_override(override: str) -> tuple[str, Any, str]:
    """Key, value, and the words for hydra of ``KEY=VALUE``; a value outside hydra's grammar (``it's``) is a string."""
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
    """The settings of a YAML of train_configs/ with ``--set`` applied, flat. Raises: ValueError."""
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


def signature(settings: Settings) -> list[str]:
    """Lines ``name=value`` of what decides the trained model and how long it is trained; comments do not count."""
    return [
        f"{name}={_shown(value)}"
        for name, value in sorted(settings.items())
        if not may_change(name) or _matches(name, MAKE_LONGER)
    ]


def limits(settings: Settings) -> tuple[int, int, int]:
    """Positions of source and target, end mark included, and tokens of a training batch (0: no limit)."""
    sides = [
        min(int(settings.get(f"{group}.max_{side}_positions") or 1024) for group in ("model", "task"))
        for side in ("source", "target")
    ]
    return sides[0], sides[1], int(settings.get("dataset.max_tokens") or 0)


def _shown(value: Any) -> str:
    return "(not given)" if value is _ABSENT else value if isinstance(value, str) else json.dumps(value)


def differences(old: Settings, new: Settings) -> list[tuple[str, Any, Any]]:
    """Name, old and new value of every setting that differs."""
    pairs = ((name, old.get(name, _ABSENT), new.get(name, _ABSENT)) for name in sorted(old.keys() | new.keys()))
    return [item for item in pairs if item[1] != item[2]]


def describe(difference: tuple[str, Any, Any]) -> str:
    """One line for people: ``model.dropout: 0.1, now 0.3``."""
    name, old, new = difference
    return name if name.startswith("content of") else f"{name}: {_shown(old)}, now {_shown(new)}"


class Training:
    """The training in a folder of checkpoints.

    Attributes:
        is_begun: whether there is any checkpoint.
        updates: those of checkpoint_last.pt; 0 if not begun, None if that file cannot be read.
        segments: ``{"update": N, "settings": {...}, "facts": {...}}`` from each (re)start with other settings on.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.is_begun = any(self.folder.glob("checkpoint*.pt"))
        noted = self.folder / FILE
        self.segments: list[dict[str, Any]] = files.read_json(noted)["segments"] if noted.is_file() else []

    @functools.cached_property
    def _state(self) -> dict[str, Any] | None:
        from xmoe_fairseq.checkpoints.files import CheckpointError, load_checkpoint

        try:
            return load_checkpoint(self.folder / "checkpoint_last.pt", verify=False, mmap=True)
        except (CheckpointError, OSError):
            return None

    @property
    def updates(self) -> int | None:
        from xmoe_fairseq.checkpoints.files import num_updates

        if not self.is_begun:
            return 0
        return None if self._state is None else num_updates(self._state)

    def check(self, settings: Settings, facts: Mapping[str, str]) -> list[str]:
        """Compare with what the training was begun with.

        Args:
            settings: flat, of `read_settings`.
            facts: what else the model depends on, such as the content of the training text; a name that only one of
                the two sides has is not compared, so facts that are known later can be checked later.
        Returns: what differs and may, in words.
        Raises: OtherTraining.
        """
        if not self.is_begun:
            return []
        old = self.segments[-1] if self.segments else {"settings": self._kept_by_checkpoint(settings), "facts": {}}
        changed = [item for item in differences(old["settings"], settings) if not self._is_default(item)]
        known = {name: value for name, value in facts.items() if name in old["facts"]}
        fatal = [item for item in changed if not may_change(item[0])]
        fatal += differences({name: old["facts"][name] for name in known}, known)
        if fatal:
            raise OtherTraining(self.updates, [describe(item) for item in fatal])
        return [describe(item) for item in changed]

    def _kept_by_checkpoint(self, settings: Settings) -> Settings:
        """For a training without settings.json: what its last checkpoint says of the settings given now."""
        return {name: self._of_checkpoint(name, value) for name, value in settings.items()}

    def _of_checkpoint(self, name: str, otherwise: Any) -> Any:
        group, _, key = name.partition(".")
        content = ((self._state or {}).get("cfg") or {}).get(group) or {}
        content = vars(content) if isinstance(content, argparse.Namespace) else content
        return content.get(key, otherwise)

    def _is_default(self, difference: tuple[str, Any, Any]) -> bool:
        """Whether a setting is only now written down, with the value that the checkpoint says it had."""
        name, old, new = difference
        return old is _ABSENT and self._of_checkpoint(name, _ABSENT) == new

    def is_done(self, settings: Settings) -> bool:
        """Whether nothing is left to train; fairseq itself would add an update."""
        max_update = settings.get("optimization.max_update") or 0
        return bool(self.updates and 0 < int(max_update) <= self.updates)

    def write(self, settings: Settings, facts: Mapping[str, str]) -> None:
        """Note the settings of a start, beside those of earlier ones."""
        now = {"update": self.updates, "settings": settings, "facts": dict(facts)}
        earlier = self.segments if self.is_begun else []
        if earlier and earlier[-1]["settings"] == settings:
            now["update"] = earlier[-1]["update"]
            earlier = earlier[:-1]
        files.write_json(self.folder / FILE, {"segments": [*earlier, now]})


def changes(folder: str | Path) -> list[str]:
    """What changed while a training went on: ``update 40: optimization.max_update: 40, now 60``."""
    segments = Training(folder).segments
    return [
        f"update {later['update']}: " + "; ".join(map(describe, differences(before["settings"], later["settings"])))
        for before, later in itertools.pairwise(segments)
    ]


def _check(args: argparse.Namespace) -> int:
    settings, facts = read_settings(args.config, args.set), dict(fact.split("=", 1) for fact in args.fact)
    training = Training(args.checkpoints)
    try:
        changed = training.check(settings, facts)
    except OtherTraining as other:
        where = "an unknown update" if other.updates is None else f"update {other.updates}"
        print(f"the training in {args.checkpoints}, at {where}, was begun with other settings:", file=sys.stderr)
        for line in other.differences:
            print(f"  {line}", file=sys.stderr)
        return 2
    if args.write:
        training.write(settings, facts)
    for line in changed:
        print(f"continues with {line}", file=sys.stderr)
    if args.state:
        state = "done" if training.is_done(settings) else "continue" if training.is_begun else "fresh"
        print(state, "?" if training.updates is None else training.updates)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval.run.training_settings", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("overrides", help="print words quoted for hydra, one a line")
    sub.add_argument("--text", action="append", default=[], metavar="KEY=TEXT", help="TEXT is taken literally")
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="VALUE as hydra reads it")
    for name, what in {
        "signature": "print the settings that decide the trained model",
        "limits": "print the most source and target positions, and the tokens of a batch (0: no limit)",
        "check": "exit 2 and name what differs if the training in DIR cannot be continued",
    }.items():
        sub = commands.add_parser(name, help=what)
        sub.add_argument("--config", required=True, metavar="YAML", help="a file of train_configs/")
        sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="changes one setting of it")
    sub.add_argument("--checkpoints", required=True, metavar="DIR", help="of the training")
    sub.add_argument("--fact", action="append", default=[], metavar="NAME=VALUE", help="what else must not change")
    sub.add_argument("--state", action="store_true", help="print fresh, continue N or done N (N updates)")
    sub.add_argument("--write", action="store_true", help="note the settings in DIR/settings.json")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        if args.command == "overrides":
            for text in args.text:
                key, _, value = text.partition("=")
                print(f"++{key}={quoted(value)}")
            for override in args.set:
                print(f"++{parse_override(override)[2]}")
        elif args.command == "signature":
            print("\n".join(signature(read_settings(args.config, args.set))))
        elif args.command == "limits":
            print(*limits(read_settings(args.config, args.set)))
        else:
            return _check(args)
    except (ValueError, OSError) as error:
        print(f"training_settings: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

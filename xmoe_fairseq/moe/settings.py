"""Description of a setting, from which flags, YAML, checkpoints, errors and reports are made.

Settings that every layer has are fields of ``MoEConfig``; a router's own settings are declared by its class.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

_NUMBERS: dict[type, type] = {int: Integral, float: Real}


@dataclass(frozen=True)
class Setting:
    """One value that a user chooses.

    Attributes:
        name: keyword of ``MoEConfig``.
        kind: int, float, bool or str.
        default: the value if none is given; it may be None if the setting is ``optional``.
        help: one line for ``--help``: unit, range, meaning of none.
        check: returns True for a value that is allowed; it is not called for None.
        allowed: the end of the error message, after "must".
        optional: None is allowed too (on a command line and in YAML: none, null).
        choices: the values that are allowed; None: all that pass ``check``.
        flat: its name in flags, YAML, checkpoints and errors; ``moe_`` + name unless given.
        shown: its format in descriptions of a model, e.g. "t {}"; empty: not in descriptions.
        per_layer: a model may give a list, one value for each MoE layer.
        in_layer: value and number of a layer -> what the layer gets, where layers must differ; None: the value itself.
        ignored_elsewhere: True: other routers ignore it, so that a checkpoint can be run with another router. False:
            with another router a value that is not the default is an error.
    """

    name: str
    kind: type
    default: Any
    help: str
    check: Callable[[Any], bool] | None = None
    allowed: str = ""
    optional: bool = False
    choices: tuple[str, ...] | None = None
    flat: str = ""
    shown: str = ""
    per_layer: bool = False
    in_layer: Callable[[Any, int], Any] | None = None
    ignored_elsewhere: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "flat", self.flat or f"moe_{self.name}")

    @property
    def flag(self) -> str:
        """``--moe-top-k``."""
        return "--" + self.flat.replace("_", "-")

    def parse(self, text: str) -> Any:
        """The value of one command-line argument; argparse makes an error of the ValueError."""
        if self.per_layer and "," in text:
            return [self._parse_one(part) for part in text.split(",")]
        return self._parse_one(text)

    def _parse_one(self, text: str) -> Any:
        return None if self.optional and text.lower() == "none" else self.kind(text)

    def validate(self, value: Any) -> None:
        """Raise ValueError, with what is allowed, for a value of one layer that is not."""
        if value is None and self.optional:
            return
        if self.choices is not None and value not in self.choices:
            raise ValueError(f"{self.flat} ({value!r}) must be one of {', '.join(self.choices)}")
        if not self._has_type(value) or not (self.check is None or self.check(value)):
            plain = {int: "a whole number", float: "a number", bool: "True or False", str: "a word"}[self.kind]
            raise ValueError(f"{self.flat} ({value!r}) must {self.allowed or 'be ' + plain}")

    def _has_type(self, value: Any) -> bool:
        if isinstance(value, bool):
            return self.kind is bool
        return isinstance(value, _NUMBERS.get(self.kind, self.kind))

    def describe(self, value: Any) -> str:
        """The setting in a description, such as ``t 0.9``; empty if it has no part in one."""
        return self.shown.format(value) if self.shown and value else ""


def declare(default: Any, kind: type, help: str, *, flat: str = "", **more: Any) -> Any:
    """A field of ``MoEConfig`` with its ``Setting``; the field's own name is the setting's.

    ``flat``: the field's own name for what is no setting of a model.
    """
    return field(default=default, metadata={"kind": kind, "help": help, "flat": flat, **more})


def at_least_one(value: float) -> bool:
    """1, 2, ..."""
    return value >= 1


def not_negative(value: float) -> bool:
    """0 and more; infinity is not."""
    return 0 <= value < math.inf


def positive(value: float) -> bool:
    """More than 0; infinity is not."""
    return 0 < value < math.inf


def below_one(value: float) -> bool:
    """In [0, 1)."""
    return 0 <= value < 1

"""Read a study's YAML and refuse unknown keys and impossible values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from eval.studies.kinds import LANGUAGE_MODEL, TRANSLATION, Kind
from eval.studies.plan import ROOT, Method, Pair, Study

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_KEYS = {
    "study": ("title", "pairs", "methods", "seeds", "baseline", "set", "run", "calibrate", "sweep"),
    "pair": ("train", "valid", "test", "test_set", "vocab-size", "methods", "set"),
    "method": ("config", "set", "seeds", "title", "paper", "sweep"),
}
# flags of the scripts that go to the preparation of the data alone
_DATA_FLAGS = ("subwords", "vocab-size", "workers")
# prices of inference if a study names none
_GOALS = ("loss:0.01", "budget:0.5", "budget:1.0")
_LANGUAGE = re.compile(r"[a-z]{2,3}")


def load_study(path: Path) -> Study:
    """Read and check a study.

    Paths of configurations are relative to the YAML's folder, prefixes of text to the working folder.
    Raises: FileNotFoundError; ValueError that names the key, its value and what is allowed.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no such study: {path}; those that come with the project: {ROOT}/train_configs/studies"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    given = _mapping(path, "the study", content, "study")
    for key in ("pairs", "methods", "seeds"):
        if not given.get(key):
            raise ValueError(f"{path}: {key} is missing or empty; a study has pairs, methods and seeds")
    flags = given.get("run") or {}
    names = list(_named(path, "methods", given["methods"]))
    pairs = tuple(
        _pair(path, name, value, flags, names) for name, value in _named(path, "pairs", given["pairs"]).items()
    )
    kind = _kind(path, pairs)
    common = _Common(
        settings=_settings(path, "set", given.get("set")),
        seeds=_seeds(path, "seeds", given["seeds"]),
        sweep=_sweep(path, "sweep", given.get("sweep"), kind),
        kind=kind,
    )
    methods = tuple(_method(path, name, given["methods"][name], common) for name in names)
    baseline = given.get("baseline", names[0])
    if baseline not in names:
        raise ValueError(f"{path}: baseline {baseline!r} is none of the methods {', '.join(names)}")
    for flag in flags:
        if flag not in _DATA_FLAGS + kind.cell_flags:
            raise ValueError(f"{path}: run: {flag} is not one of {', '.join(_DATA_FLAGS + kind.cell_flags)}")
    return Study(
        title=str(given.get("title", path.stem)),
        pairs=pairs,
        methods=methods,
        baseline=baseline,
        cell_flags=_flags(flags, kind.cell_flags),
        goals=tuple(str(goal) for goal in given.get("calibrate", _GOALS)),
    )


@dataclass(frozen=True)
class _Common:
    """The settings that the study gives to all its methods."""

    settings: tuple[str, ...]
    seeds: tuple[int, ...]
    sweep: tuple[float, ...]
    kind: Kind


def _kind(path: Path, pairs: tuple[Pair, ...]) -> Kind:
    kinds = {pair.kind.name: pair for pair in pairs}
    if len(kinds) > 1:
        shown = " and ".join(f"{pair.name} (a {name})" for name, pair in kinds.items())
        raise ValueError(f"{path}: pairs: {shown} cannot be compared; a study is of one kind")
    for pair in pairs:
        if pair.kind is LANGUAGE_MODEL and not _LANGUAGE.fullmatch(pair.languages):
            raise ValueError(f"{path}: pairs: {pair.name} must be two languages such as de-en, or one such as en")
    return pairs[0].kind


def _mapping(path: Path, place: str, value: Any, kind: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {place} must be a mapping, found {value!r}")
    unknown = [key for key in value if key not in _KEYS[kind]]
    if unknown:
        raise ValueError(f"{path}: {place}: unknown {', '.join(map(str, unknown))}; known are {', '.join(_KEYS[kind])}")
    return value


def _named(path: Path, place: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(name, str) and _NAME.fullmatch(name) for name in value):
        raise ValueError(f"{path}: {place} must be a mapping; its names become folders: letters, digits, '.', '_', '-'")
    return value


def _pair(path: Path, name: str, value: Any, flags: Mapping[str, Any], methods: list[str]) -> Pair:
    given = _mapping(path, f"pair {name}", value, "pair")
    missing = [key for key in ("train", "valid", "test") if not given.get(key)]
    if missing:
        raise ValueError(f"{path}: pair {name}: {', '.join(missing)} missing: a prefix PREFIX of PREFIX.LANGUAGE files")
    texts = {key: str(Path(given[key]).absolute()) for key in ("train", "valid", "test")}
    only = given.get("methods")
    if only is not None and (not isinstance(only, list) or not only or set(only) - set(methods)):
        raise ValueError(f"{path}: pair {name}: methods must be a list of {', '.join(methods)}, found {only!r}")
    own = {flag: given[flag] for flag in _DATA_FLAGS if flag in given}
    test_set = str(given.get("test_set", Path(given["test"]).name))
    return Pair(
        name,
        **texts,
        test_set=test_set,
        data_flags=_flags({**flags, **own}, _DATA_FLAGS),
        methods=None if only is None else tuple(only),
        settings=_settings(path, f"pair {name}: set", given.get("set")),
    )


def _method(path: Path, name: str, value: Any, common: _Common) -> Method:
    given = _mapping(path, f"method {name}", value, "method")
    config = (path.parent / str(given.get("config"))).resolve()
    if not config.is_file():
        raise ValueError(f"{path}: method {name}: config {given.get('config')!r} is no file in {path.parent}")
    return Method(
        name=name,
        title=str(given.get("title", name)),
        config=str(config),
        settings=(*common.settings, *_settings(path, f"method {name}: set", given.get("set"))),
        seeds=_seeds(path, f"method {name}: seeds", given["seeds"]) if "seeds" in given else common.seeds,
        paper=given.get("paper"),
        sweep=_sweep(path, f"method {name}: sweep", given["sweep"], common.kind) if "sweep" in given else common.sweep,
    )


def _seeds(path: Path, place: str, value: Any) -> tuple[int, ...]:
    if (
        not isinstance(value, list)
        or not value
        or not all(isinstance(seed, int) and seed >= 0 for seed in value)
        or len(set(value)) < len(value)
    ):
        raise ValueError(
            f"{path}: {place} must be a list of different whole numbers such as [1, 2, 3], found {value!r}"
        )
    return tuple(value)


def _sweep(path: Path, place: str, value: Any, kind: Kind) -> tuple[float, ...]:
    if not value:
        return ()
    if kind is TRANSLATION:
        raise ValueError(f"{path}: {place}: thresholds are swept for language models; leave it out for translations")
    if (
        not isinstance(value, list)
        or not all(isinstance(item, (int, float)) and 0 <= item <= 1 for item in value)
        or len(set(value)) < len(value)
    ):
        raise ValueError(f"{path}: {place} must be a list of different thresholds in [0, 1], found {value!r}")
    return tuple(float(item) for item in value)


def _settings(path: Path, place: str, value: Any) -> tuple[str, ...]:
    """``{a.b: 1}`` as ``a.b=1``, in the form of --set."""
    if value is None:
        return ()
    if not isinstance(value, dict) or not all("." in str(key) for key in value):
        raise ValueError(f"{path}: {place} must be a mapping of GROUP.KEY to values, found {value!r}")
    return tuple(f"{key}={_word(item)}" for key, item in value.items())


def _word(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(_word, value))}]"
    return str(value)


def _flags(given: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(word for name in names if name in given for word in (f"--{name}", str(given[name])))

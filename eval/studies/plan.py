"""What a study is: pairs, methods and seeds from one YAML, and the runs of scripts/run_pair.sh that it stands for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_KEYS = {
    "study": ("title", "pairs", "methods", "seeds", "baseline", "set", "run", "calibrate"),
    "pair": ("train", "valid", "test", "test_set", "vocab-size", "methods"),
    "method": ("config", "set", "seeds", "title", "paper"),
}
# flags of run_pair.sh that a study may give to all cells; those of the data go to the preparation alone
_DATA_FLAGS = ("subwords", "vocab-size", "workers")
# prices of inference where a study names none
_GOALS = ("loss:0.01", "budget:0.5", "budget:1.0")
_CELL_FLAGS = ("average", "beam", "lenpen", "max-tokens", "device", "launcher")


@dataclass(frozen=True)
class Pair:
    """One language pair: prefixes of its text, what the test set is called, and flags of its data.

    Attributes:
        name: ``de-en``, or with a word after a dot, ``de-en.30k``, where a study has several texts of a pair.
        methods: names of the methods that are trained on it; None: all.
    """

    name: str
    train: str
    valid: str
    test: str
    test_set: str
    data_flags: tuple[str, ...]
    methods: tuple[str, ...] | None = None

    def has(self, method: str) -> bool:
        """True if the method is trained on this pair."""
        return self.methods is None or method in self.methods

    @property
    def languages(self) -> str:
        """Such as ``de-en``."""
        return self.name.split(".")[0]

    @property
    def target(self) -> str:
        """The language that is translated into."""
        return self.languages.split("-")[-1]


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: also the name of its folder.
        title: what tables show.
        config: absolute path of its YAML.
        settings: ``GROUP.KEY=VALUE``, those of the whole study first.
        seeds: those it is trained with.
        paper: the row of the paper's Table 3 to show beside it, or None.
    """

    name: str
    title: str
    config: str
    settings: tuple[str, ...]
    seeds: tuple[int, ...]
    paper: str | None


@dataclass(frozen=True)
class Cell:
    """One training: a run of scripts/run_pair.sh."""

    pair: Pair
    method: Method
    seed: int

    @property
    def name(self) -> str:
        """Relative path of its folder, below the study's ``cells``."""
        return f"{self.pair.name}/{self.method.name}/seed-{self.seed}"


@dataclass(frozen=True)
class Study:
    """A checked study; ``baseline`` is the method that all others are tested against."""

    title: str
    pairs: tuple[Pair, ...]
    methods: tuple[Method, ...]
    baseline: str
    cell_flags: tuple[str, ...]
    goals: tuple[str, ...]

    def cells(self) -> list[Cell]:
        """All trainings. The first seed of every method comes first, so an unfinished study compares something."""
        most = max(len(method.seeds) for method in self.methods)
        return [
            Cell(pair, method, method.seeds[turn])
            for turn in range(most)
            for pair in self.pairs
            for method in self.methods
            if turn < len(method.seeds) and pair.has(method.name)
        ]

    def data_command(self, pair: Pair, out: Path) -> list[str]:
        """Subwords and binary data of one pair, once for all its cells."""
        texts = ["--train", pair.train, "--valid", pair.valid, "--test", pair.test]
        return [*_run_pair(pair, out / "data" / pair.name), *texts, *pair.data_flags, "--data-only"]

    def cell_command(self, cell: Cell, out: Path) -> list[str]:
        """The run of one cell; anyone can start it alone."""
        data = out / "data" / cell.pair.name
        prepared = ["--test", cell.pair.test, "--data-bin", str(data / "data-bin")]
        prepared += ["--subword-model", str(data / "subwords"), "--test-set", cell.pair.test_set]
        given = ["--config", cell.method.config, "--seed", str(cell.seed)]
        given += [word for setting in cell.method.settings for word in ("--set", setting)]
        given += [word for goal in self.goals or ("none",) for word in ("--calibrate", goal)]
        if cell.seed != cell.method.seeds[0]:
            given.append("--no-analysis")  # the page shows the routing of each method's first seed
        return [*_run_pair(cell.pair, out / "cells" / cell.name), *prepared, *given, *self.cell_flags]


def _run_pair(pair: Pair, out: Path) -> list[str]:
    return ["bash", str(ROOT / "scripts" / "run_pair.sh"), "--pair", pair.languages, "--out", str(out)]


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
    common = _settings(path, "set", given.get("set"))
    seeds = _seeds(path, "seeds", given["seeds"])
    methods = tuple(
        _method(path, name, value, common, seeds) for name, value in _named(path, "methods", given["methods"]).items()
    )
    names = [method.name for method in methods]
    baseline = given.get("baseline", names[0])
    if baseline not in names:
        raise ValueError(f"{path}: baseline {baseline!r} is none of the methods {', '.join(names)}")
    flags = given.get("run") or {}
    for flag in flags:
        if flag not in _DATA_FLAGS + _CELL_FLAGS:
            raise ValueError(f"{path}: run: {flag} is not one of {', '.join(_DATA_FLAGS + _CELL_FLAGS)}")
    pairs = tuple(
        _pair(path, name, value, flags, names) for name, value in _named(path, "pairs", given["pairs"]).items()
    )
    return Study(
        title=str(given.get("title", path.stem)),
        pairs=pairs,
        methods=methods,
        baseline=baseline,
        cell_flags=_flags(flags, _CELL_FLAGS),
        goals=tuple(str(goal) for goal in given.get("calibrate", _GOALS)),
    )


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
    )


def _method(path: Path, name: str, value: Any, common: tuple[str, ...], seeds: tuple[int, ...]) -> Method:
    given = _mapping(path, f"method {name}", value, "method")
    config = (path.parent / str(given.get("config"))).resolve()
    if not config.is_file():
        raise ValueError(f"{path}: method {name}: config {given.get('config')!r} is no file in {path.parent}")
    return Method(
        name=name,
        title=str(given.get("title", name)),
        config=str(config),
        settings=(*common, *_settings(path, f"method {name}: set", given.get("set"))),
        seeds=_seeds(path, f"method {name}: seeds", given["seeds"]) if "seeds" in given else seeds,
        paper=given.get("paper"),
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


def _settings(path: Path, place: str, value: Any) -> tuple[str, ...]:
    """``{a.b: 1}`` as ``a.b=1``, in the words that --set takes."""
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

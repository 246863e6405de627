"""The records of a study: texts, methods and seeds of one YAML, and their runs of run_pair.sh or run_lm.sh."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from eval.studies.kinds import LANGUAGE_MODEL, TRANSLATION, Kind

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Pair:
    """One language pair, or the text of a language model: prefixes, name of the test set, flags of its data.

    Attributes:
        name: ``de-en``, or ``en`` for language models; with a word after a dot, ``de-en.30k``, where a study has
            several texts of a pair.
        methods: names of the methods that are trained on it; None: all.
        settings: ``GROUP.KEY=VALUE`` of all trainings on it, after those of the method.
    """

    name: str
    train: str
    valid: str
    test: str
    test_set: str
    data_flags: tuple[str, ...]
    methods: tuple[str, ...] | None = None
    settings: tuple[str, ...] = ()

    def has(self, method: str) -> bool:
        """True if the method is trained on this pair."""
        return self.methods is None or method in self.methods

    @property
    def languages(self) -> str:
        """The languages, such as ``de-en``, or ``en`` for language models."""
        return self.name.split(".")[0]

    @property
    def kind(self) -> Kind:
        """The kind of model that is trained on it."""
        return TRANSLATION if "-" in self.languages else LANGUAGE_MODEL

    @property
    def target(self) -> str:
        """The target language."""
        return self.languages.split("-")[-1]


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: also the name of its folder.
        title: its name in tables.
        config: absolute path of its YAML.
        settings: ``GROUP.KEY=VALUE``, those of the whole study first.
        seeds: the seeds of its trainings.
        paper: the row of the paper's table to show beside it, or None.
        sweep: further thresholds at which its language models are evaluated.
    """

    name: str
    title: str
    config: str
    settings: tuple[str, ...]
    seeds: tuple[int, ...]
    paper: str | None
    sweep: tuple[float, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One training: a run of run_pair.sh or run_lm.sh."""

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

    @property
    def kind(self) -> Kind:
        """The kind of all its texts."""
        return self.pairs[0].kind

    def cells(self) -> list[Cell]:
        """All trainings; the first seed of every method comes first, so that an unfinished study compares methods."""
        most = max(len(method.seeds) for method in self.methods)
        return [
            Cell(pair, method, method.seeds[turn])
            for turn in range(most)
            for pair in self.pairs
            for method in self.methods
            if turn < len(method.seeds) and pair.has(method.name)
        ]

    def data_command(self, pair: Pair, out: Path) -> list[str]:
        """The command that makes subwords and binary data of one pair, once for all its cells."""
        texts = ["--train", pair.train, "--valid", pair.valid, "--test", pair.test]
        return [*_run(pair, out / "data" / pair.name), *texts, *pair.data_flags, "--data-only"]

    def cell_command(self, cell: Cell, out: Path) -> list[str]:
        """The command of one cell, which can also be started alone."""
        data = out / "data" / cell.pair.name
        prepared = ["--data-bin", str(data / "data-bin")]
        if self.kind is TRANSLATION:
            prepared = ["--test", cell.pair.test, *prepared, "--subword-model", str(data / "subwords")]
        prepared += ["--test-set", cell.pair.test_set]
        given = ["--config", cell.method.config, "--seed", str(cell.seed)]
        settings = (*cell.method.settings, *cell.pair.settings)
        given += [word for setting in settings for word in ("--set", setting)]
        given += [word for threshold in cell.method.sweep for word in ("--sweep", f"{threshold:g}")]
        given += [word for goal in self.goals or ("none",) for word in ("--calibrate", goal)]
        if cell.seed != cell.method.seeds[0]:
            given.append("--no-analysis")  # the page shows the routing of each method's first seed
        return [*_run(cell.pair, out / "cells" / cell.name), *prepared, *given, *self.cell_flags]


def _run(pair: Pair, out: Path) -> list[str]:
    flag = "--pair" if pair.kind is TRANSLATION else "--language"
    return ["bash", str(ROOT / "scripts" / pair.kind.script), flag, pair.languages, "--out", str(out)]

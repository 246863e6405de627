"""A run as the reports read it: its name and the files of eval.analyse and eval.run_report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.text import files

Json = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run; a part that it lacks is empty.

    Attributes:
        name: its title on a page.
        analysis: content of analysis.json, or None.
        report: content of scores.json, or None.
    """

    name: str
    analysis: Json | None = None
    report: Json | None = None

    def analysed(self, part: str) -> Json:
        """A part of the analysis that is an object, such as ``layers``, ``history``, ``quality`` or ``checkpoint``."""
        return (self.analysis or {}).get(part) or {}

    def listed(self, part: str) -> list[Any]:
        """A part of the analysis that is a list: ``problems``, ``explorer`` or ``checkpoints``."""
        return (self.analysis or {}).get(part) or []

    def reported(self, part: str) -> Json:
        """A part of scores.json: ``scores``, ``training``, ``generation`` or ``config``."""
        return (self.report or {}).get(part) or {}

    @property
    def layers(self) -> Json:
        """Label -> the layer's part of the analysis; empty for a dense model."""
        return self.analysed("layers")

    def sweep(self, name: str) -> list[Json]:
        """The points of a sweep, ``capacity`` or ``threshold``."""
        return self.analysed("sweeps").get(name) or []


def load_run(text: str) -> Run:
    """A run from ``FOLDER``, ``FILE.json`` or ``NAME=`` one of these.

    Raises: FileNotFoundError if neither analysis.json nor scores.json is there; ValueError for broken JSON.
    """
    name, place = ("", text) if Path(text).exists() or "=" not in text else text.split("=", 1)
    path = Path(place)
    folder = path if path.is_dir() else path.parent
    analysis = path if path.is_file() else folder / "analysis.json"
    scores = folder / "scores.json"
    if not path.exists() or not (analysis.is_file() or scores.is_file()):
        raise FileNotFoundError(
            f"{place}: no analysis.json and no scores.json there; run xmoe analyse or xmoe run first"
        )
    analysed = reported = None
    if analysis.is_file():
        analysed = files.read_json(analysis)
        if analysed.get("schema") != 1:
            raise ValueError(f"{analysis}: not written by this version of eval.analyse; run it again")
    if scores.is_file() and path.is_dir():
        reported = files.read_json(scores)
    return Run(name or path.resolve().name, analysed, reported)

"""Read fairseq's JSON training log. As a command, copy it to a file and show it as a progress bar.

fairseq-hydra-train ... common.log_format=json 2>&1 | python -m eval.run.training_log --log train.log
"""

from __future__ import annotations

import json
import re
import signal
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from xmoe_fairseq.command_line import command_parser, reports_errors

# "[2026-01-31 12:00:00,000][valid][INFO] - {...}" from fairseq-hydra-train, "... | valid | {...}" from
# fairseq-train. train_inner is written every log interval, the others when an epoch or a validation ends.
_RECORD = re.compile(r'\b(train_inner|train|valid\w*|test\w*)(?: \| |\]\[INFO\] - )(\{"epoch".*\})\s*$')
_MESSAGE = re.compile(r"^(?:\[?\d{4}-\d\d-\d\d |Traceback |(?:DEBUG|INFO|WARNING|ERROR|CRITICAL):|\S+: \w*Warning: )")
_LOUD = re.compile(r"Traceback |\b(?:WARNING|ERROR|CRITICAL)\b")
_MAX_UPDATE = re.compile(r"'max_update': (\d+)")
# The criterions' name of a figure of one MoE layer: side, index, figure.
LAYER_FIGURE = re.compile(r"moe_(encoder|decoder)_?(\d+)_(\w+)")
_SHOWN = {
    ("train", "loss"): "loss",
    ("train", "wps"): "words/s",
    ("train", "moe_used"): "experts",
    ("valid", "loss"): "valid loss",
}


@dataclass(frozen=True)
class Record:
    """The figures of one line.

    Attributes:
        kind: ``train_inner`` (every ``log_interval`` updates), ``train`` (end of an epoch) or a valid subset.
        figures: numbers by fairseq's key, without the ``train_`` or ``valid_`` in front; NaN and inf stay.
    """

    kind: str
    figures: dict[str, float]

    @property
    def num_updates(self) -> int | None:
        """Updates done when the line was written, or None where the line does not tell."""
        value = self.figures.get("num_updates")
        return None if value is None else int(value)


def layer_order(label: str) -> tuple[bool, int]:
    """Sorts labels such as ``encoder 1`` as a token meets the layers: the encoder's first, by index."""
    side, index = label.split()[:2]
    return side != "encoder", int(index)


def parse_line(line: str) -> Record | None:
    """The figures of one log line, or None if it holds none."""
    found = _RECORD.search(line)
    if not found:
        return None
    kind, text = found.groups()
    try:
        content = json.loads(text)
    except ValueError:  # a line cut short by an interruption
        return None
    figures = {}
    for key, value in content.items():
        if (number := _number(value)) is not None:
            figures[key.removeprefix(f"{kind}_")] = number
    return Record(kind, figures)


def _number(value: object) -> float | None:
    """The number in one of fairseq's strings such as "3.142", "None" or "nan"; None if there is none."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def read_records(path: str | Path) -> list[Record]:
    """All figures of a log, in the order of the updates.

    An interrupted and resumed training repeats the updates since its last checkpoint; the later line counts.
    Raises: FileNotFoundError if there is no such log.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such training log: {path}")
    with open(path, encoding="utf-8", errors="replace") as lines:
        return _without_repeats(record for record in map(parse_line, lines) if record)


def _without_repeats(records: Iterable[Record]) -> list[Record]:
    kept: dict[tuple[str, object], Record] = {}
    for position, record in enumerate(records):
        key = (record.kind, position if record.num_updates is None else record.num_updates)
        kept.pop(key, None)
        kept[key] = record
    return sorted(kept.values(), key=lambda record: record.num_updates or 0)


def last_figures(records: Sequence[Record], kind: str) -> dict[str, float]:
    """The figures of the last line of one kind; empty if there is none."""
    return next((dict(record.figures) for record in reversed(records) if record.kind == kind), {})


class Progress:
    """Shows a training on standard error: a bar that follows the updates, with warnings and errors above it."""

    def __init__(self) -> None:
        self._bar: tqdm[None] | None = None  # made when the first figures come
        self._total: int | None = None
        self._shown: dict[str, str] = {}
        self._quiet: deque[str] = deque(maxlen=20)
        self._is_loud = self._is_done = False

    def add(self, line: str) -> None:
        """Take the next line of fairseq's output."""
        self._is_done = self._is_done or "done training in" in line
        record = parse_line(line)
        if record is not None:
            self._advance(record)
            return
        if self._total is None and (found := _MAX_UPDATE.search(line)):
            self._total = int(found[1]) or None
        if found := _MESSAGE.search(line):  # a line that starts no message continues the one before it
            self._is_loud = bool(_LOUD.search(line[:80]))
        if self._is_loud:
            self._write(line)
        else:
            self._quiet.append(line[:400])

    def close(self) -> None:
        """End the bar, and show the last lines of a training that did not say that it is done."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if not self._is_done:
            self._write("the training stopped early; its last lines:")
            for line in self._quiet:
                self._write(line)

    def _advance(self, record: Record) -> None:
        if self._bar is None:
            seconds = 1 if sys.stderr.isatty() else 20
            self._bar = tqdm(total=self._total, unit="update", mininterval=seconds)
        side = "train" if record.kind.startswith("train") else "valid"
        for key, value in record.figures.items():
            if (side, key) in _SHOWN:
                self._shown[_SHOWN[side, key]] = f"{value:.4g}"
        self._bar.set_postfix(self._shown, refresh=False)
        self._bar.update(max(0, (record.num_updates or 0) - self._bar.n))

    def _write(self, line: str) -> None:
        tqdm.write(line.rstrip("\n"), file=sys.stderr)


@reports_errors("training_log")
def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser("training_log", __doc__, prog="python -m eval.run.training_log")
    parser.add_argument("--log", required=True, metavar="FILE", help="append every line of standard input to this file")
    args = parser.parse_args(argv)
    # Ctrl-C reaches the whole pipeline: it ends the training, whose last lines must still reach the log
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    progress = Progress()
    with open(args.log, "a", encoding="utf-8") as log:
        for line in sys.stdin:
            log.write(line)
            log.flush()
            progress.add(line)
    progress.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Run a study (pairs x methods x seeds) and write its results: study.json, study.md, study.html.

bash scripts/run_study.sh --study FILE.yaml --out DIR [--jobs N]
"""

from __future__ import annotations

import argparse
import fcntl
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.run.record import load_run
from eval.studies import collect, page, text
from eval.studies.plan import Study
from eval.studies.reading import load_study
from eval.studies.running import SAVED, Job, Runner
from eval.text import files
from xmoe_fairseq.command_line import at_least, command_parser, reports_errors


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = command_parser("study", __doc__)
    add = parser.add_argument
    add(
        "--study",
        required=True,
        metavar="YAML",
        help="pairs, methods, seeds; those of the project: train_configs/studies",
    )
    add("--out", required=True, metavar="DIR", help="folder of the cells and of the results")
    add("--jobs", type=at_least(1), default=1, metavar="N", help="cells at the same time (default 1)")
    add("--only-collect", action="store_true", help="run nothing, write the results of the cells that are finished")
    add("--dry-run", action="store_true", help="print the commands, ready to be copied, and run nothing")
    return parser.parse_args(argv)


def show(study: Study, out: Path) -> None:
    """Print every command of the study."""
    for pair in study.pairs:
        print(f"\n# data of {pair.name}\n{shlex.join(study.data_command(pair, out))}")
    for cell in study.cells():
        print(f"\n# {cell.name}\n{shlex.join(study.cell_command(cell, out))}")


def run(study: Study, out: Path, workers: int) -> tuple[list[Job], bool]:
    """Make the data, then run the cells. Returns: the jobs that ended, and True if a signal stopped them."""
    logs = out / "logs"
    steps = [
        [
            Job(f"data/{pair.name}", study.data_command(pair, out), logs / f"data.{pair.name}.log")
            for pair in study.pairs
        ],
        [
            Job(
                cell.name,
                study.cell_command(cell, out),
                logs / f"{cell.name.replace('/', '.')}.log",
                done_before=(out / "cells" / cell.name / "scores.json").exists(),
            )
            for cell in study.cells()
        ],
    ]
    ended: list[Job] = []
    for jobs in steps:
        failed = {job.name.removeprefix("data/") for job in ended if job.code}
        runner = Runner([job for job in jobs if job.name.split("/")[0] not in failed], workers, tell)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, lambda *_, runner=runner: runner.stop())
        ended += runner.run()
        if runner.stopped:
            return ended, True
    return ended, False


def tell(line: str) -> None:
    """Print progress on standard error."""
    print(f"run_study: {line}", file=sys.stderr, flush=True)


def write_results(study: Study, out: Path) -> dict[str, Any]:
    """Write study.json, study.speed.json, study.md and study.html of the finished cells."""
    content, speeds = collect.collect(study, out), collect.speeds(study, out)
    files.write_json(out / "study.json", content)
    files.write_json(out / "study.speed.json", speeds)
    files.write_text(out / "study.md", text.markdown(content, speeds))
    runs = [
        load_run(f"{cell.pair.name} {cell.method.name}={out / 'cells' / cell.name}")
        for cell in study.cells()
        if cell.seed == cell.method.seeds[0] and cell.name not in content["missing"]
    ]
    files.write_text(out / "study.html", page.render(content, speeds, runs))
    return content


@reports_errors("run_study")
def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    study, out = load_study(Path(args.study)), Path(args.out).absolute()
    if args.dry_run:
        show(study, out)
        return 0
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another study is at work in {out}; wait for it or choose another --out") from None
        ended, stopped = ([], False) if args.only_collect else run(study, out, args.jobs)
        if stopped:
            tell("stopped by a signal, everything saved; the same command again continues")
            return SAVED
        content = write_results(study, out)
    failed = [job.name for job in ended if job.code]
    if failed:
        tell(f"error: failed: {', '.join(failed)}; their logs are in {out}/logs; the same command again continues")
    tell(f"{'part of the study' if content['missing'] else 'done'}: {out}/study.md, study.json, study.html")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

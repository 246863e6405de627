"""Run the commands of a study, several at a time; one that fails does not stop the others."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SAVED = 75  # exit code of scripts/run_pair.sh: interrupted and saved; the same command continues
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux


@dataclass
class Job:
    """One command and its result.

    Attributes:
        done_before: an earlier run has finished it, so it takes seconds and tells nothing about the others.
        code: its exit code; None while it has not ended.
    """

    name: str
    command: Sequence[str]
    log: Path
    done_before: bool = False
    code: int | None = None
    seconds: float = 0.0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    started: float = 0.0

    def start(self) -> None:
        """Start the command; its output is appended to its log."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.started = time.monotonic()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )

    def stop(self) -> None:
        """Ask a started command to save and end."""
        if self.process is not None:
            self.process.send_signal(signal.SIGUSR1)

    def has_ended(self) -> bool:
        """True if the command has ended; then ``code`` is set."""
        if self.process is None or self.process.poll() is None:
            return False
        self.code, self.seconds = self.process.returncode, time.monotonic() - self.started
        return True

    def last_words(self, count: int = 4) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:])


def _end_with_parent() -> None:
    """Make the kernel send a cell SIGTERM, which saves, when the study is killed."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGTERM)


class Runner:
    """A queue of jobs. After ``stop`` no job starts, and running jobs are asked to save and end."""

    def __init__(self, jobs: Sequence[Job], workers: int, tell: Callable[[str], None]) -> None:
        self.waiting, self.running, self.ended = list(jobs), list[Job](), list[Job]()
        self.workers, self.tell, self.total = workers, tell, len(jobs)
        self.stopped = False

    def stop(self) -> None:
        """Pass SIGUSR1 on, at which run_pair.sh saves its training and ends with code 75."""
        self.stopped = True
        for job in self.running:
            job.stop()

    def run(self) -> list[Job]:
        """Run all jobs. Returns: the jobs in the order of their ends."""
        while self.running or (self.waiting and not self.stopped):
            while self.waiting and len(self.running) < self.workers and not self.stopped:
                job = self.waiting.pop(0)
                self.running.append(job)
                job.start()
                if self.stopped:  # a signal came while the job started
                    job.stop()
            for job in [job for job in self.running if job.has_ended()]:
                self.running.remove(job)
                self.ended.append(job)
                self.tell(self._told(job))
            time.sleep(0.1)
        return self.ended

    def _told(self, job: Job) -> str:
        place = f"[{len(self.ended)}/{self.total}] {job.name}"
        if job.code == SAVED:
            return f"{place}: stopped, saved"
        if job.code:
            return f"{place}: failed (exit {job.code}); its log {job.log} ends with\n{job.last_words()}"
        left = self._seconds_left()
        rest = f"; about {duration(left)} left" if left is not None else ""
        return f"{place}: done in {duration(job.seconds)}{rest}"

    def _seconds_left(self) -> float | None:
        """The estimate from the mean time of jobs that did their work here, with running jobs counted as half done."""
        times = [job.seconds for job in self.ended if job.code == 0 and not job.done_before]
        waiting, running = (sum(not job.done_before for job in jobs) for jobs in (self.waiting, self.running))
        if not times or not waiting + running:
            return None
        return sum(times) / len(times) * (waiting + running / 2) / min(self.workers, waiting + running)


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"

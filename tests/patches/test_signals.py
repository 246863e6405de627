"""Signals where fairseq-train starts its ranks itself; single processes and ranks: test_two_ranks.py and tests/e2e."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace

import pytest
from torch.multiprocessing import ProcessExitedException, get_context

from xmoe_fairseq.patches import signals

SPAWNS = SimpleNamespace(
    distributed_training=SimpleNamespace(distributed_world_size=2, distributed_no_spawn=False),
)


def ranks_end_with(code: int):
    def call_main(_cfg, _main):
        raise ProcessExitedException("process 0 ended", error_index=0, error_pid=1, exit_code=code)

    return call_main


def test_the_code_of_the_ranks_is_given_out():
    with pytest.raises(SystemExit) as stop:
        signals._call_main(ranks_end_with(signals.SAVED), SPAWNS, None)
    assert stop.value.code == 75


def test_a_failure_stays_a_failure():
    with pytest.raises(ProcessExitedException):
        signals._call_main(ranks_end_with(1), SPAWNS, None)


def wait_for_signal(ready) -> None:
    received = []
    signal.signal(signal.SIGUSR1, lambda *_: received.append(1))
    ready.set()
    while not received:
        time.sleep(0.01)
    os._exit(signals.SAVED)


def test_signals_are_passed_on_to_the_ranks():
    context = get_context("fork")
    before = signal.getsignal(signal.SIGUSR1)

    def call_main(_cfg, _main):
        ready = context.Event()
        rank = context.Process(target=wait_for_signal, args=(ready,), daemon=True)
        rank.start()
        assert ready.wait(30)
        os.kill(os.getpid(), signal.SIGUSR1)
        rank.join(30)
        return rank.exitcode

    assert signals._call_main(call_main, SPAWNS, None) == 75
    assert signal.getsignal(signal.SIGUSR1) is before

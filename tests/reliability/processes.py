"""The command in a process of its own, which is killed or stopped at random moments, and resumed.

A process that has everything imported is forked for each run: importing takes seconds, and a run less than one.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import sklearn.datasets  # noqa: F401  (with torch._dynamo: imported before the fork, so that no run waits for them)
import torch
import torch._dynamo

from tests.reliability.failures import RESUMED
from tests.reliability.small_run import (
    EVERY,
    STEPS,
    Row,
    Trial,
    Unbroken,
    differences,
    prepare,
    run_command,
    seed_generators,
    steps_kept,
)

LONGEST = 60.0  # seconds that a run may take on a busy machine
multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])


class Started(ForkServerProcess):
    """The command on the folder `output`, in a process of its own. words: more of the command line."""

    def __init__(self, output: Path, *words: str) -> None:
        super().__init__()
        self._given = (output, *words)
        self._log = output.with_name(f"{output.name}-{time.monotonic_ns()}.log")
        self._done = multiprocessing.get_context("forkserver").RawValue("q", 0)
        self.start()

    def run(self) -> None:
        """What the new process does."""
        for number in (signal.SIGTERM, signal.SIGHUP):  # nohup may have switched them off
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            for stream in (1, 2):
                os.dup2(log, stream)
            torch.set_num_threads(1)
            prepare(pytest.MonkeyPatch(), self._count)
            if "--resume" in self._given:  # with other states of the generators: it has to bring them back
                seed_generators(os.getpid())
            sys.exit(run_command(*self._given))
        except KeyboardInterrupt:  # it came before the command began
            sys.exit(130)

    def _count(self) -> None:
        self._done.value += 1

    @property
    def steps(self) -> int:
        """Training steps that it has done."""
        return int(self._done.value)

    @property
    def told(self) -> str:
        """What it has printed."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def end(self) -> int:
        """The exit status of a run that ends by itself. One that does not is killed, and that is an error."""
        self.join(LONGEST)
        if self.exitcode is None:
            self.kill()
            raise AssertionError(f"the run does not end: {self.told[-300:]}")
        assert "Traceback" not in self.told, f"the run ends with a traceback: {self.told[-800:]}"
        return self.exitcode


def strike_any_time(*numbers: signal.Signals) -> Trial:
    """A signal at random times: the run and up to two that resume it are struck, the one after those is compared."""

    def trial(rng: random.Random, tmp: Path, unbroken: Unbroken) -> str:
        folder, known = tmp / "run", 0
        for _ in range(3):
            number = rng.choice(numbers)
            run = Started(folder, *(("--resume",) if known else ()))
            run.join(rng.uniform(0.0, 1.2 * unbroken.seconds))
            if run.pid and run.exitcode is None:
                os.kill(run.pid, number)
            status = run.end()
            kept, done = steps_kept(folder), known + run.steps
            where = f"{number.name} after {done} steps, {kept} kept: status {status}: {run.told[-500:]}"
            if number == signal.SIGKILL:
                assert status in (-number, unbroken.status), where
                assert kept >= max(known, done - EVERY), where
            else:
                # Before its handlers are in place the system's own end the process: no step was taken then.
                assert status in (128 + number, -number, unbroken.status), where
                assert kept == done, where
                told_all = "Figures, history.csv" in run.told  # it came after the very last line
                assert not run.steps or told_all or "--resume" in run.told, where
            known = kept
        again = Started(folder, *(("--resume",) if known else ()))
        assert again.end() == unbroken.status, again.told[-500:]
        assert not differences(folder, unbroken.folder)
        return ""

    return trial


def two_runs(rng: random.Random, tmp: Path, unbroken: Unbroken) -> str:
    """Two commands on one folder."""
    folder, begun = tmp / "run", rng.randrange(1, STEPS)
    first = Started(folder)
    while first.steps < begun and first.is_alive():
        time.sleep(0.002)
    second = Started(folder, *rng.choice(((), ("--resume",))))
    assert second.end() == 2, second.told
    assert "in use" in second.told
    assert second.told.count("\n") == 1, second.told
    assert first.end() == unbroken.status, first.told
    assert not differences(folder, unbroken.folder)
    assert not (folder / "previous").exists()
    return ""


KEPT = f"the state can be read and lacks at most the {EVERY} steps since the last checkpoint; {RESUMED}"
STOPPED = f"it ends with status 130, 143 or 129 and says how to continue; no step is lost; {RESUMED}"
REFUSED = "the second refuses in one line and touches nothing; the first ends as the unbroken run"
ROWS = {
    "kill -9 at any time, of resumed runs too": Row(KEPT, strike_any_time(signal.SIGKILL)),
    "SIGINT, SIGTERM or SIGHUP at any time": Row(
        STOPPED, strike_any_time(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    ),
    "two runs started on one output folder": Row(REFUSED, two_runs, share=0.2),
}

"""Runs that are killed or stopped at random moments, and resumed: the end is that of the unbroken run, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path

from tests.torture.fault import Outcome, fault
from tests.torture.runner import (
    EVERY,
    LONGEST,
    ROOT,
    differences,
    leftovers,
    steps_kept,
    the_runner,
)

KEPT = (
    f"the state can be read and lacks at most the {EVERY} steps since the last checkpoint; resumed, the run ends with "
    "the weights, optimizer, history, figures and results of the unbroken one, bit for bit"
)


def check_finished(folder: Path, unbroken: Path, **which: Collection[str]) -> None:
    different = differences(folder, unbroken, **which)
    assert not different, f"not as in the unbroken run: {', '.join(different)}"
    assert not leftovers(folder), f"left behind: {leftovers(folder)}"


@fault("kill -9 at a random moment of a run", survived=KEPT, rounds=100, quick=4)
def killed(rng: random.Random, tmp: Path, rounds: int) -> Outcome:
    """Every run is killed and resumed again and again until it gets through; so resumed runs are killed, too."""
    outcome, finished = Outcome(), 0
    runner = the_runner()
    folder, known = tmp / "0", 0
    while outcome.tried - finished < rounds or folder.exists():
        resume = ("--resume",) if known else ()
        run = runner.start(folder, *resume)
        last = outcome.tried - finished >= rounds
        if run.wait(LONGEST if last else rng.uniform(0.0, 1.2 * runner.seconds)) is None:
            run.send(signal.SIGKILL)
            if run.wait() == -signal.SIGKILL:  # else it had just ended by itself
                with outcome.trial(f"killed after {run.steps} steps, resumed at {known}"):
                    kept = steps_kept(folder)
                    assert kept >= known, f"{kept} steps are kept where {known} were"
                    assert run.steps - kept <= EVERY, f"{kept} of {run.steps} steps are kept"
                    known = kept
                continue
        finished += 1
        with outcome.trial(f"run {finished}, finished"):
            assert run.end() in (0, 1), run.told[-500:]
            check_finished(folder, runner.unbroken)
        folder, known = tmp / str(finished), 0
    outcome.note = f"{outcome.tried - finished} kills, {finished} runs that were finished after them and compared"
    return outcome


@fault(
    "SIGINT, SIGTERM or SIGHUP at a random moment of a run",
    survived="it ends with status 130, 143 or 129 and says how to go on; no step is lost; resumed, it ends as the "
    "unbroken run, bit for bit",
    rounds=45,
    quick=2,
)
def stopped(rng: random.Random, tmp: Path, rounds: int) -> Outcome:
    """As `killed`, with signals that can be handled. Before training there is nothing to lose, and none to resume."""
    outcome, finished, early = Outcome(), 0, 0
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    runner = the_runner()
    folder, known = tmp / "0", 0
    while outcome.tried - finished < rounds or folder.exists():
        run = runner.start(folder, *(("--resume",) if known else ()))
        last = outcome.tried - finished >= rounds
        if run.wait(LONGEST if last else rng.uniform(0.0, runner.seconds)) is None:
            number = numbers[outcome.tried % len(numbers)]
            run.send(number)
            with outcome.trial(f"{number.name} after {run.steps} steps, resumed at {known}"):
                status = run.end()
                kept = steps_kept(folder)
                if status in (0, 1):  # it was about to end
                    assert kept == max(run.steps, known), f"{kept} of {run.steps} steps are kept"
                else:
                    # Before the handlers are in place the system's own end it: no step was taken then.
                    assert status in (128 + number, -number), f"status {status}"
                    assert kept == max(run.steps, known), f"{kept} of {run.steps} steps are kept"
                    told_all = "Figures, history.csv" in run.told  # it came after the very last line
                    assert run.steps == 0 or told_all or "--resume" in run.told, run.told[-500:]
                    early += run.steps == 0
                known = kept
            continue
        finished += 1
        with outcome.trial(f"run {finished}, finished"):
            assert run.end() in (0, 1), run.told[-500:]
            check_finished(folder, runner.unbroken)
        folder, known = tmp / str(finished), 0
    outcome.note = (
        f"{outcome.tried - finished} signals, {early} of them before the first step; {finished} runs compared"
    )
    return outcome


@fault(
    "kill -9 and SIGTERM of the command `python -m experiments.debug_run` itself",
    survived=KEPT,
    rounds=4,
    quick=0,
)
def command(rng: random.Random, tmp: Path, rounds: int) -> Outcome:
    """As a user would: the smoke preset's own network, from a shell. Killed within the training, resumed, compared."""
    outcome = Outcome()
    words = ["--data=digits", "--preset=smoke", "--epochs=3", "--limit=100", "--device=cpu", "--checkpoint-every=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(folder: Path, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "experiments.debug_run", *words, f"--output={folder}", *more]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    unbroken = start(tmp / "unbroken")
    told = unbroken.communicate()[0]
    assert unbroken.returncode in (0, 1), told
    for number in range(rounds):
        folder = tmp / str(number)
        with outcome.trial(f"round {number}", seconds=4 * LONGEST):
            process = start(folder)
            while not (folder / "checkpoint.pt").exists() and process.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.uniform(0.0, 1.0))
            sent = (signal.SIGKILL, signal.SIGTERM)[number % 2]
            process.send_signal(sent)
            told = process.communicate()[0]
            assert process.returncode in (0, 1, -signal.SIGKILL, 128 + signal.SIGTERM), told
            again = start(folder, "--resume")
            told = again.communicate()[0]
            assert again.returncode in (0, 1), told
            # The script seeds torch; every process gets other states of Python's and numpy's generators.
            check_finished(folder, tmp / "unbroken", generators=("torch",))
    return outcome


@fault(
    "two runs started on one output folder",
    survived="the second refuses in one line and touches nothing; the first ends as the unbroken run",
    rounds=10,
    quick=1,
)
def two_runs(rng: random.Random, tmp: Path, rounds: int) -> Outcome:
    outcome = Outcome()
    runner = the_runner()
    for number in range(rounds):
        folder = tmp / str(number)
        with outcome.trial(f"round {number}"):
            first = runner.start(folder)
            while first.steps < rng.randrange(1, 10) and first.wait(0.002) is None:
                pass
            second = runner.start(folder, *(("--resume",) if number % 2 else ()))
            assert second.end() == 2, second.told
            assert "in use" in second.told
            assert second.told.count("\n") == 1, second.told
            assert first.end() in (0, 1), first.told
            check_finished(folder, runner.unbroken)
            assert not (folder / "previous").exists()
    return outcome

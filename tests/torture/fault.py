"""A fault that is brought about on purpose, and the count of how often it was survived.

A fault is a function `run(rng, tmp, rounds) -> Outcome`. It tries the fault `rounds` times at places drawn from `rng`,
in the empty folder `tmp`. One try is one `with outcome.trial(...)`: it is survived where the block ends, and lost where
anything is raised in it, an assertion that fails included, or where it takes longer than its time limit.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

SECONDS_PER_TRIAL = 60.0


class Hang(BaseException):
    """A trial that is not over after its time limit. No handler of ordinary errors may swallow it."""


@dataclass
class Outcome:
    """tried = survived + len(lost). `skipped` says why nothing was tried; `note` is a fact for the table."""

    tried: int = 0
    survived: int = 0
    lost: list[str] = field(default_factory=list)
    skipped: str = ""
    note: str = ""

    @contextmanager
    def trial(self, what: str, seconds: float = SECONDS_PER_TRIAL) -> Iterator[None]:
        """One try, called `what` in the list of the lost ones."""
        self.tried += 1
        try:
            with limited(seconds):
                yield
        except (Exception, SystemExit, Hang) as error:
            self.lost.append(f"{what}: {type(error).__name__}: {str(error)[:1000]}")
        else:
            self.survived += 1


Run = Callable[[random.Random, Path, int], Outcome]


@dataclass(frozen=True)
class Fault:
    """One row of the table. `rounds` of the full run, `quick` rounds in the tests; `survived`: what counts as that."""

    name: str
    survived: str
    rounds: int
    quick: int
    run: Run


FAULTS: dict[str, Fault] = {}


def fault(name: str, *, survived: str, rounds: int, quick: int) -> Callable[[Run], Run]:
    """Enter the function below as a row of the table."""

    def enter(run: Run) -> Run:
        if name in FAULTS:
            raise ValueError(f"two faults are called {name!r}")
        FAULTS[name] = Fault(name, survived, rounds, quick, run)
        return run

    return enter


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise Hang in the block once `seconds` have passed. Does nothing where the system has no SIGALRM."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise Hang(f"not over after {seconds:g} s")

    handler = signal.signal(signal.SIGALRM, ring)
    remaining = signal.setitimer(signal.ITIMER_REAL, seconds)  # a test runner may have set one of its own
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *remaining)
        signal.signal(signal.SIGALRM, handler)

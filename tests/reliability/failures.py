"""What is done to a run, and what has to hold afterwards: the failures of the matrix.

A failure is injected into the process of the command before it begins, and strikes in one training step or from that
step on. Processes that are killed or stopped from outside are in tests/reliability/processes.py.
"""

from __future__ import annotations

import errno
import math
import os
import random
import re
import signal
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from experiments import figures
from src.training import epoch as training_epoch
from tests.reliability.small_run import (
    EVERY,
    STEP,
    STEPS,
    Row,
    Trial,
    Unbroken,
    differences,
    prepare,
    run_told,
    seed_generators,
    steps_kept,
)

Patch = pytest.MonkeyPatch
ERRORS: dict[str, Callable[[], Exception]] = {
    "memory of Python": MemoryError,
    "memory of the CPU": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 GB"),
    "memory of CUDA": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB"),
}
WRITE_ERRORS = {"full": errno.ENOSPC, "read-only": errno.EROFS}


class Killed(BaseException):
    """Stands for kill -9: what it passes through writes and cleans up nothing more."""


@dataclass(frozen=True)
class Failure:
    """A failure, and what has to hold after it.

    survived: what counts as survived, for the table. inject: puts it into this process, at a training step of the run
    (from 1), in one of its kinds. kinds: the variants, and a pattern of what each has the run say. statuses: of the
    command. loses: training steps that may be lost.
    """

    survived: str
    inject: Callable[[Patch, int, str], None]
    kinds: dict[str, str]
    statuses: set[int]
    loses: int = EVERY


def in_step(patch: Patch, number: int, action: Callable[[nn.Module, ExitStack], None], *, after: bool = False) -> None:
    """Do `action` before the update of step `number`, or `after` it. What it puts on the stack ends with the step."""
    real, count = training_epoch.train_step, 0

    def step(model: nn.Module, *rest: Any) -> Any:
        nonlocal count
        count += 1
        with ExitStack() as stack:
            if count == number and not after:
                action(model, stack)
            losses = real(model, *rest)
            if count == number and after:
                action(model, stack)
        return losses

    patch.setattr(STEP, step)


def kill(patch: Patch, number: int, kind: str) -> None:
    """In a step, or before the renaming number `number` of a file that was written beside its place."""
    real, count = Path.replace, 0

    def killed(*_: object, **__: object) -> None:
        raise Killed

    def die() -> None:
        patch.setattr(tempfile, "mkstemp", killed)
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        killed()

    def replace(path: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == number:
            die()
        return real(path, target)

    if kind == "in a step":
        in_step(patch, number, lambda model, stack: die())
    else:
        patch.setattr(Path, "replace", replace)


def send_signals(patch: Patch, number: int, kind: str) -> None:
    """One signal in the step, or two where its weights have changed."""
    names = kind.split(" and ")

    def send(model: nn.Module, stack: ExitStack) -> None:
        for name in names:
            os.kill(os.getpid(), signal.Signals[name])

    in_step(patch, number, send, after=len(names) > 1)


def raise_error(patch: Patch, number: int, kind: str) -> None:
    def fail(model: nn.Module, stack: ExitStack) -> None:
        raise ERRORS[kind]()

    in_step(patch, number, fail)


def hinder_writes(patch: Patch, number: int, kind: str) -> None:
    """From the step on no file can be made."""
    code = WRITE_ERRORS[kind]
    refused = mock.Mock(side_effect=OSError(code, os.strerror(code)))
    in_step(patch, number, lambda model, stack: patch.setattr(tempfile, "mkstemp", refused))


def spoil_number(patch: Patch, number: int, kind: str) -> None:
    """The loss, a gradient or a weight becomes NaN or infinite."""
    bad = (math.nan, math.inf)[number % 2]

    def spoil(model: nn.Module, stack: ExitStack) -> None:
        parameters, cross_entropy = dict(model.named_parameters()), nn.functional.cross_entropy
        if kind == "loss":
            stack.enter_context(
                mock.patch(
                    "torch.nn.functional.cross_entropy", lambda *given, **named: cross_entropy(*given, **named) * bad
                )
            )
        elif kind == "gradient":
            weight: Any = parameters["layer2.0.conv1.parametrizations.weight.original"]
            stack.callback(weight.register_hook(lambda gradient: torch.full_like(gradient, bad)).remove)
        else:
            with torch.no_grad():
                parameters["bn1.weight"][0] = bad

    in_step(patch, number, spoil)


def spoil_figure(patch: Patch, number: int, kind: str) -> None:
    def draw(*_: Any, **__: Any) -> None:
        raise RuntimeError("no font")

    patch.setattr(figures, kind, draw)


KILLED = -signal.SIGKILL  # the "status" of a process that was killed
RESUMED = "resumed without the failure, the run ends as the unbroken one, bit for bit"
GOOD = "the run ends with one line that says so, the last good checkpoint stays; "
FAILURES: dict[str, Failure] = {
    "killed in a step, or between writing and renaming a file": Failure(
        f"at most the {EVERY} steps since the last checkpoint are lost; {RESUMED}",
        kill,
        {"in a step": "", "before a renaming": ""},
        statuses={KILLED},
    ),
    "SIGINT, SIGTERM or SIGHUP in a step": Failure(
        f"status 130, 143 or 129, it says how to continue, no step is lost; {RESUMED}",
        send_signals,
        dict.fromkeys(("SIGINT", "SIGTERM", "SIGHUP"), "stopped after epoch .* kept in .*(--resume|run this cell)"),
        statuses={128 + signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGHUP},
        loses=0,
    ),
    "second Ctrl-C, in the middle of an update": Failure(
        f"status 130, the last good checkpoint stays; {RESUMED}",
        send_signals,
        {"SIGINT and SIGINT": "stopped within a step"},
        statuses={130},
    ),
    "disk full or read-only at a checkpoint": Failure(
        GOOD + "with room again, " + RESUMED,
        hinder_writes,
        dict.fromkeys(WRITE_ERRORS, "could not be written"),
        statuses={2},
    ),
    "NaN or infinity in the loss, a gradient or a weight": Failure(
        GOOD.replace("says so", "names the first bad tensor") + RESUMED,
        spoil_number,
        {
            "loss": "the loss is (nan|inf) at epoch",
            "gradient": r"a gradient is not finite at .*: layer2\.0\.conv1\.weight; ",
            "weight": r"the loss is nan at .*: linear\.bias; ",
        },
        statuses={2},
    ),
    "out of memory in a step": Failure(
        GOOD.replace("says so", "says which batch size would do") + RESUMED,
        raise_error,
        dict.fromkeys(ERRORS, r"does not hold a batch of 15 images; try batches of 7: --batch-size 7"),
        statuses={2},
    ),
    "figure that cannot be drawn": Failure(
        "a warning that names the figure; the other figures, the results and the status are as without it",
        spoil_figure,
        {"channel_liveness": "channel_liveness.png could not be drawn"},
        statuses={0},
        loses=0,
    ),
}


def strike(name: str, kind: str = "") -> Trial:
    """The failure at a random step of the command, which is then resumed. kind: one of its kinds, "" for any."""

    def trial(rng: random.Random, tmp: Path, unbroken: Unbroken) -> str:
        failure, folder, steps = FAILURES[name], tmp / "run", list[int]()
        chosen, number = kind or rng.choice(list(failure.kinds)), rng.randrange(1, STEPS + 1)
        with pytest.MonkeyPatch.context() as patch:
            prepare(patch, lambda: steps.append(1))
            failure.inject(patch, number, chosen)
            try:
                status, _, told = run_told(folder)
            except Killed:
                status, told = KILLED, ""
        kept, where = steps_kept(folder), f"{chosen}, step {number}: status {status}: {told[-800:]}"
        assert status in failure.statuses, where
        assert re.search(failure.kinds[chosen], told), where
        assert sum(line.startswith("error: ") for line in told.splitlines()) == (status == 2), where
        assert len(steps) - kept <= failure.loses, f"{kept} of {len(steps)} steps are kept; {where}"
        with pytest.MonkeyPatch.context() as patch:
            prepare(patch)
            if kept:
                seed_generators(7)  # a resumed run has to bring back their states
            status, _, told = run_told(folder, *(["--resume"] if kept else []))
        assert status == unbroken.status, told[-500:]
        assert not differences(folder, unbroken.folder)
        return ""

    return trial


ROWS = {name: Row(failure.survived, strike(name), share=0.3) for name, failure in FAILURES.items()}

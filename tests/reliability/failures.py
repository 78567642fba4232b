"""What is done to a run, and what has to hold afterwards: the failures of the matrix.

A failure is injected into the process of the run before it begins, and strikes in one training step or from that step
on. The same injections serve the training loop within the tests' process, and the command in a process of its own.
"""

from __future__ import annotations

import errno
import math
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from experiments import figures
from src.runs import RunError
from src.runs import folder as run_folder
from src.training import Interrupted, TrainingError
from src.training import epoch as training_epoch
from tests.reliability.small_run import EVERY, FIGURES, STEP, STEPS

Patch = pytest.MonkeyPatch
ERRORS: dict[str, Callable[[], Exception]] = {
    "memory of Python": MemoryError,
    "memory of the CPU": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 GB"),
    "memory of CUDA": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB"),
    "after the update": lambda: ZeroDivisionError("within a step"),
}
DRAWING_ERRORS = (RuntimeError("no font"), ValueError("limits cannot be NaN"), MemoryError(), KeyError("bits"))


class Killed(BaseException):
    """Stands for kill -9 where the tests' own process is the one to be killed."""


def die() -> None:
    """End this process as kill -9 does. Tests within their own process put something else here."""
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Moment:
    """When a failure strikes, in which variant, in which folder. step: training step of the run, from 1."""

    step: int
    kind: str
    folder: Path


@dataclass(frozen=True)
class Failure:
    """A failure, and what has to hold after it.

    survived: what counts as survived, for the table. kinds: the variants, and a pattern of what each has the run say.
    ends: what leaves the training loop; None where the run comes to its end. steps: the moments of the quick tests;
    none for a failure outside of the training loop. loses: training steps that may be lost. mend: makes the folder
    usable again.
    """

    survived: str
    inject: Callable[[Patch, Moment], None]
    kinds: dict[str, str]
    ends: type[BaseException] | None
    steps: tuple[int, ...] = ()
    loses: int = EVERY
    mend: Callable[[Path], None] = lambda folder: None


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


def kill(patch: Patch, moment: Moment) -> None:
    """In a step, or before the renaming number `step` of a file that was written beside its place."""
    real, count = Path.replace, 0

    def replace(path: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == moment.step:
            die()
        return real(path, target)

    if moment.kind == "in a step":
        in_step(patch, moment.step, lambda model, stack: die())
    else:
        patch.setattr(Path, "replace", replace)


def send_signals(patch: Patch, moment: Moment) -> None:
    """One signal in the step, or two where its weights have changed."""
    names = moment.kind.split(" and ")

    def send(model: nn.Module, stack: ExitStack) -> None:
        for name in names:
            os.kill(os.getpid(), signal.Signals[name])

    in_step(patch, moment.step, send, after=len(names) > 1)


def raise_error(patch: Patch, moment: Moment) -> None:
    def fail(model: nn.Module, stack: ExitStack) -> None:
        raise ERRORS[moment.kind]()

    in_step(patch, moment.step, fail, after=moment.kind == "after the update")


@contextmanager
def short_files(most_bytes: int) -> Iterator[None]:
    """No file may become longer than `most_bytes`: a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def hinder_writes(patch: Patch, moment: Moment) -> None:
    """From the step on no file, or not the one of this name, can be written, or not longer than some bytes."""
    how, _, name = moment.kind.partition(" at ")
    real, begun = run_folder.write_atomic, []

    def write(path: str | Path, *rest: Any, **more: Any) -> None:
        hindrance: AbstractContextManager[Any] = nullcontext()
        if begun and name in ("every file", Path(path).name):
            error = OSError(errno.EROFS, "Read-only file system")
            read_only = mock.patch("tempfile.mkstemp", side_effect=error)
            hindrance = read_only if how == "read-only" else short_files(int(how.split()[0]))
        with hindrance:
            real(path, *rest, **more)

    patch.setattr(run_folder, "write_atomic", write)
    in_step(patch, moment.step, lambda model, stack: begun.append(True))


def remove_folder(patch: Patch, moment: Moment) -> None:
    def remove(model: nn.Module, stack: ExitStack) -> None:
        shutil.rmtree(moment.folder)
        if moment.kind == "a file in its place":
            moment.folder.write_text("mine")

    in_step(patch, moment.step, remove)


def spoil_number(patch: Patch, moment: Moment) -> None:
    """The loss, a gradient or a weight becomes NaN or infinite."""
    bad = (math.nan, math.inf)[moment.step % 2]

    def spoil(model: nn.Module, stack: ExitStack) -> None:
        parameters, cross_entropy = dict(model.named_parameters()), nn.functional.cross_entropy
        if moment.kind == "loss":
            stack.enter_context(
                mock.patch("torch.nn.functional.cross_entropy", lambda *given: cross_entropy(*given) * bad)
            )
        elif moment.kind == "gradient":
            weight: Any = parameters["layer2.0.conv1.parametrizations.weight.original"]
            stack.callback(weight.register_hook(lambda gradient: torch.full_like(gradient, bad)).remove)
        else:
            with torch.no_grad():
                parameters["bn1.weight"][0] = bad

    in_step(patch, moment.step, spoil)


def spoil_figure(patch: Patch, moment: Moment) -> None:
    def draw(*_: Any, **__: Any) -> None:
        raise DRAWING_ERRORS[moment.step % len(DRAWING_ERRORS)]

    patch.setattr(figures, moment.kind, draw)


# The exit status of the command, by what leaves its training loop. What is not here cannot happen to the command.
STATUSES: dict[type[BaseException] | None, set[int]] = {
    None: {0},
    Killed: {-signal.SIGKILL},
    KeyboardInterrupt: {130},
    Interrupted: {129, 130, 143},
    RunError: {2},
    TrainingError: {2},
}
RESUMED = "resumed without the failure, the run ends as the unbroken one, bit for bit"
GOOD = "the run ends with one line that says so, the last good checkpoint stays; "
FAILURES: dict[str, Failure] = {
    "kill -9 in a step, or between writing and renaming a file": Failure(
        f"at most the {EVERY} steps since the last checkpoint are lost; {RESUMED}",
        kill,
        {"in a step": "", "before a renaming": ""},
        ends=Killed,
        steps=(1, 4, 6, 11),
    ),
    "SIGINT, SIGTERM or SIGHUP in a step": Failure(
        f"status 130, 143 or 129, it says how to continue, no step is lost; {RESUMED}",
        send_signals,
        dict.fromkeys(("SIGINT", "SIGTERM", "SIGHUP"), "stopped after epoch .* kept in .*(--resume|run this cell)"),
        ends=Interrupted,
        steps=(1, 6, 12),
        loses=0,
    ),
    "second Ctrl-C, in the middle of an update": Failure(
        f"status 130, the last good checkpoint stays; {RESUMED}",
        send_signals,
        {"SIGINT and SIGINT": "stopped within a step"},
        ends=KeyboardInterrupt,
        steps=(1, 7),
    ),
    "error in the middle of an update": Failure(
        f"the error comes through, the last good checkpoint stays; {RESUMED}",
        raise_error,
        {"after the update": "within a step"},
        ends=ZeroDivisionError,
        steps=(2, 7),
    ),
    "disk full or read-only at a checkpoint": Failure(
        GOOD + "with room again, " + RESUMED,
        hinder_writes,
        {
            f"{how} at every file": "could not be written"
            for how in ("0 bytes", "2000 bytes", "20000 bytes", "read-only")
        },
        ends=RunError,
        steps=(2, 7),
    ),
    "disk full at a figure, history.csv or run.json": Failure(
        "a figure or history.csv costs a warning, run.json ends the run with one line; with room again, " + RESUMED,
        hinder_writes,
        {f"0 bytes at {name}": f"{name}'? could not be written" for name in (*FIGURES, "history.csv", "run.json")},
        ends=None,
        loses=0,
    ),
    "output folder vanishes": Failure(
        "it is made again with a warning, and the run ends as the unbroken one, bit for bit",
        remove_folder,
        {"removed": "was gone and is made again"},
        ends=None,
        steps=(6, 11),
        loses=0,
    ),
    "a file in the place of the output folder": Failure(
        "the run ends with one line that says so; with the folder possible again, it is trained anew to the same end",
        remove_folder,
        {"a file in its place": "could not be written .*make room"},
        ends=RunError,
        steps=(6,),
        loses=STEPS,
        mend=Path.unlink,
    ),
    "NaN or infinity in the loss, a gradient or a weight": Failure(
        GOOD.replace("says so", "names the first bad gradient") + RESUMED,
        spoil_number,
        {
            "loss": "the loss is (nan|inf) at epoch",
            "gradient": r"a gradient is not finite at .*: layer2\.0\.conv1\.weight; ",
            "weight": r"the loss is nan at .*: linear\.bias; ",
        },
        ends=TrainingError,
        steps=(6,),
    ),
    "out of memory in a step": Failure(
        GOOD.replace("says so", "says which batch size would do") + RESUMED,
        raise_error,
        dict.fromkeys(list(ERRORS)[:3], r"does not hold a batch of 15 images; try batches of 7: --batch-size 7"),
        ends=TrainingError,
        steps=(6,),
    ),
    "figure that cannot be drawn": Failure(
        "a warning that names the figure; the other figures, the results and the status are as without it",
        spoil_figure,
        {name.removesuffix(".png"): f"{name} could not be drawn" for name in FIGURES},
        ends=None,
        loses=0,
    ),
}

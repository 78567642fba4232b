"""Runs in which something breaks: disk, folder, figure, numbers, memory. What was done before stays.

A run goes until it is broken, in its own process (sabotage.py); then it is resumed without the fault, and its end is
held against that of the unbroken run.
"""

from __future__ import annotations

import math
import os
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from src.export import pack
from src.storage import StorageError
from src.training.failures import short_name
from tests.torture.damaged_files import small_network
from tests.torture.disks import SIZE, small_disk
from tests.torture.fault import Outcome, fault
from tests.torture.run_server import tiny_quantized
from tests.torture.runner import EPOCHS, EVERY, FIGURES, STEPS_PER_EPOCH, Started, steps_kept, the_runner
from tests.torture.sabotage import DRAWING_ERRORS, FILLER, MEMORY_ERRORS, leave_free, set_writable
from tests.torture.stops import check_finished

STEPS = EPOCHS * STEPS_PER_EPOCH
CHECKPOINTS = sum(step % EVERY == 0 or step % STEPS_PER_EPOCH == 0 for step in range(1, STEPS + 1))
RESUMED = "resumed without the fault, the run ends as the unbroken one, bit for bit"


def resume(folder: Path, known: int) -> None:
    """Go on from the folder, or begin anew where nothing was kept, and compare the end."""
    runner = the_runner()
    again = runner.start(folder, *(("--resume",) if known else ()))
    assert again.end() in (0, 1), again.told[-500:]
    check_finished(folder, runner.unbroken)


def stopped_by(run: Started, words: str) -> None:
    """The run ends by itself with status 2 and one line that says `words`."""
    assert run.end() == 2, run.told[-500:]
    errors = [line for line in run.told.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, run.told[-500:]
    assert words in errors[0], errors[0]


def kept_of(folder: Path, done: int) -> int:
    """Steps that are kept of those that were done: all but the EVERY since the last checkpoint."""
    kept = steps_kept(folder)
    assert kept >= done - EVERY, f"{kept} of {done} steps are kept"
    return kept


@fault(
    "disk full at a checkpoint",
    survived="the run ends with one line that says so, the checkpoint before it stays; with room again, " + RESUMED,
    rounds=20,
    quick=1,
)
def full_at_checkpoint(rng: random.Random, tmp: Path, rounds: int) -> Outcome:
    outcome, runner = Outcome(), the_runner()
    with small_disk(tmp / "disk") as mounted:
        for number in range(rounds):
            folder, time = tmp / "disk" / str(number), rng.randrange(1, CHECKPOINTS + 1)
            free = rng.randrange(40_000)
            settings = {"name": "checkpoint.pt", "time": time, "free": free, "disk": str(tmp / "disk") * mounted}
            with outcome.trial(f"checkpoint {time}, {free} bytes free"):
                run = runner.start(folder, sabotage="fill_disk", settings=settings)
                stopped_by(run, "could not be written")
                (tmp / "disk" / FILLER).unlink(missing_ok=True)
                resume(folder, kept_of(folder, run.steps))
            _empty(folder)
    return _on(outcome, mounted)


@fault(
    "disk full at a figure, history.csv or run.json",
    survived="a figure or history.csv costs a warning, run.json ends the run with one line; no file is half written; "
    "with room again, " + RESUMED,
    rounds=24,
    quick=2,
)
def full_at_results(rng: random.Random, tmp: Path, rounds: int) -> Outcome:
    outcome, runner = Outcome(), the_runner()
    with small_disk(tmp / "disk") as mounted:
        for number in range(rounds):
            folder, name = tmp / "disk" / str(number), (*FIGURES, "history.csv", "run.json")[number % 6]
            # The tables are shorter than a page of the disk: they find no room only where there is none at all.
            free = rng.randrange(10_000) if name in FIGURES else 0
            settings = {"name": name, "time": 1, "free": free, "disk": str(tmp / "disk") * mounted}
            if name == "history.csv":
                settings["time"] = EPOCHS + 1  # the one at the end; those before are followed by a checkpoint
            with outcome.trial(f"{name}, {free} bytes free"):
                run = runner.start(folder, sabotage="fill_disk", settings=settings)
                status = run.end()
                (tmp / "disk" / FILLER).unlink(missing_ok=True)
                assert status in (0, 1, 2), run.told[-500:]
                assert name in run.told, run.told[-500:]
                assert steps_kept(folder) == STEPS
                whole = {path.name: path.read_bytes() for path in runner.unbroken.iterdir() if path.suffix == ".png"}
                assert all((folder / file).read_bytes() == whole[file] for file in FIGURES if (folder / file).exists())
                assert name not in FIGURES or not (folder / name).exists()
                resume(folder, STEPS)
            _empty(folder)
    return _on(outcome, mounted)


@fault(
    "disk full at a packed network",
    survived="refused with one error that names the file; the file that was there stays as it was, nothing beside it",
    rounds=40,
    quick=5,
)
def full_at_packing(rng: random.Random, tmp: Path, rounds: int) -> Outcome:
    outcome, network = Outcome(), small_network().eval()
    with small_disk(tmp / "disk") as mounted:
        path = tmp / "disk" / "model.cdq"
        pack(network, path)
        before = path.read_bytes()
        for free in [rng.randrange(len(before)) for _ in range(rounds)]:
            with outcome.trial(f"{free} bytes free"), _room(tmp / "disk", free, mounted):
                with pytest.raises(StorageError, match=path.name):
                    pack(network, path, force=True)
                assert path.read_bytes() == before
                assert {entry.name for entry in path.parent.iterdir()} <= {path.name, FILLER}
    return _on(outcome, mounted)


@fault(
    "output folder becomes read-only in mid-run",
    survived="the run ends with one line that says so, the checkpoint before it stays; writable again, " + RESUMED,
    rounds=10,
    quick=1,
)
def read_only(rng: random.Random, tmp: Path, rounds: int) -> Outcome:
    outcome, runner = Outcome(), the_runner()
    with small_disk(tmp / "disk") as mounted:
        if not mounted and os.geteuid() == 0:
            return Outcome(skipped="root may write everywhere, and no file system could be mounted read-only")
        for number in range(rounds):
            folder, time = tmp / "disk" / str(number), rng.randrange(2, CHECKPOINTS + 1)
            settings = {"name": "checkpoint.pt", "time": time, "mounts": mounted}
            with outcome.trial(f"at checkpoint {time}"):
                try:
                    run = runner.start(folder, sabotage="lock_folder", settings=settings)
                    stopped_by(run, "could not be written")
                    again = runner.start(folder, "--resume")
                    assert again.end() == 2
                    assert "cannot be written" in again.told
                finally:
                    set_writable(folder, True, mounted)
                resume(folder, kept_of(folder, run.steps))
            _empty(folder)
    return _on(outcome, mounted)


@fault(
    "output folder vanishes in mid-run",
    survived="it is made again with a warning, and the run ends as the unbroken one, bit for bit",
    rounds=10,
    quick=1,
)
def vanishing(rng: random.Random, tmp: Path, rounds: int) -> Outcome:
    outcome, runner = Outcome(), the_runner()
    for number in range(rounds):
        folder, step = tmp / str(number), rng.randrange(1, STEPS + 1)
        with outcome.trial(f"in step {step}"):
            settings = {"step": step, "folder": str(folder)}
            run = runner.start(folder, sabotage="remove_folder", settings=settings)
            assert run.end() in (0, 1), run.told[-500:]
            assert "was gone" in run.told
            check_finished(folder, runner.unbroken)
    return outcome


@fault(
    "figure that cannot be drawn",
    survived="a warning that names the figure; the other figures, the results and the status are as without it",
    rounds=16,
    quick=1,
)
def undrawable(rng: random.Random, tmp: Path, rounds: int) -> Outcome:
    outcome, runner = Outcome(), the_runner()
    for number in range(rounds):
        folder, figure = tmp / str(number), FIGURES[number % len(FIGURES)]
        error = rng.choice(list(DRAWING_ERRORS))
        with outcome.trial(f"{figure}: {error}"):
            settings = {"name": figure.removesuffix(".png"), "error": error}
            run = runner.start(folder, sabotage="spoil_figure", settings=settings)
            assert run.end() in (0, 1), run.told[-500:]
            assert f"{figure} could not be drawn" in run.told
            assert not (folder / figure).exists()
            (folder / figure).write_bytes((runner.unbroken / figure).read_bytes())
            check_finished(folder, runner.unbroken)
    return outcome


@fault(
    "NaN or infinity in the loss, a gradient or a weight",
    survived="the run ends with one line that names the first bad tensor; the last good state stays; " + RESUMED,
    rounds=24,
    quick=2,
)
def not_a_number(rng: random.Random, tmp: Path, rounds: int) -> Outcome:
    outcome, runner = Outcome(), the_runner()
    names = [name for name, _ in tiny_quantized().named_parameters()]
    for number in range(rounds):
        folder, step, name = tmp / str(number), rng.randrange(1, STEPS + 1), rng.choice(names)
        kind, value = ("gradient", "weight", "loss")[number % 3], rng.choice((math.nan, math.inf))
        with outcome.trial(f"{kind} {name} becomes {value} in step {step}"):
            settings = {"step": step, "kind": kind, "parameter": name, "value": value}
            run = runner.start(folder, sabotage="spoil_number", settings=settings)
            stopped_by(run, "the loss is" if kind == "loss" else kind)
            assert step - 1 <= run.steps <= step
            if kind != "loss":
                assert short_name(name) in run.told, run.told[-500:]
            resume(folder, kept_of(folder, step - 1))
    return outcome


@fault(
    "out of memory in a step",
    survived="the run ends with one line that says which batch size would do; the last good state stays; " + RESUMED,
    rounds=12,
    quick=1,
)
def out_of_memory(rng: random.Random, tmp: Path, rounds: int) -> Outcome:
    outcome, runner = Outcome(), the_runner()
    for number in range(rounds):
        folder, step = tmp / str(number), rng.randrange(1, STEPS + 1)
        kind = list(MEMORY_ERRORS)[number % len(MEMORY_ERRORS)]
        with outcome.trial(f"{kind} in step {step}"):
            run = runner.start(folder, sabotage="exhaust_memory", settings={"step": step, "kind": kind})
            stopped_by(run, "--batch-size 10")
            assert run.steps == step - 1
            resume(folder, kept_of(folder, step - 1))
    return outcome


@contextmanager
def _room(disk: Path, free: int, mounted: bool) -> Iterator[None]:
    """Only `free` bytes of room on the disk; without one of its own, no file longer than that."""
    if mounted:
        leave_free(disk, free)
        yield
        (disk / FILLER).unlink()
        return
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, most[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)


def _empty(folder: Path) -> None:
    """Make room on the small disk for the next trial."""
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def _on(outcome: Outcome, mounted: bool) -> Outcome:
    outcome.note = f"on a disk of {SIZE // 2**20} MB" if mounted else "with a limit on file sizes: no disk was mounted"
    return outcome

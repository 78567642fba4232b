"""The matrix within one process: a training loop fails at a moment and is continued, and ends as the unbroken one.

`python -m tests.reliability` strikes the command in processes of its own, at random moments.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest

from experiments.pipeline import TrainingLoop
from src.data import ImageData, load_data
from src.runs import RunError, Snapshots
from src.training import Step, TrainingError
from tests.reliability import failures
from tests.reliability.failures import FAILURES, Killed, Moment
from tests.reliability.small_run import (
    SETTINGS,
    STEPS,
    Unbroken,
    build_run,
    differences,
    open_loop,
    prepare,
    steps_kept,
    train,
)

CASES = [
    (name, kind, step, ("resume", "enter again")[(number + index) % 2] if failure.ends is not Killed else "resume")
    for name, failure in FAILURES.items()
    for number, kind in enumerate(failure.kinds)
    for index, step in enumerate(failure.steps)
]


@pytest.fixture(scope="module")
def data() -> ImageData:
    return load_data("digits", limit=SETTINGS["limit"])


@pytest.fixture(autouse=True)
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has one entry for each training step of the test."""
    done: list[int] = []
    prepare(monkeypatch, lambda: done.append(1))
    return done


def die_within(patch: pytest.MonkeyPatch) -> None:
    """What `die` does here: from then on nothing is written or cleaned up, as by a process that is gone."""

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    def die() -> None:
        patch.setattr(tempfile, "mkstemp", killed)
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        killed()

    patch.setattr(failures, "die", die)


@pytest.mark.parametrize(("name", "kind", "step", "way"), CASES)
def test_the_continued_run_ends_as_the_unbroken_one(
    name: str, kind: str, step: int, way: str, data: ImageData, steps: list[int], tiny_run: Unbroken, tmp_path: Path
) -> None:
    failure, folder, said = FAILURES[name], tmp_path / "run", []
    loop = open_loop(data, folder, said.append)
    history = loop.run.history
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        die_within(patch)
        failure.inject(patch, Moment(step, kind, folder))
        if failure.ends is None:
            train(loop)
        else:
            with pytest.raises(failure.ends) as caught:
                train(loop)
            said.append(str(caught.value))
    said += [str(warning.message) for warning in warned]
    assert any(re.search(failure.kinds[kind], line) for line in said), said
    failure.mend(folder)
    folder.mkdir(exist_ok=True)
    kept, done = steps_kept(folder), len(steps)
    assert done - kept <= failure.loses
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if way == "enter again":
            train(loop)
            assert loop.run.history is history  # a figure that shows it continues to
        else:
            train(open_loop(data, folder, said.append, resume=bool(kept)))
    assert not differences(folder, tiny_run.folder, command=False)


def test_a_run_is_killed_again_and_again(data: ImageData, tiny_run: Unbroken, tmp_path: Path) -> None:
    for number in range(2):
        loop = open_loop(data, tmp_path, print, resume=number > 0)
        with pytest.MonkeyPatch.context() as patch:
            die_within(patch)
            FAILURES["kill -9 in a step, or between writing and renaming a file"].inject(
                patch, Moment(5, "in a step", tmp_path)
            )
            with pytest.raises(Killed):
                train(loop)
    train(open_loop(data, tmp_path, print, resume=True))
    assert not differences(tmp_path, tiny_run.folder, command=False)


def test_an_observer_that_fails_costs_nothing(
    data: ImageData, steps: list[int], tiny_run: Unbroken, tmp_path: Path
) -> None:
    loop = open_loop(data, tmp_path, print)

    def observe(step: Step) -> None:
        if len(steps) == 6:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(loop, observe)
    assert steps_kept(tmp_path) == 6
    train(loop)
    assert len(steps) == STEPS
    assert not differences(tmp_path, tiny_run.folder, command=False)


def test_where_nothing_was_written_no_resuming_is_promised(data: ImageData, tmp_path: Path) -> None:
    """And a network whose first steps failed, or that has been trained, is not taken for a new one."""
    said: list[str] = []
    loop = open_loop(data, tmp_path, said.append)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hinder = FAILURES["disk full or read-only at a checkpoint"].inject
        hinder(patch, Moment(1, "read-only at every file", tmp_path))
        with pytest.raises(RunError, match="could not be written"):
            train(loop)
    assert said == ["nothing was written yet"]
    with pytest.MonkeyPatch.context() as patch:
        FAILURES["error in the middle of an update"].inject(patch, Moment(1, "after the update", tmp_path))
        with pytest.raises(ZeroDivisionError):
            train(broken := open_loop(data, tmp_path, said.append))
    with pytest.raises(RunError, match="no checkpoint is there: build the network again"):
        train(broken)
    broken.run.history.records.clear()
    with pytest.raises(RunError, match="has been trained before: for a new run build it"):
        TrainingLoop.open(broken.run, tmp_path)


@pytest.mark.parametrize("left", ["of another run", "damaged"])
def test_histograms_that_are_not_this_runs_are_not_taken_over(
    left: str, data: ImageData, tiny_run: Unbroken, tmp_path: Path
) -> None:
    said: list[str] = []
    loop = open_loop(data, tmp_path, print)
    with pytest.MonkeyPatch.context() as patch:
        FAILURES["SIGINT, SIGTERM or SIGHUP in a step"].inject(patch, Moment(3, "SIGINT", tmp_path))
        with pytest.raises(KeyboardInterrupt):
            train(loop)
    good = (tiny_run.folder / "snapshots.npz").read_bytes()
    (tmp_path / "snapshots.npz").write_bytes(good if left == "of another run" else good[:-1])
    train(open_loop(data, tmp_path, said.append, resume=True))
    assert any("histograms of the epochs so far are lost" in line for line in said) == (left == "damaged")
    assert Snapshots.load(tmp_path / "snapshots.npz").epochs == [0, 1, 2, 3]
    assert differences(tmp_path, tiny_run.folder, command=False) in ([], ["snapshots.npz"])


def test_the_gradient_that_backward_reaches_first_is_named(data: ImageData) -> None:
    """Backward goes linear, layer3, layer2, then into layer1, where the last convolution's BatchNorm comes first."""
    run = build_run(data)
    run.model.layer2.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * float("nan"),))
    with pytest.raises(TrainingError, match=r"a gradient is not finite .*: layer1\.0\.bn2\.bias; "):
        list(run.steps())

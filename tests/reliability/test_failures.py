"""The training loop, as a notebook uses it: it fails and is entered again, and ends as the unbroken one.

`python -m tests.reliability` strikes the command.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from experiments.pipeline import TrainingLoop
from src.data import ImageData, load_data
from src.runs import RunError, Snapshots
from src.training import Step, TrainingError
from tests.reliability.failures import FAILURES
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


@pytest.fixture(scope="module")
def data() -> ImageData:
    return load_data("digits", limit=SETTINGS["limit"])


@pytest.fixture(autouse=True)
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has one entry for each training step of the test."""
    done: list[int] = []
    prepare(monkeypatch, lambda: done.append(1))
    return done


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("SIGINT, SIGTERM or SIGHUP in a step", "SIGTERM"),
        ("second Ctrl-C, in the middle of an update", "SIGINT and SIGINT"),
        ("disk full or read-only at a checkpoint", "full"),
        ("out of memory in a step", "memory of the CPU"),
    ],
)
@pytest.mark.parametrize("step", [7, 12])
@pytest.mark.filterwarnings("default")
def test_a_loop_that_is_entered_again_ends_as_the_unbroken_one(
    name: str, kind: str, step: int, data: ImageData, tiny_run: Unbroken, tmp_path: Path
) -> None:
    loop = open_loop(data, tmp_path, print)
    history = loop.run.history
    with pytest.MonkeyPatch.context() as patch:
        FAILURES[name].inject(patch, step, kind)
        with pytest.raises((KeyboardInterrupt, RunError, TrainingError)):
            train(loop)
    train(loop)
    assert loop.run.history is history, "a figure that shows it continues to"
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
        hinder(patch, 1, "read-only")
        with pytest.raises(RunError, match="could not be written"):
            train(loop)
    assert said == ["nothing was written yet"]
    with pytest.MonkeyPatch.context() as patch:
        FAILURES["second Ctrl-C, in the middle of an update"].inject(patch, 1, "SIGINT and SIGINT")
        with pytest.raises(KeyboardInterrupt):
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
        FAILURES["SIGINT, SIGTERM or SIGHUP in a step"].inject(patch, 3, "SIGINT")
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

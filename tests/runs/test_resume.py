"""A run that is stopped anywhere and taken up again ends as the unbroken one does, bit for bit, and loses nothing.

A network of one block a stage on 60 of the embedded digits in batches of 15: three epochs of four steps.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments import pipeline
from experiments.pipeline import Run, TrainingLoop, configure
from experiments.sparsity import coupled_group_lasso
from resnet import BasicBlock, ResNet
from src import training
from src.data import ImageData, load_data
from src.runs import RunError, RunFolder, load_checkpoint, state_bytes
from src.storage import folder_lock
from src.training import History, Step, StepLosses, TrainingError

CPU = torch.device("cpu")
CONFIG = configure("smoke", epochs=3, batch_size=15, device="cpu", precision="fp32", delay=1)
STEPS = 4


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data() -> ImageData:
    return load_data("digits", limit=60)


def new_run(data: ImageData, seed: int = 0) -> Run:
    torch.manual_seed(seed)
    model = ResNet(BasicBlock, [1, 1, 1], widths=(4, 8, 16)).to(memory_format=torch.channels_last)
    attached = pipeline.attach(CONFIG, model)
    optimizer = pipeline.build_optimizer(CONFIG, model)
    objective = CONFIG.objective(coupled_group_lasso(model))
    return Run(CONFIG, data, CPU, torch.float32, model, attached, optimizer, objective, History(CONFIG.epochs))


def train(loop: TrainingLoop, steps: int | None = None, observer: Callable[[Step], None] | None = None) -> None:
    """All that is left, or only `steps` steps and then nothing more: as if the process were gone."""
    with loop:
        for _ in loop.epochs():
            for step in loop.steps():
                if observer:
                    observer(step)
                steps = None if steps is None else steps - 1
                if steps == 0:
                    raise Gone
            loop.finish_epoch()


class Gone(BaseException):
    """What the loop must not be able to react to."""


def killed(run: Run, folder: Path, steps: int, **settings: Any) -> None:
    """Train `steps` steps and end as by kill -9: nothing is written on the way out."""
    loop = TrainingLoop.open(run, folder, report=lambda _: None, **settings)
    loop._keep = lambda _: None  # type: ignore[method-assign]
    with pytest.raises(Gone):
        train(loop, steps)


def everything(run: Run) -> dict[str, Any]:
    """All that must be equal."""
    with torch.no_grad():
        images = run.data.test_images[:8].float() / 255
        scores = run.model.eval()(images)
    records = [{**asdict(record), "seconds": 0} for record in run.history]
    tensors = {f"model {name}": tensor.clone() for name, tensor in run.model.state_dict().items()}
    for number, state in run.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer {number} {name}": tensor.clone() for name, tensor in state.items()}
    groups = [{k: v for k, v in g.items() if k != "params"} for g in run.optimizer.param_groups]
    histograms = run.snapshots.to_bytes() if run.snapshots else b""
    return {"tensors": tensors | {"scores": scores}, "records": records, "groups": groups, "histograms": histograms}


def assert_equal(run: Run, expected: dict[str, Any]) -> None:
    found = everything(run)
    tensors, others = found.pop("tensors"), dict(expected)
    wanted = others.pop("tensors")
    assert tensors.keys() == wanted.keys()
    differing = [name for name, tensor in tensors.items() if not torch.equal(tensor, wanted[name])]
    assert not differing
    assert found == others


@pytest.fixture(scope="module")
def unbroken(data: ImageData, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    run = new_run(data)
    train(TrainingLoop.open(run, tmp_path_factory.mktemp("unbroken")))
    torch.set_num_threads(before)
    return everything(run)


# --- exact resume


@pytest.mark.parametrize(("steps", "every"), [(1, 1), (3, 2), (4, None), (6, None), (5, 3), (7, 1), (11, 3)])
def test_killed_anywhere_and_resumed_it_ends_the_same(
    steps: int, every: int | None, data: ImageData, unbroken: dict[str, Any], tmp_path: Path
) -> None:
    killed(new_run(data), tmp_path, steps + 1, checkpoint_every=every)
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    done = STEPS * state["epoch"] + state["step"]
    assert steps - (every or STEPS) < done <= steps + 1

    said: list[str] = []
    run = new_run(data, seed=7)  # other weights: they all come from the checkpoint
    loop = TrainingLoop.open(run, tmp_path, resume=True, report=said.append)
    assert (len(run.history), run.means.steps) == divmod(done, STEPS)
    assert said == [f"resumed {run.progress.text}"]
    train(loop)
    assert_equal(run, unbroken)


def test_histograms_that_another_run_left_are_not_taken_over(
    data: ImageData, unbroken: dict[str, Any], tmp_path: Path
) -> None:
    """The other run wrote them, and then no checkpoint, for want of room perhaps."""
    killed(new_run(data, seed=3), tmp_path, 5)
    for name in ("checkpoint.pt", "history.csv"):
        (tmp_path / name).unlink()
    killed(new_run(data), tmp_path, 3, checkpoint_every=2)
    run = new_run(data)
    train(TrainingLoop.open(run, tmp_path, resume=True))
    assert_equal(run, unbroken)


def test_resumed_again_and_again_it_ends_the_same(data: ImageData, unbroken: dict[str, Any], tmp_path: Path) -> None:
    killed(new_run(data), tmp_path, 2, checkpoint_every=1)
    for _ in range(3):
        killed(new_run(data, seed=7), tmp_path, 2, checkpoint_every=1, resume=True)
    run = new_run(data)
    train(TrainingLoop.open(run, tmp_path, resume=True))
    assert_equal(run, unbroken)


def noisy_step(model: nn.Module, optimizer: Any, images: Tensor, labels: Tensor, *rest: Any) -> StepLosses:
    """A user's own step that draws from all the process's random generators."""
    import random

    import numpy as np

    noise = torch.randn_like(images) * (0.1 * random.random() + 0.1 * float(np.random.rand()))  # noqa: NPY002
    return training.train_step(model, optimizer, images + noise, labels, *rest)


def test_a_step_of_ones_own_with_random_numbers_resumes_exactly(
    data: ImageData, unbroken: dict[str, Any], tmp_path: Path
) -> None:
    import random

    import numpy as np

    def seed() -> None:
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002

    whole, broken = new_run(data), new_run(data)
    seed()
    train(TrainingLoop.open(whole, tmp_path / "whole", step=noisy_step))
    expected = everything(whole)
    assert not torch.equal(expected["tensors"]["model conv1.weight"], unbroken["tensors"]["model conv1.weight"])
    seed()
    killed(broken, tmp_path / "broken", 6, step=noisy_step, checkpoint_every=1)
    again = new_run(data)
    _ = torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002  (the generators are somewhere else)
    train(TrainingLoop.open(again, tmp_path / "broken", resume=True, step=noisy_step))
    assert_equal(again, expected)


def test_an_epoch_that_is_taken_up_has_the_steps_that_are_left(data: ImageData) -> None:
    run = new_run(data)
    settings = pipeline.epoch_settings(CONFIG, 0, torch.float32)
    taken = list(training.train_epoch(run.model, run.optimizer, data, run.objective, start=3, **settings))
    assert [(step.index, step.steps) for step in taken] == [(3, 4)]
    assert list(training.train_epoch(run.model, run.optimizer, data, run.objective, start=4, **settings)) == []


def test_another_optimizer_is_refused_and_nothing_is_changed(data: ImageData, tmp_path: Path) -> None:
    killed(new_run(data), tmp_path, 5)
    run = new_run(data, seed=7)
    run.optimizer = torch.optim.SGD(run.optimizer.param_groups[0]["params"], lr=1e-3, momentum=0.9)
    before = everything(run)
    with pytest.raises(RunError, match="of another optimizer, or of other parameters; build the same one"):
        TrainingLoop.open(run, tmp_path, resume=True)
    assert_equal(run, before)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("model", "linear.weight"), 1.5, "of another architecture: .* 1 of another shape"),
        (("model", 7), torch.zeros(1), "of another architecture: .* 1 unknown"),
        (("optimizer", "state", 0, "exp_avg"), torch.zeros(2), r"other parameters \(exp_avg of parameter 0\)"),
        (("optimizer", "state", 0), None, "does not fit this run"),
        (("optimizer_class",), "SGD", "of another optimizer"),
        (("history", "records", 0, "epoch"), 2, "epoch 2 does not follow 0 recorded epochs"),
        (("history", "records", 0), 3, "not a history of this version"),
        (("random", "torch"), torch.zeros(3), "not the states of random generators"),
    ],
)
def test_a_checkpoint_with_other_contents_is_refused_and_nothing_is_changed(
    place: tuple[Any, ...], value: object, message: str, data: ImageData, tmp_path: Path
) -> None:
    killed(new_run(data), tmp_path, 6, checkpoint_every=1)
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    inner: Any = state
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (tmp_path / "checkpoint.pt").write_bytes(state_bytes(state))
    run = new_run(data, seed=7)
    before = everything(run)
    with pytest.raises(RunError, match=message):
        TrainingLoop.open(run, tmp_path, resume=True)
    assert_equal(run, before)


# --- interruptions


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [1, 6, 12])
def test_the_loop_that_was_interrupted_goes_on_when_it_is_entered_again(
    at: int, number: int, data: ImageData, unbroken: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, real = [], training.train_step

    def step(*arguments: Any) -> StepLosses:
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), number)
        return real(*arguments)

    monkeypatch.setattr("src.training.epoch.train_step", step)
    said: list[str] = []
    run = new_run(data)
    loop = TrainingLoop.open(run, tmp_path, report=said.append)
    with pytest.raises(KeyboardInterrupt):
        train(loop)
    assert len(calls) == at
    assert run.whole
    where = run.progress.text
    assert said == [f"stopped {where}, which is kept in {tmp_path}; run this cell again to go on"]
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert STEPS * state["epoch"] + state["step"] == at == STEPS * len(run.history) + run.means.steps
    history = run.history  # a figure that shows it goes on showing it
    train(loop)
    assert len(calls) == 3 * STEPS
    assert run.history is history
    assert_equal(run, unbroken)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_after_a_step_that_failed_half_way_it_goes_on_from_the_last_checkpoint(
    error: type[BaseException],
    data: ImageData,
    unbroken: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, calls = training.train_step, []

    def step(model: nn.Module, *rest: Any) -> StepLosses:
        calls.append(1)
        if len(calls) == 7:
            real(model, *rest)
            raise error
        return real(model, *rest)

    monkeypatch.setattr("src.training.epoch.train_step", step)
    run, said = new_run(data), []
    loop = TrainingLoop.open(run, tmp_path, report=said.append)
    with pytest.raises(error):
        train(loop)
    assert not run.whole
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 0  # nothing half done was written
    history = run.history
    train(loop)
    assert run.history is history
    assert said[-1] == "taken up after epoch 1 of 3, the last good state"
    assert_equal(run, unbroken)


def test_a_failure_before_anything_was_written_asks_for_a_new_network(data: ImageData, tmp_path: Path) -> None:
    def step(*_: Any) -> StepLosses:
        raise ZeroDivisionError

    loop = TrainingLoop.open(new_run(data), tmp_path, step=step)
    with pytest.raises(ZeroDivisionError):
        train(loop)
    with pytest.raises(RunError, match="no checkpoint is there: build the network again"):
        train(loop)


def test_an_observer_that_fails_costs_nothing(data: ImageData, unbroken: dict[str, Any], tmp_path: Path) -> None:
    seen: list[int] = []

    def observer(step: Step) -> None:
        seen.append(step.index)
        if len(seen) == 6:
            raise ZeroDivisionError

    run = new_run(data)
    loop = TrainingLoop.open(run, tmp_path)
    with pytest.raises(ZeroDivisionError):
        train(loop, observer=observer)
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 2
    train(loop, observer=observer)
    assert len(seen) == 3 * STEPS
    assert_equal(run, unbroken)


def test_a_trained_network_is_not_taken_for_a_new_one(data: ImageData, tmp_path: Path) -> None:
    run = new_run(data)
    killed(run, tmp_path, 5)
    again = Run(CONFIG, data, CPU, torch.float32, run.model, [], run.optimizer, run.objective, History(3))
    with pytest.raises(RunError, match="has been trained before: for a new run build it"):
        TrainingLoop.open(again, tmp_path)
    assert (tmp_path / "checkpoint.pt").exists()  # and nothing was moved


# --- what is no number


def poisoned_gradient(model: nn.Module, name: str, at: int) -> None:
    """From its step `at` on, the gradient of `name` has one NaN; the loss of that step is finite."""
    calls = []

    def spoil(gradient: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) < at:
            return gradient
        spoiled = gradient.clone()
        spoiled.view(-1)[0] = float("nan")
        return spoiled

    cast(Tensor, dict(model.named_parameters())[name]).register_hook(spoil)


def test_a_gradient_that_is_no_number_is_named_and_the_last_good_state_stays(data: ImageData, tmp_path: Path) -> None:
    run = new_run(data)
    poisoned_gradient(run.model, "layer2.0.conv1.parametrizations.weight.original", at=6)
    loop = TrainingLoop.open(run, tmp_path, checkpoint_every=1)
    message = r"a gradient is not finite at epoch 2, step 2 \(loss \d.*\); .*: gradient of layer2\.0\.conv1\.weight; "
    with pytest.raises(TrainingError, match=message):
        train(loop)
    assert loop.kept == f"the state after epoch 1 of 3 and 1 step of the next is in {tmp_path}"
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert (state["epoch"], state["step"]) == (1, 1)
    assert all(torch.isfinite(t).all() for t in state["model"].values())


def test_the_gradient_that_backward_reaches_first_is_named(data: ImageData) -> None:
    run = new_run(data)

    def step(model: Any, optimizer: Any, images: Tensor, labels: Tensor, *_: Any) -> StepLosses:
        spoil = model.layer2.register_full_backward_hook(lambda _, inputs, __: (inputs[0] * float("nan"),))
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        spoil.remove()
        optimizer.step()
        return StepLosses(*torch.ones(5))

    # backward goes linear, layer3, layer2, and then into layer1, where the last convolution's BatchNorm comes first
    with pytest.raises(TrainingError, match=r"a gradient is not finite .*: gradient of layer1\.0\.bn2\.bias"):
        list(pipeline.steps_left(run, step))


def test_an_input_that_is_no_number_is_named(data: ImageData) -> None:
    run = new_run(data)
    object.__setattr__(data := load_data("digits", limit=60), "mean", (0.1, float("nan"), 0.1))
    run.data = data
    with pytest.raises(TrainingError, match=r"loss is nan at epoch 1, step 1 .*: input: 15 of 15 images of the batch"):
        list(pipeline.steps_left(run))


@pytest.mark.parametrize("where", ["linear.weight", "bn1.running_var", "the optimizer's exp_avg"])
def test_a_state_that_is_no_number_is_never_written(where: str, data: ImageData, tmp_path: Path) -> None:
    run = new_run(data)
    killed(run, tmp_path, 5)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    spoiled = dict(run.model.state_dict()).get(where, next(iter(run.optimizer.state.values()))["exp_avg"])
    spoiled.fill_(float("inf"))
    with pytest.raises(TrainingError, match=f"{where} is not finite after epoch 1 of 3 and 1 step of the next: this"):
        TrainingLoop(run, RunFolder(tmp_path)).save()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


# --- the folder under the run


@pytest.mark.parametrize("at", [6, 11])  # in the second epoch, and in the last
def test_a_folder_that_vanishes_is_made_again(
    at: int, data: ImageData, unbroken: dict[str, Any], tmp_path: Path
) -> None:
    folder, run, seen = tmp_path / "run", new_run(data), []

    def observer(step: Step) -> None:
        seen.append(step)
        if len(seen) == at:
            shutil.rmtree(folder)

    with pytest.warns(RuntimeWarning, match="was gone and is made again"):
        train(TrainingLoop.open(run, folder), observer=observer)
    assert_equal(run, unbroken)
    assert load_checkpoint(folder / "checkpoint.pt")["epoch"] == 3
    assert (folder / "history.csv").read_text() == run.history.csv_text()
    assert (folder / folder_lock.LOCK).exists()
    assert (folder / "snapshots.npz").exists()


def test_a_folder_that_cannot_be_made_again_stops_the_run_and_after_mending_it_goes_on(
    data: ImageData, unbroken: dict[str, Any], tmp_path: Path
) -> None:
    folder, run, seen, said = tmp_path / "run", new_run(data), [], []

    def observer(step: Step) -> None:
        seen.append(step)
        if len(seen) == 6:
            shutil.rmtree(folder)
            folder.write_text("a file in its place")

    loop = TrainingLoop.open(run, folder, report=said.append)
    for _ in range(2):  # the second time, nothing has been mended yet
        with pytest.raises(RunError, match=r"the checkpoint after epoch 2 of 3 could not be written to .*make room"):
            train(loop, observer=observer)
    assert run.whole
    assert len(seen) == 2 * STEPS
    folder.unlink()
    with pytest.warns(RuntimeWarning, match="was gone and is made again"):
        train(loop)
    assert_equal(run, unbroken)
    assert load_checkpoint(folder / "checkpoint.pt")["epoch"] == 3


@pytest.mark.filterwarnings("default")
def test_a_full_disk_leaves_the_old_checkpoint_and_no_trace(
    data: ImageData, unbroken: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(data)
    loop = TrainingLoop.open(run, tmp_path)
    real = os.fsync

    def full(handle: int) -> None:
        if len(run.history) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"after epoch 2 of 3 could not be written .*\(No space left on device\)"):
        train(loop)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "checkpoint.pt", "history.csv", "snapshots.npz"}
    assert load_checkpoint(tmp_path / "checkpoint.pt")["epoch"] == 1
    monkeypatch.undo()
    torch.set_num_threads(1)
    train(loop)
    assert_equal(run, unbroken)


@pytest.mark.filterwarnings("ignore:.*could not be written")
def test_where_nothing_could_be_written_no_resuming_is_promised(
    data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    said: list[str] = []
    loop = TrainingLoop.open(new_run(data), tmp_path, report=said.append, go_on="--resume goes on")
    with pytest.raises(RunError, match=r"after epoch 1 of 3 could not be written .*make room"):
        train(loop)
    assert said == ["nothing was written yet"]


def test_another_machine_or_library_is_said(data: ImageData, tmp_path: Path) -> None:
    killed(new_run(data), tmp_path, 5)
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    state["versions"]["torch"], state["machine"]["threads"] = "1.0", 64
    state["machine"] |= {"device_name": "Abacus", "precision": "bfloat16"}
    (tmp_path / "checkpoint.pt").write_bytes(state_bytes(state))
    said: list[str] = []
    TrainingLoop.open(new_run(data), tmp_path, resume=True, report=said.append)
    now = f"torch 1.0 then, {torch.__version__.partition('+')[0]}"
    assert said[0].startswith(f"NOTICE: {now}")
    assert "device name Abacus then, " in said[0]
    assert "precision bfloat16 then, float32 now; threads 64 then, 1 now: the last digits may differ" in said[0]

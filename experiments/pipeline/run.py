"""A run in memory, its steps and its epochs, and the loop that the script and the notebook share: nothing is lost."""

from __future__ import annotations

import os
import signal
import statistics
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.pipeline.budget import BudgetControl
from experiments.pipeline.config import RunConfig
from src import training
from src.data import ImageData, steps_per_epoch
from src.runs import (
    CHECKPOINT,
    SNAPSHOTS,
    SUMMARY,
    RunError,
    RunFolder,
    RunProgress,
    SnapshotError,
    Snapshots,
    load_checkpoint,
    restore,
)
from src.storage import Notify, StorageError, duration, log_info
from src.training import (
    EpochMeans,
    EpochRecord,
    History,
    Interrupted,
    Objective,
    Step,
    StepFunction,
    Terminated,
    TrainingError,
    between_steps,
    in_notebook,
    raise_pending,
)
from utils_quantization import quantized_layers

KERNEL_GRACE_SECONDS = 3.0  # of a kernel that is asked to end, for the last figure
ESTIMATE_SECONDS, ESTIMATE_STEPS = 2.0, 10  # at least, before it is said how long the rest will take
TEST_SHARE = 1 / 3  # of a training step's time, for testing as many images: a forward pass alone


def epoch_settings(config: RunConfig, epoch: int, precision: torch.dtype) -> dict[str, Any]:
    """The keyword arguments of `train_epoch` for epoch `epoch` (from 0) of the run that `config` describes."""
    return {
        "epoch": epoch,
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "coefficient": config.schedule()(epoch, config.epochs),
        "lr_lambda": config.lr_lambda(),
        "precision": precision,
        "seed": config.seed,
        "crop_padding": config.crop_padding,
        "flip": config.flip,
    }


@dataclass
class Run:
    """Everything that moves while a network trains. `config` is the one that is really run (see `suited_to`).

    means, seconds: the sums of the unfinished epoch, of which `means.steps` steps are done, and the time they took.
    snapshots: the quantized layers after each epoch, once the training loop has opened its folder.
    control: moves the penalty where the configuration has a budget.
    step_fn: what a training step does (`fast_step`); None is `train_step`.
    is_consistent: False from the beginning of a step to its end, and for good where it failed or was cut off.
    """

    config: RunConfig
    data: ImageData
    device: torch.device
    precision: torch.dtype
    model: nn.Module
    attached: list[str]
    optimizer: torch.optim.Optimizer
    objective: Objective
    history: History
    means: EpochMeans = field(default_factory=EpochMeans)
    seconds: float = 0.0
    is_consistent: bool = True
    snapshots: Snapshots = field(init=False)
    step_fn: StepFunction | None = None
    control: BudgetControl | None = None

    def __post_init__(self) -> None:
        # With a budget or without, the task loss is that of the configuration.
        shaped = {name: getattr(self.config, name) for name in ("label_smoothing", "distill", "temperature")}
        self.objective = replace(self.objective, **shaped)
        if self.step_fn is None:
            self.step_fn = training.fast_step(self.device, self.config.compile, log_info)

    @property
    def subtitle(self) -> str:
        """One line for figures: what was trained on what."""
        part = f", {len(self.data.train_labels):,} training images" if self.config.limit else ""
        return f"{self.config.model} on {self.data.title}{part}; preset {self.config.preset}, seed {self.config.seed}"

    @property
    def progress(self) -> RunProgress:
        """How far it has come."""
        return RunProgress(self.history, self.means, self.seconds)

    @progress.setter
    def progress(self, progress: RunProgress) -> None:
        """Continue from there. The history stays the same object, which figures may show."""
        self.history.records[:] = progress.history.records
        self.means, self.seconds, self.is_consistent = progress.means, progress.seconds, True

    def estimate(self, seconds_per_step: float) -> str:
        """How long the rest of the training takes, its tests included, and why where the processor is a slow one."""
        epochs, size = self.config.epochs - len(self.history), self.config.batch_size
        steps = steps_per_epoch(self.data, size)
        tests = TEST_SHARE * len(self.data.test_labels) / size
        seconds = (epochs * (steps + tests) - self.means.steps) * seconds_per_step
        emulated = self.device.type == "cpu" and self.config.precision == "auto" and self.precision == torch.float32
        why = ", which does not multiply bfloat16" if emulated else ""
        processor = "CPU" if self.device.type == "cpu" else "GPU"
        return f"training takes about {duration(seconds)} on this {processor}{why}: {epochs} epochs of {steps} steps"

    @property
    def coefficient(self) -> float:
        """Of the penalty, in the unfinished epoch."""
        if self.control:
            return self.control.coefficient(self.history)
        return self.config.schedule()(len(self.history), self.config.epochs)

    @property
    def continuation(self) -> str:
        """What the schedules make of more epochs, where a run that was finished is about to be continued; else ""."""
        config, done = self.config, len(self.history)
        if config.continued_from != done or self.means.steps:
            return ""
        rate, last = config.lr_lambda(), self.history.last
        return (
            f", which was its end; now the schedules are those of {config.epochs} epochs: the learning rate goes from "
            f"{last.learning_rate:.2g} to {config.learning_rate * rate(done / config.epochs):.2g} and ends at "
            f"{config.learning_rate * rate(1.0):.2g}, the penalty's coefficient goes from {last.coefficient:.2g} to "
            f"{self.coefficient:.2g}; an unbroken run of {config.epochs} epochs gives other numbers"
        )

    def steps(self) -> Iterator[Step]:
        """Train the unfinished epoch from where it stands, yielding after each step, which is counted by then.

        Raises TrainingError where the loss or a gradient is not finite, the memory does not hold a batch, or the run
        has no teacher where it needs one.
        """
        if self.config.distill and self.objective.teacher is None:
            raise TrainingError("distill: the run has no teacher yet; see experiments.pipeline.add_teacher")
        settings = epoch_settings(self.config, len(self.history), self.precision)
        settings |= {"start": self.means.steps, "step": self.step_fn, "coefficient": self.coefficient}
        if self.control:
            self.control.apply(self.history)
        began = time.perf_counter()
        self.is_consistent = False
        try:
            with self._explained_out_of_memory():
                for step in training.train_epoch(self.model, self.optimizer, self.data, self.objective, **settings):
                    now = time.perf_counter()
                    self.means.add(step)
                    self.seconds, began, self.is_consistent = self.seconds + now - began, now, True
                    yield step
                    self.is_consistent = False
        except Interrupted:  # it is raised between two steps only
            self.is_consistent = True
            raise
        self.is_consistent = True

    def finish_epoch(self) -> EpochRecord:
        """Measure the epoch whose steps are all done, put its record into the history and begin the next.

        Raises TrainingError where the test loss is not finite or the memory does not hold the test images.
        """
        with self._explained_out_of_memory():
            record = training.measure_epoch(
                self.model,
                self.optimizer,
                self.data,
                self.means,
                epoch=len(self.history),
                coefficient=self.coefficient,
                seconds=self.seconds,
                precision=self.precision,
            )
            fresh = training.recalibrated_accuracy(self.model, self.data, self.precision)
        record = replace(record, recalibrated_accuracy=fresh)
        if self.control:
            cost, penalised = self.control.cost(self.model), self.control.choose(self.model)
            record = replace(record, cost=cost, penalised=penalised)
        self.history.append(record)
        if self.control:
            self.control.enforce(self.model, self.history)
        self.means, self.seconds = EpochMeans(), 0.0
        return record

    @contextmanager
    def _explained_out_of_memory(self) -> Iterator[None]:
        """Inside, an error for want of memory becomes one that says which batch size would do."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not training.is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold the tensors of the failed step
            size = self.config.batch_size
            half = max(2, size // 2)  # BatchNorm needs two images
            raise TrainingError(
                f"the memory of {self.device.type} does not hold a batch of {size} images; try batches of {half}: "
                f"--batch-size {half}, or BATCH_SIZE = {half}"
            ) from error


@dataclass(frozen=True)
class Baseline:
    """The finished run without compression: accuracy on the test set in float32, its history, and where it lies."""

    accuracy: float
    history: History
    folder: Path


@dataclass
class TrainingLoop:
    """A run and its folder, as the script and the notebook train it. As a context manager it keeps what was done.

        with TrainingLoop.open(run, "debug_output") as loop:
            for epoch in loop.epochs():
                for step in loop.steps():
                    ...                       # a Step: progress, observers
                record = loop.finish_epoch()  # measured, in run.history, and written

    Inside, the folder is locked, and an interruption waits for the end of the step; then checkpoint and history are
    written and it is raised: KeyboardInterrupt, or Terminated where the process was asked to end (a notebook's kernel
    does end then). Entered again, it continues where it stopped; after a step that failed, from the last checkpoint.

    checkpoint_every: steps between two checkpoints within an epoch; None for one after each epoch only. resume_hint:
    how the user continues after an interruption. saved: the state that is in the folder, in words; "" for none.
    explores: whether it resumed a run that has its results already, and to which a notebook therefore writes nothing.
    """

    run: Run
    folder: RunFolder
    checkpoint_every: int | None = None
    notify: Notify = print
    resume_hint: str = "run this cell again to continue, or the notebook with RESUME = True"
    saved: str = field(default="", init=False)
    explores: bool = field(default=False, init=False)
    _step_seconds: list[float] = field(default_factory=list, init=False)
    _estimated: bool = field(default=False, init=False)

    @classmethod
    def open(cls, run: Run, output: str | Path, *, resume: bool = False, **settings: Any) -> TrainingLoop:
        """Begin `run` in the folder `output`, or where `resume` is set continue it from the checkpoint there.

        An earlier run there moves to previous/ unless it is resumed. Raises RunError where the folder cannot be used,
        is in use, or holds no checkpoint that fits; nothing is changed then, nor by resuming a finished run.
        """
        if resume and not RunFolder(Path(output)).has_checkpoint():
            raise RunError(f"there is no checkpoint at {str(output)!r} to resume from; run without --resume first")
        if not resume and run.optimizer.state and not run.history.records:
            raise RunError(
                "this network has been trained before: for a new run build it and its optimizer again (in the notebook "
                "run the cells from chapter 4 on), or resume"
            )
        loop = cls(run, RunFolder(Path(output)) if resume else RunFolder.open(output), **settings)
        if resume:
            loop._restore()
            loop.notify(f"resumed {run.progress.text}{run.continuation}")
            if loop.epochs():
                loop.folder.resume()
            else:
                loop.explores = (loop.folder.path / SUMMARY).exists()
        elif not run.history.records:
            loop._begin_snapshots()
        return loop

    def epochs(self) -> range:
        """The epochs that are left, from 0; some steps of the first may be done."""
        return range(len(self.run.history), self.run.config.epochs)

    def steps(self) -> Iterator[Step]:
        """The steps that are left of the unfinished epoch, with a checkpoint every `checkpoint_every`.

        `notify` is told once how long all that is left will take, after two seconds and ten steps.
        """
        last = 0.0
        for step in self.run.steps():
            now = time.perf_counter()
            if last:  # an epoch's first step takes longer: the test before it, or a choice of algorithms
                self._time(now - last)
            last = now
            done = len(self.run.history) * step.steps + step.index + 1
            if self.checkpoint_every and done % self.checkpoint_every == 0 and step.index + 1 < step.steps:
                self.save()
            yield step

    def finish_epoch(self) -> EpochRecord:
        """Measure the epoch, put its record into the history, and write checkpoint and history."""
        record = self.run.finish_epoch()
        self.run.snapshots.add(self.run.model, record.epoch)
        self.save()
        return record

    def save(self) -> None:
        """Write the checkpoint, and after an epoch history and snapshots.

        Raises RunError or TrainingError; the old checkpoint stays.
        """
        run, folder = self.run, self.folder.path
        if not run.means.steps or not (folder / SNAPSHOTS).exists():
            # Before the checkpoint: snapshots ahead of it are cut off by a resumed run, missing ones are lost.
            self.folder.try_write(SNAPSHOTS, run.snapshots.to_bytes())
        self.folder.save_progress(run.model, run.optimizer, run.progress, asdict(run.config), run.data.digest)
        self.saved = run.progress.text

    @property
    def kept(self) -> str:
        """Which state is in the folder, and how it is continued."""
        if not self.saved:
            return "nothing was written yet"
        return f"the state {self.saved} is kept in {self.folder.path}; {self.resume_hint}"

    def __enter__(self) -> TrainingLoop:
        self._guard = self._guarded()
        self._guard.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._guard.__exit__(*raised)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Bring run and folder to the same state; afterwards, and after any error, write what is not written yet."""
        with self.folder.lock() if self.epochs() else nullcontext(), between_steps():
            if self.run.is_consistent:
                self._save_unsaved()  # what could not be written when it was due
            elif self.saved:
                self._restore()
                self.notify(f"resumed {self.run.progress.text}, the last good state")
            else:
                raise RunError("the first steps failed and no checkpoint is there: build the network again")
            try:
                yield
                raise_pending()
            except BaseException as error:
                self._keep(error)
                raise

    def _save_unsaved(self) -> None:
        begun = self.run.history.records or self.run.means.steps
        if begun and self.saved != self.run.progress.text:
            self.save()

    def _time(self, seconds: float) -> None:
        """Count a step and give the estimate once it can be made: by the median, since the first steps are watched."""
        if self._estimated:
            return
        self._step_seconds.append(seconds)
        if len(self._step_seconds) >= ESTIMATE_STEPS and sum(self._step_seconds) >= ESTIMATE_SECONDS:
            self._estimated = True
            self.notify(self.run.estimate(statistics.median(self._step_seconds)))

    def _keep(self, error: BaseException) -> None:
        """Write what is not written yet, and say how to continue."""
        if isinstance(error, StorageError):
            self.notify(self.kept)
        elif self.run.is_consistent:
            try:
                self._save_unsaved()
            except (StorageError, TrainingError) as failure:
                self.notify(f"error: {failure}")
        if isinstance(error, KeyboardInterrupt):
            where = self.run.progress.text if self.run.is_consistent else "within a step"
            self.notify(f"stopped {where}; {self.kept}")
        if isinstance(error, Terminated) and in_notebook():
            # IPython outlives every exception, but this process was asked to end.
            threading.Timer(KERNEL_GRACE_SECONDS, os.kill, (os.getpid(), signal.SIGTERM)).start()

    def _restore(self) -> None:
        """Load the checkpoint and the snapshots. Damaged snapshots begin again with the present state."""
        run, config = self.run, asdict(self.run.config)
        state = load_checkpoint(self.folder.path / CHECKPOINT, run.device, self.notify)
        state["config"] = asdict(RunConfig("")) | state["config"]  # a setting that is younger was at its default
        run.progress = restore(state, run.model, run.optimizer, config, run.data.digest, self.notify)
        self.saved = run.progress.text
        layers = list(quantized_layers(run.model))
        try:
            run.snapshots = Snapshots.resume(self.folder.path / SNAPSHOTS, layers, run.model, len(run.history))
        except SnapshotError as error:
            self.notify(f"the histograms of the epochs so far are lost: {error}")
            self._begin_snapshots()

    def _begin_snapshots(self) -> None:
        self.run.snapshots = Snapshots(list(quantized_layers(self.run.model)))
        self.run.snapshots.add(self.run.model, len(self.run.history))

"""The loop that the script and the notebook share: steps, epochs, and how nothing of them is lost.

    with TrainingLoop.open(run, "debug_output") as loop:
        for epoch in loop.epochs():
            for step in loop.steps():
                ...                       # a Step: progress, observers
            record = loop.finish_epoch()  # measured, in run.history, and written

A run stands between two steps or between two epochs whenever it is not within a step, and can be written, read and
gone on from there: the rest is what it would have been.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from experiments.pipeline.config import RunConfig
from experiments.pipeline.run import Run
from src import training
from src.runs import SNAPSHOTS, RunError, RunFolder, SnapshotError, Snapshots
from src.storage import StorageError
from src.training import (
    EpochRecord,
    Interrupted,
    StepFunction,
    Terminated,
    TrainingError,
    batch_size_advice,
    between_steps,
    in_notebook,
    is_out_of_memory,
    raise_pending,
)
from utils_quantization import quantized_layers

OnStep = Callable[[int, training.Step], None]
SECONDS_TO_LIVE = 3.0  # of a kernel that is asked to end, for the last figure


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


def measure(run: Run, means: training.EpochMeans, epoch: int, seconds: float) -> EpochRecord:
    """The record of epoch `epoch` (from 0), which has just been trained in `seconds`."""
    coefficient = run.config.schedule()(epoch, run.config.epochs)
    return training.measure_epoch(
        run.model,
        run.optimizer,
        run.data,
        means,
        epoch=epoch,
        coefficient=coefficient,
        seconds=seconds,
        precision=run.precision,
    )


def steps_left(run: Run, step: StepFunction | None = None) -> Iterator[training.Step]:
    """Train the present epoch from where it stands, yielding after each step, which is counted by then.

    step: what a step does; `run.step` by default. Raises TrainingError where the loss or a gradient is not finite or
    the memory does not hold a batch; the run is not `whole` then.
    """
    settings = epoch_settings(run.config, len(run.history), run.precision)
    steps = training.train_epoch(
        run.model, run.optimizer, run.data, run.objective, start=run.means.steps, step=step or run.step, **settings
    )
    began = time.perf_counter()
    while (done := _next(run, steps)) is not None:
        now = time.perf_counter()
        run.means.add(done)
        run.seconds, began, run.whole = run.seconds + now - began, now, True
        yield done


def finish_epoch(run: Run) -> EpochRecord:
    """Measure the epoch whose steps are all done, put its record into the history and begin the next."""
    try:
        record = measure(run, run.means, len(run.history), run.seconds)
    except (MemoryError, RuntimeError) as error:
        _explain(run, error)
        raise
    run.history.append(record)
    run.means, run.seconds = training.EpochMeans(), 0.0
    return record


def train_epochs(run: Run, on_step: OnStep | None = None) -> Iterator[EpochRecord]:
    """Train the epochs that are left, in memory alone, yielding each one's record; it is in `run.history` by then."""
    for epoch in range(len(run.history), run.config.epochs):
        for step in steps_left(run):
            if on_step:
                on_step(epoch, step)
        yield finish_epoch(run)


class TrainingLoop:
    """A run and its folder. As a context manager it keeps what was done, whatever happens inside.

    checkpoint_every: steps between two checkpoints within an epoch; None for one after each epoch only.
    step: what a step does, as in `steps_left`. go_on: how the user goes on after an interruption.

    Inside, an interruption waits for the end of the step; then checkpoint and history are written and it is raised:
    KeyboardInterrupt, or Terminated where the process was asked to end (a notebook's kernel does end then). Entered
    again, it goes on where it stopped; after a step that failed, from the last checkpoint.
    """

    def __init__(
        self,
        run: Run,
        folder: RunFolder,
        *,
        checkpoint_every: int | None = None,
        step: StepFunction | None = None,
        report: Callable[[str], None] = print,
        go_on: str = "run this cell again to go on",
    ) -> None:
        self.run, self.folder = run, folder
        self.saved = run.progress.text if run.history.records or run.means.steps else ""
        self._every, self._step, self._report, self._go_on = checkpoint_every, step, report, go_on
        self._signals: AbstractContextManager[None] | None = None
        if run.snapshots is None:
            run.snapshots = _present_state(run)

    @classmethod
    def open(cls, run: Run, output: str | Path, *, resume: bool = False, **settings: Any) -> TrainingLoop:
        """Take the folder `output` for `run`: from its checkpoint where `resume` is set, else from the beginning.

        An earlier run there moves to previous/ unless it is resumed. Raises RunError where the folder cannot be used,
        is in use, or holds no checkpoint that fits; nothing is changed then.
        """
        report = settings.get("report", print)
        if not resume and run.optimizer.state and not run.history.records:
            raise RunError(
                "this network has been trained before: for a new run build it and its optimizer again (in the notebook "
                "run the cells from chapter 5 on), or resume"
            )
        if resume:
            RunFolder(Path(output)).check_resumable()
        folder = RunFolder.open(output, keep=resume)
        if resume:
            _restore(run, folder, report)
            report(f"resumed {run.progress.text}")
        return cls(run, folder, **settings)

    def epochs(self) -> range:
        """The epochs that are left, from 0; the first of them may be begun."""
        return range(len(self.run.history), self.run.config.epochs)

    def steps(self) -> Iterator[training.Step]:
        """The steps that are left of the present epoch, with a checkpoint every so many."""
        for step in steps_left(self.run, self._step):
            due = self._every and (len(self.run.history) * step.steps + step.index + 1) % self._every == 0
            if due and step.index + 1 < step.steps:
                self.save()
            yield step

    def finish_epoch(self) -> EpochRecord:
        """Measure the epoch, put its record into the history, and write checkpoint and history."""
        record = finish_epoch(self.run)
        self._snapshots.add(self.run.model, record.epoch)
        self.save()
        return record

    def save(self) -> None:
        """Write the checkpoint, and after an epoch history and snapshots. Raises RunError or TrainingError; the old
        checkpoint stays.
        """
        run, folder = self.run, self.folder.path
        due = not run.means.steps or not self.saved or not (folder / SNAPSHOTS).exists()
        gone = not folder.is_dir()  # the checkpoint makes it again
        if due and not gone:
            # Before the checkpoint: what is ahead of it is cut off when the run is taken up, what is behind is lost.
            self.folder.try_write(SNAPSHOTS, self._snapshots.to_bytes())
        self.folder.save_progress(
            run.model, run.optimizer, run.history, asdict(run.config), run.data.digest, run.means, run.seconds
        )
        if due and gone:
            self.folder.try_write(SNAPSHOTS, self._snapshots.to_bytes())
        self.saved = run.progress.text

    @property
    def _snapshots(self) -> Snapshots:
        assert self.run.snapshots is not None  # since __init__
        return self.run.snapshots

    @property
    def kept(self) -> str:
        """Where what is kept can be found."""
        if not self.saved:
            return "nothing was written yet"
        return f"the state {self.saved} is in {self.folder.path}"

    def __enter__(self) -> TrainingLoop:
        self._signals = between_steps()
        self._signals.__enter__()
        try:
            if not self.run.whole:
                if not self.saved:
                    raise RunError("the first steps failed and no checkpoint is there: build the network again")
                _restore(self.run, self.folder, self._report)
                self._report(f"taken up {self.run.progress.text}, the last good state")
            elif self._behind():
                self.save()  # it could not be written when it was due
        except BaseException as error:
            self._signals.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._signals is not None
        try:
            if error is None:
                raise_pending()
            else:
                self._keep(error)
        except Interrupted as late:
            self._keep(late)
            raise
        finally:
            self._signals.__exit__(kind, error, trace)

    def _behind(self) -> bool:
        """Whether the run has made steps that are not written."""
        begun = self.run.history.records or self.run.means.steps
        return bool(begun) and self.saved != self.run.progress.text

    def _stopped(self, go_on: str) -> str:
        where = self.run.progress.text if self.run.whole else "within a step"
        if not self.saved:
            return f"stopped {where}; no step was finished, so there is nothing to resume"
        what = "which" if self.saved == where else f"the state {self.saved}"
        return f"stopped {where}, {what} is kept in {self.folder.path}; {go_on}"

    def _keep(self, error: BaseException) -> None:
        """Write what is not written yet, and say how to go on."""
        if self.run.whole and not isinstance(error, StorageError) and self._behind():
            try:
                self.save()
            except (StorageError, TrainingError) as failure:
                self._report(f"error: {failure}")
        if isinstance(error, StorageError):
            self._report(f"{self.kept}; {self._go_on}" if self.saved else self.kept)
        ending = isinstance(error, Terminated) and in_notebook()
        if isinstance(error, KeyboardInterrupt):
            self._report(self._stopped("the notebook with RESUME = True goes on" if ending else self._go_on))
        if ending:  # IPython outlives every exception, but this process was asked to end
            threading.Timer(SECONDS_TO_LIVE, os.kill, (os.getpid(), signal.SIGTERM)).start()


def _restore(run: Run, folder: RunFolder, report: Callable[[str], None]) -> None:
    run.progress = folder.restore(run.model, run.optimizer, asdict(run.config), run.device, run.data.digest, report)
    try:
        layers = list(quantized_layers(run.model))
        run.snapshots = Snapshots.resume(folder.path / SNAPSHOTS, layers, run.model, len(run.history))
    except SnapshotError as error:
        report(f"the histograms of the epochs so far are lost: {error}")
        run.snapshots = _present_state(run)


def _present_state(run: Run) -> Snapshots:
    snapshots = Snapshots(list(quantized_layers(run.model)))
    snapshots.add(run.model, len(run.history))
    return snapshots


def _next(run: Run, steps: Iterator[training.Step]) -> training.Step | None:
    """The next step, or None. Afterwards the run is whole, interrupted between two steps, too; not after a failure."""
    run.whole = False
    try:
        step = next(steps, None)
    except Interrupted:
        run.whole = True
        raise
    except (MemoryError, RuntimeError) as error:
        _explain(run, error)
        raise
    if step is None:
        run.whole = True
    return step


def _explain(run: Run, error: Exception) -> None:
    """Where the memory ran out, raise an error that says which batch size would do."""
    if is_out_of_memory(error):
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of the failed step
        shape = tuple(run.data.train_images.shape[1:])
        advice = batch_size_advice(run.config.batch_size, run.model, shape, run.precision)
        raise TrainingError(advice) from error

"""The loop that the script and the notebook share: steps, epochs, and how nothing of them is lost.

    with TrainingLoop.open(run, "debug_output") as loop:
        for epoch in loop.epochs():
            for step in loop.steps():
                ...                       # a Step: progress, observers
            record = loop.finish_epoch()  # measured, in run.history, and written

Between two steps a run is consistent: it can be written, read and continued, and the rest is what it would have been.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from experiments.pipeline.run import Run
from src.runs import SNAPSHOTS, RunError, RunFolder, SnapshotError, Snapshots
from src.storage import Notify, StorageError
from src.training import (
    EpochRecord,
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


class TrainingLoop:
    """A run and its folder. As a context manager it keeps what was done, whatever happens inside.

    checkpoint_every: steps between two checkpoints within an epoch; None for one after each epoch only.
    step_fn: what a step does, as in `Run.steps`. resume_hint: how the user continues after an interruption.

    Inside, an interruption waits for the end of the step; then checkpoint and history are written and it is raised:
    KeyboardInterrupt, or Terminated where the process was asked to end (a notebook's kernel does end then). Entered
    again, it continues where it stopped; after a step that failed, from the last checkpoint.
    """

    def __init__(
        self,
        run: Run,
        folder: RunFolder,
        *,
        checkpoint_every: int | None = None,
        step_fn: StepFunction | None = None,
        notify: Notify = print,
        resume_hint: str = "run this cell again to continue",
    ) -> None:
        self.run, self.folder = run, folder
        self.saved = run.progress.text if run.history.records or run.means.steps else ""
        self._every, self._step_fn, self._notify, self._resume_hint = checkpoint_every, step_fn, notify, resume_hint
        self._guard: AbstractContextManager[None] | None = None

    @classmethod
    def open(cls, run: Run, output: str | Path, *, resume: bool = False, **settings: Any) -> TrainingLoop:
        """Take the folder `output` for `run`: from its checkpoint where `resume` is set, else from the beginning.

        An earlier run there moves to previous/ unless it is resumed. Raises RunError where the folder cannot be used,
        is in use, or holds no checkpoint that fits; nothing is changed then.
        """
        if not resume and run.optimizer.state and not run.history.records:
            raise RunError(
                "this network has been trained before: for a new run build it and its optimizer again (in the notebook "
                "run the cells from chapter 5 on), or resume"
            )
        if resume:
            RunFolder(Path(output)).check_resumable()
        loop = cls(run, RunFolder.open(output, keep=resume), **settings)
        if resume:
            loop._restore()
            loop._notify(f"resumed {run.progress.text}")
        return loop

    def epochs(self) -> range:
        """The epochs that are left, from 0; some steps of the first may be done."""
        return range(len(self.run.history), self.run.config.epochs)

    def steps(self) -> Iterator[Step]:
        """The steps that are left of the unfinished epoch, with a checkpoint every `checkpoint_every`."""
        for step in self.run.steps(self._step_fn):
            due = self._every and (len(self.run.history) * step.steps + step.index + 1) % self._every == 0
            if due and step.index + 1 < step.steps:
                self.save()
            yield step

    def finish_epoch(self) -> EpochRecord:
        """Measure the epoch, put its record into the history, and write checkpoint and history."""
        record = self.run.finish_epoch()
        self._snapshots().add(self.run.model, record.epoch)
        self.save()
        return record

    def save(self) -> None:
        """Write the checkpoint, and after an epoch history and snapshots.

        Raises RunError or TrainingError; the old checkpoint stays.
        """
        run, folder = self.run, self.folder.path
        due = not run.means.steps or not self.saved or not (folder / SNAPSHOTS).exists()
        gone = not folder.is_dir()  # the checkpoint makes it again
        if due and not gone:
            # Before the checkpoint: snapshots ahead of it are cut off by a resumed run, missing ones are lost.
            self.folder.try_write(SNAPSHOTS, self._snapshots().to_bytes())
        self.folder.save_progress(
            run.model, run.optimizer, run.history, asdict(run.config), run.data.digest, run.means, run.seconds
        )
        if due and gone:
            self.folder.try_write(SNAPSHOTS, self._snapshots().to_bytes())
        self.saved = run.progress.text

    @property
    def kept(self) -> str:
        """Which state is in the folder."""
        return f"the state {self.saved} is in {self.folder.path}" if self.saved else "nothing was written yet"

    def __enter__(self) -> TrainingLoop:
        self._guard = self._guarded()
        self._guard.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._guard is not None  # entered before
        self._guard.__exit__(kind, error, trace)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Bring run and folder to the same state; afterwards, and after any error, write what is not written yet."""
        with between_steps():
            self._snapshots()
            if not self.run.is_consistent:
                if not self.saved:
                    raise RunError("the first steps failed and no checkpoint is there: build the network again")
                self._restore()
                self._notify(f"resumed {self.run.progress.text}, the last good state")
            elif self._has_unsaved_steps():
                self.save()  # it could not be written when it was due
            try:
                yield
                raise_pending()
            except BaseException as error:
                self._keep(error)
                raise

    def _has_unsaved_steps(self) -> bool:
        begun = self.run.history.records or self.run.means.steps
        return bool(begun) and self.saved != self.run.progress.text

    def _keep(self, error: BaseException) -> None:
        """Write what is not written yet, and say how to continue."""
        if self.run.is_consistent and not isinstance(error, StorageError) and self._has_unsaved_steps():
            try:
                self.save()
            except (StorageError, TrainingError) as failure:
                self._notify(f"error: {failure}")
        if isinstance(error, StorageError):
            self._notify(f"{self.kept}; {self._resume_hint}" if self.saved else self.kept)
        ends_kernel = isinstance(error, Terminated) and in_notebook()
        if isinstance(error, KeyboardInterrupt):
            self._notify(
                self._stopped("the notebook with RESUME = True continues" if ends_kernel else self._resume_hint)
            )
        if ends_kernel:  # IPython outlives every exception, but this process was asked to end
            threading.Timer(KERNEL_GRACE_SECONDS, os.kill, (os.getpid(), signal.SIGTERM)).start()

    def _stopped(self, hint: str) -> str:
        where = self.run.progress.text if self.run.is_consistent else "within a step"
        if not self.saved:
            return f"stopped {where}; no step was finished, so there is nothing to resume"
        what = "which" if self.saved == where else f"the state {self.saved}"
        return f"stopped {where}, {what} is kept in {self.folder.path}; {hint}"

    def _restore(self) -> None:
        """Load the checkpoint and the snapshots. Damaged snapshots begin again with the present state."""
        run, config = self.run, asdict(self.run.config)
        run.progress = self.folder.restore(run.model, run.optimizer, config, run.device, run.data.digest, self._notify)
        self.saved = run.progress.text
        layers = list(quantized_layers(run.model))
        try:
            run.snapshots = Snapshots.resume(self.folder.path / SNAPSHOTS, layers, run.model, len(run.history))
        except SnapshotError as error:
            self._notify(f"the histograms of the epochs so far are lost: {error}")
            run.snapshots = None
            self._snapshots()

    def _snapshots(self) -> Snapshots:
        """The run's snapshots, which begin with its present state."""
        if self.run.snapshots is None:
            self.run.snapshots = Snapshots(list(quantized_layers(self.run.model)))
            self.run.snapshots.add(self.run.model, len(self.run.history))
        return self.run.snapshots

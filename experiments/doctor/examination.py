"""The doctor beside a run that trains anyway: `python -m experiments.debug_run --doctor`, and anybody's own script.

examination = Examination(run, log_info)
examination.begin()                    # before the first step; changes nothing
examination.step(epoch, step)          # after every step
examination.epoch(record)              # after every epoch
report = examination.conclude(checkpoint, result, accuracy)
"""

from __future__ import annotations

from pathlib import Path

from experiments.doctor.core.findings import BEFORE, FIRST_STEPS, Report
from experiments.doctor.core.pipeline import Pipeline
from experiments.doctor.examine import afterwards, before, first_steps
from experiments.doctor.training.reported import Reported
from experiments.doctor.training.training_checks import Watcher
from experiments.evaluator import EvalResult
from experiments.pipeline import Run
from src.storage import Notify
from src.training import EpochRecord, Step


class Examination:
    """All four stages around a run. notify: gets one line for each stage, as soon as it is known."""

    def __init__(self, run: Run, notify: Notify) -> None:
        self._run, self._notify = run, notify
        self._pipeline = Pipeline.of_run(run)
        self._watcher = Watcher(self._pipeline)
        self.report = Report()

    def begin(self) -> None:
        """The first two stages, which take some seconds. A resumed run has its first steps behind it."""
        if self._run.history.records or self._run.means.steps:
            self._notify("doctor: this run is resumed; its state before training is not examined again")
            return
        self._add(BEFORE, before(self._pipeline))
        self._add(FIRST_STEPS, first_steps(self._pipeline))

    def step(self, epoch: int, step: Step) -> None:
        """After an update; `epoch` from 0."""
        self._watcher.step(epoch, step)

    def epoch(self, record: EpochRecord) -> None:
        """After an epoch was measured and before the next one starts."""
        self._watcher.epoch(record)

    def conclude(self, checkpoint: Path, result: EvalResult, accuracy: float) -> Report:
        """What was seen in training, and what was reported of it a second time; returns the whole report."""
        if self._run.history.records:
            self.report += self._watcher.report()
        reported = Reported(checkpoint, self._run.history, result, accuracy)
        self.report += afterwards(self._pipeline, reported)
        return self.report

    def _add(self, stage: str, found: Report) -> None:
        self.report += found
        self._notify(f"doctor: {stage}: {found.line}")

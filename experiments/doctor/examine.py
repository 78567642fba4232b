"""The four stages: each a function from a Pipeline to a Report, so that it can be used alone.

pipeline = Pipeline.of_run(run)                  # or Pipeline.of_parts(model, optimizer, batches, step)
report = before(pipeline) + first_steps(pipeline)
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.doctor.checks.data import data_checks
from experiments.doctor.checks.network import network_checks
from experiments.doctor.checks.optimizer import optimizer_checks
from experiments.doctor.checks.penalty import penalty_checks
from experiments.doctor.checks.quantizers import quantizer_checks
from experiments.doctor.checks.reported import Reported, reported_checks
from experiments.doctor.checks.step import step_checks
from experiments.doctor.pipeline import Pipeline, train
from experiments.doctor.report import AFTERWARDS, BEFORE, FIRST_STEPS, NOT_JUDGED, TRAINING, Finding, Report
from experiments.doctor.runner import RAISED, CheckRunner, PartFailed, preserve_state
from experiments.doctor.training.watcher import Watcher
from experiments.evaluator import EvalResult
from experiments.pipeline import Run, load_run
from src.runs import CHECKPOINT
from src.storage import Notify
from src.training import EpochRecord, History, Step, TrainingError

QUICK = {"epochs": 14, "delay": 4, "dz_learning_rate": 6e-3, "bit_learning_rate": 6e-3}
"""What the doctor's own run changes of the preset `smoke`: shorter, with faster logits."""


def before(pipeline: Pipeline) -> Report:
    """What can be known before training: attachment, quantizers, optimizer, data, network, penalty. Changes nothing."""
    runner = CheckRunner(BEFORE, pipeline)
    with preserve_state(pipeline):
        quantizer_checks(runner, pipeline)
        optimizer_checks(runner, pipeline)
        data_checks(runner, pipeline)
        network_checks(runner, pipeline)
        penalty_checks(runner, pipeline)
    return runner.report()


def first_steps(pipeline: Pipeline) -> Report:
    """What a few real steps show; afterwards everything is as it was. Changes nothing."""
    runner = CheckRunner(FIRST_STEPS, pipeline)
    with preserve_state(pipeline):
        step_checks(runner, pipeline)
    return runner.report()


def while_training(
    pipeline: Pipeline, folder: Path, on_epoch: Callable[[Any], None] | None = None
) -> tuple[Report, Reported]:
    """Train the expected epochs and watch; returns what was seen and what the pipeline reported of itself."""
    watcher, reported = Watcher(pipeline, every_step=True), Reported()
    history = History(pipeline.expected.epochs or 1)
    try:
        for record, path in train(watcher.listening(_blaming_parts(pipeline)), folder, watcher.step):
            watcher.epoch(record)
            history.records.append(record)
            reported.checkpoint = path
            if on_epoch:
                on_epoch(record)
    except TrainingError as error:
        watcher.failed(error, "loss-not-finite")
    except PartFailed as error:
        watcher.failed(error.__cause__ or error, error.cause)
    except RAISED as error:  # whatever a part raises is a finding
        watcher.failed(error, "step-raises")
    reported.history = history if history.records else None
    return watcher.report(), reported


def _blaming_parts(pipeline: Pipeline) -> Pipeline:
    """The pipeline whose errors in measuring and saving say that they are from there."""

    def telling(part: Callable[..., Any], cause: str, kind: type) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            try:
                found = part(*arguments)
                if not isinstance(found, kind):
                    raise TypeError(f"it returned {type(found).__name__}, neither an accuracy nor {kind.__name__}")
                return found
            except TrainingError:
                raise
            except RAISED as error:
                raise PartFailed(cause, error) from error

        return call

    measure = telling(pipeline.measure, "measure-raises", EpochRecord) if pipeline.measure else None
    save = telling(pipeline.save, "saving-raises", object) if pipeline.save else None
    return replace(pipeline, measure=measure, save=save)


def afterwards(pipeline: Pipeline, reported: Reported) -> Report:
    """Every reported figure a second time, and the healthy list of `experiments.verdict`."""
    runner = CheckRunner(AFTERWARDS, pipeline)
    reported_checks(runner, pipeline, reported)
    return runner.report()


def examine(
    pipeline: Pipeline,
    folder: Path | None = None,
    *,
    stop_when_faulty: bool = False,
    on_stage: Callable[[str, Report], None] | None = None,
    on_epoch: Callable[[Any], None] | None = None,
) -> Report:
    """All four stages, training the pipeline in between. folder: for the checkpoint; a temporary one by default.

    stop_when_faulty: leave out the stages after the first that finds a fault. Without `epochs` and `measure` there is
    no training: the report then ends with the first steps.
    """
    with ExitStack() as stack:
        place = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="doctor-")))
        report = Report()

        def add(stage: str, found: Report) -> bool:
            nonlocal report
            report += found
            if on_stage:
                on_stage(stage, found)
            return stop_when_faulty and report.faulty

        if add(BEFORE, before(pipeline)) or add(FIRST_STEPS, first_steps(pipeline)):
            return report
        if pipeline.measure is None and not pipeline.expected.epochs:
            reason = "how many epochs to train is not said"
            unseen = Finding("training", "the network learns", TRAINING, "", reason, NOT_JUDGED, needs="epochs")
            return report + Report((unseen,))
        seen, reported = while_training(pipeline, place, on_epoch)
        unmeasured = pipeline.measure is None and pipeline.evaluate is None
        if add(TRAINING, seen) or reported.history is None or unmeasured:
            return report
        add(AFTERWARDS, afterwards(pipeline, reported))
        return report


def examine_folder(path: Path, data_root: str | None = None) -> Report:
    """The last stage on a finished run's folder (checkpoint.pt of `debug_run`). Raises RunError or DataError.

    data_root: where the run's images are, by default where they were. Nothing is downloaded.
    """
    run = load_run(path, data_root=data_root, device="cpu")
    return afterwards(Pipeline.of_run(run), Reported(checkpoint=path / CHECKPOINT, history=run.history))


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

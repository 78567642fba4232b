"""The doctor: examine a training pipeline in four stages and name what is broken, not only that something is.

    python -m experiments.doctor --data digits --epochs 14 --output doctor
    python -m experiments.doctor --run debug_output

The first trains a short run of its own and examines it before, at its first steps, while it trains, and afterwards.
`--run FOLDER` examines a finished run. stdout gets the checks that failed, and last the headline; --all prints every
check, and doctor.json in the --output folder holds them. Notices are on stderr.
Exit status: 0 no fault found, 1 a check failed, 2 bad input, 130 interrupted.

Each stage is a function from a Pipeline to a Report, so that it can be used alone:

    pipeline = Pipeline.of_run(run)                  # or Pipeline.of_parts(model, optimizer, batches, step)
    report = before(pipeline) + first_steps(pipeline)
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.doctor.core.check_runner import RAISED, CheckRunner, PartFailed, preserve_state
from experiments.doctor.core.findings import AFTERWARDS, BEFORE, FIRST_STEPS, STAGES, TRAINING, Report
from experiments.doctor.core.pipeline import Pipeline, train
from experiments.doctor.data.data_checks import data_checks
from experiments.doctor.network.account_checks import account_checks
from experiments.doctor.network.baseline_checks import baseline_checks
from experiments.doctor.network.network_checks import network_checks
from experiments.doctor.quantizer.grid_checks import grid_checks
from experiments.doctor.quantizer.joint_checks import joint_checks
from experiments.doctor.quantizer.quantizer_checks import quantizer_checks
from experiments.doctor.step.optimizer_checks import optimizer_checks
from experiments.doctor.step.penalty_checks import penalty_checks
from experiments.doctor.step.step_checks import step_checks
from experiments.doctor.training.reported import Reported
from experiments.doctor.training.training_checks import Watcher
from experiments.doctor.training.verdict_checks import verdict_checks
from experiments.pipeline import PRESETS_HELP, build_run, configure, load_run, prepare_data
from src.runs import CHECKPOINT, RunFolder
from src.storage import CommandParser, check_writable, fail, log_info
from src.training import EpochRecord, History, TrainingError

HEALTHY, FAULTY, INTERRUPTED = 0, 1, 130
QUICK = {"epochs": 14, "delay": 4, "dz_learning_rate": 6e-3, "bit_learning_rate": 6e-3}
"""What the doctor's own run changes of the preset `smoke`: shorter, with faster logits."""


def before(pipeline: Pipeline) -> Report:
    """What can be known before training: attachment, quantizers, optimizer, data, network, penalty. Changes nothing."""
    runner = CheckRunner(BEFORE)
    with preserve_state(pipeline):
        quantizer_checks(runner, pipeline)
        grid_checks(runner, pipeline)
        joint_checks(runner, pipeline)
        optimizer_checks(runner, pipeline)
        data_checks(runner, pipeline)
        network_checks(runner, pipeline)
        baseline_checks(runner, pipeline)
        penalty_checks(runner, pipeline)
    return runner.report()


def first_steps(pipeline: Pipeline) -> Report:
    """What a few real steps show; afterwards everything is as it was. Changes nothing."""
    runner = CheckRunner(FIRST_STEPS)
    with preserve_state(pipeline):
        step_checks(runner, pipeline)
    return runner.report()


def while_training(
    pipeline: Pipeline, folder: Path, on_epoch: Callable[[Any], None] | None = None
) -> tuple[Report, Reported]:
    """Train the expected epochs and watch; returns what was seen and what the pipeline reported of itself."""
    watcher, reported = Watcher(pipeline), Reported()
    history = History(pipeline.expected.epochs or 1)
    try:
        for record, path in train(_blaming_parts(pipeline), folder, watcher.step):
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
                    raise TypeError(f"it returned {type(found).__name__}, not {kind.__name__}")
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
    runner = CheckRunner(AFTERWARDS)
    account_checks(runner, pipeline, reported)
    verdict_checks(runner, pipeline, reported.history)
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

    stop_when_faulty: leave out the stages after the first that finds a fault. Without `measure` there is no training:
    the report then ends with the first steps.
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

        if add(BEFORE, before(pipeline)) or add(FIRST_STEPS, first_steps(pipeline)) or pipeline.measure is None:
            return report
        seen, reported = while_training(pipeline, place, on_epoch)
        if add(TRAINING, seen) or reported.history is None:
            return report
        add(AFTERWARDS, afterwards(pipeline, reported))
        return report


def examine_folder(path: Path, data_root: str | None = None) -> Report:
    """The last stage on a finished run's folder (checkpoint.pt of `debug_run`). Raises RunError or DataError.

    data_root: where the run's images are, by default where they were. Nothing is downloaded.
    """
    run = load_run(path, data_root=data_root, device="cpu")
    return afterwards(Pipeline.of_run(run), Reported(checkpoint=path / CHECKPOINT, history=run.history))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = _parser().parse_args(arguments)
    started = time.perf_counter()
    try:
        report = examine_folder(Path(options.run), options.data_root) if options.run else _own_run(options)
        print(report.text(passed=options.all))
        log_info(f"{time.perf_counter() - started:.0f} s")
        if options.output:
            RunFolder(Path(options.output)).write_json("doctor.json", report.to_json())
    except ValueError as error:  # every error of the library that bad input can cause is one
        return fail(str(error))
    except OSError as error:
        return fail(f"{error.filename or options.output!r}: {error.strerror or error}")
    except KeyboardInterrupt:
        log_info("interrupted")
        return INTERRUPTED
    return FAULTY if report.faulty else HEALTHY


def _own_run(options: argparse.Namespace) -> Report:
    if options.output:
        check_writable(options.output)
    changes: dict[str, Any] = {**QUICK} if options.preset == "smoke" else {}
    asked = {name: getattr(options, name) for name in ("data", "data_root", "epochs", "limit", "seed", "device")}
    config = configure(options.preset, **changes | {name: value for name, value in asked.items() if value is not None})
    config, data = prepare_data(config, log_info)
    run = build_run(config, data)
    log_info(f"{run.subtitle}; {config.epochs} epochs")

    def told(stage: str, found: Report) -> None:
        log_info(f"[{STAGES.index(stage) + 1}/{len(STAGES)}] {stage}: {found.line}")

    return examine(
        Pipeline.of_run(run), on_stage=told, on_epoch=lambda record: log_info(record.console_line(config.epochs))
    )


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser("experiments.doctor", (__doc__ or "").partition("\n\nEach stage")[0])
    parser.add_argument("--preset", default="smoke", help=f"{PRESETS_HELP} (default: smoke)")
    parser.add_argument("--data", help="auto, cifar10, digits or folder:PATH (default: the preset's)")
    parser.add_argument("--data-root", help="where CIFAR-10 is (default: data); with --run, where the run's images are")
    parser.add_argument("--epochs", type=int, help=f"epochs to train (default: {QUICK['epochs']})")
    parser.add_argument("--limit", type=int, help="at most this many training and test images (default: all)")
    parser.add_argument("--seed", type=int, help="seed of weights, order and augmentation (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument("--output", help="folder for doctor.json (default: none is written)")
    parser.add_argument("--all", action="store_true", help="print every check, not only those that failed")
    parser.add_argument("--run", help="examine the finished run in this folder instead of a new one")
    return parser


if __name__ == "__main__":
    sys.exit(main())

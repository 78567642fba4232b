"""Validate the whole pipeline as a script: train, record, evaluate, judge.

    python -m experiments.debug_run --data cifar10 --epochs 20 --output debug_output
    python -m experiments.debug_run --preset smoke --limit 500
    python -m experiments.debug_run --resume

One line per epoch on stdout, then the compression table and the verdict; progress and notices on stderr. The output
folder gets four figures, history.csv, run.json and checkpoint.pt (and checkpoint.previous.pt, the one before it).
With --doctor the run is examined before, while and after it trains; the findings are printed and written to run.json.
Ctrl-C and SIGTERM let the running step finish and write a checkpoint; a second Ctrl-C ends at once.
Exit status: 0 no fault found, 1 the verdict or the doctor found one, 2 bad input, or a training that could not
continue (not a number, memory or disk full); 130 interrupted, 143 terminated (checkpoint, history and figures kept:
--resume continues, with the same result).
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from experiments import pipeline
from experiments.doctor import Examination
from experiments.headless import parse_settings
from experiments.notebook import ProgressBar
from experiments.pipeline import BUDGETS, PRESETS_HELP, RunConfig, configure
from src.data import steps_per_epoch
from src.runs import CHECKPOINT, SUMMARY, RunFolder
from src.storage import CommandParser, check_writable, fail, folder_lock, log_info, prepare_streams, print_result
from src.training import DEVICES, Terminated, TrainingError, is_out_of_memory, pick_device, terminations

HEALTHY, FAULTY, INTERRUPTED = 0, 1, 130
SETTINGS = {
    each.name: each.default for each in fields(RunConfig) if each.name not in ("preset", "continued_from", "given")
}
RESUME_HINT = "the same command with --resume continues"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    prepare_streams()
    try:
        with terminations(), warnings.catch_warnings():
            warnings.showwarning = _say_warning
            options, config, settings = read_arguments(arguments)
            return _run(options, config, settings)
    except ValueError as error:  # every error of the library that bad input can cause is one
        return fail(str(error))
    except OSError as error:
        return fail(f"{error.filename or options.output!r}: {error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return fail("the memory does not hold the images; use --limit, or end other programs")
    except KeyboardInterrupt as stopped:  # outside of the training loop, which keeps what it has
        log_info("interrupted")
        return _status(stopped)


def read_arguments(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, RunConfig, dict[str, Any]]:
    """The options, the configuration that they ask for, and the settings among them. Raises ValueError."""
    options = _parser().parse_args(arguments)
    names = ("data", "data_root", "epochs", "batch_size", "limit", "seed", "device")
    settings = {name: getattr(options, name) for name in names}
    for kind in BUDGETS:
        if amount := getattr(options, f"target_{kind}"):
            settings["target"] = f"{kind} {amount}"
    settings |= parse_settings(options.set, SETTINGS)
    return options, configure(options.preset or "debug", **settings), settings


def _run(options: argparse.Namespace, config: RunConfig, settings: dict[str, Any]) -> int:
    pick_device(config.device)
    check_writable(options.output)  # before minutes of work, and without creating anything
    folder_lock.check_free(options.output)
    if options.resume:
        saved = pipeline.SavedRun.open(options.output, notify=lambda line: None)  # the loop reads it again, and says it
        config = saved.resumed(options.preset, **settings)
    config, data = pipeline.prepare_data(config, log_info)
    run = pipeline.build_run(config, data)
    saving = {"checkpoint_every": options.checkpoint_every, "notify": log_info, "resume_hint": RESUME_HINT}
    loop = pipeline.TrainingLoop.open(run, options.output, resume=options.resume, **saving)
    with loop.folder.lock():  # until all is written
        return _train_and_judge(loop, options)


def _train_and_judge(loop: pipeline.TrainingLoop, options: argparse.Namespace) -> int:
    run = loop.run
    arithmetic = f"{run.device.type}, {str(run.precision).removeprefix('torch.')}"
    log_info(f"{run.subtitle}; {arithmetic}; {len(run.attached)} quantizers")
    pipeline.add_teacher(run, options.output, progress=ProgressBar, notify=log_info)
    examination = Examination(run, log_info) if options.doctor else None
    if examination:
        examination.begin()
    try:
        _train(loop, examination)
    except KeyboardInterrupt as stopped:
        if run.history.records:
            pipeline.save_figures(run, loop.folder)
        return _status(stopped)
    except TrainingError as error:
        return fail(f"{error}; {loop.kept}")
    try:
        baseline = pipeline.obtain_baseline(
            run, options.output, options.baseline, progress=ProgressBar, notify=log_info
        )
        return _conclude(run, loop.folder, examination, baseline)
    except BaseException:
        kept = f"the training is complete and kept in {loop.folder.path}"
        log_info(f"{kept}; {RESUME_HINT} with its evaluation and figures")
        raise


def _train(loop: pipeline.TrainingLoop, examination: Examination | None) -> None:
    """Train the epochs that are left; a line on stdout for each."""
    run, epochs = loop.run, loop.run.config.epochs
    steps = steps_per_epoch(run.data, run.config.batch_size)
    with ProgressBar(epochs, steps, len(run.history), run.means.steps) as progress, loop:
        for epoch in loop.epochs():
            for step in loop.steps():
                progress.step(epoch + 1, step.index + 1, step.loss)
                if examination:
                    examination.step(epoch, step)
            record = loop.finish_epoch()
            if examination:
                examination.epoch(record)
            progress.epoch_done(record)
            print_result(record.console_line(epochs))


def _conclude(
    run: pipeline.Run, folder: RunFolder, examination: Examination | None, baseline: pipeline.Baseline | None
) -> int:
    result, accuracy = pipeline.evaluate_run(run)
    report = examination.conclude(folder.path / CHECKPOINT, result, accuracy) if examination else None
    verdict = pipeline.judge_run(run, accuracy, baseline)
    pipeline.save_figures(run, folder, baseline)
    folder.try_write("history.csv", run.history.csv_text())
    print_result(f"\n{pipeline.compression_table(result, accuracy)}")
    diagnosis = report.to_json() if report else None
    # Of a dead network there is nothing to pack.
    packed_ratio = pipeline.packed_ratio(run.model) if result.structured_stats.total_macs else None
    summary = pipeline.summary(run, result, accuracy, verdict, diagnosis, baseline, packed_ratio)
    print_result(" ".join(summary["in_words"]))
    print_result(f"\n{verdict.text()}")
    if report:
        print_result(f"\n{report.text()}")
    if run.data.notice:
        print_result(f"\nNOTICE: {run.data.notice}")
    folder.write_json(SUMMARY, summary)
    print_result(f"\nFigures, history.csv, run.json and checkpoint.pt are in {folder.path}")
    return FAULTY if verdict.faulty or (report and report.faulty) else HEALTHY


def _status(stopped: KeyboardInterrupt) -> int:
    """128 + the signal's number, as a shell has it."""
    return 128 + stopped.signal if isinstance(stopped, Terminated) else INTERRUPTED


def _say_warning(message: Warning | str, *_: object, **__: object) -> None:
    """A warning is one line, without the place in the code that it comes from."""
    log_info(f"warning: {message}")


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser("experiments.debug_run", __doc__)
    parser.add_argument("--preset", help=f"{PRESETS_HELP} (default: debug)")
    parser.add_argument("--data", help="auto, cifar10, digits or folder:PATH (default: auto)")
    parser.add_argument("--data-root", help="where CIFAR-10 is or will be (default: data)")
    parser.add_argument("--epochs", type=int, help="epochs to train (default: the preset's)")
    parser.add_argument("--batch-size", type=int, help="images a step (default: the preset's)")
    parser.add_argument("--limit", type=int, help="use at most this many training and test images (default: all)")
    parser.add_argument("--seed", type=int, help="seed of weights, order and augmentation (default: 0)")
    targets = parser.add_mutually_exclusive_group()
    targets.add_argument("--target-bops", metavar="SHARE", help="a budget: at most 3%% of the dense network's BOPs")
    targets.add_argument("--target-macs", metavar="SHARE", help="at most 50%% of the dense network's MACs, say")
    targets.add_argument("--target-bytes", metavar="FACTOR", help="a packed file 20x smaller than the FP32 state, say")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other setting of `RunConfig` (experiments/pipeline/config.py), such as peak=0.02",
    )
    parser.add_argument("--device", help=f"one of {', '.join(DEVICES)} (default: auto)")
    parser.add_argument("--output", default="debug_output", help="folder for the results (default: debug_output)")
    parser.add_argument(
        "--baseline",
        choices=pipeline.WISHES,
        default="auto",
        help="train without compression, too, to say what it costs; auto: where that takes less than two minutes",
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in the folder, with its settings")
    parser.add_argument("--doctor", action="store_true", help="examine the run check by check, and name what is broken")
    parser.add_argument("--checkpoint-every", type=int, metavar="STEPS", help="also after STEPS steps, not only epochs")
    return parser


if __name__ == "__main__":
    sys.exit(main())

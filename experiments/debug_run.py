"""Validate the whole pipeline as a script: train, record, evaluate, judge.

    python -m experiments.debug_run [--data cifar10] [--epochs 20] [--output debug_output] [--resume]

One line per epoch on stdout, then the compression table and the verdict; progress and notices on stderr. The output
folder gets four figures, history.csv, run.json and checkpoint.pt.
Exit status: 0 no fault found, 1 the verdict found a fault, 2 bad input, 130 interrupted (history and checkpoint kept).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from experiments import pipeline
from experiments.console import fail, say
from experiments.live import TerminalProgress
from experiments.presets import PRESETS, RunConfig, configure
from src.data import steps_per_epoch
from src.runs import RunFolder, check_writable
from src.training import DEVICES, Step, TrainingError

HEALTHY, FAULTY, INTERRUPTED = 0, 1, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        config = _configuration(options)
        return _run(config, options.output, options.resume)
    except ValueError as error:  # every error of the library that bad input can cause is one
        return fail(str(error))
    except OSError as error:
        return fail(f"{error.filename or options.output!r}: {error.strerror or error}")
    except KeyboardInterrupt:  # outside of the training loop, which keeps what it has
        say("interrupted")
        return INTERRUPTED


def _run(config: RunConfig, output: str, resume: bool) -> int:
    check_writable(output)  # before minutes of work, and without creating anything
    config, data = pipeline.prepare_data(config, say)
    run = pipeline.build_run(config, data)
    if resume:
        folder = RunFolder(Path(output))
        run.history = folder.resume(run.model, run.optimizer, asdict(config), run.device, data.digest)
        say(f"resumed after epoch {len(run.history)} of {config.epochs}")
    else:
        folder = RunFolder.open(output)
    arithmetic = f"{run.device.type}, {str(run.precision).removeprefix('torch.')}"
    say(f"{run.subtitle}; {arithmetic}; {len(run.attached)} quantizers")
    saved = len(run.history)
    progress = TerminalProgress()
    progress.start(config.epochs, steps_per_epoch(data, config.batch_size), len(run.history))

    def on_step(epoch: int, step: Step) -> None:
        progress.step(epoch + 1, step.index + 1, step.loss)

    try:
        for record in pipeline.train_epochs(run, on_step):
            folder.save_progress(run.model, run.optimizer, run.history, asdict(config), data.digest)
            saved = record.epoch
            progress.epoch_done(record)
            print(record.console_line(config.epochs), flush=True)
    except KeyboardInterrupt:
        progress.close("interrupted")
        kept = f"history and checkpoint of {saved} epochs are in {folder.path}; the same command with --resume goes on"
        nothing = "no epoch was finished, so there is nothing to resume"
        say(f"stopped in epoch {saved + 1}; {kept if saved else nothing}")
        return INTERRUPTED
    except TrainingError as error:
        progress.close("stopped")
        return fail(f"{error}; {saved} finished epochs are kept in {folder.path}")
    progress.close("trained")
    return _conclude(run, folder)


def _conclude(run: pipeline.Run, folder: RunFolder) -> int:
    result, accuracy = pipeline.evaluate_run(run)
    verdict = pipeline.verdict(run)
    pipeline.save_figures(run, folder)
    folder.write("history.csv", run.history.csv_text())
    folder.write_json("run.json", pipeline.summary(run, result, accuracy, verdict))
    print()
    print(pipeline.compression_table(result, accuracy))
    print()
    print(verdict.text())
    if run.data.notice:
        print(f"\nNOTICE: {run.data.notice}")
    print(f"\nFigures, history.csv, run.json and checkpoint.pt are in {folder.path}")
    return FAULTY if verdict.faulty else HEALTHY


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.debug_run",
        description="Train with the learnable dead-zone quantizer, evaluate the compression, and judge the run.",
        epilog="exit status: 0 no fault found, 1 the verdict found a fault, 2 bad input, 130 interrupted",
    )
    parser.add_argument("--preset", default="debug", help=f"one of {', '.join(PRESETS)} (default: debug)")
    parser.add_argument("--data", default="auto", help="auto, cifar10, digits or folder:PATH (default: auto)")
    parser.add_argument("--data-root", default="data", help="where CIFAR-10 is or will be (default: data)")
    parser.add_argument("--epochs", type=int, help="epochs to train (default: the preset's)")
    parser.add_argument("--batch-size", type=int, help="images a step (default: the preset's)")
    parser.add_argument("--limit", type=int, help="at most so many training and test images (default: all)")
    parser.add_argument("--seed", type=int, help="seed of weights, order and augmentation (default: 0)")
    parser.add_argument("--device", default="auto", help=f"one of {', '.join(DEVICES)} (default: auto)")
    parser.add_argument("--output", default="debug_output", help="folder for the results (default: debug_output)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the output folder")
    return parser


def _configuration(options: argparse.Namespace) -> RunConfig:
    names = ("data", "data_root", "epochs", "batch_size", "limit", "seed", "device")
    return configure(options.preset, **{name: getattr(options, name) for name in names})


if __name__ == "__main__":
    sys.exit(main())

"""The doctor: examine a training pipeline in four stages and name what is broken, not only that something is.

    python -m experiments.doctor --data digits --epochs 14 --output doctor
    python -m experiments.doctor --run debug_output
    python -m experiments.doctor --pipeline docs.doctor_example:pipeline

The first trains a short run of its own and examines it before, at its first steps, while it trains, and afterwards.
`--run FOLDER` examines a finished run. `--pipeline MODULE:FUNCTION` examines the Pipeline that the function returns:
before training and at its first steps, and while it trains where the pipeline says `epochs`. stdout gets what failed or
is unusual, and last the headline; --all prints every check, and doctor.json in the --output folder holds them. Notices
are on stderr.
Exit status: 0 no fault found, 1 a check failed, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.doctor.examine import QUICK, examine, examine_folder
from experiments.doctor.pipeline import Pipeline
from experiments.doctor.report import STAGES, Report
from experiments.pipeline import PRESETS_HELP, build_run, configure, prepare_data
from src.runs import RunFolder
from src.storage import CommandParser, check_writable, fail, log_info

HEALTHY, FAULTY, INTERRUPTED = 0, 1, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = _parser().parse_args(arguments)
    started = time.perf_counter()
    try:
        report = _examined(options)
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


def _examined(options: argparse.Namespace) -> Report:
    if options.run:
        return examine_folder(Path(options.run), options.data_root)
    if options.output:
        check_writable(options.output)
    if options.pipeline:
        return examine(pipeline_of(options.pipeline), on_stage=_tell)
    return _own_run(options)


def pipeline_of(place: str) -> Pipeline:
    """The Pipeline that a function returns. place: "package.module:function"; the working folder's modules are found.

    Raises ValueError where there is none.
    """
    module, _, name = place.partition(":")
    if not module or not name:
        raise ValueError(f"--pipeline {place!r}: need MODULE:FUNCTION, as in my_project.train:pipeline")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module), name, None)
        if not callable(function):
            raise ValueError(f"--pipeline {place}: module {module} has no function {name!r}")
        found = function()
    except ModuleNotFoundError as error:
        raise ValueError(f"--pipeline {place}: there is no module {error.name!r} in {Path.cwd()}") from error
    if not isinstance(found, Pipeline):
        what = type(found).__name__
        raise ValueError(f"--pipeline {place}: {name}() returned {what}; return Pipeline.of_parts(...)")
    return found


def _tell(stage: str, found: Report) -> None:
    log_info(f"[{STAGES.index(stage) + 1}/{len(STAGES)}] {stage}: {found.line}")


def _own_run(options: argparse.Namespace) -> Report:
    changes: dict[str, Any] = {**QUICK} if options.preset == "smoke" else {}
    asked = {name: getattr(options, name) for name in ("data", "data_root", "epochs", "limit", "seed", "device")}
    config = configure(options.preset, **changes | {name: value for name, value in asked.items() if value is not None})
    config, data = prepare_data(config, log_info)
    run = build_run(config, data)
    log_info(f"{run.subtitle}; {config.epochs} epochs")
    return examine(
        Pipeline.of_run(run), on_stage=_tell, on_epoch=lambda record: log_info(record.console_line(config.epochs))
    )


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser("experiments.doctor", __doc__ or "")
    parser.add_argument("--preset", default="smoke", help=f"{PRESETS_HELP} (default: smoke)")
    parser.add_argument("--data", help="auto, cifar10, digits or folder:PATH (default: the preset's)")
    parser.add_argument("--data-root", help="where CIFAR-10 is (default: data); with --run, where the run's images are")
    parser.add_argument("--epochs", type=int, help=f"epochs to train (default: {QUICK['epochs']})")
    parser.add_argument("--limit", type=int, help="at most this many training and test images (default: all)")
    parser.add_argument("--seed", type=int, help="seed of weights, order and augmentation (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument("--output", help="folder for doctor.json (default: none is written)")
    parser.add_argument("--all", action="store_true", help="print every check, not only those that failed")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--run", help="examine the finished run in this folder instead of a new one")
    other.add_argument("--pipeline", metavar="MODULE:FUNCTION", help="examine the Pipeline that this function returns")
    return parser


if __name__ == "__main__":
    sys.exit(main())

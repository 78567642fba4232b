"""Train a grid of settings and seeds, and lay what it reached side by side: mean, spread, and what failed.

    python -m experiments.sweep --preset smoke --set peak=0.005,0.01,0.02 --seeds 0,1,2 --output sweep_output

Every run is `python -m experiments.debug_run` in a folder of its own, OUTPUT/peak=0.005/seed=0, and what it prints is
in log.txt there. Runs are tasks of Ray: as many at once as there are cores or GPUs for them, on this machine or on the
cluster of --address, whose machines have to share the checkout and OUTPUT. Without Ray they run one after the other.
A run that was killed, with its worker or with the sweep, continues from its checkpoint: by itself where a worker died,
else with the same command again, which leaves finished runs as they are.
Written into OUTPUT: sweep.csv and sweep.md, a row for every setting, and frontier.png.
Exit status: 0 all runs finished, 1 some did not (the table names them), 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch

from experiments import debug_run
from experiments.figures import frontier, png_bytes
from experiments.pipeline import PRESETS_HELP, ConfigError, comparison
from src.runs import SUMMARY, RunFolder
from src.storage import (
    CommandParser,
    check_writable,
    fail,
    folder_lock,
    log_info,
    prepare_streams,
    print_result,
    write_atomic,
)
from src.training import terminations

LOG, START = "log.txt", "--- started\n"
ATTEMPTS = 3  # after a worker was killed
SECONDS_TO_STOP = 60.0
INTERRUPTED, TERMINATED = debug_run.INTERRUPTED, 143


class Job(NamedTuple):
    """One run of the grid. name: of its folder, below the sweep's. arguments: of `experiments.debug_run`."""

    name: str
    folder: Path
    arguments: tuple[str, ...]

    @property
    def finished(self) -> bool:
        """Whether it was trained, evaluated and judged."""
        return (self.folder / SUMMARY).exists()

    def log(self) -> str:
        """What it has printed since it was last started; "" before."""
        log = self.folder / LOG
        return log.read_text(errors="replace").rpartition(START)[2] if log.exists() else ""

    def progress(self) -> str:
        """Epoch, accuracy and time left, from the end of the log."""
        log = self.log()
        epochs = re.findall(r"^Epoch +(\S+) .*Acc: +(\S+)", log, re.MULTILINE)
        left = re.findall(r"about (\S[^·\n]*) left", log)
        return ", ".join([f"epoch {epoch}, {accuracy}" for epoch, accuracy in epochs[-1:]] + left[-1:]) or "waiting"


def train(job: Job, directory: str) -> int:
    """Train the run of a job, or what is left of it, in this process. Returns the exit status of `debug_run`."""
    os.chdir(directory)
    job.folder.mkdir(parents=True, exist_ok=True)
    resume = ["--resume"] if RunFolder(job.folder).has_checkpoint() else []
    with (job.folder / LOG).open("a", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
        log.write(START)
        return debug_run.main([*job.arguments, *resume])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    prepare_streams()
    options = _parser().parse_args(arguments)
    try:
        jobs, refused = _jobs(options)
        check_writable(options.output)
        options.output.mkdir(parents=True, exist_ok=True)
        with folder_lock.hold(options.output):
            left = [job for job in jobs if not job.finished]
            log_info(f"{len(jobs)} runs, of which {len(jobs) - len(left)} are finished")
            failed = refused | _train_all(left, options)
            return _conclude([job for job in jobs if job.finished], failed, options.output)
    except ValueError as error:
        return fail(str(error))
    except OSError as error:
        return fail(f"{error.filename or str(options.output)!r}: {error.strerror or error}")
    except KeyboardInterrupt:
        log_info("interrupted; the same command continues every run where it stopped")
        return INTERRUPTED


def _jobs(options: argparse.Namespace) -> tuple[list[Job], dict[str, str]]:
    """The runs of the grid, and why those that have no valid configuration were left out, by name.

    Raises ConfigError where no run is left.
    """
    axes = []
    for text in options.set:
        name, _, values = text.partition("=")
        axes.append([f"{name}={value}" for value in values.split(",")])
    jobs: list[Job] = []
    refused: dict[str, str] = {}
    for *settings, seed in itertools.product(*axes, options.seeds.split(",")):
        name = "/".join([*(setting.replace("/", "_") for setting in settings), f"seed={seed}"])
        folder = options.output.resolve() / name
        flags = [f"--set={setting}" for setting in settings]
        flags += [f"--preset={options.preset}", f"--set=seed={seed}", f"--output={folder}", "--baseline=false"]
        try:
            debug_run.read_arguments(flags)
        except ValueError as error:
            refused[name] = str(error)
        else:
            jobs.append(Job(name, folder, tuple(flags)))
    if not jobs:
        raise ConfigError(next(iter(refused.values())))
    return jobs, refused


def _train_all(jobs: Sequence[Job], options: argparse.Namespace) -> dict[str, str]:
    """Train the runs. Returns why some did not finish, by name."""
    try:
        import ray
    except ImportError:
        log_info("Ray is not installed (python -m pip install ray): the runs are trained one after the other")
        return _one_after_the_other(jobs)
    os.environ.setdefault("RAY_task_oom_retries", "1")  # Ray's own default is to try for ever
    environment = {"env_vars": {"PYTHONPATH": str(Path(__file__).parents[2])}}
    own: dict[str, Any] = {} if options.address else {"include_dashboard": False}
    ray.init(options.address, runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR, **own)
    gpus = options.gpus_per_run if options.gpus_per_run is not None else float(torch.cuda.is_available())
    task = ray.remote(num_cpus=options.cpus_per_run, num_gpus=gpus, max_calls=1, max_retries=ATTEMPTS)(train)
    started = {task.remote(job, os.getcwd()): job for job in jobs}
    try:
        with terminations():  # ray.init takes SIGTERM for itself
            return _watch({ref.future(): job for ref, job in started.items()})
    except KeyboardInterrupt:  # every run ends its step and writes a checkpoint
        for ref in started:
            ray.cancel(ref)
        ray.wait(list(started), num_returns=len(started), timeout=SECONDS_TO_STOP)
        raise
    finally:
        ray.shutdown()


def _one_after_the_other(jobs: Sequence[Job]) -> dict[str, str]:
    failed: dict[str, str] = {}
    for job in jobs:
        log_info(f"{job.name} begins; its progress is in {job.folder / LOG}")
        status = train(job, os.getcwd())
        if status in (INTERRUPTED, TERMINATED):
            raise KeyboardInterrupt
        failed |= _ended(job)
    return failed


def _watch(running: Mapping[Future[int], Job]) -> dict[str, str]:
    """Wait for the runs, with a line for each: on a terminal in place, elsewhere once a minute where it changed."""
    failed: dict[str, str] = {}
    left, shown, terminal = dict(running), dict[str, str](), sys.stdout.isatty()
    while left:
        done = wait(left, timeout=2 if terminal else 60, return_when=FIRST_COMPLETED).done
        if terminal and shown:
            sys.stdout.write(f"\x1b[{len(shown)}A\x1b[J")
        for future in done:
            job, error = left.pop(future), future.exception()
            failed |= _ended(job, error)
        lines = {job.name: f"{job.name}  {job.progress()}" for job in left.values()}
        for name, line in lines.items():
            if terminal or shown.get(name) != line:
                print_result(line)
        shown = lines
    return failed


def _ended(job: Job, error: BaseException | None = None) -> dict[str, str]:
    """Say how a run ended. Returns the reason, by its name, where it did not finish."""
    if job.finished:
        print_result(f"{job.name}  finished, {job.progress()}")
        return {}
    lines = job.log().strip().splitlines()
    reason = f"{type(error).__name__}: its worker ended" if error else lines[-1] if lines else "it printed nothing"
    print_result(f"{job.name}  FAILED: {reason}")
    return {job.name: reason}


def _conclude(finished: Sequence[Job], failed: Mapping[str, str], output: Path) -> int:
    """Write and print the table, draw the figure."""
    lines = [f"failed: {name}: {reason}" for name, reason in failed.items()]
    if finished:
        runs = [comparison.read_run(job.folder, job.name) for job in finished]
        table = comparison.over_seeds(runs)
        text = comparison.markdown(comparison.over_seeds_text(table))
        write_atomic(output / "sweep.csv", table.to_csv(index=False).encode())
        write_atomic(output / "frontier.png", png_bytes(frontier(comparison.points(runs), comparison.published(runs))))
        lines = [text, "", *lines, *comparison.notices(runs)]
        write_atomic(output / "sweep.md", "\n".join([*lines, ""]).encode())
    print_result("\n".join(["", *lines, f"table and figure: {output}"]))
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser("experiments.sweep", __doc__)
    parser.add_argument("--preset", default="debug", help=f"{PRESETS_HELP} (default: debug)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE,VALUE",
        help="values of a setting of `RunConfig` (experiments/pipeline/config.py); several: all combinations",
    )
    parser.add_argument("--seeds", default="0", help="seeds of every setting, such as 0,1,2 (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("sweep_output"), help="folder (default: sweep_output)")
    parser.add_argument("--address", help="a Ray cluster to join, such as auto (default: one of its own, here)")
    parser.add_argument("--cpus-per-run", type=float, default=1, help="cores of a run (default: 1)")
    parser.add_argument("--gpus-per-run", type=float, help="GPUs of a run, 0.25 to share one among four (default: 1)")
    return parser

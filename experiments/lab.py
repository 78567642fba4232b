"""Open the walkthrough in JupyterLab with a trained run, so that everything can be explored at once.

    python -m experiments.lab --output debug_output --port 8888

The run is the one in debug_output (where `make walkthrough` and `make debug` write), or the one that --output names.
Where there is none, a short one on the embedded digits is trained first, about two minutes, into runs/lab/run.
JupyterLab opens runs/lab/codeq_walkthrough.ipynb, a copy of the notebook that resumes that run: its training cell reads
the run instead of training again. The copy is executed first, about a minute, unless it was before with this run; one
that was edited is kept as it is.
Exit status: that of JupyterLab; 2 bad input; 130 interrupted (the same command resumes the training).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import nbformat
from nbformat.sign import NotebookNotary

from experiments.headless import execute, fill_in, parameter_defaults, read_notebook
from src.storage import BAD_INPUT, CommandParser, fail, log_info, write_atomic

if TYPE_CHECKING:
    from experiments.pipeline import SavedRun

INTERRUPTED = 130
ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = Path("notebooks/codeq_walkthrough.ipynb")
USUAL = Path("debug_output")  # the notebook's own OUTPUT_DIR
OWN = Path("runs/lab/run")
COPY = Path("runs/lab") / NOTEBOOK.name
SETTINGS = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False}}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    options = _parser().parse_args(arguments)
    os.chdir(ROOT)
    folder = Path(options.output) if options.output else _known_run()
    if folder is None:
        folder, status = OWN, train(OWN)
        if status > 1:  # 1 is a verdict that found a fault: that is worth exploring, too
            if status != BAD_INPUT:
                log_info("the same command resumes the training")
            return status
    try:
        run = finished_run(folder)
        log_info(
            f"exploring the run in {folder}: preset {run.config.preset}, {run.config.epochs} epochs on {run.data_name}"
        )
        parameters = {"DATA_ROOT": run.config.data_root, "OUTPUT_DIR": folder.as_posix(), "RESUME": True}
        if interrupted := execute_copy(COPY, parameters, folder / "run.json"):
            return interrupted
    except (ValueError, OSError) as error:
        return fail(str(error))
    log_info(f"opening {COPY}: Run, Run All Cells starts its controls")
    return serve(COPY, options.port, show=not options.no_browser)


def finished_run(folder: Path) -> SavedRun:
    """The run in `folder`. Raises RunError where there is none, or where it is not finished."""
    from experiments.pipeline import SavedRun, contents  # load torch: after --help
    from src.runs import RunError

    run = SavedRun.open(folder)
    done, planned = len(run.history), run.config.epochs
    if done != planned or not run.summary:
        found = f"{done} of {planned} epochs, {contents(folder)}"
        raise RunError(f"the run in {str(folder)!r} is not finished: {found}; finish it first, with --resume")
    return run


def _known_run() -> Path | None:
    """The folder of the first usual place that holds a finished run; says why one cannot be explored."""
    for folder in (USUAL, OWN):
        if (folder / "run.json").is_file():
            try:
                finished_run(folder)
            except ValueError as error:
                log_info(f"skipped: {error}")
            else:
                return folder
    return None


def train(folder: Path) -> int:
    """Train the short run into `folder`, or resume one that was interrupted. Returns the exit status of the script."""
    from experiments import debug_run

    command = ["--data", "digits", "--output", str(folder)]
    if (folder / "checkpoint.pt").is_file() and not (folder / "run.json").is_file():
        log_info(f"resuming the training in {folder} (about two minutes in all) ...")
        return debug_run.main([*command, "--resume"])
    log_info(f"no trained run yet: training a short one on the embedded digits into {folder}, about two minutes ...")
    return debug_run.main(command)


def execute_copy(copy: Path, parameters: Mapping[str, object], summary: Path) -> int:
    """Write the notebook with `parameters`, executed, to `copy`. Returns 130 where that was interrupted, else 0.

    A copy whose cells were edited stays, and so does one that was executed after `summary` was written.
    """
    notebook = fill_in(read_notebook(NOTEBOOK), parameters)
    if copy.exists():
        present = read_notebook(copy)
        same_parameters = parameter_defaults(present) == parameter_defaults(notebook)
        if [cell.source for cell in fill_in(present, parameters).cells] != [cell.source for cell in notebook.cells]:
            log_info(f"{copy} was edited and stays as it is; move it away for a fresh one")
            return 0
        if same_parameters and copy.stat().st_mtime > summary.stat().st_mtime:
            return 0
    write_atomic(copy, nbformat.writes(notebook).encode())
    log_info("executing the notebook with this run, about a minute ...")
    execution = execute(copy, notify=log_info)
    if execution.failure:
        log_info(execution.failure)
    write_atomic(copy, nbformat.writes(execution.notebook).encode())
    NotebookNotary().sign(execution.notebook)  # trusted: JupyterLab then shows its SVG and the colours of its tables
    return execution.exit_status if execution.exit_status == INTERRUPTED else 0


def serve(notebook: Path, port: int | None = None, *, show: bool = True) -> int:
    """JupyterLab on `notebook` (below ROOT) until it ends, in a browser if it is to be shown."""
    from jupyterlab.labapp import main as jupyterlab

    settings = ROOT / notebook.parent / "settings"  # no question about news
    write_atomic(settings / "overrides.json", json.dumps(SETTINGS).encode())
    command = [f"--ServerApp.root_dir={ROOT}", f"--LabApp.default_url=/lab/tree/{notebook.as_posix()}", "--allow-root"]
    command.append(f"--LabApp.app_settings_dir={settings}")
    if port is not None:
        command.append(f"--ServerApp.port={port}")
    if not show:
        command.append("--no-browser")
    return jupyterlab(command) or 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser("experiments.lab", __doc__)
    parser.add_argument(
        "--output", help=f"folder of the run to explore (default: {USUAL}, else a short one is trained)"
    )
    parser.add_argument("--port", type=int, help="port to try first (default: 8888; one in use is skipped)")
    parser.add_argument("--no-browser", action="store_true", help="print the address instead of opening a browser")
    return parser


if __name__ == "__main__":
    sys.exit(main())

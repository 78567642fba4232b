"""Execute the walkthrough without a browser and keep what was executed, also when a cell fails.

    python -m experiments.run_notebook --set DATA=digits --set EPOCHS=3

`--set NAME=VALUE` puts a cell tagged `injected-parameters` after the one tagged `parameters`; a name that is not in
that cell, or a value of another type than its default, is an error before anything starts. The kernel is this Python,
its working directory the notebook's folder. While it runs, stderr gets a line per chapter, and stdout what the cells
tagged `summary` print: notices, epochs, verdict. Written: the executed notebook and one HTML file. A run that did not
end well is written beside them, as NAME.failed.ipynb and NAME.failed.html, so that the last good ones stay.

Exit status: 0 finished; 1 a cell failed, ran out of time or its kernel died; 2 bad input, or a full disk;
130 interrupted.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from experiments.headless import (
    CELL_TIMEOUT,
    STARTUP_TIMEOUT,
    NotebookInputError,
    execute,
    parameter_defaults,
    parse_settings,
    read_notebook,
    to_html,
)
from src.storage import BAD_INPUT, CommandParser, StorageError, check_output, log_info, print_result, write_atomic

NOTEBOOK = Path("notebooks/codeq_walkthrough.ipynb")
EXECUTED = Path("build/codeq_walkthrough.ipynb")
PAGE = Path("build/codeq_walkthrough.html")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    options = _parser().parse_args(arguments)
    executed, page = options.output_notebook, options.html
    try:
        if options.render_only:
            _write_page(read_notebook(executed), page, options.notebook)
            return 0
        values = parse_settings(options.set, parameter_defaults(read_notebook(options.notebook)))
        _check_device(values.get("DEVICE"))
        for path in (executed, page):
            if path.resolve() == options.notebook.resolve():
                raise NotebookInputError(
                    f"{path} is the notebook itself, which stays without outputs: name another file"
                )
            check_output(path)
        limits = {"cell_timeout": options.cell_timeout or None, "startup_timeout": options.startup_timeout}
        execution = execute(options.notebook, values, notify=log_info, narrate=print_result, **limits)
    except (NotebookInputError, StorageError) as error:
        log_info(f"run_notebook: {error}")
        return BAD_INPUT
    command = ["python", "-m", "experiments.run_notebook", *(f"--set={setting}" for setting in options.set)]
    execution.notebook.metadata["run"]["command"] = shlex.join(command)
    if execution.failure:
        log_info(f"run_notebook: {execution.failure}")
        if executed.exists() or page.exists():
            log_info(f"run_notebook: {executed} and {page} stay as an earlier run left them")
        executed = _failed(executed)
    try:
        write_atomic(executed, nbformat.writes(execution.notebook).encode())
        print_result(f"notebook  {executed}")
        _write_page(execution.notebook, page, options.notebook)
    except OSError as error:  # a full disk; what the notebook's run wrote into its own folder is kept
        log_info(f"run_notebook: not written into {executed.parent}: {error.strerror or error} ({error.filename})")
        return BAD_INPUT
    return execution.exit_status


def _check_device(name: object) -> None:
    """Raise NotebookInputError for a device that is absent here. Loads torch for "cuda" and "mps" alone."""
    if name in ("cuda", "mps"):
        from src.training import TrainingError, pick_device

        try:
            pick_device(str(name))
        except TrainingError as error:
            raise NotebookInputError(f"DEVICE={name}: {error}") from error


def _failed(path: Path) -> Path:
    """Where the file of a run that did not end well goes: page.html -> page.failed.html."""
    return path.with_name(f"{path.stem}.failed{path.suffix}")


def _write_page(executed: NotebookNode, page: Path, notebook: Path) -> None:
    """Write the page of a notebook that was executed; its images are found beside `notebook`."""
    failed = executed.metadata.get("run", {}).get("status") == "failed"
    page = _failed(page) if failed else page
    write_atomic(page, to_html(executed, notebook.parent).encode())
    print_result(f"page      {page}")


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser("experiments.run_notebook", __doc__)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="replace a parameter")
    parser.add_argument("--notebook", type=Path, default=NOTEBOOK, help="what to execute (%(default)s)")
    parser.add_argument("--output-notebook", type=Path, default=EXECUTED, help="the executed notebook (%(default)s)")
    parser.add_argument("--html", type=Path, default=PAGE, help="the page (%(default)s)")
    parser.add_argument(
        "--cell-timeout", type=float, default=CELL_TIMEOUT, metavar="SECONDS", help="0 is no limit (%(default)s)"
    )
    parser.add_argument(
        "--startup-timeout", type=float, default=STARTUP_TIMEOUT, metavar="SECONDS", help="(%(default)s)"
    )
    parser.add_argument("--render-only", action="store_true", help="write the page of the notebook executed last")
    return parser


if __name__ == "__main__":
    sys.exit(main())

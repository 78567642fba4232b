"""Open the walkthrough in JupyterLab with a trained run, so that everything can be explored at once.

    python -m experiments.lab [--output debug_output] [--port 8888] [--no-browser]

The run is the one in debug_output (what `make walkthrough` and `make debug` leave there), or the one that --output
names. Where there is none, a short one on the embedded digits is trained first, about a minute, into runs/lab/run.
JupyterLab opens runs/lab/codeq_walkthrough.ipynb, a copy of the notebook with that run's parameters: its training cell
takes the run up instead of training again. A copy that was edited is kept as it is.
Exit status: that of JupyterLab; 2 bad input; 130 interrupted (the same command goes on with the training).
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import webbrowser
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from experiments.headless import NOTEBOOK, NotebookInputError, write_copy
from src.storage import BAD_INPUT, fail, log_info

ROOT = Path(__file__).resolve().parent.parent
USUAL = Path("debug_output")  # the notebook's own OUTPUT_DIR
OWN = Path("runs/lab/run")
COPY = Path("runs/lab") / NOTEBOOK.name
DISPLAYS = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")

Start = Callable[[Sequence[str]], int]


def main(arguments: Sequence[str] | None = None, start: Start | None = None) -> int:
    """The command. start: runs a command line to its end and gives its exit status. Returns the exit status."""
    options = _parser().parse_args(arguments)
    start = start or run_to_end
    os.chdir(ROOT)
    from experiments.notebook import LabRunError, explorable, training_command  # loads torch: after --help

    try:
        folder = Path(options.output) if options.output else None
        if folder is None:
            folder = next((place for place in (USUAL, OWN) if (place / "run.json").is_file() and _fits(place)), None)
        if folder is None:
            status = start(training_command(OWN))
            if status > 1:  # 1 is a verdict that found a fault: that is worth exploring, too
                if status == 130:
                    log_info("interrupted; the same command goes on where it stopped")
                return status
            folder = OWN
        parameters = explorable(folder)
        log_info(f"exploring the run in {folder}: {', '.join(f'{name}={value}' for name, value in parameters.items())}")
        log_info(write_copy(COPY, parameters))
    except (LabRunError, NotebookInputError) as error:
        return fail(str(error))
    except KeyboardInterrupt:
        return 130
    return start(server_command(COPY, options.port, show=not options.no_browser))


def _fits(folder: Path) -> bool:
    """Whether the run in `folder` can be explored; says why where it cannot."""
    from experiments.notebook import LabRunError, explorable

    try:
        explorable(folder)
    except LabRunError as error:
        log_info(f"passed over: {error}")
        return False
    return True


def server_command(notebook: Path, port: int | None = None, *, show: bool = True) -> list[str]:
    """The command line that starts JupyterLab on `notebook` (below ROOT), in a browser where there is one to show."""
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={ROOT}"]
    command.append(f"--LabApp.default_url=/lab/tree/{notebook.as_posix()}")
    if port is not None:
        command.append(f"--ServerApp.port={port}")
    if is_root():
        command.append("--allow-root")
    if not show or not has_browser():
        log_info("open the address that JupyterLab prints below in a browser")
        command.append("--no-browser")
    return command


def is_root() -> bool:
    """Root on Linux or macOS; JupyterLab wants to be told that this is meant."""
    return hasattr(os, "geteuid") and os.geteuid() == 0


def has_browser(environment: Mapping[str, str] = os.environ, platform: str = sys.platform) -> bool:
    """Whether a browser can be shown: on Linux that takes a display (a browser of the terminal is of no use)."""
    if platform.startswith("linux") and not any(environment.get(name) for name in DISPLAYS):
        return False
    try:
        webbrowser.get()
    except webbrowser.Error:
        return False
    return True


def run_to_end(command: Sequence[str]) -> int:
    """Run a command and give its exit status. Ctrl-C and SIGTERM reach it, and it decides when it ends."""
    process = subprocess.Popen(command)
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:  # the terminal has sent it to the command as well
                continue
    finally:
        signal.signal(signal.SIGTERM, before)


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 <= int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r}: need a port from 0 (any free one) to 65535")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m experiments.lab",
        description="Open the walkthrough in JupyterLab with a trained run.",
        epilog=f"Exit status: JupyterLab's; {BAD_INPUT} bad input; 130 interrupted.",
    )
    parser.add_argument(
        "--output", help=f"folder of the run to explore (default: {USUAL}, else a short one is trained)"
    )
    parser.add_argument("--port", type=_port, help="port to try first (default: 8888; one in use is passed over)")
    parser.add_argument("--no-browser", action="store_true", help="print the address instead of opening a browser")
    return parser


if __name__ == "__main__":
    sys.exit(main())

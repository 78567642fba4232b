"""What the commands read and print. A closed terminal, a broken pipe or a full log ends no training."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

BAD_INPUT = 2
Notify = Callable[[str], None]
"""What receives a line of text for the user, such as `log_info` or `print`."""


class CommandParser(argparse.ArgumentParser):
    """The parser of `python -m MODULE`: --help shows the module's docstring, and a mistyped flag gets a suggestion."""

    def __init__(self, module: str, docstring: str | None) -> None:
        super().__init__(
            prog=f"python -m {module}", description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def error(self, message: str) -> NoReturn:
        """Print usage and message on stderr and exit with status 2."""
        known = re.findall(r"--[\w-]+", self.format_usage())
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        near = difflib.get_close_matches(unknown[1], known, n=1) if unknown else []
        super().error(f"{message}; did you mean {near[0]}?" if near else message)


def prepare_streams() -> None:
    """Make stdout and stderr fit for any text, and replace those that the process was started without."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", errors="backslashreplace"))  # noqa: SIM115  (as long as the process)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def log_info(line: str) -> None:
    """Print one line on stderr, at once; on a terminal in the place of a progress line."""
    with suppress(OSError, AttributeError):  # closed, or not there at all
        clear = "\r\x1b[K" if sys.stderr.isatty() else ""
        print(f"{clear}{line}", file=sys.stderr, flush=True)


def print_result(text: str) -> None:
    """Print lines on stdout, at once. When stdout cannot be written, one warning on stderr replaces them all."""
    try:
        print(text, flush=True)
    except OSError as error:
        reason = error.strerror or error
        log_info(f"warning: the standard output cannot be written ({reason}); the run goes on without it")
        with suppress(OSError, ValueError):  # what is buffered would fail again at the end of the process
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def duration(seconds: float) -> str:
    """A time in two figures or so: "40 s", "1 min 15 s", "40 min" from ten minutes on, "8 h 53 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min" + (f" {whole % 60:02d} s" if whole < 600 else "")
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def fail(message: str) -> int:
    """Print what is wrong with the input on stderr and return the exit status for it."""
    log_info(f"error: {message}")
    return BAD_INPUT

"""What the commands print. Nobody has to listen: a closed terminal, a broken pipe or a full log ends no training."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

BAD_INPUT = 2


def prepare_streams() -> None:
    """Make stdout and stderr fit for any text, and give the process those that it was started without."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  (as long as the process)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def say(line: str) -> None:
    """One line on stderr, at once."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def tell(text: str) -> None:
    """Lines on stdout, at once. Once they cannot be written that is said on stderr, and they are left out."""
    try:
        print(text, flush=True)
    except OSError as error:
        say(f"warning: the standard output cannot be written ({error.strerror or error}); the run goes on without it")
        with suppress(OSError, ValueError):  # what is buffered would fail again at the end of the process
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(message: str) -> int:
    """Say what is wrong with the input and return the exit status for it."""
    say(f"error: {message}")
    return BAD_INPUT

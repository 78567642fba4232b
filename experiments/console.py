"""What the commands say on stderr."""

from __future__ import annotations

import sys

BAD_INPUT = 2


def say(line: str) -> None:
    """One line on stderr, at once."""
    print(line, file=sys.stderr, flush=True)


def fail(message: str) -> int:
    """Say what is wrong with the input and return the exit status for it."""
    say(f"error: {message}")
    return BAD_INPUT

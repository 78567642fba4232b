"""Damage to a file's bytes, and what a reader may make of it: say so, or read the same as before."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tests.torture.fault import Outcome

Content = TypeVar("Content")


def damaged(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """What was done, and the bytes after it: a bit or byte changed, a run of bytes overwritten, or the end cut off."""
    way, place = rng.choice(("bit", "byte", "zeros", "noise", "cut")), rng.randrange(len(data))
    if way == "cut":
        return f"cut to {place} bytes", data[:place]
    length = 1 if way in ("bit", "byte") else rng.randrange(1, 65)
    old = data[place : place + length]
    if way == "bit":
        new = bytes([old[0] ^ 1 << rng.randrange(8)])
    elif way == "byte":
        new = bytes([old[0] ^ rng.randrange(1, 256)])
    else:
        new = bytes(len(old)) if way == "zeros" else rng.randbytes(len(old))
    return f"{way} at {place}, {len(old)} bytes", data[:place] + new + data[place + len(old) :]


def read_damaged(
    path: Path,
    rng: random.Random,
    rounds: int,
    read: Callable[[Path], Content],
    same: Callable[[Content, Content], bool],
    refusal: type[Exception],
) -> Outcome:
    """Damage the file at `path` again and again. Survived: `read` raises `refusal`, or returns the `same` as before.

    The note says how often it was harmless. A refusal must name the file and fit into a few lines.
    """
    data, outcome, harmless = path.read_bytes(), Outcome(), 0
    whole = read(path)
    for _ in range(rounds):
        what, bad = damaged(data, rng)
        path.write_bytes(bad)
        with outcome.trial(what):
            try:
                found = read(path)
            except refusal as error:
                told(error, path)
            else:
                assert same(found, whole), "read without an error, with other contents"
                harmless += 1
    path.write_bytes(data)
    if harmless:
        outcome.note = f"{outcome.tried - harmless} refused, {harmless} without effect on the contents"
    return outcome


def told(error: Exception, path: Path) -> None:
    """The message is for a person: it names the file, is a few lines at most, and is no traceback."""
    text = str(error)
    assert path.name in text, f"the message does not name {path.name}: {text}"
    assert len(text) < 2000, "the message is too long to be read"
    assert "Traceback" not in text, "the message holds a traceback"

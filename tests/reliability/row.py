"""A row of the table of failures: what is tried, again and again, and what counts as survived."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.reliability.small_run import Unbroken

Trial = Callable[[random.Random, Path, Unbroken], str]
"""One try: places and moments from the generator, files into the empty folder. Raises where something is lost, an
AssertionError perhaps; else returns in a word what came of it, where that is worth counting."""


@dataclass(frozen=True)
class Row:
    """survived: what counts as that. trial: see `Trial`. share: how often it is tried for each try of the others."""

    survived: str
    trial: Trial
    share: float = 1.0

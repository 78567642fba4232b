"""Time several things in turns, in one process, so that a machine that slows down slows all of them alike."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Take = Callable[[], object]
WARM_UP, STEPS_A_TURN = 2, {"cpu": 1, "mps": 5, "cuda": 20}


def time_in_turns(takes: Mapping[str, Take], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds a step of every variant, one number a round."""
    count, names = STEPS_A_TURN[device.type], list(takes)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for take in takes.values():
        for _ in range(WARM_UP):
            take()
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            synchronize(device)
            start = time.perf_counter()
            for _ in range(count):
                takes[name]()
            synchronize(device)
            seconds[name].append((time.perf_counter() - start) / count)
    return seconds


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and the values themselves."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": statistics.median(values), "low": low, "high": high, "samples": list(values)}


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def at_least(low: int) -> Callable[[str], int]:
    """For argparse: a whole number from `low` on."""

    def whole(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r}: need a whole number from {low} on")
        return int(text)

    return whole

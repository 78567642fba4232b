"""Schedules of the sparsity coefficient: functions (epoch, total_epochs) -> coefficient, epochs counted from 0.

The peak matters more than the shape: a coefficient that ramps to 1.0 destroys ResNet-20 within a few epochs
(docs/experiments.md), so presets carry a measured one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from src.quantizer import check_range

Schedule = Callable[[int, int], float]


class ScheduleError(ValueError):
    """A schedule's argument is out of range."""


_check_epochs = partial(check_range, lowest=0, remedy="a number of epochs", error=ScheduleError)
_check_coefficient = partial(check_range, lowest=0, whole=False, error=ScheduleError)


def linear_warmup(delay: int, ramp: int, peak: float = 1.0) -> Schedule:
    """0 up to epoch `delay`, then a straight line that reaches `peak` at epoch `delay + ramp`, then `peak`.

    With delay=5, ramp=5: epochs 0 to 5 give 0, epoch 6 gives peak / 5, epoch 10 and later give peak. ramp=0 is a jump.
    """
    _check_epochs("delay", delay)
    _check_epochs("ramp", ramp)
    _check_coefficient("peak", peak)

    def coefficient(epoch: int, total_epochs: int) -> float:
        if epoch < delay:
            return 0.0
        return peak if epoch - delay >= ramp else peak * (epoch - delay) / ramp

    return coefficient


def constant(value: float) -> Schedule:
    """`value` in every epoch."""
    _check_coefficient("value", value)
    return lambda epoch, total_epochs: value


def cosine_anneal(delay: int = 0, peak: float = 1.0) -> Schedule:
    """0 up to epoch `delay`, then half a cosine that rises to `peak` as the run ends.

    coefficient = peak / 2 (1 - cos(pi t)), t = (epoch - delay) / (total_epochs - delay).
    """
    _check_epochs("delay", delay)
    _check_coefficient("peak", peak)

    def coefficient(epoch: int, total_epochs: int) -> float:
        if epoch < delay:
            return 0.0
        progress = min((epoch - delay) / max(total_epochs - delay, 1), 1.0)
        return peak / 2 * (1 - math.cos(math.pi * progress))

    return coefficient

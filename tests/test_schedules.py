"""Schedules against values worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from experiments.schedules import ScheduleError, constant, cosine_anneal, linear_warmup


def test_linear_warmup_of_the_debug_run() -> None:
    schedule = linear_warmup(delay=5, ramp=5, peak=0.5)
    expected = [0, 0, 0, 0, 0, 0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5]
    assert [schedule(epoch, 20) for epoch in range(13)] == pytest.approx(expected)
    assert linear_warmup(5, 5)(6, 20) == pytest.approx(0.2)
    assert linear_warmup(5, 5)(10, 20) == 1.0


@pytest.mark.parametrize(
    ("delay", "ramp", "expected"), [(0, 0, [2, 2, 2]), (2, 0, [0, 0, 2]), (0, 2, [0, 1, 2]), (9, 9, [0, 0, 0])]
)
def test_linear_warmup_edges(delay: int, ramp: int, expected: list[float]) -> None:
    schedule = linear_warmup(delay, ramp, peak=2)
    assert [schedule(epoch, 3) for epoch in range(3)] == expected


def test_constant() -> None:
    assert [constant(0.3)(epoch, 7) for epoch in (0, 3, 6, 100)] == [0.3] * 4


def test_cosine_anneal() -> None:
    """peak / 2 (1 - cos(pi t)), t in quarters of the 8 epochs after the delay: 0, 0.1464, 0.5, 0.8536, 1."""
    schedule = cosine_anneal(delay=2, peak=4.0)
    assert schedule(0, 10) == schedule(1, 10) == schedule(2, 10) == 0
    quarter = 0.5 - math.sqrt(0.5) / 2
    expected = [4 * quarter, 2, 4 * (1 - quarter), 4, 4]
    assert [schedule(epoch, 10) for epoch in (4, 6, 8, 10, 15)] == pytest.approx(expected)
    assert cosine_anneal()(5, 10) == pytest.approx(0.5)
    assert cosine_anneal(delay=10)(10, 10) == 0


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: linear_warmup(-1, 5), "delay=-1: need 0 or more, a whole number; a number of epochs"),
        (lambda: linear_warmup(5, 2.5), "ramp=2.5"),
        (lambda: linear_warmup(5, 5, peak=-0.1), "peak=-0.1: need 0 or more"),
        (lambda: constant(math.inf), "value=inf"),
        (lambda: cosine_anneal(delay=-3), "delay=-3"),
        (lambda: cosine_anneal(peak=math.nan), "peak=nan"),
    ],
)
def test_bad_arguments(call: Callable[[], object], said: str) -> None:
    with pytest.raises(ScheduleError, match=said):
        call()

"""The coefficient of the penalty, epoch by epoch, against the expected one."""

from __future__ import annotations

import numpy as np

from experiments.doctor.pipeline import Pipeline
from experiments.doctor.runner import CheckRunner, NotApplicable, Outcome


def coefficient_checks(runner: CheckRunner, pipeline: Pipeline) -> None:
    """Add the finding about the schedule, before training."""
    proves = "the penalty's weight in every epoch"
    runner.check("coefficient's schedule", proves, _coefficients, pipeline, blame="coefficient-wrong")


def _coefficients(pipeline: Pipeline) -> Outcome:
    expected = pipeline.expected.coefficients
    if expected is None:
        raise NotApplicable("no schedule is expected")
    found = [float(pipeline.coefficient(epoch)) for epoch in range(len(expected))]
    return coefficient_outcome(found, list(expected), "the schedule gives")


def coefficient_outcome(found: list[float], expected: list[float], who: str) -> Outcome:
    """Compare the coefficients of epochs 1, 2, ... with the expected ones, and say which mistake they look like."""
    peak = max(expected, default=0.0)
    close = 1e-6 * max(peak, 1e-12)
    odd = [e for e, (a, b) in enumerate(zip(found, expected, strict=True)) if not abs(a - b) <= close]
    wanted = f"0 to {peak:g}, epoch by epoch"
    if not odd:
        return Outcome(wanted, f"{who} just that", True)
    likely: list[str | None] = []
    if max(found) > 5 * peak:
        likely.append("coefficient-too-large")
    if len(found) > 1 and len(set(found)) == 1:
        likely.append("coefficient-never-ramps" if found[0] == 0 else "coefficient-constant")
    elif max(found) < 0.01 * peak:
        likely.append("coefficient-never-ramps")
    for shift in (1, -1):
        moved = expected[:1] + expected[:-1] if shift == 1 else expected[1:] + expected[-1:]
        if np.allclose(found, moved, rtol=1e-6, atol=close):
            likely.append("coefficient-shifted")
    likely += ["coefficient-wrong", "coefficient-constant", "coefficient-never-ramps"]
    e = odd[0]
    measured = f"{who} {found[e]:.4g} instead of {expected[e]:.4g} in epoch {e + 1} ({len(odd)} epochs differ)"
    return Outcome(wanted, measured, False, likely)

"""The coefficient of the penalty, epoch by epoch, against the promised one."""

from __future__ import annotations

import numpy as np

from experiments.doctor.core.subject import Subject
from experiments.doctor.core.ward import NotApplicable, Outcome, Ward


def coefficient_checks(ward: Ward, subject: Subject) -> None:
    """Add the finding about the schedule, before training."""
    proves = "the penalty's weight in every epoch"
    ward.check("coefficient's schedule", proves, _coefficients, subject, blame="coefficient-wrong")


def _coefficients(subject: Subject) -> Outcome:
    promised = subject.promise.coefficients
    if promised is None:
        raise NotApplicable("no schedule is promised")
    found = [float(subject.coefficient(epoch)) for epoch in range(len(promised))]
    return coefficient_outcome(found, list(promised), "the schedule gives")


def coefficient_outcome(found: list[float], promised: list[float], who: str) -> Outcome:
    """Compare the coefficients of epochs 1, 2, ... with the promised ones, and say which mistake they look like."""
    peak = max(promised, default=0.0)
    close = 1e-6 * max(peak, 1e-12)
    odd = [e for e, (a, b) in enumerate(zip(found, promised, strict=True)) if not abs(a - b) <= close]
    expected = f"0 to {peak:g}, epoch by epoch"
    if not odd:
        return Outcome(expected, f"{who} just that", True)
    likely: list[str | None] = []
    if max(found) > 5 * peak:
        likely.append("coefficient-too-large")
    if len(found) > 1 and len(set(found)) == 1:
        likely.append("coefficient-never-ramps" if found[0] == 0 else "coefficient-constant")
    elif max(found) < 0.01 * peak:
        likely.append("coefficient-never-ramps")
    for shift in (1, -1):
        moved = promised[:1] + promised[:-1] if shift == 1 else promised[1:] + promised[-1:]
        if np.allclose(found, moved, rtol=1e-6, atol=close):
            likely.append("coefficient-shifted")
    likely += ["coefficient-wrong", "coefficient-constant", "coefficient-never-ramps"]
    e = odd[0]
    measured = f"{who} {found[e]:.4g} instead of {promised[e]:.4g} in epoch {e + 1} ({len(odd)} epochs differ)"
    return Outcome(expected, measured, False, likely)

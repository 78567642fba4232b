"""Which mistake explains what was measured? One engine for every check that has a reference.

A mutant is the reference with one mistake in it. Reference and mutants predict the same observables; a mutant explains
the measurement where it comes much nearer to it than the reference does:

    misfit(guess) = mean, over the observables that are not right, of min(1, ||found - guess|| / ||found - right||)

An observable that is right and would not be under the mutant counts as 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

Reference = TypeVar("Reference")
Observables = Mapping[str, Tensor]
"""Numbers and tensors by name, float64 on the CPU."""

MUCH_NEARER = 0.3
SAME = 1e-3  # of an observable's size; what a mutant changes by less, it leaves as it is


@dataclass(frozen=True)
class Mutant(Generic[Reference]):
    """key: of the cause, which several mutants may share; change: puts the mistake into a reference."""

    key: str
    change: Callable[[Reference], Reference]


def explain(
    found: Observables,
    reference: Reference,
    mutants: Iterable[Mutant[Reference]],
    predict: Callable[[Reference], Observables],
    *,
    near: float = MUCH_NEARER,
) -> list[str]:
    """Keys of the mutants with a misfit below `near` (the reference has 1), best first, each once.

    A mutant that cannot be computed here (another shape, a network without the part it changes) explains nothing.
    """
    right = predict(reference)
    misfits: dict[str, float] = {}
    for mutant in mutants:
        try:
            guess = predict(mutant.change(reference))
        except (ValueError, RuntimeError, LookupError, ArithmeticError):
            continue
        misfits[mutant.key] = min(misfit(found, guess, right), misfits.get(mutant.key, math.inf))
    return sorted((key for key in misfits if misfits[key] < near), key=lambda key: misfits[key])


def misfit(found: Observables, guess: Observables, right: Observables) -> float:
    """Mean over the observables that are not right, of ||found - guess|| / ||found - right||, each at most 1.

    Those that are right and would not be under the guess count as 1.
    """
    shares = []
    for name, value in found.items():
        off = distance(value, right[name])
        if off > 0:
            shares.append(min(1.0, distance(value, guess[name]) / off))
        elif distance(guess[name], right[name]) > SAME * float(torch.linalg.vector_norm(right[name].double())):
            shares.append(1.0)
    return sum(shares) / len(shares) if shares else 0.0


def distance(left: Tensor, right: Tensor) -> float:
    """2-norm of the difference; infinite where shapes differ or a value is not finite."""
    if left.shape != right.shape:
        return math.inf
    off = float(torch.linalg.vector_norm(left.double() - right.double()))
    return off if math.isfinite(off) else math.inf

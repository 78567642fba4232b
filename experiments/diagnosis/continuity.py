"""Whether an epoch goes on from where the one before it ended: nobody loads, resets or exchanges weights in between.

The first step of an epoch may move the weights as far as a step does. How far that is the second step tells: both have
the same learning rate and coefficient. Lengths are 2-norms over all trainable parameters together.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from experiments.diagnosis.ward import NotApplicable, Outcome

MOST = 10.0  # times the second step; Adam's steps differ by less than a factor of 3


class Continuity:
    """Tell it `step(model, index)` after each update and `epoch_done(model)` before the next epoch starts."""

    def __init__(self) -> None:
        self._held: list[Tensor] = []
        self._first = 0.0
        self.jumps: list[tuple[float, float]] = []  # length of the first and of the second step of epochs 2, 3, ...

    def epoch_done(self, model: nn.Module) -> None:
        self._held = _weights(model)

    def interrupted(self) -> None:
        """Steps were missed: the next epoch that is seen whole is compared again."""
        self._held = []

    def step(self, model: nn.Module, index: int) -> None:
        if not self._held or index > 1:
            return
        now = _weights(model)
        length = _distance(self._held, now)
        if index == 0:
            self._first, self._held = length, now
            return
        self.jumps.append((self._first, length))
        self._held = []

    def outcome(self) -> Outcome:
        """Raises NotApplicable where no second epoch with two steps was seen."""
        if not self.jumps:
            raise NotApplicable("this needs a second epoch of two steps or more")
        ratio, place = max((first / max(second, 1e-12), n) for n, (first, second) in enumerate(self.jumps, 2))
        ok = ratio <= MOST or self.jumps[place - 2][0] < 1e-9
        measured = f"the first step of epoch {place} moves the weights {ratio:.2g} times as far as its second"
        return Outcome(f"at most {MOST:g} times", measured, ok, ["weights-reset", "changes-too-much"], ratio / MOST)


def _weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def _distance(before: list[Tensor], now: list[Tensor]) -> float:
    if [p.shape for p in before] != [p.shape for p in now]:
        return float("inf")
    return float(torch.stack([(a - b).norm() for a, b in zip(before, now, strict=True)]).norm())

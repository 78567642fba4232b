"""One update of AdamW, Adam and SGD as it should be, in float64, from the gradient the optimizer saw and its state.

AdamW   p <- p (1 - lr decay);  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
        p <- p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
Adam    the same with g + decay p for g, and no shrinking of p
SGD     g + decay p; buffer = momentum buffer + g; p <- p - lr buffer
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Moved:
    """What one update of one parameter starts from. state: the optimizer's for it, before the update."""

    p: Tensor
    gradient: Tensor
    settings: Settings
    state: Settings


def adamw(of: Moved) -> Tensor:
    """The movement of p: decay apart from the gradient."""
    return _adam(of, of.gradient) - _rate(of) * _decay(of) * of.p


def adam(of: Moved) -> Tensor:
    """The movement of p: decay within the gradient."""
    return _adam(of, of.gradient + _decay(of) * of.p)


def sgd(of: Moved) -> Tensor:
    """The movement of p."""
    g = of.gradient + _decay(of) * of.p
    momentum = float(of.settings.get("momentum", 0.0))
    return -_rate(of) * (momentum * _kept(of, "momentum_buffer") + g if momentum else g)


RULES: dict[type, Callable[[Moved], Tensor]] = {
    torch.optim.AdamW: adamw,
    torch.optim.Adam: adam,
    torch.optim.SGD: sgd,
}
UNKNOWN = ("amsgrad", "nesterov", "dampening")
"""Settings of a group with which none of these rules holds."""


@dataclass(frozen=True)
class Update:
    """One update in pieces. gradient: the rule's, made of the found one; change: of p, made of the rule's movement."""

    rule: Callable[[Moved], Tensor]
    settings: Callable[[Settings], Settings] = field(default=lambda settings: settings)
    gradient: Callable[[Tensor], Tensor] = field(default=lambda gradient: gradient)
    change: Callable[[Tensor, Tensor], Tensor] = field(default=lambda p, movement: movement)

    def movement(self, of: Moved) -> Tensor:
        """By how much p should move."""
        sign = -1.0 if of.settings.get("maximize") else 1.0
        moved = Moved(of.p, self.gradient(sign * of.gradient), self.settings(of.settings), of.state)
        return self.change(of.p, self.rule(moved))


def _adam(of: Moved, g: Tensor) -> Tensor:
    first, second = of.settings.get("betas", (0.9, 0.999))
    step = float(of.state.get("step", 0)) + 1
    m = first * _kept(of, "exp_avg") + (1 - first) * g
    v = second * _kept(of, "exp_avg_sq") + (1 - second) * g.square()
    root = (v / (1 - second**step)).sqrt() + float(of.settings.get("eps", 1e-8))
    return -_rate(of) * (m / (1 - first**step)) / root


def _rate(of: Moved) -> float:
    return float(of.settings["lr"])


def _decay(of: Moved) -> float:
    return float(of.settings.get("weight_decay", 0.0))


def _kept(of: Moved, name: str) -> Tensor:
    value = of.state.get(name)
    return torch.zeros_like(of.p) if value is None else value.detach().double().cpu()

"""One update of AdamW, Adam and SGD a second time, in float64, from the gradient the optimizer saw and its state.

AdamW   p <- p (1 - lr decay);  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
        p <- p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
Adam    the same with g + decay p for g, and no shrinking of p
SGD     g + decay p; buffer = momentum buffer + g; p <- p - lr buffer
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from experiments.doctor.observe import StepTrace
from experiments.doctor.pipeline import Pipeline
from experiments.doctor.runner import NotApplicable
from experiments.doctor.step.optimizer_checks import groups_by_parameter, kind_of


def expected_update(pipeline: Pipeline, name: str, p: nn.Parameter, seen: StepTrace) -> Tensor | None:
    """By how much `p` should move in the watched step; None where the rule is not known here.

    The optimizer is as it was before the step. With a expected its rates and decays count, otherwise the optimizer's.
    """
    optimizer = pipeline.optimizer
    if not isinstance(optimizer, (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)) or name not in seen.gradients:
        return None
    try:
        group = dict(groups_by_parameter(optimizer).get(id(p), [{}])[0])
    except NotApplicable:
        return None
    fresh = not optimizer.state
    if pipeline.expected.groups is not None and fresh:
        expected = pipeline.expected.groups[kind_of(name)]
        group |= {"lr": expected.learning_rate, "weight_decay": expected.decay}
    if "lr" not in group or group.get("amsgrad") or group.get("nesterov") or group.get("dampening"):
        return None
    gradient = seen.gradients[name]
    if gradient is None:
        return torch.zeros_like(seen.before[name])
    sign = -1.0 if group.get("maximize") else 1.0
    state = optimizer.state.get(p, {})
    if isinstance(optimizer, torch.optim.SGD):
        return _sgd(seen.before[name], sign * gradient, group, state)
    return _adam(seen.before[name], sign * gradient, group, state, isinstance(optimizer, torch.optim.AdamW))


def _adam(p: Tensor, gradient: Tensor, group: dict[str, Any], state: Any, decoupled: bool) -> Tensor:
    rate, decay = float(group["lr"]), float(group.get("weight_decay", 0.0))
    first, second = group.get("betas", (0.9, 0.999))
    step = float(state.get("step", 0)) + 1
    g = gradient if decoupled else gradient + decay * p
    m = first * _kept(state, "exp_avg", p) + (1 - first) * g
    v = second * _kept(state, "exp_avg_sq", p) + (1 - second) * g.square()
    root = (v / (1 - second**step)).sqrt() + float(group.get("eps", 1e-8))
    return (-rate * decay * p if decoupled else 0.0) - rate * (m / (1 - first**step)) / root


def _sgd(p: Tensor, gradient: Tensor, group: dict[str, Any], state: Any) -> Tensor:
    g = gradient + float(group.get("weight_decay", 0.0)) * p
    momentum = float(group.get("momentum", 0.0))
    return -float(group["lr"]) * (momentum * _kept(state, "momentum_buffer", p) + g if momentum else g)


def _kept(state: Any, name: str, p: Tensor) -> Tensor:
    value = state.get(name)
    return torch.zeros_like(p) if value is None else value.detach().double().cpu()

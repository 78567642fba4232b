"""Before training: the sparsity penalty, its groups and its coefficient's schedule.

The penalty is called on a disturbed network, where quantized and latent weights, and all channels, differ, and its
value and gradient are compared with the reference. Axis letters: G groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from experiments.doctor.causes.explain import Observables
from experiments.doctor.checks.step import compare_penalty, relative, tensors
from experiments.doctor.expected import LOGITS
from experiments.doctor.observe import grouping_of, objective_of, perturb_
from experiments.doctor.pipeline import Pipeline
from experiments.doctor.reference.objective import Grouping, Objective, gradients, parameter_name
from experiments.doctor.runner import CheckRunner, NotApplicable, Outcome, PartFailed, preserve_state
from utils_quantization import quantization, quantized_layers

OUTWEIGHS = 40.0  # times the task loss at chance; the presets' peaks stay below 5
CLOSE = 1e-3
SMALL = 0.01  # of its size: a network in which a guard of 1e-4 under the root weighs as much as a group


def penalty_checks(runner: CheckRunner, pipeline: Pipeline) -> None:
    """Add the findings about the penalty and its schedule."""
    for name, proves, check in (
        ("coefficient's schedule", "the penalty's weight in every epoch", _coefficients),
        ("coefficient's size", "the penalty at its peak does not drown the task", _peak),
    ):
        runner.check(name, proves, check, pipeline, blame="coefficient-wrong")
    runner.check("penalty", "the coupled group lasso of the quantized weights, and its gradient", _penalty, pipeline)
    runner.check("dead groups", "the penalty stays right where groups are dead or small", _dead_groups, pipeline)


def _coefficients(pipeline: Pipeline) -> Outcome:
    expected = pipeline.expected.coefficients
    if expected is None:
        raise NotApplicable("no schedule is expected", "expected.coefficients")
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
    constant = len(found) > 1 and len(set(found)) == 1
    moved = (expected[:1] + expected[:-1], expected[1:] + expected[-1:])
    likely = [
        "coefficient-too-large" if max(found) > 5 * peak else None,
        "coefficient-constant" if constant and found[0] else None,
        "coefficient-never-ramps" if max(found) < 0.01 * peak else None,
        "coefficient-shifted" if any(np.allclose(found, m, rtol=1e-6, atol=close) for m in moved) else None,
        *("coefficient-wrong", "coefficient-constant", "coefficient-never-ramps"),
    ]
    e = odd[0]
    measured = f"{who} {found[e]:.4g} instead of {expected[e]:.4g} in epoch {e + 1} ({len(odd)} epochs differ)"
    return Outcome(wanted, measured, False, likely)


def _peak(pipeline: Pipeline) -> Outcome:
    epochs = pipeline.expected.epochs or 1
    with preserve_state(pipeline), torch.no_grad():
        value = float(_called(pipeline))
    largest = max(float(pipeline.coefficient(epoch)) for epoch in range(epochs))
    weighted, chance = largest * value, math.log(pipeline.expected.num_classes or 10)
    measured = f"{largest:g} x {value:.3g} = {weighted:.3g}"
    ok = weighted < OUTWEIGHS * chance and value >= 0
    likely = ["coefficient-too-large", "penalty-dominates"]
    return Outcome(f"below {OUTWEIGHS:g} ln(classes) = {OUTWEIGHS * chance:.3g}", measured, ok, likely)


def _called(pipeline: Pipeline) -> Tensor:
    if pipeline.objective.penalty is None:
        raise NotApplicable("there is no penalty")
    try:
        value = pipeline.objective.penalty(pipeline.model)
    except Exception as error:
        raise PartFailed("penalty-wrong", error) from error
    if not isinstance(value, Tensor):
        raise PartFailed("penalty-detached", TypeError(f"the penalty is {type(value).__name__}, not a tensor"))
    return value


def _penalty(pipeline: Pipeline) -> Outcome:
    if pipeline.objective.penalty is None and pipeline.expected.penalty:
        return Outcome(pipeline.expected.penalty, "no penalty at all", False, ["penalty-not-in-loss"])
    with preserve_state(pipeline):
        first = float(_called(pipeline).detach())
        if pipeline.expected.penalty is None:
            found = gradients(_called(pipeline), pipeline.model)
            size = relative(found, {})
            ok = math.isfinite(first) and size > 0 and math.isfinite(size)
            measured = f"value {first:.4g}, norm of its gradient {size:.4g}"
            return Outcome("a finite value with a gradient", measured, ok, ["penalty-detached"])
        grouping = grouping_of(pipeline)
        perturb_(pipeline)
        out, value = _compared(pipeline, grouping)
        stale = not out.ok and value == first
        return replace(out, likely=["penalty-stale", *out.likely]) if stale else out


def _dead_groups(pipeline: Pipeline) -> Outcome:
    """At a group that is all zero the 2-norm has a corner: value and gradient must be 0 there, not 0 / 0."""
    if pipeline.objective.penalty is None or pipeline.expected.penalty is None:
        raise NotApplicable("no penalty is expected", "expected.penalty")
    with preserve_state(pipeline):
        grouping = grouping_of(pipeline)
        perturb_(pipeline)
        dead = _shrink_and_zero_(pipeline, grouping)
        out, _ = _compared(pipeline, grouping)
    return replace(out, expected=f"the same with {dead} of {grouping.count} groups set to zero and all others small")


def _compared(pipeline: Pipeline, grouping: Grouping) -> tuple[Outcome, float]:
    """The pipeline's penalty of the network as it stands against the reference; also its value."""
    found = _observed(pipeline.model, lambda: _called(pipeline))

    def predict(objective: Objective) -> Observables:
        factor = objective.coefficient(1.0)
        meant = _observed(pipeline.model, lambda: factor * objective.penalty(objective, pipeline.model))
        return {**meant, **objective.gradients(tensors(meant))}

    return compare_penalty(found, objective_of(pipeline, grouping), predict, CLOSE), float(found["value"])


def _observed(model: nn.Module, penalty: Callable[[], Tensor]) -> Observables:
    """A penalty's value, and its gradient at the weights that the network reads, without passing the quantizers.

    The logits are left out, to which the quantizer's grid passes a little of any gradient.
    """
    if not quantized_layers(model):
        value = penalty()
        found = gradients(value, model)
    else:
        with quantization(model, enabled=True), quantized_leaves(model) as leaves:
            value = penalty()
            found = gradients(value, model, leaves)
    shared = {name: g for name, g in found.items() if name.rpartition(".")[2] not in LOGITS}
    return {"value": value.detach().double().cpu(), **shared}


def _shrink_and_zero_(pipeline: Pipeline, grouping: Grouping) -> int:
    """Make all weights small, and set every third group to zero, all its members; returns how many."""
    chosen = torch.arange(grouping.count) % 3 == 0
    with torch.no_grad():
        for name, p in pipeline.model.named_parameters():
            if name.rpartition(".")[2] not in LOGITS:
                p.mul_(SMALL)
        for member in grouping.members:
            p = pipeline.model.get_parameter(parameter_name(pipeline.model, member.module, member.parameter))
            index = torch.from_numpy(member.groups)
            rows = torch.nonzero((index >= 0) & chosen[index.clamp(min=0)]).flatten()
            p.index_fill_(member.dim, rows.to(p.device), 0.0)
    return int(chosen.sum())


@contextmanager
def quantized_leaves(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Inside, every quantized weight is a leaf of its own, by the name of the latent weight: gradients stop there.

    A layer's weight is then read from where `shared_quantized_weights` keeps it.
    """
    layers = quantized_layers(model)
    with torch.no_grad():
        leaves = {name: cast(Tensor, layer.weight).detach().clone().requires_grad_() for name, layer in layers.items()}
    switches = {name: cast(Any, layer).parametrizations.weight[0] for name, layer in layers.items()}
    before = {name: switch._shared for name, switch in switches.items()}
    named = {name: parameter_name(model, name, "weight") for name in layers}
    try:
        for name, switch in switches.items():
            switch._shared = leaves[name]
        yield {named[name]: leaf for name, leaf in leaves.items()}
    finally:
        for name, switch in switches.items():
            switch._shared = before[name]

"""Before training: the sparsity penalty, its groups and its coefficient's schedule.

The penalty is called on a disturbed network, where quantized and latent weights, and all channels, differ, and its
value and gradient are compared with the definition. Axis letters: G groups.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from experiments.doctor.core import objective
from experiments.doctor.network.channel_group_checks import channel_group_checks
from experiments.doctor.pipeline import Pipeline
from experiments.doctor.runner import CheckRunner, NotApplicable, Outcome, PartFailed, names, preserve_state
from experiments.doctor.step.coefficient_checks import coefficient_checks
from experiments.doctor.step.penalty_diagnosis import as_parameters, misfit, penalty_diagnosis
from experiments.doctor.training.perturbation import at_leaves, perturb_, quantized_leaves, zero_groups_
from utils_quantization import quantization, quantized_layers

OUTWEIGHS = 40.0  # times the task loss at chance; the presets' peaks stay below 5
CLOSE = 1e-3


def penalty_checks(runner: CheckRunner, pipeline: Pipeline) -> None:
    """Add the findings about the penalty and its schedule."""
    coefficient_checks(runner, pipeline)
    runner.check(
        "coefficient's size",
        "the penalty at its peak does not drown the task",
        _peak,
        pipeline,
        blame="coefficient-wrong",
    )
    runner.check("penalty", "the coupled group lasso of the quantized weights, and its gradient", _penalty, pipeline)
    runner.check("dead groups", "the penalty stays finite where groups are dead", _dead_groups, pipeline)
    channel_group_checks(runner, pipeline)


def _peak(pipeline: Pipeline) -> Outcome:
    if pipeline.objective.penalty is None:
        raise NotApplicable("there is no penalty")
    epochs = pipeline.expected.epochs or 1
    largest = max(float(pipeline.coefficient(epoch)) for epoch in range(epochs))
    with preserve_state(pipeline), torch.no_grad():
        value = float(_called(pipeline))
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
    if pipeline.objective.penalty is None:
        if pipeline.expected.penalty:
            return Outcome(pipeline.expected.penalty, "no penalty at all", False, ["penalty-not-in-loss"])
        raise NotApplicable("there is no penalty")
    with preserve_state(pipeline):
        if pipeline.expected.penalty is None:
            value = _called(pipeline)
            slopes = objective.gradients(value, pipeline.model)
            size = math.sqrt(sum(float(g.square().sum()) for g in slopes.values()))
            ok = math.isfinite(float(value)) and size > 0 and math.isfinite(size)
            measured = f"value {float(value):.4g}, norm of its gradient {size:.4g}"
            return Outcome("a finite value with a gradient", measured, ok, ["penalty-detached"])
        grouping = objective.channel_grouping(pipeline)
        perturb_(pipeline)
        found = _value_and_gradient(pipeline)
        if not quantized_layers(pipeline.model):
            return _compare_penalty(pipeline, grouping, *found)
        with quantization(pipeline.model, enabled=True):
            return _compare_penalty(pipeline, grouping, *found)


def _value_and_gradient(pipeline: Pipeline) -> tuple[float, objective.Gradients]:
    """The penalty of the network as it stands; its gradient is that for the quantized weights."""
    if not quantized_layers(pipeline.model):
        value = _called(pipeline)
        return float(value.detach()), objective.gradients(value, pipeline.model)
    with quantization(pipeline.model, enabled=True), quantized_leaves(pipeline.model) as leaves:
        value = _called(pipeline)
        found = objective.gradients(value, pipeline.model)
        return float(value.detach()), at_leaves(pipeline.model, value, leaves, found)


def _dead_groups(pipeline: Pipeline) -> Outcome:
    """At a group that is all zero the 2-norm has a corner: value and gradient must be 0 there, not 0 / 0."""
    if pipeline.objective.penalty is None or pipeline.expected.penalty is None:
        raise NotApplicable("no penalty is expected")
    with preserve_state(pipeline):
        grouping = objective.channel_grouping(pipeline)
        perturb_(pipeline)
        dead = zero_groups_(pipeline, grouping)
        value, found = _value_and_gradient(pipeline)
    right = math.isfinite(value)
    broken = [name for name, g in found.items() if not torch.isfinite(g).all()]
    measured = f"value {value:.5g}; gradient " + (f"not finite for {names(broken)}" if broken else "finite")
    expected = f"a finite value and gradient with {dead} of {grouping.count} groups set to zero"
    return Outcome(expected, measured, right and not broken, ["penalty-not-differentiable"])


def _compare_penalty(
    pipeline: Pipeline, grouping: objective.Grouping, value: float, found: objective.Gradients
) -> Outcome:
    weights = grouping.weights(pipeline.model)
    right, slopes = grouping.lasso(weights)
    target, gradient = as_parameters(pipeline.model, slopes), _shared(found)
    miss = max(abs(value - right) / max(right, 1e-12), misfit(gradient, target))
    none = not any(float(g.abs().max()) > 0 for g in found.values())
    broken = [name for name, g in found.items() if not torch.isfinite(g).all()]
    measured = f"value {value:.5g} for {right:.5g}; gradient off by {100 * misfit(gradient, target):.2g}%"
    if none:
        measured = f"value {value:.5g} for {right:.5g}, without any gradient"
    ok = miss < CLOSE and not broken
    likely: list[str] = []
    if not ok:
        likely = ["penalty-not-differentiable"] if broken else ["penalty-detached"] if none else []
        likely += penalty_diagnosis(pipeline, grouping, value, gradient)
    expected = f"sum of the 2-norms of {grouping.count} groups"
    return Outcome(expected, measured, ok, likely, miss / CLOSE)


def _shared(found: objective.Gradients) -> objective.Gradients:
    """Without the logits, to which the quantizer's grid passes a little of any gradient."""
    return {name: g for name, g in found.items() if name.rpartition(".")[2] not in ("logit_dz", "logit_bit")}

"""Before training: the sparsity penalty, its groups and its coefficient's schedule.

The penalty is called on a disturbed network, where quantized and latent weights, and all channels, differ, and its
value and gradient are compared with the definition. Axis letters: G groups.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from experiments.doctor.core import objective
from experiments.doctor.core.subject import Subject
from experiments.doctor.core.ward import Broken, NotApplicable, Outcome, Ward, names, undisturbed
from experiments.doctor.network.channel_group_checks import channel_group_checks
from experiments.doctor.step.coefficient_checks import coefficient_checks
from experiments.doctor.step.penalty_diagnosis import as_parameters, misfit, penalty_diagnosis
from experiments.doctor.training.unsettled import at_leaves, quantized_leaves, silence, unsettle
from utils_quantization import quantization, quantized_layers

OUTWEIGHS = 40.0  # times the task loss at chance; the presets' peaks stay below 5
CLOSE = 1e-3


def penalty_checks(ward: Ward, subject: Subject) -> None:
    """Add the findings about the penalty and its schedule."""
    coefficient_checks(ward, subject)
    ward.check(
        "coefficient's size",
        "the penalty at its peak does not drown the task",
        _peak,
        subject,
        blame="coefficient-wrong",
    )
    ward.check("penalty", "the coupled group lasso of the quantized weights, and its gradient", _penalty, subject)
    ward.check("dead groups", "the penalty stays finite where groups are dead", _dead_groups, subject)
    channel_group_checks(ward, subject)


def _peak(subject: Subject) -> Outcome:
    if subject.objective.penalty is None:
        raise NotApplicable("there is no penalty")
    epochs = subject.promise.epochs or 1
    largest = max(float(subject.coefficient(epoch)) for epoch in range(epochs))
    with undisturbed(subject), torch.no_grad():
        value = float(_called(subject))
    weighted, chance = largest * value, math.log(subject.promise.num_classes or 10)
    measured = f"{largest:g} x {value:.3g} = {weighted:.3g}"
    ok = weighted < OUTWEIGHS * chance and value >= 0
    likely = ["coefficient-too-large", "penalty-dominates"]
    return Outcome(f"below {OUTWEIGHS:g} ln(classes) = {OUTWEIGHS * chance:.3g}", measured, ok, likely)


def _called(subject: Subject) -> Tensor:
    if subject.objective.penalty is None:
        raise NotApplicable("there is no penalty")
    try:
        value = subject.objective.penalty(subject.model)
    except Exception as error:
        raise Broken("penalty-wrong", error) from error
    if not isinstance(value, Tensor):
        raise Broken("penalty-detached", TypeError(f"the penalty is {type(value).__name__}, not a tensor"))
    return value


def _penalty(subject: Subject) -> Outcome:
    if subject.objective.penalty is None:
        if subject.promise.penalty:
            return Outcome(subject.promise.penalty, "no penalty at all", False, ["penalty-not-in-loss"])
        raise NotApplicable("there is no penalty")
    with undisturbed(subject):
        if subject.promise.penalty is None:
            value = _called(subject)
            slopes = objective.gradients(value, subject.model)
            size = math.sqrt(sum(float(g.square().sum()) for g in slopes.values()))
            ok = math.isfinite(float(value)) and size > 0 and math.isfinite(size)
            measured = f"value {float(value):.4g}, norm of its gradient {size:.4g}"
            return Outcome("a finite value with a gradient", measured, ok, ["penalty-detached"])
        grouping = objective.channel_grouping(subject)
        unsettle(subject)
        found = _value_and_gradient(subject)
        if not quantized_layers(subject.model):
            return _compare_penalty(subject, grouping, *found)
        with quantization(subject.model, enabled=True):
            return _compare_penalty(subject, grouping, *found)


def _value_and_gradient(subject: Subject) -> tuple[float, objective.Gradients]:
    """The penalty of the network as it stands; its gradient is that for the quantized weights."""
    if not quantized_layers(subject.model):
        value = _called(subject)
        return float(value.detach()), objective.gradients(value, subject.model)
    with quantization(subject.model, enabled=True), quantized_leaves(subject.model) as leaves:
        value = _called(subject)
        found = objective.gradients(value, subject.model)
        return float(value.detach()), at_leaves(subject.model, value, leaves, found)


def _dead_groups(subject: Subject) -> Outcome:
    """At a group that is all zero the 2-norm has a corner: value and gradient must be 0 there, not 0 / 0."""
    if subject.objective.penalty is None or subject.promise.penalty is None:
        raise NotApplicable("no penalty is promised")
    with undisturbed(subject):
        grouping = objective.channel_grouping(subject)
        unsettle(subject)
        dead = silence(subject, grouping)
        value, found = _value_and_gradient(subject)
    right = math.isfinite(value)
    broken = [name for name, g in found.items() if not torch.isfinite(g).all()]
    measured = f"value {value:.5g}; gradient " + (f"not finite for {names(broken)}" if broken else "finite")
    expected = f"a finite value and gradient with {dead} of {grouping.count} groups at zero"
    return Outcome(expected, measured, right and not broken, ["penalty-not-differentiable"])


def _compare_penalty(
    subject: Subject, grouping: objective.Grouping, value: float, found: objective.Gradients
) -> Outcome:
    weights = grouping.weights(subject.model)
    right, slopes = grouping.lasso(weights)
    target, gradient = as_parameters(subject.model, slopes), _shared(found)
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
        likely += penalty_diagnosis(subject, grouping, value, gradient)
    expected = f"sum of the 2-norms of {grouping.count} groups"
    return Outcome(expected, measured, ok, likely, miss / CLOSE)


def _shared(found: objective.Gradients) -> objective.Gradients:
    """Without the logits, to which the quantizer's grid passes a little of any gradient."""
    return {name: g for name, g in found.items() if name.rpartition(".")[2] not in ("logit_dz", "logit_bit")}

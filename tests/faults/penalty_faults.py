"""Faults in the sparsity penalty, its groups and its coefficient, and in the squares of the logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.doctor import Pipeline
from experiments.doctor.pipeline import PipelineParts
from experiments.notebook import demonstration
from experiments.notebook.demonstration import Fault
from experiments.sparsity import coupled_group_lasso, group_lasso, l1_kernel_sparsity, safe_sqrt
from src import training
from src.pruning import ChannelGroups, Member, channel_groups

Penalty = training.Penalty
STEP: Callable[..., training.StepLosses] = training.train_step


def penalty(change: Callable[[Penalty], Penalty]) -> Callable[[PipelineParts], PipelineParts]:
    """The pipeline with `change` applied to its penalty function."""
    return lambda parts: replace(parts, penalty=lambda model: change(coupled_group_lasso(model)))


def members(change: Callable[[ChannelGroups], ChannelGroups]) -> Callable[[PipelineParts], PipelineParts]:
    """The pipeline's penalty over other groups."""
    return lambda parts: replace(parts, penalty=lambda model: group_lasso(change(channel_groups(model))))


def roles(*kept: str) -> Callable[[ChannelGroups], ChannelGroups]:
    return lambda groups: replace(groups, members=tuple(m for m in groups.members if m.role in kept))


def unguarded(model: nn.Module) -> Penalty:
    """The coupled group lasso with a plain square root."""
    groups = channel_groups(model)

    def penalty(network: nn.Module) -> Tensor:
        sums = torch.zeros(len(groups))
        for member in groups.members:
            weight = getattr(network.get_submodule(member.module), member.parameter)
            squares = (
                weight.square().transpose(0, member.dim).flatten(1).sum(1) if weight.dim() > 1 else weight.square()
            )
            index = torch.from_numpy(member.groups)
            sums = sums.index_add(0, index[index >= 0], squares[index >= 0])
        return sums.sqrt().sum()

    return penalty


def slices_shifted(groups: ChannelGroups) -> ChannelGroups:
    """What reads channel c is in the group of channel c + 1."""
    shifted = [replace(m, groups=np.roll(m.groups, 1)) if m.role == "slice" else m for m in groups.members]
    return replace(groups, members=tuple(shifted))


def without_shortcut(groups: ChannelGroups) -> ChannelGroups:
    """Every block has groups of its own, as if nothing were added to the stream that runs past it."""
    blocks = {member.module.partition(".")[0]: None for member in groups.members}
    offset = {block: place * len(groups) for place, block in enumerate(blocks)}

    def apart(m: Member) -> Member:
        block = m.module.partition(".")[0]
        return replace(m, groups=np.where(m.groups < 0, -1, m.groups + offset[block]))

    names = tuple(f"{block}/{name}" for block in blocks for name in groups.names)
    return ChannelGroups(tuple(apart(m) for m in groups.members), names)


def first_stage_only(groups: ChannelGroups) -> ChannelGroups:
    return replace(groups, members=tuple(m for m in groups.members if m.module.startswith("layer1")))


def over_inputs(model: nn.Module) -> Tensor:
    """The group lasso over input channels: sum over i of || W[:, i] ||."""
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    return torch.stack([safe_sqrt(w.square().sum((0, 2, 3))).sum() for w in weights]).sum()


def ridge(groups: ChannelGroups) -> Penalty:
    """The sum of squares of everything in a group: the square root is missing."""

    def squares(model: nn.Module) -> Tensor:
        found = {f"{m.module}.{m.parameter}" for m in groups.members}
        values = [getattr(model.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2]) for n in sorted(found)]
        return torch.stack([value.square().sum() for value in values]).sum()

    return squares


def kept_from_first(of: Penalty) -> Penalty:
    """The value of the first call, ever after."""
    kept: list[Tensor] = []

    def first(model: nn.Module) -> Tensor:
        kept.append(of(model).detach()) if not kept else None
        return kept[0]

    return first


def coefficient(change: Callable[[Callable[[int], float]], Callable[[int], float]]) -> Callable[[Pipeline], Pipeline]:
    return lambda pipeline: replace(pipeline, coefficient=change(pipeline.coefficient))


def applied(change: Callable[[float], float]) -> Callable[[Pipeline], Pipeline]:
    """The step applies another coefficient than it is given."""

    def apply(pipeline: Pipeline) -> Pipeline:
        def step(*rest: Any) -> training.StepLosses:
            *others, given, precision = rest
            return STEP(*others, change(given), precision)

        return replace(pipeline, step=step)

    return apply


def schedule_by_step(pipeline: Pipeline) -> Pipeline:
    """The schedule is asked with the number of the step, and is at its peak within the first epoch."""
    steps, schedule = count(), pipeline.coefficient

    def step(*rest: Any) -> training.StepLosses:
        *others, _, precision = rest
        return STEP(*others, schedule(next(steps)), precision)

    return replace(pipeline, step=step)


def objective(**change: Any) -> Callable[[Pipeline], Pipeline]:
    return lambda pipeline: replace(pipeline, objective=replace(pipeline.objective, **change))


FAULTS = (
    Fault(
        "penalty detached",
        "The penalty has a value, and no gradient.",
        ("penalty-detached", "penalty-not-in-loss"),
        parts=penalty(lambda of: lambda model: of(model).detach()),
    ),
    demonstration.FAULTS["penalty on latent weights"],
    Fault(
        "penalty along inputs",
        "The norm of a group runs over an input channel's weights instead of a filter's.",
        ("penalty-wrong-axis",),
        parts=lambda parts: replace(parts, penalty=lambda model: over_inputs),
    ),
    Fault(
        "groups shifted by one",
        "The slices that read channel c are penalised with the filter of channel c + 1.",
        ("penalty-groups-shifted",),
        parts=members(slices_shifted),
    ),
    Fault(
        "groups without the shortcut",
        "Filters that write to one residual stream are in groups of their own.",
        ("penalty-ignores-shortcut",),
        parts=members(without_shortcut),
    ),
    Fault(
        "groups without BatchNorm",
        "Scale and shift are not penalised, and without them no channel ever dies.",
        ("penalty-without-batchnorm",),
        parts=members(roles("filter", "slice", "bias")),
    ),
    Fault(
        "groups without what reads them",
        "The slices that read a channel are not in its group.",
        ("penalty-without-slices",),
        parts=members(roles("filter", "scale", "shift", "bias")),
    ),
    Fault(
        "penalty in the first stage alone",
        "Two of three stages are not penalised.",
        ("penalty-wrong",),
        parts=members(first_stage_only),
    ),
    Fault(
        "penalty counted twice",
        "The penalty enters the loss with twice its weight.",
        ("penalty-scaled", "penalty-wrong"),
        parts=penalty(lambda of: lambda model: 2 * of(model)),
    ),
    Fault(
        "mean instead of sum",
        "The penalty is divided by the number of groups.",
        ("penalty-scaled", "penalty-wrong"),
        parts=lambda parts: replace(
            parts, penalty=lambda model: lambda m: coupled_group_lasso(model)(m) / len(channel_groups(model))
        ),
    ),
    Fault(
        "penalty with the wrong sign",
        "The penalty is subtracted, so channels grow.",
        ("penalty-sign", "penalty-wrong"),
        parts=penalty(lambda of: lambda model: -of(model)),
    ),
    Fault(
        "squares without root",
        "A sum of squares shrinks every weight and sets none to zero.",
        ("penalty-not-lasso", "penalty-wrong"),
        parts=lambda parts: replace(parts, penalty=lambda model: ridge(channel_groups(model))),
    ),
    Fault(
        "L1 instead of groups",
        "Every weight is penalised by itself, so channels do not vanish together.",
        ("penalty-wrong",),
        parts=lambda parts: replace(parts, penalty=lambda model: l1_kernel_sparsity),
    ),
    Fault(
        "penalty never recomputed",
        "The value of the first step is added to every loss.",
        ("penalty-detached", "penalty-not-in-loss"),
        parts=penalty(kept_from_first),
    ),
    Fault(
        "coefficient constant",
        "The coefficient is at its peak from the first epoch on.",
        ("coefficient-constant",),
        pipeline=coefficient(lambda of: lambda epoch: of(10**6)),
    ),
    Fault(
        "coefficient never ramps",
        "The coefficient stays at 0.",
        ("coefficient-never-ramps",),
        pipeline=coefficient(lambda of: lambda epoch: 0.0),
    ),
    demonstration.FAULTS["coefficient ramps to 1"],
    Fault(
        "coefficient one epoch early",
        "Epochs are counted from 1 where the schedule counts from 0.",
        ("coefficient-shifted",),
        pipeline=coefficient(lambda of: lambda epoch: of(epoch + 1)),
    ),
    Fault(
        "coefficient by step",
        "The schedule is asked with the number of the step instead of the epoch.",
        ("coefficient-not-applied", "coefficient-wrong"),
        pipeline=schedule_by_step,
    ),
    Fault(
        "coefficient ignored",
        "The step adds the penalty with weight 1 whenever the coefficient is not 0.",
        ("coefficient-not-applied",),
        pipeline=applied(lambda given: float(given > 0)),
    ),
    Fault(
        "coefficient applied twice",
        "The penalty is multiplied by the square of the coefficient.",
        ("coefficient-not-applied",),
        pipeline=applied(lambda given: given * given),
    ),
    Fault(
        "penalty left out of the loss",
        "The step is called without the penalty.",
        ("penalty-not-in-loss",),
        pipeline=objective(penalty=None),
    ),
    Fault(
        "squares of the logits missing",
        "Neither dead zones nor bits are drawn anywhere but by the task.",
        ("logit-squares-missing",),
        pipeline=objective(lambda_dz=0.0, lambda_bit=0.0),
    ),
    Fault(
        "squares of one kind of logits missing",
        "The dead-zone logits are regularised, the bit logits are not.",
        ("logit-squares-missing", "lambda-wrong"),
        pipeline=objective(lambda_bit=0.0),
    ),
    Fault(
        "squares ten times too heavy",
        "lambda of the dead-zone logits is 0.1 instead of 0.01.",
        ("lambda-wrong",),
        pipeline=objective(lambda_dz=0.1),
    ),
    Fault(
        "root not guarded at zero",
        "The gradient of the square root is 0 / 0 as soon as a group is dead.",
        ("penalty-not-differentiable",),
        parts=lambda parts: replace(parts, penalty=unguarded),
    ),
)

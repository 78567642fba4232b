"""Faults in the sparsity penalty, its groups and its coefficient, and in the squares of the logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

from torch import Tensor, nn

from experiments.doctor import Pipeline, PipelineParts
from experiments.doctor.causes.explain import Mutant
from experiments.doctor.causes.step_mutants import (
    by_block,
    cut_add,
    grouped,
    layerwise,
    one_branch,
    only,
    pads_at_the_end,
    piece,
    retied,
    rolled,
    times,
)
from experiments.notebook import demonstration
from experiments.notebook.demonstration import Fault
from experiments.sparsity import coupled_group_lasso, group_lasso, l1_kernel_sparsity
from src import training
from src.pruning import channel_groups
from tests.faults.mutated import penalty_fault, step_fault

Penalty = training.Penalty
STEP: Callable[..., training.StepLosses] = training.train_step


def penalty(make: Callable[[nn.Module], Penalty]) -> Callable[[PipelineParts], PipelineParts]:
    """The pipeline with another penalty function."""
    return lambda parts: replace(parts, penalty=make)


def unguarded(sums: Tensor) -> Tensor:
    """A plain square root, whose gradient at 0 is infinite."""
    return sums.sqrt()


def first_stage_only(model: nn.Module) -> Penalty:
    groups = channel_groups(model)
    return group_lasso(replace(groups, members=tuple(m for m in groups.members if m.module.startswith("layer1"))))


def kept_from_first(model: nn.Module) -> Penalty:
    """The value of the first call, ever after."""
    of, kept = coupled_group_lasso(model), list[Tensor]()

    def first(network: nn.Module) -> Tensor:
        kept.append(of(network).detach()) if not kept else None
        return kept[0]

    return first


def one_call_behind(model: nn.Module) -> Penalty:
    """The value of the call before, from a cache that is filled after it is read."""
    of, kept = coupled_group_lasso(model), list[Tensor]()

    def last(network: nn.Module) -> Tensor:
        kept.append(of(network).detach())
        return kept[-2] if len(kept) > 1 else kept[-1]

    return last


def detached_later(model: nn.Module) -> Penalty:
    """Whole at first; after 50 calls its weights are read through .data."""
    of, calls = coupled_group_lasso(model), count()
    return lambda network: of(network) if next(calls) < 50 else of(network).detach()


def coefficient(change: Callable[[Callable[[int], float]], Callable[[int], float]]) -> Callable[[Pipeline], Pipeline]:
    return lambda pipeline: replace(pipeline, coefficient=change(pipeline.coefficient))


def schedule_by_step(pipeline: Pipeline) -> Pipeline:
    """The schedule is asked with the number of the step, and is at its peak within the first epoch."""
    steps, schedule = count(), pipeline.coefficient

    def step(*rest: Any) -> training.StepLosses:
        *others, _, precision = rest
        return STEP(*others, schedule(next(steps)), precision)

    return replace(pipeline, step=step)


FAULTS = (
    penalty_fault(
        "penalty detached",
        "The penalty has a value, and no gradient.",
        piece("penalty-detached", norm=lambda sums: sums.detach().sqrt()),
        "penalty-not-in-loss",
    ),
    demonstration.FAULTS["penalty on latent weights"],
    penalty_fault(
        "penalty along inputs",
        "The norm of a group runs over an input channel's weights instead of a filter's.",
        grouped("penalty-wrong-axis", layerwise(1)),
    ),
    penalty_fault(
        "groups shifted by one",
        "The slices that read channel c are penalised with the filter of channel c + 1.",
        grouped("penalty-groups-shifted", rolled(1, "slice")),
    ),
    penalty_fault(
        "BatchNorm of the channel before",
        "Scale and shift of channel c are penalised with the filter of channel c - 1.",
        grouped("penalty-groups-shifted", rolled(-1, "scale", "shift")),
    ),
    penalty_fault(
        "groups without the shortcut",
        "Filters that write to one residual stream are in groups of their own.",
        grouped("penalty-ignores-shortcut", by_block),
    ),
    penalty_fault(
        "groups of one branch",
        "An addition passes on the groups of its first input alone.",
        grouped("penalty-ignores-shortcut", retied(one_branch(0))),
        "penalty-groups-shifted",
    ),
    penalty_fault(
        "groups end at additions",
        "What reads a sum is in the group of nothing that was added.",
        grouped("penalty-ignores-shortcut", retied(cut_add)),
        "penalty-without-slices",
    ),
    penalty_fault(
        "groups of another padding",
        "The groups have option A's zero channels all at the end instead of half on each side.",
        grouped("penalty-groups-shifted", retied(pads_at_the_end)),
    ),
    penalty_fault(
        "groups without BatchNorm",
        "Scale and shift are not penalised, and without them no channel ever dies.",
        grouped("penalty-without-batchnorm", only("filter", "slice", "bias")),
    ),
    penalty_fault(
        "groups without what reads them",
        "The slices that read a channel are not in its group.",
        grouped("penalty-without-slices", only("filter", "scale", "shift", "bias")),
    ),
    Fault(
        "penalty in the first stage alone",
        "Two of three stages are not penalised.",
        ("penalty-wrong",),
        parts=penalty(first_stage_only),
    ),
    penalty_fault(
        "penalty counted twice",
        "The penalty enters the loss with twice its weight.",
        piece("penalty-scaled", coefficient=lambda given: 2 * given),
        "penalty-wrong",
    ),
    penalty_fault(
        "mean instead of sum",
        "The penalty is divided by the number of groups.",
        piece("penalty-scaled", norm=lambda sums: sums.clamp(min=1e-30).sqrt() / len(sums)),
        "penalty-wrong",
    ),
    penalty_fault(
        "penalty with the wrong sign",
        "The penalty is subtracted, so channels grow.",
        piece("penalty-sign", coefficient=lambda given: -given),
        "penalty-wrong",
    ),
    penalty_fault(
        "squares without root",
        "A sum of squares shrinks every weight and sets none to zero.",
        piece("penalty-not-lasso", norm=lambda sums: sums),
        "penalty-wrong",
    ),
    penalty_fault(
        "one norm for all groups",
        "The root is taken of the sum over all groups, so no group is drawn to zero before another.",
        piece("penalty-not-lasso", norm=lambda sums: sums.sum().sqrt()),
    ),
    penalty_fault(
        "a constant under the root",
        "The penalty takes sqrt(x + 1e-4), which is flat where a group is small.",
        piece("penalty-smoothed", norm=lambda sums: (sums + 1e-4).sqrt()),
    ),
    Fault(
        "L1 instead of groups",
        "Every weight is penalised by itself, so channels do not vanish together.",
        ("penalty-not-lasso", "penalty-wrong"),
        parts=penalty(lambda model: l1_kernel_sparsity),
    ),
    Fault(
        "penalty never recomputed",
        "The value of the first step is added to every loss.",
        ("penalty-stale", "penalty-detached"),
        parts=penalty(kept_from_first),
    ),
    Fault(
        "penalty one call behind",
        "Every loss holds the penalty's value of the step before.",
        ("penalty-stale", "penalty-detached"),
        parts=penalty(one_call_behind),
    ),
    Fault(
        "penalty detached in mid-run",
        "After 50 calls the penalty has no gradient any more.",
        ("penalty-detached",),
        parts=penalty(detached_later),
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
    step_fault(
        "coefficient ignored",
        "The step adds the penalty with weight 1 whenever the coefficient is not 0.",
        piece("coefficient-not-applied", coefficient=lambda given: 1.0),
    ),
    step_fault(
        "coefficient applied twice",
        "The penalty is multiplied by the square of the coefficient.",
        piece("coefficient-not-applied", coefficient=lambda given: given * given),
    ),
    step_fault(
        "penalty left out of the loss",
        "The step adds no penalty to its loss.",
        piece("penalty-not-in-loss", grouping=None),
    ),
    step_fault(
        "squares of the logits missing",
        "Neither dead zones nor bits are drawn anywhere but by the task.",
        Mutant("logit-squares-missing", times(0.0, "logit_dz", "logit_bit")),
    ),
    step_fault(
        "squares of one kind of logits missing",
        "The dead-zone logits are regularised, the bit logits are not.",
        Mutant("logit-squares-missing", times(0.0, "logit_bit")),
        "lambda-wrong",
    ),
    step_fault(
        "squares ten times too heavy",
        "lambda of the dead-zone logits is 0.1 instead of 0.01.",
        Mutant("lambda-wrong", times(10.0, "logit_dz")),
    ),
    step_fault(
        "squares with the wrong sign",
        "The squares of the logits are subtracted, so dead zones close and bits rise.",
        Mutant("lambda-wrong", times(-1.0, "logit_dz", "logit_bit")),
    ),
    penalty_fault(
        "root not guarded at zero",
        "The gradient of the square root is 0 / 0 as soon as a group is dead.",
        piece("penalty-not-differentiable", norm=unguarded),
    ),
)

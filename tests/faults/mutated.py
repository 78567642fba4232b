"""A mistake of the catalogue in a real pipeline, whose penalty, step or update computes with the mutant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from experiments.doctor import Pipeline, PipelineParts
from experiments.doctor.causes.explain import Mutant
from experiments.doctor.observe import objective_of
from experiments.doctor.reference.objective import Objective, channel_grouping, plain
from experiments.doctor.reference.update import Update, adamw
from experiments.notebook.demonstration import Fault
from src import training


def penalty_fault(name: str, breaks: str, mutant: Mutant[Objective], *also: str) -> Fault:
    """The pipeline's penalty is the mutant's. also: causes that name it rightly, too."""

    def penalty(model: nn.Module) -> training.Penalty:
        wrong = mutant.change(Objective(grouping=channel_grouping(model, (3, 32, 32))))
        return lambda network: (wrong.coefficient(1.0) * wrong.penalty(wrong, network)).float()

    def exchange(parts: PipelineParts) -> PipelineParts:
        return replace(parts, penalty=penalty)

    return Fault(name, breaks, (mutant.key, *also), parts=exchange)


def step_fault(name: str, breaks: str, mutant: Mutant[Objective], *also: str) -> Fault:
    """The pipeline's step computes losses and gradients as the mutant does; the update is the optimizer's own."""
    return Fault(name, breaks, (mutant.key, *also), pipeline=lambda pipeline: _stepping(pipeline, mutant.change))


def _stepping(pipeline: Pipeline, change: Callable[[Objective], Objective]) -> Pipeline:
    grouping = channel_grouping(pipeline.model, (3, 32, 32))
    objective = change(objective_of(pipeline, grouping))

    def step(
        model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, *rest: Any
    ) -> training.StepLosses:
        _, coefficient, precision = rest
        optimizer.zero_grad()
        losses = objective.losses(model.train(objective.training), (images, labels), coefficient, precision)
        losses.total.backward()
        found = {name: plain(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        for name, gradient in objective.gradients(found).items():
            p = model.get_parameter(name)
            p.grad = gradient.to(p)
        optimizer.step()
        *parts, scores = objective.report(losses)
        correct = (scores.argmax(1) == labels).sum()
        return training.StepLosses(*(part.detach().float() for part in parts), correct=correct)

    return replace(pipeline, step=step)


def update_fault(name: str, breaks: str, mutant: Mutant[Update], *also: str) -> Fault:
    """Every step's movement of every parameter is what the mutant makes of it."""
    change = mutant.change(Update(adamw)).change

    def apply(pipeline: Pipeline) -> Pipeline:
        def step(model: nn.Module, *rest: object) -> object:
            before = {n: p.detach().clone() for n, p in model.named_parameters()}
            losses = pipeline.step(model, *rest)  # type: ignore[arg-type]
            with torch.no_grad():
                for n, p in model.named_parameters():
                    p.copy_(before[n] + change(before[n], p - before[n]))
            return losses

        return replace(pipeline, step=step)

    return Fault(name, breaks, (mutant.key, *also), pipeline=apply)

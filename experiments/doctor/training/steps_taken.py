"""The watched steps of a pipeline, and the objective's parts computed a second time."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from experiments.doctor.core import objective
from experiments.doctor.core.probe import Watched, watched_step
from experiments.doctor.core.subject import Subject
from experiments.doctor.core.ward import Broken, NotApplicable, undisturbed
from experiments.doctor.network.network_checks import batch_of
from experiments.doctor.step.optimizer_checks import kind_of

IMAGES = 64
LOSS_CLOSE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}  # relative; bf16 has 8 bits of mantissa


@dataclass
class Steps:
    """The watched steps, or the error that the first one raised, and the objective's parts computed a second time."""

    images: Tensor
    labels: Tensor
    plain: Watched | None = None
    again: Watched | None = None
    penalised: Watched | None = None
    error: Broken | None = None
    coefficient: float = 0.0
    task: float = 0.0
    task_gradient: objective.Gradients | None = None


def take_steps(subject: Subject) -> Steps:
    """Steps A, B and C. Raises NotApplicable without a usable batch."""
    images, labels = batch_of(subject, IMAGES)
    steps = Steps(images, labels)
    penalised = subject.objective.penalty is not None
    steps.coefficient = (subject.promise.peak or 0.01) if penalised else 0.0
    with undisturbed(subject):
        subject.model.train()
        try:
            with undisturbed(subject):
                steps.task, steps.task_gradient = own_task(subject, steps)
        except Exception:  # the step itself will say what is wrong
            steps.task_gradient = None
        try:
            with undisturbed(subject):
                for p in subject.model.parameters():
                    p.grad = None
                steps.plain = watched_step(subject, images, labels, 0.0)
                left = {name: p.grad for name, p in subject.model.named_parameters()}
            with undisturbed(subject):
                for name, p in subject.model.named_parameters():
                    kept = left.get(name)
                    p.grad = None if kept is None else kept.clone()
                steps.again = watched_step(subject, images, labels, 0.0)
            if penalised:
                with undisturbed(subject):
                    for p in subject.model.parameters():
                        p.grad = None
                    steps.penalised = watched_step(subject, images, labels, steps.coefficient)
        except Broken as error:
            steps.error = error
    return steps


def own_task(subject: Subject, steps: Steps, *, quantized: bool = True) -> tuple[float, objective.Gradients]:
    bare = without_hooks(subject)
    loss = objective.task_loss(bare, steps.images, steps.labels, quantized=quantized)
    return float(loss.detach()), objective.gradients(loss, bare.model)


def without_hooks(subject: Subject) -> Subject:
    """The subject with a copy of its network, whose parameters have no hooks that change their gradients."""
    try:
        return replace(subject, model=copy.deepcopy(subject.model))
    except Exception:  # a network of one's own that cannot be copied
        return subject


def done(seen: Watched | None) -> Watched:
    if seen is None:
        raise NotApplicable("the step did not run")
    return seen


def loss_value(subject: Subject, steps: Steps, *, quantized: bool) -> float:
    with torch.no_grad():
        return float(objective.task_loss(subject, steps.images, steps.labels, quantized=quantized))


def gradients_of(seen: Watched) -> objective.Gradients:
    return {n: torch.zeros_like(seen.before[n]) if g is None else g for n, g in seen.gradients.items()}


def of_weights(grads: objective.Gradients) -> objective.Gradients:
    return {name: g for name, g in grads.items() if kind_of(name) == "weights"}


def is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats


def promised_squares(subject: Subject) -> float:
    weights = {"logit_dz": subject.promise.lambda_dz or 0.0, "logit_bit": subject.promise.lambda_bit or 0.0}
    return sum(weight * objective.squares(subject.model, leaf)[0] for leaf, weight in weights.items())


def objective_penalty(subject: Subject) -> float:
    """The promised penalty, by its definition."""
    grouping = objective.channel_grouping(subject)
    return grouping.lasso(grouping.weights(subject.model))[0]


def other_images(seen: Tensor, given: Tensor) -> bool:
    return seen.shape != given.shape or not torch.equal(seen.float().cpu(), given.float().cpu())


def labels_are_mixed(subject: Subject, steps: Steps) -> bool:
    """With one label for all images a permutation changes nothing: is the loss then right?"""
    same = torch.full_like(steps.labels, int(steps.labels[0]))
    one = replace(steps, labels=same)
    squares = promised_squares(subject)
    with undisturbed(subject):
        subject.model.train()
        with undisturbed(subject):
            meant = loss_value(subject, one, quantized=True)
        seen = watched_step(subject, steps.images, same, 0.0)
    assert seen.losses is not None
    return abs(float(seen.losses.total) - squares - meant) < LOSS_CLOSE[subject.precision] * max(meant, 1.0)

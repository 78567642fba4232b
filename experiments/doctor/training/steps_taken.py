"""The watched steps of a pipeline, and the objective's parts computed a second time."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from experiments.doctor.core import objective
from experiments.doctor.network.network_checks import batch_of
from experiments.doctor.observe import StepTrace, watched_step
from experiments.doctor.pipeline import Pipeline
from experiments.doctor.runner import NotApplicable, PartFailed, preserve_state
from experiments.doctor.step.optimizer_checks import kind_of

IMAGES = 64
LOSS_CLOSE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}  # relative; bf16 has 8 bits of mantissa


@dataclass
class Steps:
    """The watched steps, or the error that the first one raised, and the objective's parts computed a second time."""

    images: Tensor
    labels: Tensor
    plain: StepTrace | None = None
    again: StepTrace | None = None
    penalised: StepTrace | None = None
    error: PartFailed | None = None
    coefficient: float = 0.0
    task: float = 0.0
    task_gradient: objective.Gradients | None = None


def take_steps(pipeline: Pipeline) -> Steps:
    """Steps A, B and C. Raises NotApplicable without a usable batch."""
    images, labels = batch_of(pipeline, IMAGES)
    steps = Steps(images, labels)
    penalised = pipeline.objective.penalty is not None
    steps.coefficient = (pipeline.expected.peak or 0.01) if penalised else 0.0
    with preserve_state(pipeline):
        pipeline.model.train()
        try:
            with preserve_state(pipeline):
                steps.task, steps.task_gradient = own_task(pipeline, steps)
        except Exception:  # the step itself will say what is wrong
            steps.task_gradient = None
        try:
            with preserve_state(pipeline):
                for p in pipeline.model.parameters():
                    p.grad = None
                steps.plain = watched_step(pipeline, images, labels, 0.0)
                left = {name: p.grad for name, p in pipeline.model.named_parameters()}
            with preserve_state(pipeline):
                for name, p in pipeline.model.named_parameters():
                    kept = left.get(name)
                    p.grad = None if kept is None else kept.clone()
                steps.again = watched_step(pipeline, images, labels, 0.0)
            if penalised:
                with preserve_state(pipeline):
                    for p in pipeline.model.parameters():
                        p.grad = None
                    steps.penalised = watched_step(pipeline, images, labels, steps.coefficient)
        except PartFailed as error:
            steps.error = error
    return steps


def own_task(pipeline: Pipeline, steps: Steps, *, quantized: bool = True) -> tuple[float, objective.Gradients]:
    """The cross entropy of the steps' batch as the network stands, and its gradients by name."""
    bare = without_hooks(pipeline)
    loss = objective.task_loss(bare, steps.images, steps.labels, quantized=quantized)
    return float(loss.detach()), objective.gradients(loss, bare.model)


def without_hooks(pipeline: Pipeline) -> Pipeline:
    """The pipeline with a copy of its network, whose parameters have no hooks that change their gradients."""
    try:
        return replace(pipeline, model=copy.deepcopy(pipeline.model))
    except Exception:  # a network of one's own that cannot be copied
        return pipeline


def done(seen: StepTrace | None) -> StepTrace:
    """The trace of a step. Raises NotApplicable where the step did not run."""
    if seen is None:
        raise NotApplicable("the step did not run")
    return seen


def loss_value(pipeline: Pipeline, steps: Steps, *, quantized: bool) -> float:
    """The cross entropy of the steps' batch, with quantizers on or off."""
    with torch.no_grad():
        return float(objective.task_loss(pipeline, steps.images, steps.labels, quantized=quantized))


def gradients_of(seen: StepTrace) -> objective.Gradients:
    """The gradients of a step by name; zeros where a parameter got none."""
    return {n: torch.zeros_like(seen.before[n]) if g is None else g for n, g in seen.gradients.items()}


def of_weights(grads: objective.Gradients) -> objective.Gradients:
    """The gradients of the weights alone, without the logits."""
    return {name: g for name, g in grads.items() if kind_of(name) == "weights"}


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm that keeps running statistics."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats


def expected_squares(pipeline: Pipeline) -> float:
    """lambda_dz sum theta_dz^2 + lambda_bit sum theta_bit^2 with the expected weights."""
    weights = {"logit_dz": pipeline.expected.lambda_dz or 0.0, "logit_bit": pipeline.expected.lambda_bit or 0.0}
    return sum(weight * objective.squares(pipeline.model, leaf)[0] for leaf, weight in weights.items())


def objective_penalty(pipeline: Pipeline) -> float:
    """The expected penalty, by its definition."""
    grouping = objective.channel_grouping(pipeline)
    return grouping.lasso(grouping.weights(pipeline.model))[0]


def other_images(seen: Tensor, given: Tensor) -> bool:
    """Whether the network saw other images than the step was given."""
    return seen.shape != given.shape or not torch.equal(seen.float().cpu(), given.float().cpu())


def labels_are_mixed(pipeline: Pipeline, steps: Steps) -> bool:
    """With one label for all images a permutation changes nothing: is the loss then right?"""
    same = torch.full_like(steps.labels, int(steps.labels[0]))
    one = replace(steps, labels=same)
    squares = expected_squares(pipeline)
    with preserve_state(pipeline):
        pipeline.model.train()
        with preserve_state(pipeline):
            meant = loss_value(pipeline, one, quantized=True)
        seen = watched_step(pipeline, steps.images, same, 0.0)
    assert seen.losses is not None
    return abs(float(seen.losses.total) - squares - meant) < LOSS_CLOSE[pipeline.precision] * max(meant, 1.0)

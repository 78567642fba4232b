"""One training step with quantization: its objective, its optimizer and its update. N images a batch.

Objective: task loss + lambda_dz sum theta_dz^2 + lambda_bit sum theta_bit^2 (CoDeQ eq. 16 and 19)
+ coefficient x sparsity penalty. Nothing here waits for the device, so a GPU is not held up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.training.devices import autocast
from utils_quantization import shared_quantized_weights

Penalty = Callable[[nn.Module], Tensor]

FLOAT16_EPSILON = 1e-3  # float16 rounds the average of squared gradients to 0 below 3e-8, and AdamW divides by its root


@dataclass(frozen=True)
class Objective:
    """What a step minimises beside the task loss.

    penalty: fn(model) -> scalar, weighted by the schedule's coefficient; None for none.
    lambda_dz, lambda_bit: weights of the squared logits in the loss; 0 where the optimizer decays them instead.
    label_smoothing, teacher, distill, temperature: of the task loss, see `task_loss`.
    """

    penalty: Penalty | None = None
    lambda_dz: float = 0.0
    lambda_bit: float = 0.0
    label_smoothing: float = 0.0
    teacher: nn.Module | None = None
    distill: float = 0.0
    temperature: float = 4.0


@dataclass(frozen=True)
class StepLosses:
    """The parts of one step's loss and the number of right answers, as scalars on the training device."""

    total: Tensor
    task: Tensor
    logits: Tensor
    groups: Tensor
    correct: Tensor


StepFunction = Callable[..., StepLosses]  # with the arguments of `train_step`
Gradients = Callable[..., StepLosses]  # with those of `step_gradients`


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    dz_learning_rate: float,
    bit_learning_rate: float,
    dz_decay: float = 0.0,
    bit_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """The optimizer's three groups, each named: "weights" (no decay), "logit_dz" and "logit_bit".

    dz_decay, bit_decay: decoupled decay on the logits; 0 where their squares are in the loss. A group without
    parameters is left out.
    """
    groups = {
        "weights": {"lr": learning_rate, "weight_decay": 0.0},
        "logit_dz": {"lr": dz_learning_rate, "weight_decay": dz_decay},
        "logit_bit": {"lr": bit_learning_rate, "weight_decay": bit_decay},
    }
    members: dict[str, list[nn.Parameter]] = {name: [] for name in groups}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            leaf = name.rpartition(".")[2]
            members[leaf if leaf in groups else "weights"].append(parameter)
    return [
        {"name": name, **settings, "base_lr": settings["lr"], "params": members[name]}
        for name, settings in groups.items()
        if members[name]
    ]


def make_optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW over the named groups, in one fused update where the device has it."""
    for group in groups:
        if any(p.dtype == torch.float16 for p in group["params"]):
            group.setdefault("eps", FLOAT16_EPSILON)
    kinds = {p.device.type for group in groups for p in group["params"]}
    return torch.optim.AdamW(groups, fused=kinds <= {"cpu", "cuda"})


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    objective: Objective,
    coefficient: float,
    precision: torch.dtype = torch.float32,
    gradients: Gradients | None = None,
) -> StepLosses:
    """One update on one batch. Each quantized weight is computed once, for the network and the penalty alike.

    images: (N, 3, H, W) normalised; labels: (N,). `coefficient` weights the penalty, which is not computed at 0.
    gradients: computes losses and gradients, by default `step_gradients`.
    """
    optimizer.zero_grad(set_to_none=True)
    losses = (gradients or step_gradients)(model, images, labels, objective, coefficient, precision)
    optimizer.step()
    return losses


def step_gradients(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    objective: Objective,
    coefficient: float | Tensor,
    precision: torch.dtype = torch.float32,
) -> StepLosses:
    """The part of `train_step` before the update: the losses of a batch, and their gradients added to the parameters'.

    coefficient: a tensor () on the training device stands for a number other than 0 that is read there.
    """
    with shared_quantized_weights(model):
        with autocast(images.device, precision):
            scores = model(images)
            task = task_loss(scores.float(), images, labels, objective)
        logits = squared_logits(model, objective.lambda_dz, objective.lambda_bit)
        penalised = isinstance(coefficient, Tensor) or coefficient
        groups = objective.penalty(model) if objective.penalty and penalised else task.new_zeros(())
        total = task + logits + coefficient * groups
    correct = (scores.argmax(1) == labels).sum()
    total.backward()
    return StepLosses(*(part.detach() for part in (total, task, logits, groups, correct)))


def task_loss(scores: Tensor, images: Tensor, labels: Tensor, objective: Objective) -> Tensor:
    """The mean over N of the cross-entropy H; with a teacher, distillation from its scores (Hinton et al. 2015):

    (1 - a) H(labels, scores) + a T^2 KL(softmax(teacher / T) || softmax(scores / T)); a is `distill`, T `temperature`.
    """
    task = F.cross_entropy(scores, labels, label_smoothing=objective.label_smoothing)
    if objective.teacher is None:
        return task
    share, heat = objective.distill, objective.temperature
    with torch.no_grad():
        wanted = F.log_softmax(objective.teacher(images).float() / heat, 1)
    distance = F.kl_div(F.log_softmax(scores / heat, 1), wanted, reduction="batchmean", log_target=True)
    return (1 - share) * task + share * heat**2 * distance


def squared_logits(model: nn.Module, lambda_dz: float, lambda_bit: float) -> Tensor:
    """lambda_dz sum theta_dz^2 + lambda_bit sum theta_bit^2 over all layers (CoDeQ eq. 16 and 19), a scalar.

    Logits that are not trained are left out: they would add a constant.
    """
    total = next(model.parameters()).new_zeros(())
    trained = [(name.rpartition(".")[2], p) for name, p in model.named_parameters() if p.requires_grad]
    for weight, leaf in ((lambda_dz, "logit_dz"), (lambda_bit, "logit_bit")):
        members: list[Tensor] = [p for name, p in trained if name == leaf]
        if weight and members:
            total = total + weight * torch.stack(members).square().sum()
    return total


def is_hooked(model: nn.Module) -> bool:
    """Whether a module has a hook, which a recorded or compiled step would not call."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return any(getattr(module, kind) for module in model.modules() for kind in kinds)

"""Training with quantization: one step, one epoch, one evaluation. What is measured leaves as records.

Objective of a step: task loss + lambda_dz sum theta_dz^2 + lambda_bit sum theta_bit^2 (CoDeQ eq. 16 and 19)
+ coefficient x sparsity penalty. Nothing here waits for the device inside a step, so a GPU is not held up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.data import ImageData, epoch_batches, steps_per_epoch
from src.training.devices import DEVICES, PRECISIONS, TrainingError, autocast, pick_device, pick_precision
from src.training.epoch_means import EpochMeans, Step, StepLosses
from src.training.evaluation import evaluate, layer_records, predict, summary
from src.training.finiteness import first_not_finite, not_finite, watched_update
from src.training.history import EpochRecord
from src.training.interrupts import raise_pending
from utils_quantization import quantized_layers, shared_quantized_weights

__all__ = [
    "DEVICES",
    "PRECISIONS",
    "EpochMeans",
    "Objective",
    "Step",
    "StepFunction",
    "StepLosses",
    "TrainingError",
    "autocast",
    "cosine_to_zero",
    "epoch_seed",
    "evaluate",
    "hold_then_linear",
    "layer_records",
    "make_optimizer",
    "measure_epoch",
    "parameter_groups",
    "pick_device",
    "pick_precision",
    "predict",
    "squared_logits",
    "step_gradients",
    "summary",
    "train_epoch",
    "train_step",
]

Penalty = Callable[[nn.Module], Tensor]
Factor = Callable[[float], float]
StepFunction = Callable[..., StepLosses]  # with the arguments of `train_step`
CALM = "lower the learning rate or the peak of the penalty"
STEPS_BETWEEN_CHECKS = 16  # reading the loss makes a GPU wait; on a CPU it costs nothing and every step is checked


@dataclass(frozen=True)
class Objective:
    """What a step minimises beside the task loss.

    penalty: fn(model) -> scalar, weighed by the schedule's coefficient; None for none.
    lambda_dz, lambda_bit: weights of the squared logits in the loss; 0 where the optimizer decays them instead.
    """

    penalty: Penalty | None = None
    lambda_dz: float = 0.0
    lambda_bit: float = 0.0


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

    dz_decay, bit_decay: the optimizer's decoupled decay on the logits; 0 where their squares are in the loss. Every
    trainable parameter is in exactly one group; a group without parameters is left out.
    """
    trainable = [(name.rpartition(".")[2], p) for name, p in model.named_parameters() if p.requires_grad]
    settings = {"logit_dz": (dz_learning_rate, dz_decay), "logit_bit": (bit_learning_rate, bit_decay)}
    groups = [
        {
            "name": "weights",
            "lr": learning_rate,
            "weight_decay": 0.0,
            "params": [p for leaf, p in trainable if leaf not in settings],
        }
    ]
    for group, (rate, decay) in settings.items():
        members = [p for leaf, p in trainable if leaf == group]
        groups.append({"name": group, "lr": rate, "weight_decay": decay, "params": members})
    return [{**group, "base_lr": group["lr"]} for group in groups if group["params"]]


def make_optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW over the named groups, in one fused update where the device has it."""
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
) -> StepLosses:
    """One update on one batch. Each quantized weight is computed once, for the network and the penalty alike.

    images: (N, 3, H, W) normalised; labels: (N,). `coefficient` weighs the penalty, which is not computed at 0.
    """
    optimizer.zero_grad(set_to_none=True)
    losses = step_gradients(model, images, labels, objective, coefficient, precision)
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
            task = F.cross_entropy(scores.float(), labels)
        logits = squared_logits(model, objective.lambda_dz, objective.lambda_bit)
        penalised = objective.penalty is not None and (isinstance(coefficient, Tensor) or coefficient)
        groups = objective.penalty(model) if objective.penalty and penalised else task.new_zeros(())
        total = task + logits + coefficient * groups
        total.backward()
    correct = (scores.argmax(1) == labels).sum()
    return StepLosses(*(part.detach() for part in (total, task, logits, groups, correct)))


def squared_logits(model: nn.Module, lambda_dz: float, lambda_bit: float) -> Tensor:
    """lambda_dz sum theta_dz^2 + lambda_bit sum theta_bit^2 over all layers (CoDeQ eq. 16 and 19), a scalar.

    Logits that are not trained are left out: they would add a constant.
    """
    total = next(model.parameters()).new_zeros(())
    for weight, leaf in ((lambda_dz, "logit_dz"), (lambda_bit, "logit_bit")):
        members: list[Tensor] = [
            p for name, p in model.named_parameters() if name.rpartition(".")[2] == leaf and p.requires_grad
        ]
        if weight and members:
            total = total + weight * torch.stack(members).square().sum()
    return total


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: ImageData,
    objective: Objective,
    *,
    epoch: int,
    epochs: int,
    batch_size: int,
    coefficient: float,
    lr_lambda: Factor,
    precision: torch.dtype = torch.float32,
    seed: int = 0,
    crop_padding: int = 4,
    flip: bool = True,
    start: int = 0,
    step: StepFunction | None = None,
) -> Iterator[Step]:
    """Train epoch `epoch` (from 0) of `epochs`, yielding after each step.

    lr_lambda: share of the run done (0 to 1) -> factor on the learning rate of the group "weights"; the logits'
        rates stay as they are.
    start: steps of this epoch that were taken before; they are left out. step: what a step does, `train_step` by
        default; it gets the same arguments.
    The order of the images, the crops and the flips depend on `seed` and `epoch` alone, so an epoch can be repeated, or
    taken up at any step. Raises TrainingError once a loss or gradient is not finite, and between two steps what
    `interrupts.between_steps` holds back.
    """
    model.train()
    take = step or train_step
    generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
    steps = steps_per_epoch(data, batch_size)
    batches = epoch_batches(data, batch_size, generator, crop_padding=crop_padding, flip=flip, start=start)
    parameters = list(model.named_parameters())
    every = 1 if data.train_images.device.type == "cpu" else STEPS_BETWEEN_CHECKS
    raise_pending()
    for index, (images, labels) in enumerate(batches, start):
        look = index % every == 0 or index == steps - 1
        _scale_learning_rate(optimizer, lr_lambda((epoch + index / steps) / epochs))
        with watched_update(optimizer, parameters, images, look) as found:
            losses = take(model, optimizer, images, labels, objective, coefficient, precision)
        if look and (found.text or not torch.isfinite(losses.total)):
            first = found.text or first_not_finite(images, parameters)
            raise TrainingError(_not_finite(losses, epoch, index, first))
        yield Step(index, steps, len(labels), losses)
        raise_pending()


def measure_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: ImageData,
    means: EpochMeans,
    *,
    epoch: int,
    coefficient: float,
    seconds: float,
    precision: torch.dtype = torch.float32,
) -> EpochRecord:
    """The record of an epoch that has just been trained (`epoch` from 0): test set, sparsity and bits as they are now.

    Raises TrainingError where the test loss is not finite: the epoch's last update may be what broke the network.
    """
    test_loss, accuracy = evaluate(model, data, precision=precision)
    if not math.isfinite(test_loss):
        broken = [*not_finite(model.state_dict().items()), "none of the weights"][0]
        raise TrainingError(
            f"the test loss is {test_loss} after epoch {epoch + 1}; first weight that is not finite: {broken}; {CALM}"
        )
    layers = layer_records(model)
    sizes = {name: cast(Tensor, layer.weight).numel() for name, layer in quantized_layers(model).items()}
    return EpochRecord(
        epoch=epoch + 1,
        coefficient=coefficient,
        learning_rate=optimizer.param_groups[0]["lr"],
        test_loss=test_loss,
        accuracy=accuracy,
        seconds=seconds,
        layers=layers,
        **means.read(),
        **summary(layers, sizes),
    )


def epoch_seed(seed: int, epoch: int) -> int:
    """A seed of its own for every epoch, so that a resumed run draws what an unbroken one does."""
    return seed * 1_000_003 + epoch


def hold_then_linear(hold: float) -> Factor:
    """1 for the first `hold` share of the run, then a straight line to 0 at its end."""
    return lambda done: 1.0 if done < hold else max(0.0, (1 - done) / (1 - hold))


def cosine_to_zero(done: float) -> float:
    """(1 + cos(pi done)) / 2."""
    return (1 + math.cos(math.pi * done)) / 2


def _scale_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        if group["name"] == "weights":
            group["lr"] = group["base_lr"] * factor


def _not_finite(losses: StepLosses, epoch: int, index: int, first: str) -> str:
    total = losses.total.item()
    what = "a gradient is not finite" if math.isfinite(total) else f"the loss is {total}"
    return (
        f"{what} at epoch {epoch + 1}, step {index + 1} (loss {total:.4g}: task {losses.task.item():.4g}, "
        f"logits {losses.logits.item():.4g}, groups {losses.groups.item():.4g}); first tensor that is not finite: "
        f"{first or 'none of inputs, weights and gradients'}; {CALM}"
    )

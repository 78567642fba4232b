"""Training with quantization: one step, one epoch, one evaluation. What is measured leaves as records.

Objective of a step: task loss + lambda_dz sum theta_dz^2 + lambda_bit sum theta_bit^2 (CoDeQ eq. 16 and 19)
+ coefficient x sparsity penalty. Nothing here waits for the device inside a step, so a GPU is not held up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.data import ImageData, epoch_batches, steps_per_epoch, test_batches
from src.records import EpochRecord, LayerRecord
from utils_quantization import quantized_layers, quantizer_of, shared_quantized_weights

Penalty = Callable[[nn.Module], Tensor]
Factor = Callable[[float], float]
DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "fp32", "bf16")
CALM = "lower the learning rate or the peak of the penalty"
EVALUATION_BATCH = 250  # larger batches fall out of the cache and take longer
STEPS_BETWEEN_CHECKS = 16  # reading the loss waits for a GPU; NaN is still found within seconds


class TrainingError(ValueError):
    """Training cannot go on: a device that is absent, or a loss that is no longer a number."""


@dataclass(frozen=True)
class StepLosses:
    """The parts of one step's loss, as scalars on the training device, and how many images were right."""

    total: Tensor
    task: Tensor
    logits: Tensor
    groups: Tensor
    correct: Tensor


@dataclass(frozen=True)
class Step:
    """Where an epoch stands: `index` of `steps` (from 0), with a batch of `images`. `loss()` waits for the device."""

    index: int
    steps: int
    images: int
    losses: StepLosses

    def loss(self) -> float:
        return float(self.losses.total)


@dataclass(frozen=True)
class Objective:
    """What a step minimises beside the task loss.

    penalty: fn(model) -> scalar, weighed by the schedule's coefficient; None for none.
    lambda_dz, lambda_bit: weights of the squared logits in the loss; 0 where the optimizer decays them instead.
    """

    penalty: Penalty | None = None
    lambda_dz: float = 0.0
    lambda_bit: float = 0.0


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" takes MPS, then CUDA, then the CPU. Raises TrainingError for an absent one."""
    if name not in DEVICES:
        raise TrainingError(f"device {name!r} is unknown: choose one of {', '.join(DEVICES)}")
    present = {"mps": torch.backends.mps.is_available(), "cuda": torch.cuda.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, here in present.items() if here))
    if not present[name]:
        here = [kind for kind, found in present.items() if found]
        raise TrainingError(f"device {name!r} is not present here: use one of {', '.join(here)}, or auto")
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The arithmetic of forward and backward passes: torch.float32 or torch.bfloat16.

    "auto" takes bfloat16 where the hardware multiplies it (AVX512_BF16 or AMX on a CPU, any CUDA device that supports
    it): elsewhere it is emulated and slower. Weights, logits, BatchNorm statistics and optimizer state are float32.
    """
    if name not in PRECISIONS:
        raise TrainingError(f"precision {name!r} is unknown: choose one of {', '.join(PRECISIONS)}")
    if name != "auto":
        return torch.bfloat16 if name == "bf16" else torch.float32
    return torch.bfloat16 if _multiplies_bf16(device) else torch.float32


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
    with shared_quantized_weights(model):
        with autocast(images.device, precision):
            scores = model(images)
            task = F.cross_entropy(scores.float(), labels)
        logits = squared_logits(model, objective.lambda_dz, objective.lambda_bit)
        zero = task.new_zeros(())
        groups = objective.penalty(model) if objective.penalty is not None and coefficient else zero
        total = task + logits + coefficient * groups
        optimizer.zero_grad(set_to_none=True)
        total.backward()
    optimizer.step()
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
    weights_factor: Factor,
    precision: torch.dtype = torch.float32,
    seed: int = 0,
    crop_padding: int = 4,
    flip: bool = True,
) -> Iterator[Step]:
    """Train epoch `epoch` (from 0) of `epochs`, yielding after each step.

    weights_factor: share of the run done (0 to 1) -> factor on the learning rate of the group "weights"; the logits'
        rates stay as they are.
    The order of the images, the crops and the flips depend on `seed` and `epoch` alone, so an epoch can be repeated.
    Raises TrainingError once the loss is not finite.
    """
    model.train()
    generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
    steps = steps_per_epoch(data, batch_size)
    batches = epoch_batches(data, batch_size, generator, crop_padding=crop_padding, flip=flip)
    for index, (images, labels) in enumerate(batches):
        _scale_learning_rate(optimizer, weights_factor((epoch + index / steps) / epochs))
        losses = train_step(model, optimizer, images, labels, objective, coefficient, precision)
        if index % STEPS_BETWEEN_CHECKS == 0 or index == steps - 1:
            _check_finite(losses, epoch, index, model)
        yield Step(index, steps, len(labels), losses)


class EpochMeans:
    """Sums of step losses on the device; their means are read once, when the epoch is over."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._steps = 0
        self._images = 0

    def add(self, step: Step) -> None:
        parts = step.losses
        row = torch.stack([parts.total, parts.task, parts.logits, parts.groups, parts.correct.to(parts.total.dtype)])
        self._sums = row if self._sums is None else self._sums + row
        self._steps += 1
        self._images += step.images

    def read(self) -> dict[str, float]:
        """Means over the steps: loss, task_loss, logit_penalty, group_penalty; train_accuracy over the images."""
        if self._sums is None:
            raise TrainingError("no step was taken in this epoch: the training set is empty")
        total, task, logits, groups, correct = self._sums.tolist()
        means = [value / self._steps for value in (total, task, logits, groups)]
        names = ("loss", "task_loss", "logit_penalty", "group_penalty")
        return {**dict(zip(names, means, strict=True)), "train_accuracy": correct / self._images}


@torch.no_grad()
def evaluate(
    model: nn.Module, data: ImageData, batch_size: int = EVALUATION_BATCH, precision: torch.dtype = torch.float32
) -> tuple[float, float]:
    """Mean cross entropy and share of right answers over the whole test set, in eval mode, with the quantizers as they
    are switched. The model's mode is restored."""
    predicted, loss = predict(model, data, batch_size, precision)
    return loss, (predicted == data.test_labels).double().mean().item()


@torch.no_grad()
def predict(
    model: nn.Module, data: ImageData, batch_size: int = EVALUATION_BATCH, precision: torch.dtype = torch.float32
) -> tuple[Tensor, float]:
    """The predicted class of every test image, (N,), and the mean cross entropy. The model's mode is restored."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        predicted, losses = [], []
        with shared_quantized_weights(model), autocast(data.test_images.device, precision):
            for images, labels in test_batches(data, batch_size):
                scores = model(images).float()
                losses.append(F.cross_entropy(scores, labels, reduction="sum"))
                predicted.append(scores.argmax(1))
        return torch.cat(predicted), torch.stack(losses).sum().item() / len(data.test_labels)
    finally:
        for module, state in training.items():
            module.training = state


@torch.no_grad()
def layer_records(model: nn.Module) -> tuple[LayerRecord, ...]:
    """Bits, dead zone, zeros and dead filters of every quantized layer, measured on the quantized weights."""
    layers = quantized_layers(model)
    with shared_quantized_weights(model):
        weights = {name: cast(Tensor, layer.weight).flatten(1) for name, layer in layers.items()}
    records = []
    for name, layer in layers.items():
        quantizer = cast(Any, quantizer_of(layer))
        zero = weights[name] == 0
        records.append(
            LayerRecord(
                name=name,
                bits=float(quantizer.get_bitwidth()),
                dead_zone=float(quantizer.dead_zone_share()),
                sparsity=zero.double().mean().item(),
                dead=tuple(zero.all(1).tolist()),
            )
        )
    return tuple(records)


def summary(layers: tuple[LayerRecord, ...], sizes: Mapping[str, int]) -> dict[str, float]:
    """Network-wide figures from the layers'; `sizes`: number of weights of each.

    unstructured_sparsity: share of all quantized weights that are 0. structured_sparsity: share of all their output
    channels whose filter is entirely 0. mean_bits: plain mean over layers.
    """
    weights = sum(sizes[layer.name] for layer in layers)
    return {
        "unstructured_sparsity": sum(layer.sparsity * sizes[layer.name] for layer in layers) / weights,
        "structured_sparsity": sum(layer.dead_channels for layer in layers) / sum(layer.channels for layer in layers),
        "mean_bits": sum(layer.bits for layer in layers) / len(layers),
    }


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
        raise TrainingError(f"the test loss is {test_loss} after epoch {epoch + 1}; {_first_broken(model)}; {CALM}")
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
    return (1 + torch.cos(torch.tensor(torch.pi * done, dtype=torch.float64)).item()) / 2


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[Any]:
    """Mixed precision on `device`, or nothing where `precision` is float32."""
    return torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)


def _scale_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        if group["name"] == "weights":
            group["lr"] = group["base_lr"] * factor


def _check_finite(losses: StepLosses, epoch: int, index: int, model: nn.Module) -> None:
    if torch.isfinite(losses.total):
        return
    raise TrainingError(
        f"the loss is {losses.total.item()} at epoch {epoch + 1}, step {index + 1} (task {losses.task.item():.4g}, "
        f"logits {losses.logits.item():.4g}, groups {losses.groups.item():.4g}); {_first_broken(model)}; {CALM}"
    )


def _first_broken(model: nn.Module) -> str:
    bad = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    return f"first parameter that is not finite: {bad[0] if bad else 'none yet'}"


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))

"""One epoch of training: its batches, its learning rate, and the means of its steps' losses."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from src.data import ImageData, epoch_batches, steps_per_epoch
from src.training.devices import TrainingError
from src.training.interrupts import raise_pending
from src.training.step import Objective, StepFunction, StepLosses, train_step

LrLambda = Callable[[float], float]
STEPS_BETWEEN_CHECKS = 16  # reading the loss makes a GPU wait; on a CPU it costs nothing and every step is checked
DIVERGENCE_HINT = "lower the learning rate or the peak of the penalty"
MEANS = ("loss", "task_loss", "logit_penalty", "group_penalty")


@dataclass(frozen=True)
class Step:
    """A step that was taken: number `index` (from 0) of the epoch's `steps`, on a batch of `images` images."""

    index: int
    steps: int
    images: int
    losses: StepLosses

    def loss(self) -> float:
        """The total loss. Waits for the device."""
        return float(self.losses.total)


@dataclass
class EpochMeans:
    """Sums of the losses of `steps` steps on the device; their means are read once, when the epoch is over."""

    sums: Tensor | None = None
    steps: int = 0
    images: int = 0

    def add(self, step: Step) -> None:
        """Add the losses of one step."""
        parts = step.losses
        row = torch.stack([parts.total, parts.task, parts.logits, parts.groups, parts.correct.to(parts.total.dtype)])
        self.sums = row if self.sums is None else self.sums + row
        self.steps += 1
        self.images += step.images

    def read(self) -> dict[str, Any]:
        """Means over the steps (`MEANS`) and train_accuracy over the images, of at least one step."""
        assert self.sums is not None
        *losses, correct = self.sums.tolist()
        means = {name: total / self.steps for name, total in zip(MEANS, losses, strict=True)}
        return {**means, "train_accuracy": correct / self.images}


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
    lr_lambda: LrLambda,
    precision: torch.dtype = torch.float32,
    seed: int = 0,
    crop_padding: int = 4,
    flip: bool = True,
    start: int = 0,
    step: StepFunction | None = None,
) -> Iterator[Step]:
    """Train epoch `epoch` (from 0) of `epochs`, yielding after each step.

    lr_lambda: progress of the run (0 to 1) -> factor on the learning rate of the group "weights" alone.
    start: steps of this epoch that were taken before; they are left out. step: by default `train_step`.
    Order, crops and flips depend on `seed` and `epoch` alone, so an epoch can be resumed at any step. Raises
    TrainingError once a loss or gradient is not finite, and between two steps the interruption that was deferred.
    """
    model.train()
    step_fn = step or train_step
    generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
    steps, dtype = steps_per_epoch(data, batch_size), next(model.parameters()).dtype
    batches = epoch_batches(data, batch_size, generator, crop_padding=crop_padding, flip=flip, start=start)
    every = 1 if data.train_images.device.type == "cpu" else STEPS_BETWEEN_CHECKS
    raise_pending()
    for index, (images, labels) in enumerate(batches, start):
        factor = lr_lambda((epoch + index / steps) / epochs)
        for group in optimizer.param_groups:
            if group["name"] == "weights":
                group["lr"] = group["base_lr"] * factor
        losses = step_fn(model, optimizer, images.to(dtype), labels, objective, coefficient, precision)
        if index % every == 0 or index == steps - 1:
            _check_finite(model, losses, f"at epoch {epoch + 1}, step {index + 1}")
        yield Step(index, steps, len(labels), losses)
        raise_pending()


def _check_finite(model: nn.Module, losses: StepLosses, where: str) -> None:
    """Raise TrainingError unless the loss and all gradients of a step are finite.

    The gradient it names is the one that backward reached first: it goes through the network from its end.
    """
    gradients = [p.grad.reshape(-1) for p in model.parameters() if p.grad is not None]
    # NaN and Inf survive a sum, so one sum tells whether there is anything to search for.
    if torch.isfinite(torch.cat([losses.total.reshape(1), *gradients]).sum()):
        return
    total, task, logits, groups, _ = (float(part) for part in vars(losses).values())
    what = "a gradient is not finite" if math.isfinite(total) else f"the loss is {total}"
    bad = not_finite((name, p.grad) for name, p in model.named_parameters())
    raise TrainingError(
        f"{what} {where} (loss {total:.4g}: task {task:.4g}, logits {logits:.4g}, groups {groups:.4g}); first gradient "
        f"that is not finite: {bad[-1] if bad else 'none'}; {DIVERGENCE_HINT}"
    )


def not_finite(tensors: Iterable[tuple[str, object]]) -> list[str]:
    """The names of the floating-point tensors that hold NaN or Inf, in the order given. Waits for the device once."""
    floats = [(name, t) for name, t in tensors if isinstance(t, Tensor) and t.is_floating_point() and t.numel()]
    if not floats:
        return []
    finite = torch.stack([torch.isfinite(t).all().to(floats[0][1].device) for _, t in floats]).tolist()
    bad = [name for (name, _), good in zip(floats, finite, strict=True) if not good]
    # as the network has them, without the way through their quantizers
    return [re.sub(r"\.parametrizations\.weight\.(original|0\.quantizer)", ".weight", name) for name in bad]


def epoch_seed(seed: int, epoch: int) -> int:
    """A different seed for every epoch, so that a resumed run draws what an unbroken one does."""
    return seed * 1_000_003 + epoch


def hold_then_linear(hold: float) -> LrLambda:
    """1 for the first `hold` share of the run, then a straight line to 0 at its end."""
    return lambda progress: 1.0 if progress < hold else max(0.0, (1 - progress) / (1 - hold))


def cosine_to_zero(progress: float) -> float:
    """(1 + cos(pi progress)) / 2."""
    return (1 + math.cos(math.pi * progress)) / 2


def warmed_up(lr_lambda: LrLambda, share: float) -> LrLambda:
    """`lr_lambda` times a straight line from 0 to 1 over the first `share` of the run; itself where that is 0."""
    return (lambda progress: min(progress / share, 1.0) * lr_lambda(progress)) if share else lr_lambda

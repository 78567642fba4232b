"""What a training step gives, and its means over an epoch, which can be put down in mid-epoch and taken up again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from src.training.devices import TrainingError


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


class EpochMeans:
    """Sums of step losses on the device, `steps` of them; their means are read once, when the epoch is over."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._images = 0
        self.steps = 0

    def add(self, step: Step) -> None:
        parts = step.losses
        row = torch.stack([parts.total, parts.task, parts.logits, parts.groups, parts.correct.to(parts.total.dtype)])
        self._sums = row if self._sums is None else self._sums + row
        self.steps += 1
        self._images += step.images

    def read(self) -> dict[str, float]:
        """Means over the steps: loss, task_loss, logit_penalty, group_penalty; train_accuracy over the images."""
        if self._sums is None:
            raise TrainingError("no step was taken in this epoch: the training set is empty")
        total, task, logits, groups, correct = self._sums.tolist()
        means = [value / self.steps for value in (total, task, logits, groups)]
        names = ("loss", "task_loss", "logit_penalty", "group_penalty")
        return {**dict(zip(names, means, strict=True)), "train_accuracy": correct / self._images}

    def state(self) -> dict[str, Any]:
        """The sums as they are, so that an epoch that is taken up again adds up to the same bits."""
        return {"sums": self._sums, "steps": self.steps, "images": self._images}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> EpochMeans:
        """The inverse of `state`. Raises ValueError for anything else."""
        sums, steps, images = (state.get(name) for name in ("sums", "steps", "images"))
        counts = all(isinstance(n, int) and n >= 0 for n in (steps, images)) and bool(steps) == bool(images)
        shaped = sums.shape == (5,) if isinstance(sums, Tensor) else sums is None and steps == 0
        if not counts or not shaped:
            raise ValueError(f"not the sums of an epoch: steps {steps!r}, images {images!r}, sums {sums!r}")
        means = cls()
        means._sums, means.steps, means._images = sums, steps, images  # type: ignore[assignment]
        return means

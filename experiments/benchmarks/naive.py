"""The pipeline as it is written down first, kept for comparison: correct, and slow in five ordinary ways.

float32 and contiguous; a quantizer that runs again for every reader of a weight; a penalty in a Python loop over
channels; torchvision's transforms image by image; an optimizer that updates parameter by parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from src import training
from src.data import ImageData
from src.pruning import channel_groups
from src.quantizer import RANGE_QUANTILE, STEP_EPSILON, DeadZoneLDZCompander

Batch = tuple[Tensor, Tensor]
GroupParts = list[list[tuple[str, str, int, int]]]


class NaiveQuantizer(DeadZoneLDZCompander):
    """The formulas of src/quantizer.py, one by one: a full sort for the range, rounding by detached differences."""

    def forward(self, w: Tensor) -> Tensor:
        """Quantize w, of any shape."""
        range_ = torch.quantile(w.detach().abs(), RANGE_QUANTILE)
        dead_zone = 2 * range_ * (1 - self.logit_dz.tanh().abs())
        bits = _through(self.logit_bit.tanh().abs() * (self.max_bits - self.min_bits) + self.min_bits, torch.round)
        levels = 2 ** (bits - 1) - 1
        step = (range_ - dead_zone / 2) / (levels - 0.5) + STEP_EPSILON
        shift = dead_zone / 2 - step / 2
        outside = w.sign() * _through(w.abs() - shift, torch.relu)
        index = _through(_through(outside / step, torch.round), lambda q: torch.clamp(q, -levels, levels))
        return step * index + shift * index.sign()


def group_parts(model: nn.Module) -> GroupParts:
    """For each removable channel the (module, parameter, dimension, index) of all that goes with it."""
    groups = channel_groups(model)
    return [
        [(module, name, dim, int(index)) for module, name, dim, indices in groups.slices(group) for index in indices]
        for group in range(len(groups))
    ]


def naive_penalty(model: nn.Module, parts: GroupParts) -> Tensor:
    """The coupled group lasso, a channel at a time. Each parameter is read once, which runs its quantizer again."""
    keys = dict.fromkeys(part[:2] for group in parts for part in group)
    read = {(module, name): getattr(model.get_submodule(module), name) for module, name in keys}
    total = next(model.parameters()).new_zeros(())
    for group in parts:
        squares = torch.zeros_like(total)
        for module, name, dim, index in group:
            squares = squares + read[module, name].select(dim, index).square().sum()
        if squares > 0:
            total = total + squares.sqrt()
    return total


def naive_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, objective: training.Objective, coefficient: float
) -> float:
    """One update in float32, and its loss, read at once: the same objective as `src.training.train_step`."""
    images, labels = batch
    loss = F.cross_entropy(model(images), labels)
    loss = loss + training.squared_logits(model, objective.lambda_dz, objective.lambda_bit)
    if objective.penalty is not None:
        loss = loss + coefficient * objective.penalty(model)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def naive_loader(data: ImageData, batch_size: int, crop_padding: int, flip: bool) -> DataLoader[tuple[Tensor, ...]]:
    """Shuffled training batches, each image through torchvision's transforms by itself; no worker processes."""
    from torchvision import transforms

    crop = [transforms.RandomCrop(32, padding=crop_padding)] if crop_padding else []
    mirror = [transforms.RandomHorizontalFlip()] if flip else []
    tail = [transforms.ToTensor(), transforms.Normalize(data.mean, data.std)]
    transform = transforms.Compose([transforms.ToPILImage(), *crop, *mirror, *tail])

    def collate(images: Sequence[Batch]) -> Batch:
        return torch.stack([transform(image) for image, _ in images]), torch.stack([label for _, label in images])

    images = TensorDataset(data.train_images.cpu(), data.train_labels.cpu())
    return DataLoader(images, batch_size, shuffle=True, drop_last=True, collate_fn=collate)


def _through(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    return x + (function(x) - x).detach()

"""The small network, its optimizer and its images that the tests of this folder train with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from resnet import BasicBlock, ResNet
from src.data import ImageData, normalize
from src.quantizer import DeadZoneLDZCompander
from src.training import make_optimizer, parameter_groups
from utils_quantization import attach_weight_quantizers

RATES = {"learning_rate": 0.01, "dz_learning_rate": 0.02, "bit_learning_rate": 0.03}


def network(seed: int = 0) -> ResNet:
    """One block a stage, widths 4, 8, 16."""
    torch.manual_seed(seed)
    return ResNet(BasicBlock, [1, 1, 1], widths=(4, 8, 16))


def quantized(seed: int = 0, **settings: Any) -> ResNet:
    """`network` with six quantizers, whose dead zone starts wide enough for a good share of zeros."""
    model = network(seed)
    kwargs = {"init_deadzone_logit": 1.0, "init_bit_logit": 0.8, **settings}
    assert len(attach_weight_quantizers(model, ["conv1", "linear"], DeadZoneLDZCompander, kwargs)) == 6
    return model


def optimizer_of(model: nn.Module, **decays: float) -> torch.optim.Optimizer:
    return make_optimizer(parameter_groups(model, **RATES, **decays))


def images(train: int = 64, test: int = 30) -> ImageData:
    generator = torch.Generator().manual_seed(1)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return pixels, torch.randint(10, (count,), generator=generator)

    names = tuple("abcdefghij")
    return ImageData("noise", "noise", *draw(train), *draw(test), names, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def batch(count: int = 16) -> tuple[Tensor, Tensor]:
    data = images(count)
    return normalize(data.train_images, data.mean, data.std), data.train_labels

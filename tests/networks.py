"""Tiny networks, one per topology, small enough that their groups and counts can be written by hand.

Every one takes images of (2, 6, 6) (`IMAGE`) and returns two scores, and has BatchNorm statistics that differ from
channel to channel after `randomize`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet import BasicBlock, PadShortcut, ResNet

IMAGE = (2, 6, 6)


class Chain(nn.Module):
    """conv1 2->3, bn1, ReLU, conv2 3->4 with bias and no BatchNorm, ReLU, mean over pixels, flatten, linear 4->2."""

    def __init__(self, padding: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 3, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(3)
        self.conv2 = nn.Conv2d(3, 4, 3, padding=padding)
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


class IdentityShortcut(nn.Module):
    """stem 2->3, then a block of inner width 2 beside the identity: stream = relu(b(relu(bn(a(stream)))) + stream)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 3, padding=1, bias=False)
        self.a = nn.Conv2d(3, 2, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(2)
        self.b = nn.Conv2d(2, 3, 3, padding=1, bias=False)
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.b(F.relu(self.bn(self.a(x)))) + x)
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


class OptionAShortcut(nn.Module):
    """stem 2->2, then one convolution 2->4 of stride 2 beside the padded shortcut: stem c is channel c + 1 after it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 2, 3, padding=1, bias=False)
        self.a = nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.shortcut = PadShortcut(1)
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.bn(self.a(x)) + self.shortcut(x))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


class OptionBShortcut(nn.Module):
    """stem 2->2, then one convolution 2->3 of stride 2 beside a 1x1 convolution of stride 2 with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 2, 3, padding=1, bias=False)
        self.a = nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False)
        self.shortcut = nn.Sequential(nn.Conv2d(2, 3, 1, stride=2, bias=False), nn.BatchNorm2d(3))
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.a(x) + self.shortcut(x))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


class FlattenArea(nn.Module):
    """conv 2->3 of stride 2, ReLU, flatten of 3 x 3 pixels: channel c is features 9 c to 9 c + 8 of linear 27->2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(27, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.flatten(F.relu(self.conv(x))))


class Applied(nn.Module):
    """One function of an image behind a 1x1 convolution 2->4, so that what the function reads is not the image."""

    def __init__(self, function: Callable[[Tensor], Tensor | tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.function(self.conv(x))


class UnknownOperation(nn.Module):
    """conv1 2->3, softmax over channels (which mixes them), conv2 3->2, ReLU, mean, linear 2->2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 3, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(3, 2, 3, padding=1, bias=False)
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.softmax(self.conv1(x), 1)
        return self.linear(F.adaptive_avg_pool2d(F.relu(self.conv2(x)), 1).flatten(1))


def tiny_resnet(option: str = "A", seed: int = 0) -> ResNet:
    """One block a stage; widths 2, 4, 8 with the padded shortcut, 2, 3, 4 with the 1x1 convolution."""
    torch.manual_seed(seed)
    widths = (2, 4, 8) if option == "A" else (2, 3, 4)
    return ResNet(BasicBlock, [1, 1, 1], 2, option=option, widths=widths, in_channels=2)


TOPOLOGIES = (Chain, IdentityShortcut, OptionAShortcut, OptionBShortcut, FlattenArea, UnknownOperation)


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> nn.Module:
    """Random weights and BatchNorm values, in float64 and eval mode, so that no result is true by a default."""
    generator = torch.Generator().manual_seed(seed)
    model.double().eval()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_var is not None
            module.running_var.abs_().add_(0.1)
    return model


@torch.no_grad()
def zero_some(model: nn.Module, seed: int, share: float = 0.4) -> nn.Module:
    """Set random filters, slices, BatchNorm scales and shifts to 0, as pruning does."""
    generator = torch.Generator().manual_seed(seed)

    def off(count: int) -> Tensor:
        return torch.rand(count, generator=generator) < share

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight[off(module.weight.shape[0])] = 0
            module.weight[:, off(module.weight.shape[1])] = 0
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            module.weight[off(module.num_features)] = 0
            module.bias[off(module.num_features)] = 0
    return model

"""Residual networks for 32x32 images (He et al., 2016, section 4.2): networks, nothing else.

A stem convolution, three stages of basic blocks at 16, 32 and 64 channels, global average pooling, one linear layer.
Between stages the shortcut changes shape in one of the paper's two ways: "A" takes every second pixel and pads zero
channels on both sides (no parameters), "B" is a 1x1 convolution of stride 2 with BatchNorm.
Axis letters: N batch, C channels, H W space.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

STAGE_CHANNELS = (16, 32, 64)


class PadShortcut(nn.Module):
    """Option A: every second pixel, and `channels` zero channels added on both sides."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C + 2 channels, ceil(H / 2), ceil(W / 2)); channel c becomes channel c + `channels`."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.channels, self.channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm beside a shortcut.

    option: "A" or "B", how the shortcut changes shape where stride or width do. Raises ValueError for another one, or
    where option A cannot split the added channels evenly.
    """

    expansion = 1

    def __init__(self, in_planes: int, planes: int, stride: int = 1, option: str = "A") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = _shortcut(in_planes, planes, stride, option)

    def forward(self, x: Tensor) -> Tensor:
        """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)); (N, C, H, W) -> (N, planes, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """A CIFAR residual network. `num_blocks`: blocks in each of the three stages.

    Depth = 2 sum(num_blocks) + 2. `ResNet(BasicBlock, [1, 1, 1])` is the smallest. `widths`: channels of the stages.
    """

    def __init__(
        self,
        block: type[BasicBlock],
        num_blocks: Sequence[int],
        num_classes: int = 10,
        *,
        option: str = "A",
        widths: Sequence[int] = STAGE_CHANNELS,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if len(num_blocks) != 3 or len(widths) != 3 or min(*num_blocks, *widths) < 1:
            raise ValueError(
                f"num_blocks={list(num_blocks)}, widths={list(widths)}: need three numbers of at least 1 in each, "
                "one per stage, such as [3, 3, 3] and [16, 32, 64]"
            )
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = _stage(block, widths[0], widths[0], num_blocks[0], 1, option)
        self.layer2 = _stage(block, widths[0], widths[1], num_blocks[1], 2, option)
        self.layer3 = _stage(block, widths[1], widths[2], num_blocks[2], 2, option)
        self.linear = nn.Linear(widths[2], num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, num_classes)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


def resnet20(num_classes: int = 10, option: str = "A") -> ResNet:
    """269,722 parameters and 40,551,040 multiply-adds per 3x32x32 image."""
    return ResNet(BasicBlock, [3, 3, 3], num_classes, option=option)


def resnet32(num_classes: int = 10, option: str = "A") -> ResNet:
    """464,154 parameters."""
    return ResNet(BasicBlock, [5, 5, 5], num_classes, option=option)


def resnet44(num_classes: int = 10, option: str = "A") -> ResNet:
    """658,586 parameters."""
    return ResNet(BasicBlock, [7, 7, 7], num_classes, option=option)


def resnet56(num_classes: int = 10, option: str = "A") -> ResNet:
    """853,018 parameters."""
    return ResNet(BasicBlock, [9, 9, 9], num_classes, option=option)


def resnet110(num_classes: int = 10, option: str = "A") -> ResNet:
    """1,727,962 parameters."""
    return ResNet(BasicBlock, [18, 18, 18], num_classes, option=option)


NETWORKS = {net.__name__: net for net in (resnet20, resnet32, resnet44, resnet56, resnet110)}


def _stage(block: type[BasicBlock], in_planes: int, planes: int, count: int, stride: int, option: str) -> nn.Sequential:
    first = block(in_planes, planes, stride, option)
    return nn.Sequential(first, *(block(planes, planes, 1, option) for _ in range(count - 1)))


def _shortcut(in_planes: int, planes: int, stride: int, option: str) -> nn.Module:
    if option not in ("A", "B"):
        raise ValueError(f"option={option!r}: need 'A' (pad with zero channels) or 'B' (1x1 convolution)")
    if stride == 1 and in_planes == planes:
        return nn.Sequential()
    if option == "B":
        return nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False), nn.BatchNorm2d(planes))
    if stride != 2 or planes < in_planes or (planes - in_planes) % 2:
        raise ValueError(
            f"option A cannot go from {in_planes} to {planes} channels with stride {stride}: it needs stride 2 and an "
            "even number of added channels; use option B"
        )
    return PadShortcut((planes - in_planes) // 2)

"""The networks, with counts worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resnet import NETWORKS, BasicBlock, PadShortcut, ResNet, resnet20
from tests.networks import randomize


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_resnet20_parameters_by_hand() -> None:
    """Every convolution has 9 I O weights and no bias, every BatchNorm 2 O, the linear layer 64 * 10 + 10."""
    stem = 9 * 3 * 16 + 2 * 16
    stage1 = 6 * (9 * 16 * 16 + 2 * 16)
    stage2 = (9 * 16 * 32 + 2 * 32) + 5 * (9 * 32 * 32 + 2 * 32)
    stage3 = (9 * 32 * 64 + 2 * 64) + 5 * (9 * 64 * 64 + 2 * 64)
    assert (stem, stage1, stage2, stage3) == (464, 14_016, 51_072, 203_520)
    assert stem + stage1 + stage2 + stage3 + 64 * 10 + 10 == 269_722
    assert parameters(resnet20()) == 269_722


@pytest.mark.parametrize(
    ("name", "blocks"), [("resnet20", 3), ("resnet32", 5), ("resnet44", 7), ("resnet56", 9), ("resnet110", 18)]
)
def test_parameters_of_the_deeper_ones(name: str, blocks: int) -> None:
    """Each further block per stage adds two convolutions at each width: 2 (9 C^2 + 2 C)."""
    added = sum(2 * (9 * c * c + 2 * c) for c in (16, 32, 64))
    assert added == 97_216
    model = NETWORKS[name](num_classes=10)
    assert parameters(model) == 269_722 + (blocks - 3) * added
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == 6 * blocks + 1
    assert [child for child, _ in model.named_children()] == ["conv1", "bn1", "layer1", "layer2", "layer3", "linear"]


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 5), (1, 1)])
def test_option_a_against_numpy(height: int, width: int) -> None:
    x = np.random.default_rng(0).standard_normal((2, 4, height, width))
    expected = np.zeros((2, 10, -(-height // 2), -(-width // 2)))
    for n, c, h, w in np.ndindex(2, 4, *expected.shape[2:]):
        expected[n, c + 3, h, w] = x[n, c, 2 * h, 2 * w]
    ours = PadShortcut(3)(torch.from_numpy(x))
    np.testing.assert_array_equal(ours.numpy(), expected)


def test_parameters_of_the_shortcuts() -> None:
    """A pads planes // 4 on both sides; B has a 1x1 convolution with BatchNorm: 16 * 32 + 2 * 32, 32 * 64 + 2 * 64."""
    assert resnet20().get_submodule("layer2.0.shortcut").channels == 32 // 4
    assert resnet20().get_submodule("layer3.0.shortcut").channels == 64 // 4
    assert parameters(resnet20(option="B")) == 269_722 + 16 * 32 + 64 + 32 * 64 + 128


def test_forward_by_its_formula() -> None:
    """The block's formula, written with functions alone and the statistics of the batch put in by hand."""
    block = BasicBlock(4, 8, stride=2)
    randomize(block, 0)
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64)

    def normalised(y: torch.Tensor, bn: Any) -> torch.Tensor:
        mean, deviation = bn.running_mean[:, None, None], (bn.running_var + 1e-5).sqrt()[:, None, None]
        return (y - mean) / deviation * bn.weight[:, None, None] + bn.bias[:, None, None]

    inner = normalised(F.conv2d(x, block.conv1.weight, stride=2, padding=1), block.bn1).clamp(min=0)
    out = normalised(F.conv2d(inner, block.conv2.weight, padding=1), block.bn2)
    out[:, 2:6] += x[:, :, ::2, ::2]
    torch.testing.assert_close(block(x), out.clamp(min=0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_blocks": [1, 1]}, "three numbers"),
        ({"num_blocks": [1, 1, 0]}, "at least 1"),
        ({"widths": (16, 32)}, "three numbers"),
        ({"widths": (16, 32, 0)}, "at least 1"),
        ({"option": "C"}, "option='C': need 'A'.*'B'"),
        ({"widths": (4, 7, 9)}, "from 4 to 7 channels.*even number.*option B"),
        ({"widths": (8, 4, 2)}, "from 8 to 4 channels"),
    ],
)
def test_bad_arguments(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ResNet(BasicBlock, **{"num_blocks": [1, 1, 1], **settings})
    with pytest.raises(ValueError, match="stride 1"):
        BasicBlock(4, 8)

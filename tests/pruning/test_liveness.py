"""Liveness of channels by hand on tiny networks. tests/pruning/test_compaction.py compares whole random networks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from src.pruning import LayerLiveness, analyze_liveness, trace
from src.pruning.liveness import Liveness, is_padded
from tests.networks import (
    IMAGE,
    Chain,
    FlattenArea,
    OptionAShortcut,
    UnknownOperation,
    randomize,
)

NAN = float("nan")


def layer(found: Liveness, name: str) -> LayerLiveness:
    return next(each for each in found.layers if each.name == name)


@torch.no_grad()
def chain(padding: int = 1, shift: float = 0.5) -> Chain:
    """All weights 1; filter 1 of conv1 is 0. BatchNorm: gamma 2, mean 3, var 4 - eps, so scale 1 and offset -3."""
    model = Chain(padding).double().eval()
    for parameter in model.parameters():
        parameter.fill_(1)
    assert model.bn1.running_mean is not None
    assert model.bn1.running_var is not None
    assert model.conv2.bias is not None
    model.bn1.running_mean.fill_(3)
    model.bn1.running_var.fill_(4 - model.bn1.eps)
    model.bn1.weight.fill_(2)
    model.bn1.bias.fill_(3 + shift)
    model.conv1.weight[1] = 0
    model.conv2.bias.zero_()
    return model


def test_a_dead_filter_leaves_a_constant_not_zero() -> None:
    """relu(beta - gamma mean / sqrt(var + eps)) = relu(3.5 - 2 * 3 / 2) = 0.5."""
    found = analyze_liveness(chain(), IMAGE)
    values = {op.name: found.constant[op.name] for op in found.ops}
    np.testing.assert_array_equal(values["conv1"], [NAN, 0, NAN])
    np.testing.assert_allclose(values["bn1"], [NAN, 0.5, NAN])
    np.testing.assert_allclose(values["relu"], [NAN, 0.5, NAN])
    first, second = layer(found, "conv1"), layer(found, "conv2")
    assert first.dead_out.tolist() == [False, True, False]
    assert first.kept_out.tolist() == [0, 2]
    assert first.kept_in.tolist() == [0, 1]
    assert second.kept_in.tolist() == [0, 2]
    assert second.carries_constants, "its zero padding makes 0.5 differ at the border"
    assert second.inputs_after_removal == 3
    assert not first.carries_constants
    assert (first.pixels, second.pixels, layer(found, "linear").pixels) == (36, 36, 1)
    np.testing.assert_allclose(found.propagated_constants("conv1"), [NAN, 0.5, NAN])


@pytest.mark.parametrize(
    ("padding", "shift", "carries"),
    [(1, 0.5, True), (1, -0.5, False), (1, 0.0, False), (0, 0.5, False)],
    ids=["positive", "stopped by ReLU", "zero", "no padding: goes into the bias"],
)
def test_when_constants_have_to_be_carried(padding: int, shift: float, carries: bool) -> None:
    second = layer(analyze_liveness(chain(padding, shift), IMAGE), "conv2")
    assert second.carries_constants is carries
    assert second.inputs_after_removal == 2 + carries


def test_all_dead_and_unpadded_is_constant_throughout() -> None:
    """conv2 reads 0.5 nine times on each of 3 channels: 13.5, plus bias 2 = 15.5; linear: 4 * 15.5 + 1 = 63."""
    model = chain(padding=0)
    with torch.no_grad():
        model.conv1.weight.zero_()
        model.conv2.bias.fill_(2)
    found = analyze_liveness(model, IMAGE)
    second = layer(found, "conv2")
    np.testing.assert_allclose(found.constant["conv2"], [15.5] * 4)
    assert second.kept_out.tolist() == []
    assert not second.dead_out.any()
    final = layer(found, "linear")
    assert final.kept_out.tolist() == [0, 1], "the scores stay"
    assert final.kept_in.tolist() == []
    np.testing.assert_allclose(model(torch.randn(2, *IMAGE).double()).detach().numpy(), 63)


def test_a_channel_nobody_reads_takes_its_producer_along() -> None:
    """Linear's columns 0 and 3 are zero: conv2's filters 0 and 3 go, and with them the last readers of conv1's 2."""
    model = chain()
    with torch.no_grad():
        model.linear.weight[:, [0, 3]] = 0
        model.conv2.weight[[1, 2], 2] = 0  # channel 2 of conv1 is read by filters 0 and 3 alone
    found = analyze_liveness(model, IMAGE)
    assert layer(found, "conv2").kept_out.tolist() == [1, 2]
    assert layer(found, "conv2").kept_in.tolist() == [0]
    assert layer(found, "conv1").kept_out.tolist() == [0]
    assert np.isnan(found.constant["conv1"]).tolist() == [True, False, True], "live, but unread"


@torch.no_grad()
def test_option_a_index_map() -> None:
    """Stem channel 0 is stream channel 1: both must be dead for linear to lose column 1. Channel 0 is `a`'s alone."""
    model = randomize(OptionAShortcut(), 5)
    model.a.weight[[0, 1]] = 0
    found = analyze_liveness(model, IMAGE)
    mean, variance = model.bn.running_mean, model.bn.running_var
    assert mean is not None
    assert variance is not None
    offset = (model.bn.bias - model.bn.weight * mean / (variance + model.bn.eps).sqrt()).numpy()
    np.testing.assert_allclose(found.constant["bn"], [offset[0], offset[1], NAN, NAN])
    np.testing.assert_allclose(found.constant["pad"], [0, NAN, NAN, 0])
    np.testing.assert_allclose(found.constant["relu_1"], [max(offset[0], 0), NAN, NAN, NAN])
    assert layer(found, "linear").kept_in.tolist() == [1, 2, 3]
    assert layer(found, "stem").kept_out.tolist() == [0, 1]
    model.stem.weight[0] = 0
    found = analyze_liveness(model, IMAGE)
    np.testing.assert_allclose(found.constant["relu_1"], [max(offset[0], 0), max(offset[1], 0), NAN, NAN])
    assert layer(found, "linear").kept_in.tolist() == [2, 3]
    assert layer(found, "stem").kept_out.tolist() == [1]
    assert layer(found, "a").kept_in.tolist() == [1]


@torch.no_grad()
def test_flatten_index_map() -> None:
    model = randomize(FlattenArea(), 1)
    model.linear.weight[:, 9:18] = 0
    assert layer(analyze_liveness(model, IMAGE), "conv").kept_out.tolist() == [0, 2]
    model.linear.weight[1, 13] = 1  # one pixel of channel 1 is read after all
    found = analyze_liveness(model, IMAGE)
    assert layer(found, "conv").kept_out.tolist() == [0, 1, 2]
    assert layer(found, "linear").kept_in.tolist() == [*range(9), 13, *range(18, 27)]


@torch.no_grad()
def test_nothing_is_removed_around_an_unknown_operation() -> None:
    model = randomize(UnknownOperation(), 2)
    model.conv1.weight[0] = 0
    model.conv2.weight[:, 1] = 0
    found = analyze_liveness(model, IMAGE)
    assert layer(found, "conv1").kept_out.tolist() == [0, 1, 2]
    assert np.isnan(found.constant["softmax"]).all()
    model.conv2.weight[0] = 0
    assert layer(analyze_liveness(model, IMAGE), "conv2").kept_out.tolist() == [1], "after it, as usual"


@pytest.mark.parametrize(("bias", "kept_in"), [(0.5, [0, 1, 2, 3]), (-0.5, [1, 2, 3])])
def test_a_grouped_convolution_is_as_wide_as_its_widest_group(bias: float, kept_in: list[int]) -> None:
    """Filters 0 to 2 read channels 0 and 1, filters 3 to 5 channels 2 and 3; one filter of the first group is dead."""
    model = nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1, groups=2)),
        *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)),
    )
    with torch.no_grad():
        model.get_submodule("0").weight[0] = 0  # channel 0 is relu(bias), which the padding makes visible
        model.get_submodule("0").bias[0] = bias
        model.get_submodule("2").weight[1] = 0
    grouped = layer(analyze_liveness(model, IMAGE), "2")
    assert (grouped.out_channels, grouped.in_channels, grouped.groups, grouped.pixels) == (6, 4, 2, 36)
    assert grouped.kept_out.tolist() == [0, 2, 3, 4, 5]
    assert grouped.kept_in.tolist() == kept_in
    assert grouped.arrangement()[1].tolist() == [[0, 1, -1], [2, 3, 4]]
    assert grouped.weights_after_removal(9) == 2 * 3 * 2 * 9


def test_a_depthwise_filter_goes_with_its_channel() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(2, 3, 1, bias=False), nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)),
    )
    with torch.no_grad():
        model.get_submodule("1").weight[1] = 0
    found = analyze_liveness(model, IMAGE)
    assert layer(found, "0").kept_out.tolist() == layer(found, "1").kept_out.tolist() == [0, 2]
    assert layer(found, "1").weights_after_removal(9) == 2 * 9


def test_what_is_called_twice_or_inside_attention_is_kept_whole_and_counted() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)
            self.attention = nn.MultiheadAttention(2, 1, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = self.conv(self.conv(x)).flatten(2).transpose(1, 2)
            return self.attention(tokens, tokens, tokens)[0].mean(1)

    found = analyze_liveness(Tokens(), IMAGE)
    assert layer(found, "conv").pixels == 2 * 36
    assert layer(found, "conv").kept_out.tolist() == [0, 1]
    assert [(each.name, each.parameter, each.out_channels, each.pixels) for each in found.layers[1:]] == [
        ("attention", "in_proj_weight", 6, 36),
        ("attention.out_proj", "weight", 2, 36),
    ]


@pytest.mark.parametrize(
    ("module", "padded"),
    [
        (nn.Conv2d(1, 1, 3, padding=(0, 1)), True),
        (nn.Conv2d(1, 1, 3, padding="valid"), False),
        (nn.Conv2d(1, 1, 3, padding="same"), True),
        (nn.Conv2d(1, 1, (1, 3), padding="same"), True),
        (nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"), False),
        (nn.ConvTranspose2d(1, 1, 3), True),
        (nn.Identity(), False),
    ],
    ids=str,
)
def test_padding(module: nn.Module, padded: bool) -> None:
    ops = trace(nn.Sequential(module, nn.Conv2d(1, 1, 1)), (1, 6, 6))
    assert is_padded(ops[1]) is padded

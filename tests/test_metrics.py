"""Counts against hand calculation and torch.utils.flop_counter.

MACs of a layer = output channels x input channels x kernel area x output pixels; BOPs = MACs x weight bits x 32.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from metrics import MetricsError, QuantizationComparison
from resnet import resnet20
from src.quantizer import DeadZoneLDZCompander
from tests.networks import IMAGE, TOPOLOGIES, Chain, OptionAShortcut, tiny_resnet
from utils_quantization import attach_weight_quantizers, latent_weight, quantization, quantized_layers, quantizer_of

EXCLUDED = ["conv1", "bn", "linear"]


def flops(model: nn.Module, size: tuple[int, int, int]) -> int:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.eval()(torch.zeros(1, *size))
    return counter.get_total_flops()


@torch.no_grad()
def pruned_chain() -> Chain:
    """Filter 1 of conv1 zero, BatchNorm offset 0.5, linear's column 2 zero; all other weights 1."""
    model = Chain().eval()
    for parameter in model.parameters():
        parameter.fill_(1)
    model.bn1.bias.fill_(0.5)
    model.conv1.weight[1] = 0
    model.linear.weight[:, 2] = 0
    return model


@pytest.mark.parametrize("make", [*TOPOLOGIES, tiny_resnet, lambda: tiny_resnet("B")])
def test_dense_macs_against_flop_counter(make: Callable[[], nn.Module]) -> None:
    model = make()
    comparison = QuantizationComparison(IMAGE)
    assert 2 * comparison.set_baseline(model).total_macs == flops(model, IMAGE)
    assert 2 * comparison.calculate_unstructured_stats(model).total_macs == flops(model, IMAGE)


def test_resnet20_a_layer_at_a_time() -> None:
    model = resnet20()
    stats = QuantizationComparison().set_baseline(model)
    assert stats["conv1"].macs == 3 * 16 * 3 * 3 * 32 * 32 == 442_368
    assert stats["layer1.2.conv2"].macs == 16 * 16 * 9 * 32 * 32 == 2_359_296
    assert stats["layer2.0.conv1"].macs == 16 * 32 * 9 * 16 * 16 == 1_179_648
    assert stats["layer3.2.conv2"].macs == 64 * 64 * 9 * 8 * 8 == 2_359_296
    assert stats["linear"].macs == 640
    assert stats.total_macs == 40_551_040
    assert 2 * stats.total_macs == flops(model, (3, 32, 32))
    assert stats.total_bops == 40_551_040 * 32 * 32
    assert {layer.bitwidth for layer in stats.layers} == {32}


def test_bops_of_an_unpruned_4_bit_resnet20() -> None:
    """Blocks at 4 bits: 40,551,040 - 442,368 - 640 = 40,108,032 MACs; stem and linear stay at 32 bits.

    (40,108,032 * 4 + 443,008 * 32) * 32 = 5,587,468,288; over 40,551,040 * 32 * 32 = 41,524,264,960 that is 13.46 %.
    """
    comparison = QuantizationComparison()
    comparison.set_baseline(resnet20())
    model = resnet20()
    kwargs = {"fixed_bit_val": 4, "learnable_bit": False, "init_deadzone_logit": 20.0}  # a dead zone of width 0
    assert len(attach_weight_quantizers(model, EXCLUDED, DeadZoneLDZCompander, kwargs)) == 18
    stats = comparison.calculate_stats(model)
    assert stats.total_bops == (40_108_032 * 4 + 443_008 * 32) * 32 == 5_587_468_288
    assert comparison.compression_ratio(stats) == pytest.approx(41_524_264_960 / 5_587_468_288)
    assert 1 / comparison.compression_ratio(stats) == pytest.approx(0.1346, abs=5e-5)
    assert comparison.mac_compression_ratio(stats) == 1
    assert [layer.bitwidth for layer in stats.layers] == [32, *[4] * 18, 32]
    assert [layer.quantized for layer in stats.layers] == [False, *[True] * 18, False]
    with quantization(model, enabled=False):
        assert {layer.bitwidth for layer in comparison.calculate_stats(model).layers} == {32}


def test_structured_by_hand() -> None:
    """Left of conv1: filters 0 and 2. Left of conv2: 3 of 4 filters, which read 2 channels and one of constants."""
    comparison = QuantizationComparison(IMAGE)
    dense = comparison.set_baseline(Chain())
    assert [layer.macs for layer in dense.layers] == [3 * 2 * 9 * 36, 4 * 3 * 9 * 36, 2 * 4] == [1944, 3888, 8]
    stats = comparison.calculate_stats(pruned_chain())
    assert [layer.macs for layer in stats.layers] == [2 * 2 * 9 * 36, 3 * (2 + 1) * 9 * 36, 2 * 3] == [1296, 2916, 6]
    assert stats.total_macs == 4218
    assert QuantizationComparison(IMAGE).set_baseline(pruned_chain()).total_macs == 5840, "the baseline counts as dense"
    assert comparison.mac_compression_ratio(stats) == 5840 / 4218
    assert comparison.compression_ratio(stats) == 5840 / 4218
    removed = [(sorted(layer.null_in.indices), sorted(layer.null_out.indices)) for layer in stats.layers]
    assert removed == [([], [1]), ([1], [2]), ([2], [])]
    assert [set(layer.dead_out) for layer in stats.layers] == [{1}, set(), set()]
    assert (stats["conv1"].null_out.count, stats["conv1"].null_out.total) == (1, 3)


def test_unstructured_by_hand() -> None:
    """Zeros: 18 of conv1's 54 weights, 2 of linear's 8. Every other weight is one MAC a pixel."""
    comparison = QuantizationComparison(IMAGE)
    comparison.set_baseline(Chain())
    stats = comparison.calculate_unstructured_stats(pruned_chain())
    assert [layer.macs for layer in stats.layers] == [36 * 36, 108 * 36, 6]
    assert [layer.pruning_ratio for layer in stats.layers] == pytest.approx([1 / 3, 0, 1 / 4])
    assert [layer.weights for layer in stats.layers] == [54, 108, 8]
    assert comparison.unstructured_mac_compression_ratio(stats) == 5840 / (1296 + 3888 + 6)


def test_bits_and_zeros_come_from_the_quantizers() -> None:
    """Bits at logit 0.5: tanh 0.5 * 6 + 2 = 4.77 -> 5. Zeros are those of the quantized weight, not the latent."""
    model = tiny_resnet()
    kwargs = {"init_bit_logit": 0.5, "init_deadzone_logit": 0.7}
    attach_weight_quantizers(model, EXCLUDED, DeadZoneLDZCompander, kwargs)
    model.train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    comparison = QuantizationComparison(IMAGE)
    comparison.set_baseline(tiny_resnet())
    stats = comparison.calculate_unstructured_stats(model)
    assert all(module.training for module in model.modules()), "counting leaves the network as it was"
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for name, layer in quantized_layers(model).items():
        latent = latent_weight(layer).detach()
        zeros = int((latent.abs() <= quantizer_of(layer).grid(latent).dead_zone / 2).sum())
        assert zeros
        found = stats[name]
        assert found.bitwidth == 5
        assert found.pruning_ratio == pytest.approx(zeros / latent.numel())
        assert found.bops == found.macs * 5 * 32
    with quantization(model, enabled=False):
        assert all(layer.pruning_ratio == 0 for layer in comparison.calculate_unstructured_stats(model).layers)


def test_a_network_of_constants_has_no_cost_left() -> None:
    comparison = QuantizationComparison(IMAGE)
    comparison.set_baseline(OptionAShortcut())
    model = OptionAShortcut()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    stats = comparison.calculate_stats(model)
    assert stats.total_macs == 0
    assert comparison.compression_ratio(stats) == comparison.mac_compression_ratio(stats) == float("inf")


def test_what_cannot_be_compared() -> None:
    comparison = QuantizationComparison(IMAGE)
    stats = comparison.calculate_stats(Chain())
    for ratio in (comparison.compression_ratio, comparison.mac_compression_ratio):
        with pytest.raises(MetricsError, match="call set_baseline"):
            ratio(stats)
    with pytest.raises(MetricsError, match=r"'conv9'.*conv1, conv2, linear"):
        _ = stats["conv9"]
    with pytest.raises(MetricsError, match=r"b_a=0: need 1\.\.64"):
        QuantizationComparison(b_a=0)
    comparison.set_baseline(tiny_resnet())
    for calculate in (comparison.calculate_stats, comparison.calculate_unstructured_stats):
        for other in (tiny_resnet("B"), Chain()):
            with pytest.raises(MetricsError, match="does not match the baseline: layer '"):
                calculate(other)

"""What a network costs: multiply-adds, bit operations and removable channels, a layer at a time.

1 MAC = one multiply and one add, for one image. BOPs = MACs x weight bits x activation bits. Activations stay at 32
bits (`b_a`), as the paper counts them; a layer without quantizer has 32-bit weights. Left out: BatchNorm, bias, ReLU,
pooling and adds, which are less than 1 % of ResNet-20.

    structured     MACs of the network that exact removal leaves (src/pruning/liveness.py): whole channels only.
    unstructured   every non-zero weight is one MAC per output pixel: density x dense MACs.

A ratio is baseline over compressed, so larger is smaller.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from src.pruning import LayerLiveness, analyze_liveness
from utils_quantization import quantized_layers, quantizer_of, shared_quantized_weights

FULL_PRECISION_BITS = 32


class MetricsError(ValueError):
    """A comparison without a baseline, or between networks that do not match."""


@dataclass(frozen=True)
class NullChannels:
    """Channels that exact removal takes out: their indices among `total`."""

    indices: frozenset[int]
    total: int

    @property
    def count(self) -> int:
        return len(self.indices)

    @property
    def ratio(self) -> float:
        """Share of channels taken out, 0 to 1."""
        return self.count / self.total if self.total else 0.0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self.indices))


@dataclass(frozen=True)
class LayerStats:
    """One convolution or linear layer.

    macs, bops: per image, counted as the whole `ModelStats` says.
    bitwidth: of the weights, 32 without quantizer. pruning_ratio: share of the weights that are exactly 0.
    null_in, null_out: input and output channels that exact removal takes out.
    dead_out: output channels whose filter is entirely 0; constant_out: those that are the same for every image and
    pixel; zero_out: those of them whose constant is 0.
    """

    name: str
    macs: int
    bops: float
    bitwidth: float
    pruning_ratio: float
    null_in: NullChannels
    null_out: NullChannels
    dead_out: frozenset[int]
    constant_out: frozenset[int]
    zero_out: frozenset[int]
    weights: int
    quantized: bool


@dataclass(frozen=True)
class ModelStats:
    """All convolution and linear layers of a network, in its order."""

    layers: tuple[LayerStats, ...]

    @property
    def total_macs(self) -> int:
        return sum(layer.macs for layer in self.layers)

    @property
    def total_bops(self) -> float:
        return sum(layer.bops for layer in self.layers)

    def __getitem__(self, name: str) -> LayerStats:
        for layer in self.layers:
            if layer.name == name:
                return layer
        known = ", ".join(layer.name for layer in self.layers)
        raise MetricsError(f"no layer is called {name!r}: choose one of {known}")


class QuantizationComparison:
    """Compare networks of one architecture with a baseline: `set_baseline`, then `calculate_stats` and the ratios.

    input_size: (C, H, W) of one image. b_a: bits of the activations. Raises MetricsError for values out of range.
    """

    def __init__(self, input_size: tuple[int, int, int] = (3, 32, 32), b_a: int = 32) -> None:
        if len(input_size) != 3 or min(input_size) < 1:
            raise MetricsError(
                f"input_size={input_size}: need channels, height and width of one image, such as (3, 32, 32)"
            )
        if not 1 <= b_a <= 64:
            raise MetricsError(f"b_a={b_a}: need activation bits from 1 to 64")
        self.input_size = input_size
        self.b_a = b_a
        self.baseline: ModelStats | None = None

    def set_baseline(self, model: nn.Module) -> ModelStats:
        """Count the dense network `model` stands for: no removal, no zeros, 32-bit weights where it has no quantizer.

        With quantizers attached their bits count, so hand over a full-precision network to compare with FP32.
        """
        layers = self._layers(model)
        self.baseline = ModelStats(tuple(self._stats(layer, info, _dense_macs(layer, info)) for layer, info in layers))
        return self.baseline

    def calculate_stats(self, model: nn.Module) -> ModelStats:
        """Structured: MACs and BOPs of the network that exact removal leaves, quantizers as they are switched."""
        return self._matching(
            ModelStats(
                tuple(self._stats(layer, info, _removed_macs(layer, info)) for layer, info in self._layers(model))
            )
        )

    def calculate_unstructured_stats(self, model: nn.Module) -> ModelStats:
        """Unstructured: every non-zero weight is one MAC per output pixel, wherever it stands."""
        return self._matching(
            ModelStats(
                tuple(self._stats(layer, info, info.nonzero * layer.pixels) for layer, info in self._layers(model))
            )
        )

    def mac_compression_ratio(self, stats: ModelStats) -> float:
        """Baseline MACs over `stats`' MACs; infinite where nothing is left. Raises MetricsError without a baseline."""
        return _ratio(self._baseline().total_macs, stats.total_macs)

    def compression_ratio(self, stats: ModelStats) -> float:
        """Baseline BOPs over `stats`' BOPs; infinite where nothing is left. Raises MetricsError without a baseline."""
        return _ratio(self._baseline().total_bops, stats.total_bops)

    unstructured_compression_ratio = compression_ratio
    unstructured_mac_compression_ratio = mac_compression_ratio

    def _layers(self, model: nn.Module) -> list[tuple[LayerLiveness, _WeightInfo]]:
        layers = analyze_liveness(model, self.input_size).layers
        info = _weight_info(model, [layer.name for layer in layers])
        return [(layer, info[layer.name]) for layer in layers]

    def _stats(self, layer: LayerLiveness, info: _WeightInfo, macs: int) -> LayerStats:
        constant = np.flatnonzero(~np.isnan(layer.constant_out))
        return LayerStats(
            name=layer.name,
            macs=macs,
            bops=float(macs) * info.bits * self.b_a,
            bitwidth=info.bits,
            pruning_ratio=1 - info.nonzero / info.count,
            null_in=_missing(layer.kept_in, layer.in_channels),
            null_out=_missing(layer.kept_out, layer.out_channels),
            dead_out=_indices(np.flatnonzero(layer.dead_out)),
            constant_out=_indices(constant),
            zero_out=_indices(np.flatnonzero(layer.constant_out == 0)),
            weights=info.count,
            quantized=info.quantized,
        )

    def _baseline(self) -> ModelStats:
        if self.baseline is None:
            raise MetricsError("there is no baseline to compare with: call set_baseline(model) first")
        return self.baseline

    def _matching(self, stats: ModelStats) -> ModelStats:
        if self.baseline is not None:
            ours, theirs = ({layer.name: layer.weights for layer in s.layers} for s in (stats, self.baseline))
            if ours != theirs:
                odd = sorted(ours.items() ^ theirs.items())[0][0]
                raise MetricsError(
                    f"the network does not match the baseline: layer {odd!r} is missing or has another shape in one of "
                    "them; compare networks of one architecture"
                )
        return stats


@dataclass(frozen=True)
class _WeightInfo:
    count: int
    nonzero: int
    kernel: int
    bits: float
    quantized: bool


@torch.no_grad()
def _weight_info(model: nn.Module, names: Iterable[str]) -> dict[str, _WeightInfo]:
    quantized = quantized_layers(model)
    found = {}
    with shared_quantized_weights(model):
        for name in names:
            layer = model.get_submodule(name)
            weight = cast(Tensor, layer.weight)
            on = name in quantized and bool(cast(Any, layer).parametrizations.weight[0].enabled)
            bits = float(cast(Any, quantizer_of(layer)).get_bitwidth()) if on else float(FULL_PRECISION_BITS)
            kernel = weight[0, 0].numel()
            found[name] = _WeightInfo(weight.numel(), int(weight.count_nonzero()), kernel, bits, on)
    return found


def _dense_macs(layer: LayerLiveness, info: _WeightInfo) -> int:
    return layer.out_channels * layer.in_channels * info.kernel * layer.pixels


def _removed_macs(layer: LayerLiveness, info: _WeightInfo) -> int:
    return len(layer.kept_out) * layer.inputs_after_removal * info.kernel * layer.pixels


def _ratio(baseline: float, compressed: float) -> float:
    return baseline / compressed if compressed else float("inf")


def _missing(kept: np.ndarray, total: int) -> NullChannels:
    return NullChannels(frozenset(range(total)) - _indices(kept), total)


def _indices(array: np.ndarray) -> frozenset[int]:
    return frozenset(int(index) for index in array)

"""What a network costs: multiply-adds, bit operations and removable channels, a layer at a time.

1 MAC = one multiply and one add, for one image. BOPs = MACs x weight bits x activation bits. Activations stay at 32
bits (`b_a`), as the paper counts them; a layer without quantizer has 32-bit weights. Left out: BatchNorm, bias, ReLU,
pooling and adds, which are less than 1 % of ResNet-20.

    structured     MACs of the network that exact removal leaves (src/pruning/liveness.py): whole channels only.
    unstructured   every non-zero weight is one MAC per output pixel: density x dense MACs.

A ratio is baseline over compressed, so larger is smaller.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from src.pruning import InputSize, LayerLiveness, analyze_liveness, check_multiple
from src.quantizer import check_range
from utils_quantization import quantized_layers, quantizer_of, shared_quantized_weights, unwrapped

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
        """How many channels are taken out."""
        return len(self.indices)


@dataclass(frozen=True)
class LayerStats:
    """One convolution or linear layer.

    macs, bops: per image, counted as the whole `ModelStats` says.
    bitwidth: of the weights, 32 without quantizer. pruning_ratio: share of the weights that are exactly 0.
    null_in, null_out: input and output channels that exact removal takes out.
    dead_out: output channels whose filter is entirely 0. weights: their number. quantized: whether a quantizer is on.
    """

    name: str
    macs: int
    bops: float
    bitwidth: float
    pruning_ratio: float
    null_in: NullChannels
    null_out: NullChannels
    dead_out: frozenset[int]
    weights: int
    quantized: bool


@dataclass(frozen=True)
class ModelStats:
    """All convolution and linear layers of a network, in its order."""

    layers: tuple[LayerStats, ...]

    @property
    def total_macs(self) -> int:
        """MACs of all layers, per image."""
        return sum(layer.macs for layer in self.layers)

    @property
    def total_bops(self) -> float:
        """BOPs of all layers, per image."""
        return sum(layer.bops for layer in self.layers)

    def __getitem__(self, name: str) -> LayerStats:
        for layer in self.layers:
            if layer.name == name:
                return layer
        known = ", ".join(layer.name for layer in self.layers)
        raise MetricsError(f"no layer is called {name!r}: choose one of {known}")


class QuantizationComparison:
    """Compare networks of one architecture with a baseline: `set_baseline`, then `calculate_stats` and the ratios.

    input_size: (C, H, W) of one image. b_a: bits of the activations. multiple_of: as in src.pruning.compact, whose
    network the structured numbers describe. Raises MetricsError for bits or multiples out of range.
    """

    def __init__(self, input_size: InputSize = (3, 32, 32), b_a: int = 32, multiple_of: int = 1) -> None:
        check_range("b_a", b_a, 1, 64, remedy="bits of the activations", error=MetricsError)
        self.input_size = input_size
        self.b_a = b_a
        self.multiple_of = multiple_of
        self.baseline: ModelStats | None = None

    def set_baseline(self, model: nn.Module) -> ModelStats:
        """Count the dense network `model` stands for: no removal, no zeros, 32-bit weights where it has no quantizer.

        With quantizers attached their bits count, so hand over a full-precision network to compare with FP32.
        """
        self.baseline = self._count(model, lambda layer, weight: weight.numel() * layer.pixels)
        return self.baseline

    def calculate_stats(self, model: nn.Module) -> ModelStats:
        """Structured: MACs and BOPs of the network that exact removal leaves, quantizers as they are switched."""

        def left(layer: LayerLiveness, weight: Tensor) -> int:
            return layer.weights_after_removal(weight[0, 0].numel()) * layer.pixels

        return self._matching(self._count(model, left))

    def calculate_unstructured_stats(self, model: nn.Module) -> ModelStats:
        """Unstructured: every non-zero weight is one MAC per output pixel, wherever it is."""
        return self._matching(self._count(model, lambda layer, weight: int(weight.count_nonzero()) * layer.pixels))

    def mac_compression_ratio(self, stats: ModelStats) -> float:
        """Baseline MACs over `stats`' MACs; infinite where nothing is left. Raises MetricsError without a baseline."""
        return _ratio(self._baseline().total_macs, stats.total_macs)

    def compression_ratio(self, stats: ModelStats) -> float:
        """Baseline BOPs over `stats`' BOPs; infinite where nothing is left. Raises MetricsError without a baseline."""
        return _ratio(self._baseline().total_bops, stats.total_bops)

    unstructured_compression_ratio = compression_ratio
    unstructured_mac_compression_ratio = mac_compression_ratio

    @torch.no_grad()
    def _count(self, model: nn.Module, macs_of: Callable[[LayerLiveness, Tensor], int]) -> ModelStats:
        """`macs_of`: MACs of a layer, given its (quantized) weight."""
        model = unwrapped(model)
        check_multiple(model, self.multiple_of, MetricsError)
        liveness = analyze_liveness(model, self.input_size, self.multiple_of)
        quantized, layers = quantized_layers(model), []
        with shared_quantized_weights(model):
            for live in liveness.layers:
                layer = cast(Any, model.get_submodule(live.name))
                weight: Tensor = getattr(layer, live.parameter)
                on = live.name in quantized and bool(layer.parametrizations.weight[0].enabled)
                bits = float(cast(Any, quantizer_of(layer)).get_bitwidth()) if on else float(FULL_PRECISION_BITS)
                macs = macs_of(live, weight)
                layers.append(
                    LayerStats(
                        name=live.name,
                        macs=macs,
                        bops=float(macs) * bits * self.b_a,
                        bitwidth=bits,
                        pruning_ratio=1 - int(weight.count_nonzero()) / weight.numel(),
                        null_in=_missing(live.kept_in, live.in_channels),
                        null_out=_missing(live.kept_out, live.out_channels),
                        dead_out=frozenset(np.flatnonzero(live.dead_out).tolist()),
                        weights=weight.numel(),
                        quantized=on,
                    )
                )
        return ModelStats(tuple(layers))

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


def _ratio(baseline: float, compressed: float) -> float:
    return baseline / compressed if compressed else float("inf")


def _missing(kept: np.ndarray, total: int) -> NullChannels:
    return NullChannels(frozenset(range(total)) - frozenset(kept.tolist()), total)

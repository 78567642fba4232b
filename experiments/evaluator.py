"""Evaluate the compression of a trained network against its full-precision baseline, and draw it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from experiments import figures
from metrics import MetricsError, ModelStats, QuantizationComparison
from src.training import layer_records
from utils_quantization import shared_quantized_weights


@dataclass(frozen=True)
class EvalResult:
    """Structured and unstructured cost, and their ratios (baseline / compressed, at least 1 for a smaller network)."""

    structured_stats: ModelStats
    structured_bops_ratio: float
    structured_mac_ratio: float
    unstructured_stats: ModelStats
    unstructured_bops_ratio: float
    unstructured_mac_ratio: float

    def rows(self) -> list[dict[str, str | int | float]]:
        """One row per layer, for a table: weights, bits, sparsity, channels before and after, MACs dense and left."""
        pairs = zip(self.structured_stats.layers, self.unstructured_stats.layers, strict=True)
        return [
            {
                "layer": structured.name,
                "weights": structured.weights,
                "bits": structured.bitwidth,
                "zeros": structured.pruning_ratio,
                "dead filters": len(structured.dead_out),
                "channels": structured.null_out.total,
                "channels left": structured.null_out.total - structured.null_out.count,
                "MACs, non-zero weights": unstructured.macs,
                "MACs, after removal": structured.macs,
            }
            for structured, unstructured in pairs
        ]

    def totals(self) -> list[dict[str, str | int | float]]:
        """Two more rows: the quantized layers and the network.

        Zeros, dead filters, channels and bits (the mean of the layers) of a network are those of its quantized layers;
        its MACs and weights are those of all layers. NaN is where a row has no number.
        """
        table = pd.DataFrame(self.rows())
        quantized = table[[layer.quantized for layer in self.structured_stats.layers]]
        of_all = ["weights", "MACs, non-zero weights", "MACs, after removal"]
        together = {
            **quantized.drop(columns="layer").sum(),
            "bits": quantized["bits"].mean(),
            "zeros": np.average(quantized["zeros"], weights=quantized["weights"]) if len(quantized) else math.nan,
        }
        network = {**dict.fromkeys(together, math.nan), **table[of_all].sum()}
        return [{"layer": "quantized layers", **together}, {"layer": "network", **network}]


class Evaluator:
    """Compare networks with `baseline_model`, a full-precision network of the same architecture."""

    def __init__(self, baseline_model: nn.Module, input_size: tuple[int, int, int] = (3, 32, 32)) -> None:
        self.comparison = QuantizationComparison(input_size)
        self.comparison.set_baseline(baseline_model)

    def evaluate(self, model: nn.Module) -> EvalResult:
        """Count `model`, quantizers as they are switched. Raises MetricsError where the architecture differs."""
        structured = self.comparison.calculate_stats(model)
        unstructured = self.comparison.calculate_unstructured_stats(model)
        return EvalResult(
            structured_stats=structured,
            structured_bops_ratio=self.comparison.compression_ratio(structured),
            structured_mac_ratio=self.comparison.mac_compression_ratio(structured),
            unstructured_stats=unstructured,
            unstructured_bops_ratio=self.comparison.unstructured_compression_ratio(unstructured),
            unstructured_mac_ratio=self.comparison.unstructured_mac_compression_ratio(unstructured),
        )

    def plot_channel_liveness(self, model: nn.Module) -> Figure:
        """Heatmap of the quantized layers' filters: rows layers, columns channels, black dead, white alive."""
        return figures.channel_liveness(layer_records(model))

    @torch.no_grad()
    def plot_sparsity_map(self, model: nn.Module, layer_name: str) -> Figure:
        """Every kernel of one convolution, its zeros left white. Raises MetricsError for an unknown layer."""
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
        if layer_name not in names:
            raise MetricsError(f"no convolution is called {layer_name!r}: choose one of {', '.join(names)}")
        with shared_quantized_weights(model):
            weight = cast(Tensor, model.get_submodule(layer_name).weight)
        return figures.sparsity_map(weight.float().cpu().numpy(), layer_name)

    def plot_layer_sparsity_bars(self, result: EvalResult) -> Figure:
        """Share of zero weights and of dead filters, a layer at a time."""
        layers = [layer for layer in result.structured_stats.layers if layer.quantized]
        return figures.layer_sparsity_bars(
            [layer.name for layer in layers],
            [layer.pruning_ratio for layer in layers],
            [len(layer.dead_out) / layer.null_out.total for layer in layers],
        )

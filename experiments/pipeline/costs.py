"""What a run's network costs after every epoch, from its history alone.

BOPs as the paper counts them: density x dense MACs x weight bits x 32-bit activations, for each quantized layer; layers
without a quantizer keep all their weights at 32 bits. Relative to the dense FP32 network, all layers included.
Axis letters: E epochs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from experiments.pipeline.config import RunConfig
from metrics import FULL_PRECISION_BITS, QuantizationComparison
from resnet import NETWORKS
from src.training import History


def dense_macs(config: RunConfig, classes: int) -> dict[str, int]:
    """MACs of each layer of the dense network, for one image."""
    return dict(_dense_macs(config.model, config.shortcut, classes))


def relative_bops(history: History, macs: Mapping[str, int]) -> NDArray[np.float64]:
    """BOPs after every epoch as a share of the dense FP32 network's, (E,). Activations cancel: 32 bits in both.

    macs: of every layer of the dense network. Raises ValueError where a quantized layer is not among them.
    """
    unknown = sorted(set(history.layer_names) - set(macs))
    if unknown:
        raise ValueError(f"layer {unknown[0]!r} of the history is no layer of the network: {', '.join(macs)}")
    dense = sum(macs.values()) * FULL_PRECISION_BITS
    quantized = np.array([macs[name] for name in history.layer_names], dtype=np.float64)  # (L,)
    untouched = dense - quantized.sum() * FULL_PRECISION_BITS
    shape = (len(history), len(quantized))
    density = 1 - history.layer_column("sparsity").reshape(shape)
    bits = history.layer_column("bits").reshape(shape)
    return ((density * bits * quantized).sum(axis=1) + untouched) / dense


@lru_cache(maxsize=32)
def _dense_macs(model: str, shortcut: str, classes: int) -> tuple[tuple[str, int], ...]:
    dense = QuantizationComparison().set_baseline(NETWORKS[model](classes, shortcut))
    return tuple((layer.name, layer.macs) for layer in dense.layers)

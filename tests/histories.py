"""Histories as training leaves them, with every number known: 18 layers of ResNet-20, any number of epochs."""

from __future__ import annotations

import numpy as np

from src.training import EpochRecord, History, LayerRecord

NAMES = [f"layer{s}.{b}.conv{c}" for s in (1, 2, 3) for b in (0, 1, 2) for c in (1, 2)]
WIDTHS = {"layer1": 16, "layer2": 32, "layer3": 64}


def make_layers(epoch: int) -> tuple[LayerRecord, ...]:
    """Layer i loses i channels in total by epoch 10; bits fall from 8 to 7 or, in the last three layers, to 5."""
    layers = []
    for i, name in enumerate(NAMES):
        width = WIDTHS[name.split(".")[0]]
        gone = i if epoch >= 10 and i < width else 0
        bits = 8.0 if epoch < 10 else 7.0 if i < 15 else 5.0
        layers.append(
            LayerRecord(
                name, bits, 0.01 * epoch, min(0.9, 0.02 * epoch + 0.01 * i), (True,) * gone + (False,) * (width - gone)
            )
        )
    return tuple(layers)


def make_history(done: int = 20, epochs: int = 20) -> History:
    history = History(epochs)
    for e in range(1, done + 1):
        layers = make_layers(e)
        dead = sum(layer.dead_channels for layer in layers) / sum(layer.channels for layer in layers)
        history.append(
            EpochRecord(
                epoch=e,
                loss=5 - 0.1 * e,
                task_loss=2 - 0.08 * e,
                logit_penalty=0.5,
                group_penalty=500.0 - e,
                coefficient=0.005 * min(max(e - 5, 0) / 5, 1),
                learning_rate=1e-3,
                train_accuracy=min(0.33 + 0.025 * e, 0.98),
                test_loss=1.0,
                accuracy=min(0.3 + 0.025 * e, 0.95),
                unstructured_sparsity=min(0.02 * e, 0.9),
                structured_sparsity=dead,
                mean_bits=float(np.mean([layer.bits for layer in layers])),
                seconds=30.0,
                layers=layers,
                recalibrated_accuracy=min(0.5 + 0.025 * e, 0.97),
            )
        )
    return history

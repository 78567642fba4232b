"""What a network does on the test set, and what its quantized layers look like. N test images, O output channels."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from src.data import ImageData, normalize, test_batches
from src.training.devices import TrainingError, autocast
from src.training.epoch import DIVERGENCE_HINT, EpochMeans
from src.training.history import EpochRecord, LayerRecord
from src.training.interrupts import raise_pending
from utils_quantization import eval_mode, quantized_layers, quantizer_of, shared_quantized_weights

EVALUATION_BATCH = 250  # larger batches fall out of the cache and take longer
RECALIBRATION_SHARE, FEWEST_IMAGES, MOST_IMAGES = 20, 100, 1_000


def evaluate(model: nn.Module, data: ImageData, precision: torch.dtype = torch.float32) -> tuple[float, float]:
    """Mean cross entropy and share of right answers over the test set, with quantizers as they are switched."""
    predicted, loss = predict(model, data, precision)
    return loss, int((predicted == data.test_labels).sum()) / len(predicted)


@torch.no_grad()
def predict(model: nn.Module, data: ImageData, precision: torch.dtype = torch.float32) -> tuple[Tensor, float]:
    """The predicted class of every test image, (N,), and the mean cross entropy. The model's mode is restored."""
    predicted, losses, dtype = [], [], next(model.parameters()).dtype
    with eval_mode(model), shared_quantized_weights(model), autocast(data.test_images.device, precision):
        for images, labels in test_batches(data, EVALUATION_BATCH):
            raise_pending()  # an interruption need not wait for the whole test set
            scores = model(images.to(dtype)).float()
            losses.append(F.cross_entropy(scores, labels, reduction="sum"))
            predicted.append(scores.argmax(1))
    return torch.cat(predicted), torch.stack(losses).sum().item() / len(data.test_labels)


@torch.no_grad()
def recalibrated_accuracy(model: nn.Module, data: ImageData, precision: torch.dtype = torch.float32) -> float:
    """Accuracy of a copy whose BatchNorm statistics are measured anew: what the weights alone are worth.

    The running averages lag behind weights that shrink fast. A twentieth of the training images, 100 to 1,000 of them,
    gives the statistics, and as many test images the accuracy: about 5 % of an epoch's time at most, and nothing that
    training reads is touched.
    """
    count = min(max(len(data.train_labels) // RECALIBRATION_SHARE, FEWEST_IMAGES), MOST_IMAGES)
    few, network = data.limited(max(count, data.num_classes)), copy.deepcopy(model)
    dtype, parts = next(model.parameters()).dtype, few.train_images.split(EVALUATION_BATCH)
    batches = (normalize(images, data.mean, data.std).to(dtype) for images in parts)
    with shared_quantized_weights(network), autocast(data.test_images.device, precision):
        update_bn(batches, network)
    return evaluate(network, few, precision)[1]


@torch.no_grad()
def layer_records(model: nn.Module) -> tuple[LayerRecord, ...]:
    """Bits, dead zone, zeros and dead filters of every quantized layer, measured on the quantized weights."""
    records = []
    with shared_quantized_weights(model):
        for name, layer in quantized_layers(model).items():
            quantizer = cast(Any, quantizer_of(layer))
            zero = cast(Tensor, layer.weight).flatten(1) == 0
            records.append(
                LayerRecord(
                    name=name,
                    bits=float(quantizer.get_bitwidth()),
                    dead_zone=float(quantizer.dead_zone_share()),
                    sparsity=int(zero.sum()) / zero.numel(),
                    dead=tuple(zero.all(1).tolist()),
                )
            )
    return tuple(records)


def summarize_layers(layers: tuple[LayerRecord, ...], sizes: Mapping[str, int]) -> dict[str, Any]:
    """Network-wide figures from the layers'; `sizes`: number of weights of each.

    unstructured_sparsity: share of all quantized weights that are 0. structured_sparsity: share of all their output
    channels whose filter is entirely 0. mean_bits: plain mean over layers.
    """
    weights = sum(sizes[layer.name] for layer in layers)
    return {
        "unstructured_sparsity": sum(layer.sparsity * sizes[layer.name] for layer in layers) / weights,
        "structured_sparsity": sum(layer.dead_channels for layer in layers) / sum(layer.channels for layer in layers),
        "mean_bits": sum(layer.bits for layer in layers) / len(layers),
    }


def measure_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: ImageData,
    means: EpochMeans,
    *,
    epoch: int,
    coefficient: float,
    seconds: float,
    precision: torch.dtype = torch.float32,
) -> EpochRecord:
    """The record of an epoch that has just been trained (`epoch` from 0): test set, sparsity and bits as they are now.

    Raises TrainingError where the test loss is not finite: the epoch's last update may have broken the network.
    """
    test_loss, accuracy = evaluate(model, data, precision=precision)
    if not math.isfinite(test_loss):
        raise TrainingError(f"the test loss is {test_loss} after epoch {epoch + 1}; {DIVERGENCE_HINT}")
    layers = layer_records(model)
    sizes = {name: cast(Tensor, layer.weight).numel() for name, layer in quantized_layers(model).items()}
    return EpochRecord(
        epoch=epoch + 1,
        coefficient=coefficient,
        learning_rate=optimizer.param_groups[0]["lr"],
        test_loss=test_loss,
        accuracy=accuracy,
        seconds=seconds,
        layers=layers,
        **means.read(),
        **summarize_layers(layers, sizes),
    )

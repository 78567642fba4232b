"""Faults in what is measured, reported and saved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from experiments.doctor import Pipeline
from experiments.doctor import pipeline as parts_of
from experiments.evaluator import EvalResult, Evaluator
from experiments.notebook import demonstration
from experiments.notebook.demonstration import Fault, accuracy, evaluated, layers, recording, small_network
from experiments.pipeline import attach
from metrics import LayerStats, ModelStats
from src import training
from src.data import ImageData, augment, normalize
from src.runs import load_checkpoint
from src.runs.checkpoint import state_bytes
from src.training import EpochRecord, History, LayerRecord
from utils_quantization import quantizer_of

Record = Callable[[Pipeline, EpochRecord], EpochRecord]
Accuracy = Callable[[Pipeline], float]


def on(change: Callable[[ImageData], ImageData]) -> Accuracy:
    """The accuracy on other images."""
    return lambda s: training.evaluate(s.model, change(cast(ImageData, s.data)), precision=s.precision)[1]


def training_images(data: ImageData) -> ImageData:
    return replace(data, test_images=data.train_images, test_labels=data.train_labels)


@torch.no_grad()
def right(model: nn.Module, data: ImageData, images: Tensor, most: int = 1) -> float:
    """Share of test images whose label is among the `most` largest scores."""
    best = model(normalize(images, data.mean, data.std)).topk(most, dim=1).indices
    return float((best == data.test_labels[:, None]).any(1).float().mean())


def in_training_mode(s: Pipeline) -> float:
    data = cast(ImageData, s.data)
    kept = copy.deepcopy(s.model.state_dict())
    s.model.train()
    share = right(s.model, data, data.test_images)
    s.model.load_state_dict(kept)
    return share


def top_three(s: Pipeline) -> float:
    data = cast(ImageData, s.data)
    s.model.eval()
    return right(s.model, data, data.test_images, most=3)


def augmented(s: Pipeline) -> float:
    """Test images are cropped at random, anew at every evaluation."""
    data = cast(ImageData, s.data)
    count = len(data.test_labels)
    s.model.eval()
    crops = augment(data.test_images, torch.randint(9, (count, 2)), torch.zeros(count, dtype=torch.bool), 4)
    return right(s.model, data, crops)


def best_so_far(pipeline: Pipeline) -> Pipeline:
    best = [0.0]

    def change(s: Pipeline, record: EpochRecord) -> EpochRecord:
        best[0] = max(best[0], record.accuracy)
        return replace(record, accuracy=best[0])

    return recording(change)(pipeline)


def dead_inputs(layer: nn.Module, record: LayerRecord) -> LayerRecord:
    weight = cast(Tensor, layer.weight)
    return replace(record, dead=tuple((weight == 0).all(3).all(2).all(0).tolist()))


def nearly_dead(layer: nn.Module, record: LayerRecord) -> LayerRecord:
    """Filters that are 99 % zeros count as dead."""
    zero = (cast(Tensor, layer.weight).flatten(1) == 0).float().mean(1)
    return replace(record, dead=tuple((zero > 0.5).tolist()))


def unrounded_bits(layer: nn.Module, record: LayerRecord) -> LayerRecord:
    quantizer = cast(Any, quantizer_of(layer))
    return replace(record, bits=float(quantizer.logit_bit.tanh().abs() * (quantizer.max_bits - 2) + 2))


def layers_averaged(s: Pipeline, record: EpochRecord) -> EpochRecord:
    """The sparsity of the network is the plain mean over layers, whatever their size."""
    return replace(record, unstructured_sparsity=sum(x.sparsity for x in record.layers) / len(record.layers))


def record_of_last_epoch(pipeline: Pipeline) -> Pipeline:
    """Every record holds the figures of the epoch before; the first its own."""
    kept: list[EpochRecord] = []

    def change(s: Pipeline, record: EpochRecord) -> EpochRecord:
        kept.append(record)
        return replace(kept[-2] if len(kept) > 1 else record, epoch=record.epoch)

    return recording(change)(pipeline)


def measured_before_training(pipeline: Pipeline) -> Pipeline:
    """Accuracy, zeros and bits are measured before the epoch's first step."""
    kept: dict[int, Any] = {}

    def train_epoch(s: Pipeline, epoch: int) -> Any:
        kept[epoch] = copy.deepcopy(s.model)
        yield from parts_of.run_epoch(s, epoch)

    def measure(s: Pipeline, means: Any, epoch: int, seconds: float) -> EpochRecord:
        return parts_of.run_measure(replace(s, model=kept[epoch]), means, epoch, seconds)

    return replace(pipeline, train_epoch=train_epoch, measure=measure)


def evaluation(change: Callable[[EvalResult], EvalResult]) -> Callable[[Pipeline], Pipeline]:
    """The last evaluation, changed."""

    def apply(pipeline: Pipeline) -> Pipeline:
        def evaluate(s: Pipeline) -> tuple[EvalResult, float]:
            result, share = pipeline.evaluate(s)  # type: ignore[misc]
            return change(result), share

        return replace(pipeline, evaluate=evaluate)

    return apply


def bops(change: Callable[[LayerStats], float]) -> Callable[[Pipeline], Pipeline]:
    """Both counts with other BOPs in every layer, and the ratios that follow."""

    def counted(stats: ModelStats) -> ModelStats:
        return ModelStats(tuple(replace(layer, bops=change(layer)) for layer in stats.layers))

    def apply(result: EvalResult) -> EvalResult:
        dense = result.structured_bops_ratio * result.structured_stats.total_bops
        structured, unstructured = counted(result.structured_stats), counted(result.unstructured_stats)
        return EvalResult(
            structured,
            dense / structured.total_bops,
            result.structured_mac_ratio,
            unstructured,
            dense / unstructured.total_bops,
            result.unstructured_mac_ratio,
        )

    return evaluation(apply)


def dense_bops(layer: LayerStats) -> float:
    """Dense MACs from the non-zero ones; the structured count comes out too large as well."""
    return layer.macs / max(1e-9, 1 - layer.pruning_ratio) * layer.bitwidth * 32


def ratios_upside_down(result: EvalResult) -> EvalResult:
    return replace(
        result,
        structured_bops_ratio=1 / result.structured_bops_ratio,
        unstructured_bops_ratio=1 / result.unstructured_bops_ratio,
    )


def evaluator(make: Callable[[Pipeline], Evaluator]) -> Callable[[Pipeline], Pipeline]:
    return lambda pipeline: replace(pipeline, evaluate=lambda s: evaluated(s, make(s)))


def quantized_baseline(s: Pipeline) -> Evaluator:
    config, data = s.expected.config, s.data
    assert config is not None
    assert data is not None
    baseline = small_network(config, data)
    attach(config, baseline)
    return Evaluator(baseline)


def larger_images(s: Pipeline) -> Evaluator:
    config, data = s.expected.config, s.data
    assert config is not None
    assert data is not None
    return Evaluator(small_network(config, data), input_size=(3, 64, 64))


def saving(change: Callable[[dict[str, Any], int], dict[str, Any]]) -> Callable[[Pipeline], Pipeline]:
    """Checkpoints whose contents are changed by fn(contents, epochs done)."""

    def save(s: Pipeline, history: History, folder: Path) -> Path:
        path = parts_of.run_save(s, history, folder)
        path.write_bytes(state_bytes(change(load_checkpoint(path), len(history))))
        return path

    return lambda pipeline: replace(pipeline, save=save)


def of_epoch_before(pipeline: Pipeline) -> Pipeline:
    kept: list[Any] = []

    def change(state: dict[str, Any], done: int) -> dict[str, Any]:
        kept.append(state["model"])
        return {**state, "model": kept[max(0, done - 2)]}

    return saving(change)(pipeline)


def never_saved_again(pipeline: Pipeline) -> Pipeline:
    """The checkpoint is written once, after the first epoch."""

    def save(s: Pipeline, history: History, folder: Path) -> Path:
        return parts_of.run_save(s, history, folder) if len(history) == 1 else folder / "checkpoint.pt"

    return replace(pipeline, save=save)


def without_statistics(state: dict[str, Any], done: int) -> dict[str, Any]:
    """BatchNorm's running statistics are saved as they were at the start."""
    fresh = {
        name: torch.zeros_like(x) if name.endswith("running_mean") else torch.ones_like(x)
        for name, x in state["model"].items()
        if name.endswith(("running_mean", "running_var"))
    }
    return {**state, "model": {**state["model"], **fresh}}


def without_logits(state: dict[str, Any], done: int) -> dict[str, Any]:
    return {**state, "model": {n: x for n, x in state["model"].items() if "logit_" not in n}}


def in_half_precision(state: dict[str, Any], done: int) -> dict[str, Any]:
    halved = {n: x.half().float() if x.is_floating_point() else x for n, x in state["model"].items()}
    return {**state, "model": halved}


FAULTS = (
    demonstration.FAULTS["sparsity of latent weights"],
    Fault(
        "sparsity averaged over layers",
        "The network's sparsity is the plain mean over layers, whatever their size.",
        ("sparsity-wrong",),
        pipeline=recording(layers_averaged),
    ),
    Fault(
        "dead channels per input",
        "A channel counts as dead where its input slice is zero, instead of its filter.",
        ("dead-per-input",),
        pipeline=layers(dead_inputs),
    ),
    Fault(
        "nearly dead counts as dead",
        "A filter counts as dead when most of it is zero.",
        ("dead-wrong",),
        pipeline=layers(nearly_dead),
        settings={"init_deadzone_logit": 0.6},
    ),
    Fault(
        "bits reported unrounded",
        "The records hold the bit width before it is rounded.",
        ("bits-misreported",),
        pipeline=layers(unrounded_bits),
    ),
    Fault(
        "bits reported as configured",
        "The records hold the largest bit width instead of the learned one.",
        ("bits-misreported",),
        pipeline=layers(lambda layer, record: replace(record, bits=8.0)),
        settings={"init_bit_logit": 1.0},
    ),
    Fault(
        "BOPs with 32-bit weights",
        "BOPs are counted as if no weight were quantized.",
        ("bops-wrong-bits",),
        pipeline=bops(lambda layer: float(layer.macs) * 32 * 32),
    ),
    Fault(
        "BOPs with the most bits",
        "BOPs are counted with 8 bits in every quantized layer.",
        ("bops-wrong-bits",),
        pipeline=bops(lambda layer: float(layer.macs) * (8 if layer.quantized else 32) * 32),
        settings={"init_bit_logit": 1.0},
    ),
    Fault(
        "BOPs of the dense network",
        "BOPs are counted with dense multiply-adds although weights are zero.",
        ("bops-dense-density",),
        pipeline=bops(dense_bops),
    ),
    Fault(
        "BOPs with 8-bit activations",
        "Activations stay in 32 bits and are counted with 8.",
        ("bops-activation-bits",),
        pipeline=bops(lambda layer: float(layer.macs) * layer.bitwidth * 8),
    ),
    Fault(
        "ratios upside down",
        "Compressed over baseline instead of baseline over compressed.",
        ("ratio-wrong",),
        pipeline=evaluation(ratios_upside_down),
    ),
    Fault(
        "quantized baseline",
        "The network is compared with a quantized one instead of the dense FP32 network.",
        ("baseline-wrong",),
        pipeline=evaluator(quantized_baseline),
    ),
    Fault(
        "MACs of larger images",
        "Multiply-adds are counted for images of 64 x 64 pixels.",
        ("macs-wrong",),
        pipeline=evaluator(larger_images),
    ),
    Fault(
        "history off by one",
        "Every record holds the figures of the epoch before.",
        ("history-shifted",),
        pipeline=record_of_last_epoch,
    ),
    Fault(
        "measured before the epoch",
        "An epoch's record is measured before its first step.",
        ("history-shifted", "history-stale"),
        pipeline=measured_before_training,
    ),
    Fault(
        "epochs numbered from 0",
        "The first record is called epoch 0.",
        ("history-shifted",),
        pipeline=recording(lambda s, record: replace(record, epoch=record.epoch - 1)),
    ),
    Fault(
        "best accuracy so far",
        "An epoch reports the best accuracy until then as its own.",
        ("accuracy-wrong", "history-stale", "history-shifted"),
        pipeline=best_so_far,
    ),
    Fault(
        "coefficient of the next epoch recorded",
        "The record says the coefficient that the next epoch will have.",
        ("coefficient-shifted", "history-shifted"),
        pipeline=recording(lambda s, record: replace(record, coefficient=s.coefficient(record.epoch))),
    ),
    demonstration.FAULTS["half of the test set"],
    Fault(
        "accuracy on training images",
        "The reported test accuracy is that of the training images.",
        ("accuracy-on-training",),
        pipeline=accuracy(on(training_images)),
    ),
    Fault(
        "evaluated in training mode",
        "BatchNorm uses the statistics of the test batch.",
        ("evaluation-in-training-mode",),
        pipeline=accuracy(in_training_mode),
    ),
    Fault(
        "top three accuracy",
        "An image counts as right where its label is among the three largest scores.",
        ("accuracy-wrong",),
        pipeline=accuracy(top_three),
    ),
    Fault(
        "accuracy in per cent",
        "Accuracy is reported as 97 instead of 0.97.",
        ("accuracy-wrong",),
        pipeline=recording(lambda s, record: replace(record, accuracy=100 * record.accuracy)),
    ),
    Fault(
        "test images augmented",
        "Test images are cropped at random, so no two evaluations agree.",
        ("evaluation-not-repeatable",),
        pipeline=accuracy(augmented),
    ),
    Fault(
        "loss summed over steps",
        "The record's training loss is the sum over the epoch's batches.",
        ("loss-misreported", "report-wrong"),
        pipeline=recording(lambda s, record: replace(record, loss=10 * record.loss, task_loss=10 * record.task_loss)),
    ),
    Fault(
        "checkpoint of another epoch",
        "The checkpoint holds the network of the epoch before.",
        ("checkpoint-of-other-epoch",),
        pipeline=of_epoch_before,
    ),
    Fault(
        "checkpoint never written again",
        "The checkpoint is written after the first epoch and never again.",
        ("checkpoint-of-other-epoch",),
        pipeline=never_saved_again,
    ),
    Fault(
        "checkpoint without BatchNorm's statistics",
        "The running statistics are saved as they were at the start.",
        ("checkpoint-incomplete",),
        pipeline=saving(without_statistics),
    ),
    Fault(
        "checkpoint without logits",
        "The quantizers' logits are missing in the checkpoint.",
        ("checkpoint-incomplete",),
        pipeline=saving(without_logits),
    ),
    Fault(
        "checkpoint in half precision",
        "The checkpoint holds weights rounded to 16 bits.",
        ("checkpoint-incomplete",),
        pipeline=saving(in_half_precision),
    ),
)

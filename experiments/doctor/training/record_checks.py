"""An epoch's record against the network: the quantized layers counted a second time, accuracy by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor

from experiments.doctor.checks.quantizers import bits_in_use, expected_weight
from experiments.doctor.core.by_hand import ACCURACY_CLOSE, accuracy_by_hand
from experiments.doctor.pipeline import Pipeline
from src.training import EpochRecord, LayerRecord
from utils_quantization import latent_weight, quantized_layers, quantizer_of

FEW_TEST_IMAGES = 1000


CLOSE = 1e-6


@dataclass(frozen=True)
class StepMeans:
    """Means over the steps of an epoch, all of which were seen: losses, and the share of right answers."""

    loss: float
    task_loss: float
    logit_penalty: float
    group_penalty: float
    train_accuracy: float

    @classmethod
    def of(cls, steps: Sequence[tuple[float, ...]], images: int) -> StepMeans:
        """steps: total, task, logits, groups and right answers of each; images: of all of them."""
        total, task, logits, groups, right = (math.fsum(values) for values in zip(*steps, strict=True))
        count = len(steps)
        return cls(total / count, task / count, logits / count, groups / count, right / max(images, 1))


@dataclass(frozen=True)
class EpochView:
    """The network at the end of an epoch: its record, and the quantized layers counted a second time."""

    record: EpochRecord
    means: StepMeans | None  # where all steps were seen
    right: tuple[int, int, float] | None  # right answers, test images and test loss, where there are few
    layers: tuple[LayerRecord, ...]
    latent_zeros: float
    dead_inputs: tuple[int, ...]
    rate: float = math.nan  # of the optimizer's first group in the last step that was seen


def counted(pipeline: Pipeline) -> tuple[tuple[LayerRecord, ...], float, tuple[int, ...]]:
    """The quantized layers by the equations: records, share of latent weights that are zero, dead inputs a layer."""
    settings = pipeline.expected.quantizer
    layers, latent, total, inputs = [], 0, 0, []
    with torch.no_grad():
        for name, layer in quantized_layers(pipeline.model).items():
            raw = latent_weight(layer)
            quantizer = cast(Any, quantizer_of(layer))
            theta = [float(getattr(quantizer, leaf, torch.tensor(math.nan))) for leaf in ("logit_dz", "logit_bit")]
            if settings is not None and not math.isnan(theta[0]):
                values = expected_weight(settings, layer)[0]
                bits = bits_in_use(settings, theta[1])
            else:
                values = cast(Tensor, layer.weight).detach().cpu()
                bits = float(quantizer.get_bitwidth()) if hasattr(quantizer, "get_bitwidth") else math.nan
            zero = values == 0
            dead = tuple(zero.flatten(1).all(1).tolist())
            share = 1 - abs(math.tanh(theta[0])) if not math.isnan(theta[0]) else math.nan
            layers.append(LayerRecord(name, bits, share, float(zero.double().mean()), dead))
            inputs.append(int(zero.transpose(0, 1).flatten(1).all(1).sum()))
            latent += int((raw == 0).sum())
            total += raw.numel()
    return tuple(layers), latent / max(total, 1), tuple(inputs)


def few_right(pipeline: Pipeline) -> tuple[int, int, float] | None:
    """Right answers, images and loss by hand, where the test set is small enough to be read after every epoch."""
    data = pipeline.data
    if data is None or pipeline.test_batches is None or len(data.test_labels) > FEW_TEST_IMAGES:
        return None
    try:
        return accuracy_by_hand(pipeline, pipeline.precision)
    except Exception:  # the pipeline's own evaluation will say so
        return None


def same_layers(found: tuple[LayerRecord, ...], meant: tuple[LayerRecord, ...]) -> bool:
    """Whether two records describe the same layers: names, zeros, bits and dead zones."""
    if [layer.name for layer in found] != [layer.name for layer in meant]:
        return False
    return all(
        abs(a.sparsity - b.sparsity) < 1e-3 and a.bits == b.bits and abs(a.dead_zone - b.dead_zone) < 1e-5
        for a, b in zip(found, meant, strict=True)
    )


def accuracy_is_off(view: EpochView, pipeline: Pipeline) -> bool:
    """Whether the recorded accuracy differs from the recounted one by more than the precision allows."""
    if view.right is None:
        return False
    right, count, _ = view.right
    return abs(view.record.accuracy - right / count) > ACCURACY_CLOSE[pipeline.precision] + 0.5 / count


def record_fault(pipeline: Pipeline, record: EpochRecord) -> tuple[str, list[str]]:
    """What of a record is not what the network shows now, and the likely causes; "" where all is."""
    return fault_of_epoch(EpochView(record, None, None, *counted(pipeline)), pipeline)


def fault_of_epoch(view: EpochView, pipeline: Pipeline) -> tuple[str, list[str]]:
    """What is wrong with one epoch's record, and the causes that fit; empty where nothing is."""
    record, layers = view.record, view.layers
    if view.right is not None and accuracy_is_off(view, pipeline):
        counted_share = view.right[0] / view.right[1]
        text = f"accuracy {100 * record.accuracy:.2f}% recorded, {100 * counted_share:.2f}% counted"
        return text, ["accuracy-wrong", "quantizers-off-in-evaluation"]
    text, keys = _fault_of_means(view, pipeline)
    if text or not layers:
        return text, keys
    sizes = {n: latent_weight(layer).numel() for n, layer in quantized_layers(pipeline.model).items()}
    total = sum(sizes.values())
    filters = sum(layer.channels for layer in layers)
    zeros = sum(layer.sparsity * sizes[layer.name] for layer in layers) / total
    dead = sum(layer.dead_channels for layer in layers)
    bits = sum(layer.bits for layer in layers) / len(layers)
    close = max(3 / total, 1e-4)  # float32 may count a weight on a threshold otherwise
    if abs(record.unstructured_sparsity - zeros) > close:
        latent = abs(record.unstructured_sparsity - view.latent_zeros) < close
        keys = ["sparsity-on-latent"] if latent else ["sparsity-wrong", "history-stale"]
        text = f"sparsity {100 * record.unstructured_sparsity:.2f}% recorded, {100 * zeros:.2f}% counted"
        return text, [*keys, "sparsity-on-latent", "quantizers-off-in-evaluation"]
    if abs(record.structured_sparsity * filters - dead) > 0.5:
        claimed = [layer.dead_channels for layer in record.layers]
        by_input = claimed == list(view.dead_inputs) or abs(sum(claimed) - sum(view.dead_inputs)) < 1
        keys = ["dead-per-input", "dead-wrong"] if by_input else ["dead-wrong", "dead-per-input"]
        return f"{100 * record.structured_sparsity:.2f}% dead recorded, {100 * dead / filters:.2f}% counted", keys
    if abs(record.mean_bits - bits) > CLOSE:
        return f"{record.mean_bits:.3f} bits recorded, {bits:.3f} counted", ["bits-misreported", "history-stale"]
    return _layer_fault(view)


def _fault_of_means(view: EpochView, pipeline: Pipeline) -> tuple[str, list[str]]:
    """Whether losses, training accuracy and test loss are what the steps and the test set say."""
    record = view.record
    for name, mean in asdict(view.means).items() if view.means is not None else ():
        reported = float(getattr(record, name))
        given = math.isfinite(mean) and (mean != 0 or name in ("loss", "task_loss"))  # 0: the step does not tell
        if given and not abs(reported - mean) <= 0.01 * abs(mean) + 1e-4:
            text = f"{name.replace('_', ' ')} {reported:.4f} recorded, {mean:.4f} is the steps' mean"
            return text, ["loss-misreported" if "accuracy" not in name else "accuracy-wrong", "report-wrong"]
    if view.right is not None and not abs(record.test_loss - view.right[2]) <= _loss_close(pipeline) * view.right[2]:
        text = f"test loss {record.test_loss:.4f} recorded, {view.right[2]:.4f} counted"
        return text, ["test-loss-wrong", "report-wrong"]
    if math.isfinite(view.rate) and not abs(record.learning_rate - view.rate) <= 1e-6 * view.rate + 1e-12:
        text = f"learning rate {record.learning_rate:.4g} recorded, {view.rate:.4g} in the last step"
        return text, ["rate-misreported", "report-wrong"]
    rest = record.loss - record.task_loss - record.logit_penalty - record.coefficient * record.group_penalty
    if pipeline.expected.config is not None and not abs(rest) <= 0.01 * abs(record.loss) + 1e-4:
        text = f"loss {record.loss:.4f} is not task + logits + coefficient x groups, by {rest:.4f}"
        # Where its parts are the steps' own, what does not fit is the coefficient.
        return text, ["loss-misreported" if view.means is None else "coefficient-wrong", "report-wrong"]
    return "", []


def _loss_close(pipeline: Pipeline) -> float:
    return 2e-3 if pipeline.precision == torch.float32 else 3e-2


def _layer_fault(view: EpochView) -> tuple[str, list[str]]:
    record, layers = view.record, view.layers
    for found, meant, dead_inputs in zip(record.layers, layers, view.dead_inputs, strict=False):
        if found.name != meant.name or len(record.layers) != len(layers):
            return f"layer {found.name} recorded, {meant.name} is there", ["report-wrong", "history-stale"]
        if abs(found.sparsity - meant.sparsity) > 2e-3:
            text = f"{found.name}: {100 * found.sparsity:.2f}% zeros recorded, {100 * meant.sparsity:.2f}% counted"
            return text, ["sparsity-on-latent" if found.sparsity < 1e-6 else "sparsity-wrong", "history-stale"]
        if found.dead != meant.dead:
            keys = ["dead-per-input", "dead-wrong"]
            likely = keys if found.dead_channels == dead_inputs else keys[::-1]
            return f"{found.name}: {found.dead_channels} dead recorded, {meant.dead_channels} counted", likely
        if abs(found.bits - meant.bits) > CLOSE:
            return f"{found.name}: {found.bits:g} bits recorded, {meant.bits:g} in use", [
                "bits-misreported",
                "history-stale",
            ]
        if abs(found.dead_zone - meant.dead_zone) > 1e-4:
            return f"{found.name}: dead zone {found.dead_zone:.4f}, {meant.dead_zone:.4f} in use", ["history-stale"]
    return "", []

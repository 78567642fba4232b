"""Faults in what is measured, reported and saved, and in the product's own account of compression."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.doctor import Pipeline
from experiments.doctor import pipeline as parts_of
from experiments.doctor.causes.account_mutants import NAMED, AccountMutant
from experiments.doctor.reference.accounting import Account, layers_of
from experiments.doctor.training.records import figures_of_record, wrong_figures
from experiments.evaluator import EvalResult
from experiments.notebook import demonstration
from experiments.notebook.demonstration import Fault, accuracy, recording
from src import training
from src.data import ImageData, augment, normalize, test_batches
from src.pruning import compaction, liveness
from src.runs import load_checkpoint
from src.runs.checkpoint import state_bytes
from src.training import EpochRecord, History

Change = Callable[[Pipeline], Pipeline]
State = dict[str, Any]
LIVENESS, COMPACTION = "src.pruning.liveness", "src.pruning.compaction"


def counted(mutant: AccountMutant) -> Change:
    """The pipeline whose records and evaluation hold what the account with this mistake gives."""
    account = mutant.change(Account())

    def record(s: Pipeline, right: EpochRecord) -> EpochRecord:
        layers = [layer for layer in layers_of(s.model, s.expected.quantizer) if layer.quantized]
        own = account.figures(layers)
        if not wrong_figures(figures_of_record(right), own):
            return right
        flags = own["dead filters"].bool().split([len(account.dead(account.weight(x))) for x in layers])
        rows = zip(right.layers, own["zeros"].tolist(), flags, own["bits"].tolist(), strict=True)
        changed = tuple(replace(x, sparsity=z, dead=tuple(dead.tolist()), bits=bits) for x, z, dead, bits in rows)
        unstructured, structured, bits = (float(own[name]) for name in ("sparsity", "dead share", "mean bits"))
        network = {"unstructured_sparsity": unstructured, "structured_sparsity": structured, "mean_bits": bits}
        return replace(right, layers=changed, **network)

    def result(s: Pipeline, right: EvalResult) -> EvalResult:
        layers = layers_of(s.model, s.expected.quantizer, (3, 32, 32))
        own = account.figures([replace(x, left=float(right.structured_stats[x.name].macs)) for x in layers])
        stats: dict[str, Any] = {}
        for part, kind in (("structured", "removal"), ("unstructured", "non-zero weights")):
            held = getattr(right, f"{part}_stats")
            rows = zip(held.layers, own[f"MACs of {kind}"].tolist(), own[f"BOPs of {kind}"].tolist(), strict=True)
            changed = tuple(replace(x, macs=int(macs), bops=bops) for x, macs, bops in rows)
            stats[f"{part}_stats"] = replace(held, layers=changed)
        for name in ("bops", "mac"):
            stats[f"unstructured_{name}_ratio"], stats[f"structured_{name}_ratio"] = own[f"{name} ratios"].tolist()
        return replace(right, **stats)

    return lambda pipeline: evaluation(result)(recording(record)(pipeline))


def evaluation(change: Callable[[Pipeline, EvalResult], EvalResult]) -> Change:
    """The last evaluation, changed."""

    def apply(pipeline: Pipeline) -> Pipeline:
        def evaluate(s: Pipeline) -> tuple[EvalResult, float]:
            result, share = pipeline.evaluate(s)  # type: ignore[misc]
            return change(s, result), share

        return replace(pipeline, evaluate=evaluate)

    return apply


def channels_misreported(s: Pipeline, result: EvalResult) -> EvalResult:
    stats = result.structured_stats
    layers = tuple(replace(layer, null_out=layer.null_in) for layer in stats.layers)
    return replace(result, structured_stats=replace(stats, layers=layers))


def on(change: Callable[[ImageData], ImageData]) -> Change:
    """The accuracy on other images."""
    return accuracy(lambda s: training.evaluate(s.model, change(cast(ImageData, s.data)), precision=s.precision)[1])


def testing(change: Callable[[Tensor, Tensor], tuple[Tensor, ...]]) -> Change:
    """The accuracy on what a test loader gives that changes every batch, raw images and labels."""

    def loader(s: Pipeline) -> Any:
        data = cast(ImageData, s.data)
        images, labels = change(data.test_images, data.test_labels)
        return test_batches(replace(data, test_images=images, test_labels=labels), 250)

    @torch.no_grad()
    def share(s: Pipeline) -> float:
        s.model.eval()
        pairs = [(s.model(images).argmax(1), labels) for images, labels in loader(s)]
        return float(torch.cat([a == b for a, b in pairs]).float().mean())

    return lambda pipeline: replace(accuracy(share)(pipeline), test_batches=loader)


def cropped(images: Tensor) -> Tensor:
    """Every image by its own offsets, the same at every evaluation."""
    offsets = torch.randint(9, (len(images), 2), generator=torch.Generator().manual_seed(0))
    return augment(images, offsets, torch.zeros(len(images), dtype=torch.bool), 4)


@torch.no_grad()
def right(s: Pipeline, change: Callable[[Tensor], Tensor] = lambda images: images, most: int = 1) -> float:
    """Share of test images whose label is among the `most` largest scores."""
    data = cast(ImageData, s.data)
    best = s.model(normalize(change(data.test_images), data.mean, data.std)).topk(most, dim=1).indices
    return float((best == data.test_labels[:, None]).any(1).float().mean())


def in_training_mode(s: Pipeline) -> float:
    kept = copy.deepcopy(s.model.state_dict())
    s.model.train()
    share = right(s)
    s.model.load_state_dict(kept)
    return share


def in_eval_mode(s: Pipeline, **settings: Any) -> float:
    s.model.eval()
    return right(s, **settings)


def cropped_anew(images: Tensor) -> Tensor:
    return augment(images, torch.randint(9, (len(images), 2)), torch.zeros(len(images), dtype=torch.bool), 4)


@torch.no_grad()
def mean_of_batch_means(s: Pipeline, record: EpochRecord) -> EpochRecord:
    """The test loss as the mean of batches of 100, of which the last is smaller."""
    s.model.eval()
    losses = [float(F.cross_entropy(s.model(x), y)) for x, y in test_batches(cast(ImageData, s.data), 100)]
    return replace(record, test_loss=sum(losses) / len(losses))


def best_so_far(pipeline: Pipeline) -> Pipeline:
    best = [0.0]

    def change(s: Pipeline, record: EpochRecord) -> EpochRecord:
        best[0] = max(best[0], record.accuracy)
        return replace(record, accuracy=best[0])

    return recording(change)(pipeline)


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


def record_with(**changes: Callable[[EpochRecord], float]) -> Change:
    """Records of which some fields are changed."""
    return recording(lambda s, record: replace(record, **{name: fn(record) for name, fn in changes.items()}))


def saving(change: Callable[[State], Any]) -> Change:
    """Checkpoints whose contents are changed before they are written."""

    def save(s: Pipeline, history: History, folder: Path) -> Path:
        path = parts_of.run_save(s, history, folder)
        state = load_checkpoint(path)
        change(state)
        path.write_bytes(state_bytes(state))
        return path

    return lambda pipeline: replace(pipeline, save=save)


def of_epoch_before(pipeline: Pipeline) -> Pipeline:
    kept: list[Any] = []

    def change(state: State) -> None:
        kept.append(state["model"])
        state["model"] = kept[max(0, len(kept) - 2)]

    return saving(change)(pipeline)


def never_saved_again(pipeline: Pipeline) -> Pipeline:
    """The checkpoint is written once, after the first epoch."""

    def save(s: Pipeline, history: History, folder: Path) -> Path:
        return parts_of.run_save(s, history, folder) if len(history) == 1 else folder / "checkpoint.pt"

    return replace(pipeline, save=save)


def saved_model(change: Callable[[str, Tensor], Tensor | None]) -> Change:
    """Checkpoints whose tensors are changed by fn(name, tensor), None to leave one out."""

    def apply(state: State) -> None:
        changed = {name: change(name, tensor) for name, tensor in state["model"].items()}
        state["model"] = {name: tensor for name, tensor in changed.items() if tensor is not None}

    return saving(apply)


def as_at_the_start(name: str, tensor: Tensor) -> Tensor:
    starts = {"running_mean": torch.zeros_like, "running_var": torch.ones_like}
    return starts.get(name.rpartition(".")[2], torch.clone)(tensor)


def earlier_accuracies_lost(state: State) -> None:
    for record in state["history"]["records"][:-1]:
        record["accuracy"] = 0.5


def handed_on(kind: str) -> dict[str, Any]:
    """The edit by which liveness hands on the first input's constants at operations of a kind."""
    whole = liveness._constant

    def constant(op: Any, module: Any, sources: Any, shapes: Any) -> Any:
        return sources[0] if op.kind == kind else whole(op, module, sources, shapes)

    return {f"{LIVENESS}._constant": constant}


def without_constants(writer: Any, op: Any, whole: Callable[..., int] = compaction._Writer._add) -> int:
    """An addition behind which the constants of its removed channels are left out."""
    removed, writer._removed = writer._removed, lambda source: np.zeros(writer.ops[source].channels)
    try:
        return whole(writer, op)
    finally:
        writer._removed = removed


def layers_without_constants(*given: Any, whole: Callable[..., Any] = liveness._layer) -> Any:
    return replace(whole(*given), carries_constants=False)


def middle_tap(op: Any, module: nn.Module, whole: Callable[..., Any] = liveness._weight) -> Any:
    weight = whole(op, module)
    return weight[:, :, weight.shape[2] // 2, None]


def live_alone(
    ops: Any, constant: Any, reads: Any, kept_whole: Any, also: Any, whole: Callable[..., Any] = liveness._kept
) -> Any:
    """What is kept, without a look at who reads it."""
    every = {name: np.isnan(values) for name, values in constant.items()}
    return whole(ops, constant, reads, kept_whole, every | also)


DROPPED = ("constants-dropped", "live-channel-removed")
EDITED: dict[str, tuple[str, dict[str, Any]]] = {
    "constants not counted": (
        "The account gives no layer the channel of ones that carries its constants.",
        {f"{LIVENESS}._layer": layers_without_constants},
    ),
    "padding ignored": (
        "Constants that are read beyond the border count as constants.",
        dict.fromkeys((f"{LIVENESS}.is_padded", f"{COMPACTION}.is_padded"), lambda op: False),
    ),
    "an add's constants dropped": (
        "Compaction leaves out what constant channels add to a sum.",
        {f"{COMPACTION}._Writer._add": without_constants},
    ),
    "kernels judged by their middle": (
        "A kernel counts as zero where its middle weight is.",
        {f"{LIVENESS}._weight": middle_tap},
    ),
    "ReLU forgotten by the account": ("A constant below zero stays what it is behind ReLU.", handed_on("relu")),
    "BatchNorm's shift dropped": ("A dead filter counts as zero behind BatchNorm, too.", handed_on("batchnorm")),
    "an add of one branch": ("A sum counts as constant where its first branch is.", handed_on("add")),
}
MISCOUNTED = {
    "sparsity averaged over layers": "The network's sparsity is the plain mean over layers, whatever their size.",
    "dead channels per input": "A channel counts as dead where its input slice is zero, instead of its filter.",
    "nearly dead counts as dead": "A filter counts as dead when most of it is zero.",
    "bits reported unrounded": "The records hold the bit width before it is rounded.",
    "bits reported as configured": "The records hold the largest bit width instead of the learned one.",
    "BOPs with 32-bit weights": "BOPs are counted as if no weight were quantized.",
    "BOPs with the most bits": "BOPs are counted with 8 bits in every quantized layer.",
    "BOPs with unrounded bits": "BOPs are counted with the bit width before it is rounded.",
    "BOPs of the dense network": "BOPs are counted with dense multiply-adds although weights are zero.",
    "BOPs with 8-bit activations": "Activations stay in 32 bits and are counted with 8.",
    "ratios upside down": "Compressed over baseline instead of baseline over compressed.",
    "quantized baseline": "The network is compared with a quantized one instead of the dense FP32 network.",
    "MACs of larger images": "Multiply-adds are counted for images of 64 x 64 pixels.",
    "ratios as shares saved": "A ratio is reported as the share of the baseline that is saved.",
    "baseline of the quantized layers": "The baseline counts the quantized layers alone.",
    "MACs without pixels": "Every non-zero weight counts as one multiply-add, however often it is used.",
    "dead filters counted as removed": "A layer's cost after removal is counted of live filters and read inputs alone.",
}
FAULTS = (
    demonstration.FAULTS["sparsity of latent weights"],
    *(
        Fault(name, breaks, (NAMED[name].key,), pipeline=counted(NAMED[name]), settings={"init_bit_logit": 1.0})
        for name, breaks in MISCOUNTED.items()
    ),
    Fault(
        "channels left misreported",
        "The removed outputs of a layer are said to be those of its inputs.",
        ("report-wrong",),
        pipeline=evaluation(channels_misreported),
    ),
    *(Fault(name, breaks, DROPPED, edits=edits) for name, (breaks, edits) in EDITED.items()),
    Fault(
        "unread channels kept",
        "Every channel that is not constant is kept, whether something reads it or not.",
        ("channels-not-removed",),
        edits={f"{LIVENESS}._kept": live_alone},
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
        pipeline=record_with(epoch=lambda record: record.epoch - 1),
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
    Fault(
        "loss summed over steps",
        "The record's training loss is the sum over the epoch's batches.",
        ("loss-misreported", "report-wrong"),
        pipeline=record_with(loss=lambda record: 10 * record.loss, task_loss=lambda record: 10 * record.task_loss),
    ),
    Fault(
        "task loss of the record",
        "The record's task loss is not the mean over the steps.",
        ("loss-misreported",),
        pipeline=record_with(task_loss=lambda record: 0.9 * record.task_loss),
    ),
    Fault(
        "training accuracy flattered",
        "The record's training accuracy is a few points too high.",
        ("accuracy-wrong",),
        pipeline=record_with(train_accuracy=lambda record: min(1.0, 1.1 * record.train_accuracy)),
    ),
    Fault(
        "penalty recorded with its coefficient",
        "The record's penalty is multiplied by the coefficient already.",
        ("loss-misreported",),
        pipeline=record_with(group_penalty=lambda record: record.coefficient * record.group_penalty),
    ),
    Fault(
        "learning rate of the start recorded",
        "The record always holds the learning rate that the run began with.",
        ("rate-misreported",),
        pipeline=recording(
            lambda s, record: replace(record, learning_rate=s.expected.config.learning_rate)  # type: ignore[union-attr]
        ),
    ),
    Fault(
        "test loss averaged over batches",
        "The test loss is the mean of batches of unequal size.",
        ("test-loss-wrong",),
        pipeline=recording(mean_of_batch_means),
    ),
    demonstration.FAULTS["half of the test set"],
    Fault(
        "accuracy on training images",
        "The reported test accuracy is that of the training images.",
        ("accuracy-on-training",),
        pipeline=on(lambda data: replace(data, test_images=data.train_images, test_labels=data.train_labels)),
    ),
    Fault(
        "accuracy of a loader that crops",
        "The test loader gives every image cropped, always the same way, and the accuracy is counted on them.",
        ("test-loader-wrong", "test-images-augmented"),
        pipeline=testing(lambda images, labels: (cropped(images), labels)),
    ),
    Fault(
        "accuracy of a loader that repeats",
        "The test loader gives the first half of the images twice, and the accuracy is counted on them.",
        ("test-loader-wrong",),
        pipeline=testing(lambda *pair: tuple(torch.cat([part[: len(part) // 2]] * 2) for part in pair)),
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
        pipeline=accuracy(lambda s: in_eval_mode(s, most=3)),
    ),
    Fault(
        "accuracy in per cent",
        "Accuracy is reported as 97 instead of 0.97.",
        ("accuracy-wrong",),
        pipeline=record_with(accuracy=lambda record: 100 * record.accuracy),
    ),
    Fault(
        "test images augmented",
        "Test images are cropped at random, so no two evaluations agree.",
        ("evaluation-not-repeatable",),
        pipeline=accuracy(lambda s: in_eval_mode(s, change=cropped_anew)),
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
        pipeline=saved_model(as_at_the_start),
    ),
    Fault(
        "checkpoint without logits",
        "The quantizers' logits are missing in the checkpoint.",
        ("checkpoint-incomplete",),
        pipeline=saved_model(lambda name, tensor: None if "logit_" in name else tensor),
    ),
    Fault(
        "checkpoint in half precision",
        "The checkpoint holds weights rounded to 16 bits.",
        ("checkpoint-incomplete",),
        pipeline=saved_model(lambda name, x: x.half().float() if x.is_floating_point() else x),
    ),
    Fault(
        "checkpoint without moments",
        "The checkpoint holds the optimizer's groups and none of its moments.",
        ("checkpoint-not-resumable",),
        pipeline=saving(lambda state: state["optimizer"].update(state={})),
    ),
    Fault(
        "checkpoint of another configuration",
        "The checkpoint says that the run had another seed.",
        ("checkpoint-not-resumable",),
        pipeline=saving(lambda state: state["config"].update(seed=77)),
    ),
    Fault(
        "checkpoint's records differ",
        "The records of earlier epochs in the checkpoint are not those of the run.",
        ("checkpoint-not-resumable",),
        pipeline=saving(earlier_accuracies_lost),
    ),
)

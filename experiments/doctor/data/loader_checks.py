"""Before training: what the loaders give, batch by batch and epoch by epoch. Axis letters: N images, K classes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.doctor.data.images import LOOKED_UP, digest
from experiments.doctor.pipeline import Batch, Pipeline
from experiments.doctor.runner import CheckRunner, NotApplicable, Outcome, PartFailed


def loader_checks(runner: CheckRunner, pipeline: Pipeline) -> None:
    """Add the findings about batches, their order and their labels."""
    blame = {"blame": "loader-raises"}
    runner.check("batches", "the loader gives batches the network can read", _batches, pipeline, **blame)
    runner.check("epochs", "no two epochs have the same order", _epochs, pipeline, **blame)
    runner.check("label balance", "every class is there, in both parts", _balance, pipeline, **blame)
    runner.check("order of the images", "a batch is a random draw without repetition", _order, pipeline, **blame)
    runner.check("test batches", "the test loader gives the whole test set once", _test_set, pipeline, **blame)


def drawn(pipeline: Pipeline, count: int) -> list[Batch]:
    """The first batches of epoch 0. Raises PartFailed where the loader does."""
    try:
        return pipeline.first_batches(count)
    except Exception as error:
        raise PartFailed("loader-raises", error) from error


def fault_of_batch(batch: Any, classes: int | None, size: tuple[int, int, int] | None) -> str:
    """What is wrong with the form of a batch, or an empty string."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        return f"a batch is {type(batch).__name__}, not a pair of images and labels"
    images, labels = batch
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
        return f"a batch holds {type(images).__name__} and {type(labels).__name__}, not tensors"
    if not images.is_floating_point() or images.dim() < 2 or not len(images):
        return f"images are {images.dtype} {tuple(images.shape)}"
    if size is not None and tuple(images.shape[1:]) != tuple(size):
        return f"images are {tuple(images.shape)}, not (N, {', '.join(map(str, size))})"
    if labels.shape != images.shape[:1] or labels.is_floating_point():
        return f"labels are {labels.dtype} {tuple(labels.shape)} for {len(images)} images"
    if not torch.isfinite(images).all():
        return "images hold values that are not finite"
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (classes is not None and high >= classes):
        return f"labels run from {low} to {high}, for {classes} classes"
    return ""


def _walks_once(pipeline: Pipeline) -> bool:
    """Whether the loader hands over the same iterator whenever it is asked."""
    first, second = (pipeline.train_batches(pipeline, 0) for _ in range(2))
    return first is second and isinstance(first, Iterator)


def good_batches(pipeline: Pipeline, count: int) -> list[Batch]:
    """Batches whose form is sound. Raises NotApplicable where there is none."""
    good = [
        b
        for b in drawn(pipeline, count)
        if not fault_of_batch(b, pipeline.expected.num_classes, pipeline.expected.input_size)
    ]
    if not good:
        raise NotApplicable("the loader gives no batch that can be used")
    return good


def _batches(pipeline: Pipeline) -> Outcome:
    size, classes, batch_size = (
        pipeline.expected.input_size,
        pipeline.expected.num_classes,
        pipeline.expected.batch_size,
    )
    expected = "float images (N, C, H, W), labels (N,)" + (f", {batch_size} a batch" if batch_size else "")
    batches = drawn(pipeline, 3)
    if not batches:
        return Outcome(expected, "no batch at all", False, ["loader-empty"])
    if _walks_once(pipeline) or not drawn(pipeline, 1):
        return Outcome(expected, "an iterator that can be walked once alone", False, ["loader-used-up", "loader-empty"])
    fault = next((f for f in (fault_of_batch(batch, classes, size) for batch in batches) if f), "")
    likely = ["loader-shapes"]
    if not fault and batch_size and len(batches[0][1]) != batch_size:
        fault = f"{len(batches[0][1])} images in the first batch"
    if not fault and pipeline.test_batches is not None:
        tests = list(islice(pipeline.test_batches(pipeline), 1))
        fault = fault_of_batch(tests[0], classes, size) if tests else "none at all"
        fault = f"test batches: {fault}" if fault else ""
        likely = ["loader-shapes"] if tests else ["loader-empty"]
    images, labels = batches[0] if not fault else (torch.zeros(0), torch.zeros(0))
    return Outcome(expected, fault or f"{tuple(images.shape)} and {tuple(labels.shape)}", not fault, likely)


def _epochs(pipeline: Pipeline) -> Outcome:
    """The first labels of some epochs, compared in pairs."""
    epochs = sorted({0, 1, 2, 3, max((pipeline.expected.epochs or 2) - 1, 1)})
    labels: dict[int, Tensor] = {}
    for epoch in epochs:
        batches = [batch for batch in pipeline.first_batches(2, epoch) if not fault_of_batch(batch, None, None)]
        if batches:
            labels[epoch] = torch.cat([batch[1].cpu() for batch in batches])
    if 0 not in labels:
        raise NotApplicable("the loader gives no batch that can be used")
    tells = len(labels[0]) >= 16 and len(labels[0].unique()) > 1
    pairs = list(combinations(labels, 2)) if tells else []
    same = [(a, b) for a, b in pairs if torch.equal(labels[a], labels[b])]
    if same and pipeline.data is None:
        raise NotApplicable("two walks through the batches are alike; whether that is meant is not known")
    measured = f"{len(labels)} epochs begin differently"
    if same:
        measured = f"epochs {same[0][0] + 1} and {same[0][1] + 1} begin with the same labels"
    return Outcome("a new order in every epoch", measured, not same, ["loader-same-order"])


def _test_set(pipeline: Pipeline) -> Outcome:
    """The labels that the test loader gives beside those of the test part."""
    if pipeline.data is None or pipeline.test_batches is None:
        raise NotApplicable("the raw images are not known, or there is no test set", "data")
    meant = pipeline.data.test_labels.cpu()
    drawn_labels = [batch[1].cpu() for batch in islice(pipeline.test_batches(pipeline), len(meant) + 1)]
    found = torch.cat(drawn_labels) if drawn_labels else meant[:0]
    classes = pipeline.data.num_classes
    same = torch.equal(found.bincount(minlength=classes), meant.bincount(minlength=classes))
    measured = f"{len(found)} images" + ("" if same or len(found) != len(meant) else ", other labels")
    likely = ["partial-test-set"] if len(found) != len(meant) else ["test-labels-wrong"]
    return Outcome(f"all {len(meant)} test images, each once", measured, same, likely)


def _balance(pipeline: Pipeline) -> Outcome:
    data = pipeline.data
    if data is None:
        labels = torch.cat([b[1] for b in good_batches(pipeline, 20)]).cpu()
        counts = labels.bincount(minlength=pipeline.expected.num_classes or 0).tolist()
        if len(labels) < 20 * len(counts):
            raise NotApplicable(f"{len(labels)} labels drawn are too few to judge {len(counts)} classes")
        parts = {"drawn": counts}
    else:
        parts = {
            "training": data.train_labels.cpu().bincount(minlength=data.num_classes).tolist(),
            "test": data.test_labels.cpu().bincount(minlength=data.num_classes).tolist(),
        }
    missing = [f"{part}: no image of class {counts.index(0)}" for part, counts in parts.items() if 0 in counts]
    measured = "; ".join(f"{part} {min(counts)} to {max(counts)} images a class" for part, counts in parts.items())
    skewed = any(max(counts) > 0.8 * sum(counts) for counts in parts.values() if len(counts) > 1)
    if data is not None:
        train, test = (np.array(parts[p], dtype=float) / max(sum(parts[p]), 1) for p in ("training", "test"))
        noise = math.sqrt(len(test) / len(data.test_labels))
        distance = float(np.abs(train - test).sum() / 2)
        skewed |= distance > 0.15 + noise
        measured += f"; their shares differ by {100 * distance:.1f}%"
    likely = ["class-missing"] if missing else ["labels-unbalanced"]
    return Outcome("every class, in like shares", "; ".join([*missing, measured]), not (missing or skewed), likely)


def _order(pipeline: Pipeline) -> Outcome:
    batches = good_batches(pipeline, 4)
    classes = pipeline.expected.num_classes or int(max(int(b[1].max()) for b in batches)) + 1
    sizes = [len(b[1]) for b in batches]
    seen = [len(b[1].unique()) for b in batches]
    # Classes that a random draw of n labels shows on average: K (1 - (1 - 1/K)^n).
    meant = [classes * (1 - (1 - 1 / classes) ** n) for n in sizes]
    few = sum(seen) < 0.6 * sum(meant) and classes > 1
    digests = [digest(image) for b in batches for image in b[0][:LOOKED_UP].cpu().numpy()]
    raw = pipeline.data
    repeats = len(digests) - len(set(digests))
    tolerated = 0.05 * len(digests) if raw is None or len(raw.train_labels) >= sum(sizes) else len(digests)
    measured = f"{np.mean(seen):.1f} classes a batch, {repeats} of {len(digests)} images seen before"
    likely = ["loader-not-shuffled" if few else None, "loader-repeats"]
    return Outcome(
        f"about {np.mean(meant):.1f} classes a batch, no repetition", measured, not few and repeats <= tolerated, likely
    )

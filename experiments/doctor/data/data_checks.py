"""Before training: images, labels, normalisation, augmentation, and the split into training and test part.

The loaders, the normalisation and the augmentation have modules of their own; here are the images and labels
themselves. Axis letters: N images, C channels, H, W space, K classes.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from experiments.doctor.core.sources import labels_of_source
from experiments.doctor.data.augmentation_checks import augmentation_checks
from experiments.doctor.data.images import digest, some
from experiments.doctor.data.loader_checks import good_batches, loader_checks
from experiments.doctor.data.normalisation_checks import normalisation_checks
from experiments.doctor.pipeline import Pipeline
from experiments.doctor.runner import CheckRunner, NotApplicable, Outcome
from src.data import ImageData

PROBED = 2000  # images that the probe of the labels learns from
SURE, UNSURE = 4.0, 2.6  # standard deviations above chance
MOST_REPEATED = 0.05  # share of a part's images that may be there already, or show nothing
BLANK = 8.0  # grey levels: no channel of a blank image deviates by so many; the flattest of CIFAR-10 by 11
LOOKS = ("brightness", "contrast", "red over green", "blue over green")


def data_checks(runner: CheckRunner, pipeline: Pipeline) -> None:
    """Add the findings about the data."""
    loader_checks(runner, pipeline)
    normalisation_checks(runner, pipeline)
    augmentation_checks(runner, pipeline)
    blame = {"blame": "loader-raises"}
    runner.check("training and test part", "no test image is trained on", _disjoint, pipeline, **blame)
    runner.check("images differ", "neither part holds an image twice, or blank ones", _repeated, pipeline, **blame)
    runner.check("like parts", "training and test images are of one kind", _alike, pipeline, **blame)
    runner.check("labels of the source", "the labels are those the data set came with", _source, pipeline, **blame)
    runner.check(
        "labels fit the images", "a linear probe learns the labels from the pixels", _information, pipeline, **blame
    )


def _alike(pipeline: Pipeline) -> Outcome:
    """Brightness, contrast and colour of the images of both parts, in standard errors."""
    data = pipeline.data
    if data is None:
        raise NotApplicable("the raw images are not known", "data")
    train, test = _looks(data.train_images), _looks(data.test_images)
    error = np.sqrt(train.var(0) / len(train) + test.var(0) / len(test))
    error += np.array([0.02 * train[:, 0].mean(), 0.02 * train[:, 1].mean(), *[0.01 * train[:, 0].mean()] * 2])
    off = np.abs(train.mean(0) - test.mean(0)) / np.maximum(error, 1e-9)
    worst = float(off.max())
    parts = (f"{name} {a:.1f} and {b:.1f}" for name, a, b in zip(LOOKS, train.mean(0), test.mean(0), strict=True))
    swapped = off[2:].max() > 5 and np.abs(train.mean(0)[2:] - test.mean(0)[:1:-1]).max() < 5 * error[2:].max()
    likely = ["channels-swapped" if swapped else None, "train-test-normalised-differently", "wrong-normalisation"]
    return Outcome("the same to 5 standard errors", ", ".join(parts), worst < 5, likely, worst / 5)


def _looks(images: Tensor) -> NDArray[np.float64]:
    """Mean and deviation of the pixels, red and blue over green, of at most 2,000 images, (N, 4)."""
    chosen = images[:: max(1, len(images) // PROBED)].float()
    flat, (red, green, blue) = chosen.flatten(1), chosen.mean((2, 3)).unbind(1)
    return torch.stack([flat.mean(1), flat.std(1), red - green, blue - green], 1).double().cpu().numpy()


def _source(pipeline: Pipeline) -> Outcome:
    """The files or the embedded digits, read again: every image must have the label it came with."""
    data = pipeline.data
    known = None if data is None else labels_of_source(data.name, pipeline.expected.config)
    if data is None or known is None:
        raise NotApplicable("only the digits and CIFAR-10 can be read again")
    wrong: dict[str, int] = {}
    for part, tensor, own in (
        ("training", data.train_images, data.train_labels),
        ("test", data.test_images, data.test_labels),
    ):
        pictures, labels = tensor.permute(0, 2, 3, 1).cpu().contiguous().numpy(), own.cpu().numpy()
        pairs = zip(pictures, labels.tolist(), strict=True)
        wrong[part] = sum(label not in known.get(digest(picture), {label}) for picture, label in pairs)
    measured = f"{wrong['training']} training and {wrong['test']} test labels differ"
    likely = ["labels-shuffled" if wrong["training"] else None, "test-labels-wrong" if wrong["test"] else None]
    return Outcome("every label as it came", measured, not any(wrong.values()), likely)


def _disjoint(pipeline: Pipeline) -> Outcome:
    data = pipeline.data
    if data is None:
        raise NotApplicable("the raw images are not known", "data")
    train = {digest(image) for image in data.train_images.cpu().contiguous().numpy()}
    test = data.test_images.cpu().contiguous().numpy()
    shared = sum(digest(image) in train or digest(image[:, :, ::-1]) in train for image in test)
    allowed = max(1, round(0.002 * len(test)))
    measured = f"{shared} of {len(test)} test images are also training images"
    return Outcome(
        f"at most {allowed} (a data set may hold a picture twice)", measured, shared <= allowed, ["test-in-training"]
    )


def _repeated(pipeline: Pipeline) -> Outcome:
    data = pipeline.data
    if data is None:
        raise NotApplicable("the raw images are not known", "data")
    parts, worst = [], 0.0
    for name, images in (("training", data.train_images), ("test", data.test_images)):
        different = len({digest(image) for image in images.cpu().contiguous().numpy()})
        parts.append(f"{different} of {len(images)} {name} images differ")
        worst = max(worst, 1 - different / len(images))
    expected = f"at least {100 * (1 - MOST_REPEATED):g}% of each part"
    blank = _blank(data)
    if blank > MOST_REPEATED:
        parts.append(f"{100 * blank:.0f}% are blank or nearly so")
    worst = max(worst, blank)
    likely = ["images-blank" if blank > MOST_REPEATED else None, "images-repeated"]
    return Outcome(expected, ", ".join(parts), worst <= MOST_REPEATED, likely, worst / MOST_REPEATED)


def _blank(data: ImageData) -> float:
    """The share of blank images in the part that has more of them, of at most 2,000 images each."""
    chosen = (images[:: max(1, len(images) // PROBED)].float() for images in (data.train_images, data.test_images))
    return max(float((some.std((2, 3)).amax(1) < BLANK).float().mean()) for some in chosen)


def _information(pipeline: Pipeline) -> Outcome:
    """Ridge regression from 8 x 8 pixels to the labels: fitted on half of the images, tried on the rest."""
    x, y = _training_images(pipeline)
    half = len(x) // 2
    classes = int(y.max()) + 1 if pipeline.expected.num_classes is None else pipeline.expected.num_classes
    if half < 10 * classes or classes < 2:
        raise NotApplicable(f"{len(x)} images are too few for a probe of {classes} classes")
    weights = _ridge(x[:half], y[:half], classes)
    held = _score(weights, x[half:], y[half:], classes)
    test = _test_images(pipeline)
    tested = _score(_ridge(x, y, classes), *test, classes) if test is not None else None
    ok_train = held[1] > SURE
    ok_test = tested is None or (tested[1] > SURE and tested[0] > 0.5 * held[0])
    measured = f"{100 * held[0]:.0f}% of training images held out"
    measured += f", {100 * tested[0]:.0f}% of test images" if tested else ""
    unsure = [score for score in (held, tested) if score is not None and UNSURE < score[1] <= SURE]
    if not (ok_train and ok_test) and (unsure or half < max(15 * classes, 100)):
        raise NotApplicable(f"{measured}: {len(x)} images are too few to tell")
    likely = ["labels-shuffled", "test-labels-wrong"] if not ok_train else ["test-labels-wrong", "labels-shuffled"]
    if pipeline.data is not None and _blank(pipeline.data) > MOST_REPEATED:
        likely.insert(0, "images-blank")
    expected = f"clearly above chance, {100 / classes:.0f}%, on both"
    return Outcome(expected, measured, ok_train and ok_test, likely)


def _training_images(pipeline: Pipeline) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    if pipeline.data is not None:
        return _features(pipeline.data.train_images, pipeline.data.train_labels)
    batches = good_batches(pipeline, 40)
    return _features(torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches]))


def _test_images(pipeline: Pipeline) -> tuple[NDArray[np.float64], NDArray[np.int64]] | None:
    if isinstance(pipeline.data, ImageData):
        return _features(pipeline.data.test_images, pipeline.data.test_labels)
    if pipeline.test_batches is None:
        return None
    batches = some(pipeline.test_batches(pipeline), 40)
    if not batches or sum(len(b[1]) for b in batches) < 100:
        return None
    return _features(torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches]))


def _features(images: Tensor, labels: Tensor) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Evenly spread images, averaged to 8 x 8 pixels, standardised, with a constant: (N, features)."""
    every = max(1, len(images) // PROBED)
    chosen, y = images[::every][:PROBED].float(), labels[::every][:PROBED].cpu().numpy()
    order = np.random.default_rng(0).permutation(len(y))  # a sorted data set gives every half all classes
    small = torch.nn.functional.adaptive_avg_pool2d(chosen, 8) if chosen.dim() == 4 else chosen
    x = small.flatten(1).double().cpu().numpy()
    x = (x - x.mean(0)) / (x.std() + 1e-12)
    return np.hstack([x, np.ones((len(x), 1))])[order], y[order]


def _ridge(x: NDArray[np.float64], y: NDArray[np.int64], classes: int) -> NDArray[np.float64]:
    targets = np.eye(classes)[y] - 1 / classes
    gram = x.T @ x
    return np.linalg.solve(gram + 0.1 * np.trace(gram) / len(gram) * np.eye(len(gram)), x.T @ targets)


def _score(
    weights: NDArray[np.float64], x: NDArray[np.float64], y: NDArray[np.int64], classes: int
) -> tuple[float, float]:
    """Share of right answers, and how many standard deviations it lies above the most frequent class's share."""
    right = float(((x @ weights).argmax(1) == y).mean())
    chance = max(1 / classes, float(np.bincount(y, minlength=classes).max() / len(y)))
    return right, (right - chance) / math.sqrt(max(chance * (1 - chance), 1e-9) / len(y))

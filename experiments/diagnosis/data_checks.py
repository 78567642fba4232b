"""Before training: images, labels, normalisation, augmentation, and the split into training and test part.

What a loader gives is traced back to the raw images: its normalisation is read off the pixel values' spacing, then
every augmented image is looked up by the centre that any crop leaves whole. Axis letters: N images, C channels,
H, W space, K classes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from experiments.diagnosis.subject import Batch, Subject
from experiments.diagnosis.ward import Broken, NotApplicable, Outcome, Ward
from src.data import ImageData
from src.image_sources import read_digits

LOOKED_UP = 64  # images of a batch that are traced back
PROBED = 2000  # images that the probe of the labels learns from
SURE, UNSURE = 4.0, 2.6  # standard deviations above chance


@dataclass(frozen=True)
class Affine:
    """x = (pixel / 255 - mean) / std, per channel."""

    mean: NDArray[np.float64]
    std: NDArray[np.float64]

    def pixels(self, images: Tensor) -> NDArray[np.float64]:
        """Back to pixel values 0..255, (N, C, H, W)."""
        x = images.detach().double().cpu().numpy()
        return (x * self.std[:, None, None] + self.mean[:, None, None]) * 255


def data_checks(ward: Ward, subject: Subject) -> None:
    """Add the findings about the data."""
    ward.check("batches", "the loader gives batches the network can read", _batches, subject, blame="loader-raises")
    blame = {"blame": "loader-raises"}
    ward.check("epochs", "an epoch holds all images, in another order than the last", _epochs, subject, **blame)
    ward.check("label balance", "every class is there, in both parts", _balance, subject, **blame)
    ward.check("order of the images", "a batch is a random draw without repetition", _order, subject, **blame)
    ward.check("normalisation", "each channel has mean 0 and deviation 1", _normalisation, subject, **blame)
    ward.check("augmentation", "crops and flips of training images, with their labels", _augmentation, subject, **blame)
    ward.check("training and test part", "no test image is trained on", _disjoint, subject, **blame)
    ward.check("like parts", "training and test images are of one kind", _alike, subject, **blame)
    ward.check("labels of the source", "the labels are those the data set came with", _source, subject, **blame)
    ward.check(
        "labels fit the images", "a linear probe learns the labels from the pixels", _information, subject, **blame
    )


def drawn(subject: Subject, count: int) -> list[Batch]:
    """The first batches of epoch 0. Raises Broken where the loader does."""
    try:
        return subject.first_batches(count)
    except Exception as error:
        raise Broken("loader-raises", error) from error


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


def _batches(subject: Subject) -> Outcome:
    size, classes, promised = subject.promise.input_size, subject.promise.num_classes, subject.promise.batch_size
    expected = "float images (N, C, H, W), labels (N,)" + (f", {promised} a batch" if promised else "")
    batches = drawn(subject, 3)
    if not batches:
        return Outcome(expected, "no batch at all", False, ["loader-empty"])
    fault = next((f for f in (fault_of_batch(batch, classes, size) for batch in batches) if f), "")
    likely = ["loader-shapes"]
    if not fault and promised and len(batches[0][1]) != promised:
        fault = f"{len(batches[0][1])} images in the first batch"
    if not fault and subject.test_batches is not None:
        fault = fault_of_batch(next(iter(subject.test_batches(subject)), None), classes, size)
        fault = f"test batches: {fault}" if fault else ""
    images, labels = batches[0] if not fault else (torch.zeros(0), torch.zeros(0))
    return Outcome(expected, fault or f"{tuple(images.shape)} and {tuple(labels.shape)}", not fault, likely)


def good_batches(subject: Subject, count: int) -> list[Batch]:
    """Batches whose form is sound. Raises NotApplicable where there is none."""
    good = [
        b
        for b in drawn(subject, count)
        if not fault_of_batch(b, subject.promise.num_classes, subject.promise.input_size)
    ]
    if not good:
        raise NotApplicable("the loader gives no batch that can be used")
    return good


def _balance(subject: Subject) -> Outcome:
    data = subject.data
    if data is None:
        labels = torch.cat([b[1] for b in good_batches(subject, 20)]).cpu()
        counts = labels.bincount(minlength=subject.promise.num_classes or 0).tolist()
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


def _order(subject: Subject) -> Outcome:
    batches = good_batches(subject, 4)
    classes = subject.promise.num_classes or int(max(int(b[1].max()) for b in batches)) + 1
    sizes = [len(b[1]) for b in batches]
    seen = [len(b[1].unique()) for b in batches]
    # Classes that a random draw of n labels shows on average: K (1 - (1 - 1/K)^n).
    meant = [classes * (1 - (1 - 1 / classes) ** n) for n in sizes]
    few = sum(seen) < 0.6 * sum(meant) and classes > 1
    digests = [_digest(image) for b in batches for image in b[0][:LOOKED_UP].cpu().numpy()]
    raw = subject.data
    repeats = len(digests) - len(set(digests))
    tolerated = 0.05 * len(digests) if raw is None or len(raw.train_labels) >= sum(sizes) else len(digests)
    measured = f"{np.mean(seen):.1f} classes a batch, {repeats} of {len(digests)} images seen before"
    likely = ["loader-not-shuffled" if few else None, "loader-repeats"]
    return Outcome(
        f"about {np.mean(meant):.1f} classes a batch, no repetition", measured, not few and repeats <= tolerated, likely
    )


def _epochs(subject: Subject) -> Outcome:
    """The batches of one epoch, counted, and the first labels of two epochs."""
    data, size = subject.data, subject.promise.batch_size
    first = [batch[1].cpu() for batch in subject.first_batches(2, epoch=0)]
    second = [batch[1].cpu() for batch in subject.first_batches(2, epoch=1)]
    if not first:
        raise NotApplicable("the loader gives no batch")
    drawn_labels, again = torch.cat(first), torch.cat(second) if second else torch.zeros(0)
    classes = len(drawn_labels.unique())
    tells = len(drawn_labels) >= 16 and classes > 1
    same = tells and torch.equal(drawn_labels, again)
    parts = ["two epochs begin with the same labels" if same else "two epochs differ"]
    likely: list[str | None] = ["loader-same-order"] if same else []
    short = False
    if data is not None and size:
        meant = max(1, len(data.train_labels) // size)
        count = sum(1 for _ in subject.train_batches(subject, 0))
        short = count != meant and not (count == meant + 1 and len(data.train_labels) % size)
        parts.append(f"{count} batches an epoch for {meant}")
        likely += ["loader-incomplete"] if short else []
    if same and data is None:
        raise NotApplicable("two walks through the batches are alike; whether that is meant is not known")
    return Outcome("all batches, in a new order", "; ".join(parts), not same and not short, likely)


def _alike(subject: Subject) -> Outcome:
    """Brightness and contrast of the images of both parts, in standard errors."""
    data = subject.data
    if data is None:
        raise NotApplicable("the raw images are not known")
    found = [_brightness(images) for images in (data.train_images, data.test_images)]
    parts, worst = [], 0.0
    for name, place in (("brightness", 0), ("contrast", 1)):
        train, test = (values[:, place] for values in found)
        error = math.sqrt(train.var() / len(train) + test.var() / len(test)) + 0.02 * train.mean()
        worst = max(worst, abs(train.mean() - test.mean()) / max(error, 1e-9))
        parts.append(f"{name} {train.mean():.1f} and {test.mean():.1f}")
    likely = ["train-test-normalised-differently", "wrong-normalisation"]
    return Outcome("the same to 5 standard errors", "; ".join(parts), worst < 5, likely, worst / 5)


def _brightness(images: Tensor) -> NDArray[np.float64]:
    """Mean and deviation of the pixels of at most 2,000 images, (N, 2)."""
    chosen = images[:: max(1, len(images) // PROBED)].float().flatten(1)
    return torch.stack([chosen.mean(1), chosen.std(1)], 1).double().cpu().numpy()


def _source(subject: Subject) -> Outcome:
    """The embedded digits, read again: every image must have the label it came with."""
    data = subject.data
    if data is None or data.name != "digits":
        raise NotApplicable("only the embedded digits can be read again at no cost")
    (train, train_labels), (test, test_labels), _ = read_digits()
    known: dict[bytes, set[int]] = {}
    for images, labels in ((train, train_labels), (test, test_labels)):
        for image, label in zip(images, labels.tolist(), strict=True):
            known.setdefault(_digest(image), set()).add(label)
    wrong: dict[str, int] = {}
    for part, tensor, own in (
        ("training", data.train_images, data.train_labels),
        ("test", data.test_images, data.test_labels),
    ):
        pictures, labels = tensor.permute(0, 2, 3, 1).cpu().contiguous().numpy(), own.cpu().numpy()
        pairs = zip(pictures, labels.tolist(), strict=True)
        wrong[part] = sum(label not in known.get(_digest(picture), {label}) for picture, label in pairs)
    measured = f"{wrong['training']} training and {wrong['test']} test labels differ"
    likely = ["labels-shuffled" if wrong["training"] else None, "test-labels-wrong" if wrong["test"] else None]
    return Outcome("every label as it came", measured, not any(wrong.values()), likely)


def _normalisation(subject: Subject) -> Outcome:
    promise = subject.promise
    batches = {"training": good_batches(subject, 2)}
    if subject.test_batches is not None:
        batches["test"] = _some(subject.test_batches(subject), 2)
    if promise.mean is None or promise.std is None:
        x = torch.cat([b[0] for b in batches["training"]]).double()
        mean, std = float(x.mean()), float(x.std())
        ok = abs(mean) < 3 and 0.05 < std < 5
        return Outcome("mean near 0, deviation near 1", f"mean {mean:.2f}, deviation {std:.2f}", ok, ["not-normalised"])
    meant = Affine(np.array(promise.mean), np.array(promise.std))
    allowed = _allowed(subject)
    found = {part: affine_of(torch.cat([b[0] for b in several]), meant) for part, several in batches.items()}
    off = {part: _off(a, meant) for part, a in found.items()}
    measured = "; ".join(
        f"{part}: mean {_triple(a.mean)}, std {_triple(a.std)}" if a else f"{part}: not an affine map of pixels"
        for part, a in found.items()
    )
    bad = [part for part, miss in off.items() if miss > allowed]
    identity = any(
        a is not None and np.allclose(a.mean, 0, atol=0.01) and np.allclose(a.std, a.std[0]) for a in found.values()
    )
    likely = ["not-normalised" if identity else None]
    likely += ["train-test-normalised-differently"] if len(bad) == 1 and len(off) == 2 else []
    likely += ["wrong-normalisation"]
    expected = f"mean {_triple(meant.mean)}, std {_triple(meant.std)}"
    return Outcome(expected, measured, not bad, likely, max(off.values()) / allowed)


def _allowed(subject: Subject) -> float:
    """How far mean (in deviations) and deviation (as a ratio) may be off: 3 %, more where few images define them."""
    data, config = subject.data, subject.promise.config
    limited = config is not None and config.limit is not None and data is not None and data.name != "cifar10"
    return 0.03 + (2 / math.sqrt(len(data.train_labels)) if limited and data is not None else 0.0)


def _off(found: Affine | None, meant: Affine) -> float:
    if found is None:
        return math.inf
    shift = np.abs(found.mean - meant.mean) / meant.std
    return float(max(shift.max(), np.abs(np.log(found.std / meant.std)).max()))


def affine_of(images: Tensor, near: Affine) -> Affine | None:
    """The normalisation that images went through, read off the spacing 1 / (255 std) of their values.

    near: tells apart what the values alone cannot (their absolute level, where black or white does not occur). None
    where the values do not lie on such a grid.
    """
    x = images.detach().double().transpose(0, 1).flatten(1).cpu().numpy()
    mean, std = [], []
    for channel, values in enumerate(x):
        levels = np.unique(values.round(6))
        gaps = np.diff(levels)
        gaps = gaps[gaps > 1e-4]
        if not len(gaps) or len(levels) > 600:
            return None
        steps = np.rint(gaps / gaps.min())
        spacing = float(gaps.sum() / steps.sum())
        deviation = 1 / (255 * spacing)
        span = round(float(levels[-1] - levels[0]) / spacing)
        if span > 255 or np.abs((values - levels[0]) / spacing - np.rint((values - levels[0]) / spacing)).max() > 0.05:
            return None
        lowest = near.mean[channel] * 255 + levels[0] * deviation * 255
        lowest = float(np.clip(np.rint(lowest), 0, 255 - span))
        std.append(deviation)
        mean.append(lowest / 255 - levels[0] * deviation)
    return Affine(np.array(mean), np.array(std))


def _augmentation(subject: Subject) -> Outcome:
    data, padding = subject.data, subject.promise.crop_padding
    if data is None or padding is None or subject.promise.mean is None or subject.promise.std is None:
        raise NotApplicable("the raw images are not known")
    if padding > 8:
        raise NotApplicable(f"a crop with padding {padding} leaves too little of an image to find it again")
    images, labels = good_batches(subject, 1)[0]
    images, labels = images[:LOOKED_UP], labels[:LOOKED_UP].cpu()
    affine = affine_of(images, Affine(np.array(subject.promise.mean), np.array(subject.promise.std)))
    if affine is None:
        return Outcome(
            "crops and flips of training images", "values that no pixels give", False, ["augmentation-wrong"]
        )
    pixels = np.rint(affine.pixels(images)).clip(0, 255).astype(np.uint8)
    train, test = (
        _centres(data.train_images, data.train_labels, padding),
        _centres(data.test_images, data.test_labels, padding),
    )
    lost = wrong = tests = flips = moved = 0
    for image, label in zip(pixels, labels.tolist(), strict=True):
        match = _lookup(image, train, padding)
        if match is None:
            lost += 1
            tests += _lookup(image, test, padding) is not None
            continue
        owners, flipped, offset = match
        wrong += label not in owners
        flips += flipped
        moved += offset != (padding, padding)
    count = len(pixels)
    unwanted = flips if subject.promise.flip is False else 0
    still = count >= 16 and ((subject.promise.flip and not flips) or (padding > 0 and not moved))
    measured = f"{count - lost} of {count} found again, {wrong} with another label, {flips} mirrored, {moved} moved"
    measured += f", {tests} are test images" if tests else ""
    likely = ["train-is-test" if tests > count / 4 else "test-in-training" if tests else None]
    likely += ["loader-labels-wrong" if wrong else None, "labels-shuffled" if wrong else None]
    likely += ["flip-unwanted" if unwanted else None, "augmentation-missing" if still and not lost else None]
    likely += ["augmentation-wrong"]
    ok = not (lost or wrong or unwanted or still)
    return Outcome(f"all {count} found among the training images, with their labels", measured, ok, likely)


Centres = dict[bytes, set[int]]


def _centres(images: Tensor, labels: Tensor, padding: int) -> Centres:
    """The labels of every image by the digest of its centre, which each crop with this padding shows whole."""
    size = images.shape[-1]
    centre = images[:, :, padding : size - padding, padding : size - padding].cpu().contiguous().numpy()
    found: Centres = {}
    for picture, label in zip(centre, labels.tolist(), strict=True):
        found.setdefault(_digest(picture), set()).add(label)
    return found


def _lookup(image: NDArray[np.uint8], centres: Centres, padding: int) -> tuple[set[int], bool, tuple[int, int]] | None:
    """The labels whose image this is a crop of, whether mirrored, and where its centre lies."""
    size = image.shape[-1] - 2 * padding
    for flipped in (False, True):
        view = image[:, :, ::-1] if flipped else image
        for row in range(2 * padding + 1):
            for column in range(2 * padding + 1):
                owners = centres.get(_digest(view[:, row : row + size, column : column + size]))
                if owners is not None:
                    return owners, flipped, (row, column)
    return None


def _disjoint(subject: Subject) -> Outcome:
    data = subject.data
    if data is None:
        raise NotApplicable("the raw images are not known")
    train = {_digest(image) for image in data.train_images.cpu().contiguous().numpy()}
    test = data.test_images.cpu().contiguous().numpy()
    shared = sum(_digest(image) in train or _digest(image[:, :, ::-1]) in train for image in test)
    allowed = max(1, round(0.002 * len(test)))
    measured = f"{shared} of {len(test)} test images are also training images"
    return Outcome(
        f"at most {allowed} (a data set may hold a picture twice)", measured, shared <= allowed, ["test-in-training"]
    )


def _information(subject: Subject) -> Outcome:
    """Ridge regression from 8 x 8 pixels to the labels: fitted on half of the images, tried on the rest."""
    x, y = _training_images(subject)
    half = len(x) // 2
    classes = int(y.max()) + 1 if subject.promise.num_classes is None else subject.promise.num_classes
    if half < 10 * classes or classes < 2:
        raise NotApplicable(f"{len(x)} images are too few for a probe of {classes} classes")
    weights = _ridge(x[:half], y[:half], classes)
    held = _score(weights, x[half:], y[half:], classes)
    test = _test_images(subject)
    tested = _score(_ridge(x, y, classes), *test, classes) if test is not None else None
    ok_train = held[1] > SURE
    ok_test = tested is None or (tested[1] > SURE and tested[0] > 0.5 * held[0])
    measured = f"{100 * held[0]:.0f}% of training images held out"
    measured += f", {100 * tested[0]:.0f}% of test images" if tested else ""
    unsure = [score for score in (held, tested) if score is not None and UNSURE < score[1] <= SURE]
    if not (ok_train and ok_test) and (unsure or half < max(15 * classes, 100)):
        raise NotApplicable(f"{measured}: {len(x)} images are too few to tell")
    likely = ["labels-shuffled", "test-labels-wrong"] if not ok_train else ["test-labels-wrong", "labels-shuffled"]
    expected = f"clearly above chance, {100 / classes:.0f}%, on both"
    return Outcome(expected, measured, ok_train and ok_test, likely)


def _training_images(subject: Subject) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    if subject.data is not None:
        return _features(subject.data.train_images, subject.data.train_labels)
    batches = good_batches(subject, 40)
    return _features(torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches]))


def _test_images(subject: Subject) -> tuple[NDArray[np.float64], NDArray[np.int64]] | None:
    if isinstance(subject.data, ImageData):
        return _features(subject.data.test_images, subject.data.test_labels)
    if subject.test_batches is None:
        return None
    batches = _some(subject.test_batches(subject), 40)
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


def _some(batches: Any, count: int) -> list[Batch]:
    def walk() -> Iterator[Batch]:
        for number, batch in enumerate(batches):
            if number >= count:
                return
            yield batch

    return list(walk())


def _digest(image: NDArray[Any]) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(image).tobytes(), digest_size=12).digest()


def _triple(values: NDArray[np.float64]) -> str:
    return "(" + ", ".join(f"{value:.3f}" for value in values) + ")"

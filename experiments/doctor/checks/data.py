"""Before training: batches and epochs of the loaders, images and labels, their split and their normalisation.

Raw images are read a second time from their source where it is known, and every test image that the loader gives is
found again among the raw ones. Axis letters: N images, C channels, H, W space, K classes.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from experiments.doctor.checks.augmentation import Affine, Tracer, affine_of, augmentation, grey_gaps, hard, odd
from experiments.doctor.pipeline import Batch, Pipeline
from experiments.doctor.reference.images import Part, fair_counts, read_source
from experiments.doctor.runner import CheckRunner, NotApplicable, Outcome, PartFailed

LOOKS = ("brightness", "contrast", "red over green", "blue over green")
PROBED = 2000  # images that the probe of the labels learns from
LEARNT, UNSURE = 4.0, 2.6  # standard deviations above chance
MOST_REPEATED = 0.05  # share of a part's images that may be there already, or show nothing
BLANK = 8.0  # grey levels: no channel of a blank image deviates by so many; the flattest of CIFAR-10 by 11
ALIKE, CLOSER = 0.995, 0.02  # quantile of a training image's likeness to the next, and the share of test images above


def data_checks(runner: CheckRunner, pipeline: Pipeline) -> None:
    """Add the findings about the data."""
    tracer = functools.cache(lambda: Tracer(pipeline, lambda batch: fault_of_batch(batch, pipeline)))

    def check(name: str, proves: str, run: Callable[..., Outcome], given: Any = pipeline) -> None:
        runner.check(name, proves, run, given, blame="loader-raises")

    check("batches", "the loader gives batches the network can read", _batches)
    check("epochs", "no two epochs have the same order", _epochs)
    check("label balance", "every class is there, in both parts", _balance)
    check("order of the images", "a batch is a random draw without repetition", _order)
    check("test batches", "the test loader gives the whole test set once", lambda _: _test_set(pipeline, tracer))
    check("normalisation", "each channel has mean 0 and deviation 1", _normalisation)
    check("augmentation", "crops and flips of training images, with their labels", lambda _: augmentation(tracer()))
    check("every image once", "an epoch draws the images without repetition", lambda _: _coverage(pipeline, tracer))
    check("training and test part", "no test image is trained on", _disjoint)
    check("images differ", "neither part holds an image twice, or blank ones", _repeated)
    check("like parts", "training and test images are of one kind", _like_parts)
    check("images of the source", "images and labels are those the data set came with", _source)
    check("labels fit the images", "a linear probe learns the labels from the pixels", _information)


def epoch_size(pipeline: Pipeline) -> tuple[int, int] | None:
    """Batches and images that an epoch should give at least: floor(N / B), at least 1, and B times that.

    One batch more, of the rest, is as good. None where the raw images or the size of a batch are not known.
    """
    if pipeline.data is None or not pipeline.expected.batch_size:
        return None
    count, size = len(pipeline.data.train_labels), pipeline.expected.batch_size
    return max(1, count // size), max(1, count // size) * min(size, count)


def good_batches(pipeline: Pipeline, count: int) -> list[Batch]:
    """Batches of epoch 0 whose form is sound. Raises NotApplicable where there is none."""
    good = [batch for batch in _drawn(pipeline, count) if _usable(pipeline, batch)]
    if not good:
        raise NotApplicable("the loader gives no batch that can be used")
    return good


def _drawn(pipeline: Pipeline, count: int) -> list[Batch]:
    try:
        return pipeline.first_batches(count)
    except Exception as error:
        raise PartFailed("loader-raises", error) from error


def _usable(pipeline: Pipeline, batch: Any) -> bool:
    return not fault_of_batch(batch, pipeline)


def fault_of_batch(batch: Any, pipeline: Pipeline) -> str:
    """What is wrong with the form of a batch, or an empty string.

    In a pipeline of one's own, bytes and probabilities (N, K) are as good as float images and labels (N,).
    """
    own, size, classes = (getattr(pipeline.expected, name) for name in ("config", "input_size", "num_classes"))
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        return f"a batch is {type(batch).__name__}, not a pair of images and labels"
    images, labels = batch
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
        return f"a batch holds {type(images).__name__} and {type(labels).__name__}, not tensors"
    is_bytes = images.dtype == torch.uint8 and own is None
    if not (images.is_floating_point() or is_bytes) or images.dim() < 2 or not len(images):
        return f"images are {images.dtype} {tuple(images.shape)}"
    if size is not None and tuple(images.shape[1:]) != tuple(size):
        return f"images are {tuple(images.shape)}, not (N, {', '.join(map(str, size))})"
    if not torch.isfinite(images).all():
        return "images hold values that are not finite"
    if labels.dim() == 2 and labels.is_floating_point() and len(labels) == len(images) and own is None:
        sums = labels.sum(1)
        if labels.min() >= 0 and (sums - 1).abs().max() < 0.01 and classes in (None, labels.shape[1]):
            return ""
    if labels.shape != images.shape[:1] or labels.is_floating_point():
        return f"labels are {labels.dtype} {tuple(labels.shape)} for {len(images)} images"
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (classes is not None and high >= classes):
        return f"labels run from {low} to {high}, for {classes} classes"
    return ""


def _batches(pipeline: Pipeline) -> Outcome:
    size = pipeline.expected.batch_size
    expected = "float images (N, C, H, W), labels (N,)" + (f", {size} a batch" if size else "")
    batches = _drawn(pipeline, 3)
    if not batches:
        return Outcome(expected, "no batch at all", False, ["loader-empty"])
    first, second = (pipeline.train_batches(pipeline, 0) for _ in range(2))
    if (first is second and isinstance(first, Iterator)) or not _drawn(pipeline, 1):
        return Outcome(expected, "an iterator that can be walked once alone", False, ["loader-used-up", "loader-empty"])
    fault, likely = next(filter(None, (fault_of_batch(batch, pipeline) for batch in batches)), ""), ["loader-shapes"]
    if not fault and size and len(batches[0][1]) != size:
        fault = f"{len(batches[0][1])} images in the first batch"
    if not fault and pipeline.test_batches is not None:
        tests = list(islice(pipeline.test_batches(pipeline), 1))
        fault = fault_of_batch(tests[0], pipeline) if tests else "none at all"
        fault = f"test batches: {fault}" if fault else ""
        likely = ["loader-shapes"] if tests else ["loader-empty"]
    images, labels = batches[0] if not fault else (torch.zeros(0), torch.zeros(0))
    return Outcome(expected, fault or f"{tuple(images.shape)} and {tuple(labels.shape)}", not fault, likely)


def _epochs(pipeline: Pipeline) -> Outcome:
    """The first labels of some epochs, compared in pairs. A list of batches may be meant to stay as it is."""
    epochs = sorted({0, 1, 2, 3, max((pipeline.expected.epochs or 2) - 1, 1)})
    labels: dict[int, Tensor] = {}
    for epoch in epochs:
        batches = [batch for batch in pipeline.first_batches(2, epoch) if _usable(pipeline, batch)]
        if batches:
            labels[epoch] = torch.cat([hard(batch[1]).cpu() for batch in batches])
    if 0 not in labels:
        raise NotApplicable("the loader gives no batch that can be used")
    tells = len(labels[0]) >= 16 and len(labels[0].unique()) > 1
    same = [(a, b) for a, b in combinations(labels, 2) if tells and torch.equal(labels[a], labels[b])]
    first, second = (pipeline.train_batches(pipeline, epoch) for epoch in (0, 1))
    listed = first is second and (pipeline.data is None or isinstance(first, (list, tuple)))
    measured = f"{len(labels)} epochs begin differently"
    if same:
        measured = f"epochs {same[0][0] + 1} and {same[0][1] + 1} begin with the same labels"
    return Outcome("a new order in every epoch", measured, not same, ["loader-same-order"], unusual=listed)


def _order(pipeline: Pipeline) -> Outcome:
    """Random draws of n labels show on average K (1 - (1 - 1/K)^n) classes."""
    batches = good_batches(pipeline, 4)
    drawn = [hard(batch[1]) for batch in batches]
    classes = pipeline.expected.num_classes or int(max(int(labels.max()) for labels in drawn)) + 1
    seen, sizes = [len(labels.unique()) for labels in drawn], [len(labels) for labels in drawn]
    meant = [classes * (1 - (1 - 1 / classes) ** n) for n in sizes]
    few = sum(seen) < 0.6 * sum(meant) and classes > 1
    digests = [_digest(image) for batch in batches for image in batch[0][:64].cpu()]
    repeats = len(digests) - len(set(digests))
    raw = pipeline.data
    tolerated = 0.05 * len(digests) if raw is None or len(raw.train_labels) >= sum(sizes) else len(digests)
    measured = f"{np.mean(seen):.1f} classes a batch, {repeats} of {len(digests)} images seen before"
    expected = f"about {np.mean(meant):.1f} classes a batch, no repetition"
    likely = ["loader-not-shuffled" if few else None, "loader-repeats"]
    return Outcome(expected, measured, not few and repeats <= tolerated, likely)


def _coverage(pipeline: Pipeline, tracer: Callable[[], Tracer]) -> Outcome:
    """In the first epoch and in later ones: images and classes drawn more often than they are there; batches."""
    data, meant = pipeline.data, epoch_size(pipeline)
    if data is None or meant is None:
        raise NotApplicable("the raw images or the size of a batch are not known", "data")
    there = data.train_labels.cpu().bincount(minlength=data.num_classes)
    fits = {meant[0], meant[0] + bool(len(data.train_labels) % (pipeline.expected.batch_size or 1))}
    parts, likely = list[str](), list[str | None]()
    for epoch in tracer().epochs:
        where = f" in epoch {epoch.number + 1}" if epoch.number else ""
        times = Counter(trace.indices for trace in epoch.traces if trace.black and trace.indices)
        repeats = sum(max(0, seen - len(indices)) for indices, seen in times.items())
        more = int((epoch.labels.bincount(minlength=data.num_classes) - there).clamp(min=0).sum())
        if repeats or not where:
            parts.append(f"{repeats} of {len(epoch.traces)} images drawn before{where}")
        if more:
            parts.append(f"{more} images of a class more than there are{where}")
        short = epoch.batches not in fits and (epoch.whole or epoch.batches > max(fits))
        if short or not where:
            parts.append(f"{epoch.batches} batches for {meant[0]}{where}")
        if epoch.fault:
            parts.append(f"{epoch.fault}{where}")
        likely += ["loader-not-finite" if "not finite" in epoch.fault else "loader-shapes"] if epoch.fault else []
        likely += ["loader-repeats" if repeats or more else None, "loader-incomplete" if short else None]
    return Outcome("all images, each once", ", ".join(parts), not any(likely), likely)


def _test_set(pipeline: Pipeline, tracer: Callable[[], Tracer]) -> Outcome:
    """Every test image that the loader gives, found again among the raw ones, each once and with its own label."""
    data = pipeline.data
    if data is None or pipeline.test_batches is None or not len(data.test_labels):
        raise NotApplicable("the raw images are not known, or there is no test set", "tests" if data else "data")
    count = len(data.test_labels)
    batches = list(islice(pipeline.test_batches(pipeline), count + 1))
    labels = torch.cat([hard(batch[1]).cpu() for batch in batches]) if batches else data.test_labels[:0].cpu()
    same = Counter(labels.tolist()) == Counter(data.test_labels.tolist())
    measured = f"{len(labels)} images" + ("" if same or len(labels) != count else ", other labels")
    likely: list[str | None] = ["partial-test-set" if len(labels) != count else "test-labels-wrong"]
    try:
        pixels = tracer().test_pixels(batches)
    except NotApplicable as reason:
        return Outcome(f"all {count} test images", f"{measured}; {reason}", same, likely)
    meant = _labels_by_image(*_parts(pipeline)["test"])
    pairs = [(_digest(image), label) for image, label in zip(pixels, labels.tolist(), strict=True)]
    lost = [n for n, (key, _) in enumerate(pairs) if key not in meant]
    wrong = sum(label not in meant.get(key, [label]) for key, label in pairs)
    again = sum(max(0, n - len(meant.get(key, pairs))) for key, n in Counter(key for key, _ in pairs).items())
    moved = sum(map(bool, tracer().tests.find(pixels[lost]))) if lost else 0
    counts = {"with another label": wrong, "drawn before": again, "not found": len(lost), "cropped or mirrored": moved}
    measured = ", ".join([measured, *(f"{number} {text}" for text, number in counts.items() if number)])
    likely = ["test-images-augmented" if 2 * moved > len(lost) else "test-images-wrong" if lost else None]
    likely += ["test-labels-wrong" if wrong else None, "partial-test-set"]
    ok = same and not any(counts.values())
    return Outcome(f"all {count} test images, each once", measured, ok, likely)


def _normalisation(pipeline: Pipeline) -> Outcome:
    """Mean and deviation are read off the spacing of the values."""
    expected, data = pipeline.expected, pipeline.data
    batches = {"training": good_batches(pipeline, 2)}
    if pipeline.test_batches is not None:
        batches["test"] = [b for b in islice(pipeline.test_batches(pipeline), 2) if _usable(pipeline, b)]
    several = {part: torch.cat([batch[0] for batch in held]) for part, held in batches.items() if held}
    if not several["training"].is_floating_point():
        raise NotApplicable("the loader gives bytes, which the step normalises")
    if expected.mean is None or expected.std is None:
        mean, std = float(several["training"].double().mean()), float(several["training"].double().std())
        ok = abs(mean) < 3 and 0.05 < std < 5
        return Outcome("mean near 0, deviation near 1", f"mean {mean:.2f}, deviation {std:.2f}", ok, ["not-normalised"])
    meant = Affine(np.array(expected.mean), np.array(expected.std))
    unit = grey_gaps(data.train_images) if data is not None and data.train_images.dtype == torch.uint8 else None
    found = {part: affine_of(images, meant, unit) for part, images in several.items()}
    if expected.config is None:  # what else is done to images may leave no pixels
        found = {part: affine for part, affine in found.items() if affine is not None}
    if not found:
        raise NotApplicable("the values are not pixels on one scale")
    allowed = _allowed(pipeline)
    off = {part: _off(affine, meant) for part, affine in found.items()}
    measured = "; ".join(
        f"{part}: mean {_triple(a.mean)}, std {_triple(a.std)}" if a else f"{part}: not an affine map of pixels"
        for part, a in found.items()
    )
    bad = [part for part, miss in off.items() if miss > allowed]
    known = [affine for affine in found.values() if affine is not None]
    identity = any(np.allclose(a.mean, 0, atol=0.01) and np.allclose(a.std, a.std[0]) for a in known)
    swapped = any(not np.allclose(a.std, meant.std, 0.01) and np.allclose(a.std, meant.std[::-1], 0.01) for a in known)
    likely: list[str | None] = ["channels-swapped" if swapped else None, "not-normalised" if identity else None]
    likely += ["train-test-normalised-differently"] if len(bad) == 1 and len(off) == 2 else []
    wanted = f"mean {_triple(meant.mean)}, std {_triple(meant.std)}"
    return Outcome(wanted, measured, not bad, [*likely, "wrong-normalisation"], max(off.values()) / allowed)


def _allowed(pipeline: Pipeline) -> float:
    """How far mean (in deviations) and deviation (as a ratio) may be off: 3 %, more where few images define them."""
    data, config = pipeline.data, pipeline.expected.config
    limited = config is not None and config.limit is not None and data is not None and data.name != "cifar10"
    return 0.03 + (2 / math.sqrt(len(data.train_labels)) if limited and data is not None else 0.0)


def _off(found: Affine | None, meant: Affine) -> float:
    if found is None:
        return math.inf
    shift = np.abs(found.mean - meant.mean) / meant.std
    return float(max(shift.max(), np.abs(np.log(found.std / meant.std)).max()))


def _triple(values: NDArray[np.float64]) -> str:
    return "(" + ", ".join(f"{value:.3f}" for value in values) + ")"


# The images and labels behind the loaders.


def _parts(pipeline: Pipeline) -> dict[str, tuple[Tensor, Tensor]]:
    """Images and labels of the training and the test part, on the CPU; an empty part is left out."""
    data = pipeline.data
    if data is None:
        raise NotApplicable("the raw images are not known", "data")
    parts = {"training": (data.train_images, data.train_labels), "test": (data.test_images, data.test_labels)}
    return {name: (images.cpu(), labels.cpu()) for name, (images, labels) in parts.items() if len(labels)}


def _both(pipeline: Pipeline) -> dict[str, tuple[Tensor, Tensor]]:
    parts = _parts(pipeline)
    if len(parts) < 2:
        raise NotApplicable("there are no raw test images", "data")
    return parts


def _balance(pipeline: Pipeline) -> Outcome:
    """Every class in both parts, in like shares; of a known source as many as it has, or as a limit takes."""
    classes, config = pipeline.expected.num_classes or 0, pipeline.expected.config
    if pipeline.data is None:
        labels = torch.cat([hard(batch[1]) for batch in good_batches(pipeline, 20)]).cpu()
        counts = {"drawn": labels.bincount(minlength=classes).numpy()}
        if len(labels) < 20 * len(counts["drawn"]):
            raise NotApplicable(f"{len(labels)} labels drawn are too few to judge {len(counts['drawn'])} classes")
    else:
        classes = pipeline.data.num_classes
        counts = {part: labels.bincount(minlength=classes).numpy() for part, (_, labels) in _parts(pipeline).items()}
    missing = [f"{part}: no image of class {held.tolist().index(0)}" for part, held in counts.items() if 0 in held]
    measured = "; ".join(f"{part} {held.min()} to {held.max()} images a class" for part, held in counts.items())
    skewed = any(held.max() > 0.8 * held.sum() for held in counts.values() if len(held) > 1)
    if len(counts) == 2:
        train, test = (held / held.sum() for held in counts.values())
        distance = float(np.abs(train - test).sum() / 2)
        skewed |= distance > 0.15 + math.sqrt(len(test) / counts["test"].sum())
        measured += f"; their shares differ by {100 * distance:.1f}%"
    for (part, held), (_, known) in zip(counts.items(), _source_of(pipeline) or (), strict=False):
        fair = fair_counts(np.bincount(known, minlength=classes), config.limit if config else None)
        unfair = np.abs(held / held.sum() * fair.sum() - fair) > 1 + 0.4 * fair
        measured += f"; {part}: class {unfair.argmax()} should have {fair[unfair.argmax()]:.0f}" if unfair.any() else ""
        skewed |= bool(unfair.any())
    likely = ["class-missing"] if missing else ["labels-unbalanced"]
    return Outcome("every class, in like shares", "; ".join([*missing, measured]), not (missing or skewed), likely)


def _source(pipeline: Pipeline) -> Outcome:
    """The files or the embedded digits, read again: every image must be there, in its part, with its label."""
    parts = _parts(pipeline)
    source = _source_of(pipeline)
    if source is None:
        raise NotApplicable("only the digits and CIFAR-10 can be read again")
    known = [_labels_by_image(*map(torch.from_numpy, part)) for part in source]
    likely, texts = list[str | None](), list[str]()
    for number, (part, (images, labels)) in enumerate(parts.items()):
        pairs = [(_digest(image), label) for image, label in zip(images, labels.tolist(), strict=True)]
        astray = sum(key not in known[number] and key in known[1 - number] for key, _ in pairs)
        changed = sum(key not in known[0] and key not in known[1] for key, _ in pairs)
        wrong = sum(label not in known[number].get(key, [label]) for key, label in pairs)
        texts.append(f"{part}: {changed} other images, {wrong} other labels, {astray} of the other part")
        likely += [("test-images-wrong" if number else "images-wrong") if changed else None]
        likely += [("test-labels-wrong" if number else "labels-shuffled") if wrong else None]
        likely += ["test-in-training" if astray else None]
    return Outcome("every image and label as it came", "; ".join(texts), not any(likely), likely)


def _source_of(pipeline: Pipeline) -> tuple[Part, Part] | None:
    data, config = pipeline.data, pipeline.expected.config
    return None if data is None or config is None else read_source(data.name, Path(config.data_root))


def _labels_by_image(images: Tensor, labels: Tensor) -> dict[bytes, list[int]]:
    """The labels of every image by its digest; a set may hold one twice."""
    known: dict[bytes, list[int]] = {}
    for image, label in zip(images, labels.tolist(), strict=True):
        known.setdefault(_digest(image), []).append(label)
    return known


def _digest(image: Tensor) -> bytes:
    """A key by which equal images (C, H, W) are found."""
    return hashlib.blake2b(image.contiguous().numpy().tobytes(), digest_size=12).digest()


def _disjoint(pipeline: Pipeline) -> Outcome:
    """Test images that are training images, mirrored or not; then, whether many are nearly so.

    Of training images, 1 - ALIKE are more alike to the next than some likeness. Of test images that are drawn as they
    were, as many are; the share that is allowed is CLOSER, four times that.
    """
    (train, _), (test, _) = _both(pipeline).values()
    known = {_digest(image) for image in train}
    shared = sum(_digest(image) in known or _digest(image.flip(2)) in known for image in test)
    allowed = max(1, round(0.002 * len(test)))
    a, b = _looks(train), _looks(test[:: max(1, len(test) // PROBED)])
    among = _nearest(a[:: max(1, len(a) // PROBED)], a, 2)
    near = int((_nearest(b, a, 1) > among.quantile(ALIKE)).sum())
    close = odd(near, len(b), CLOSER) and near > CLOSER * len(b)
    measured = f"{shared} of {len(test)} test images are also training images"
    measured += f", {near} of {len(b)} nearly so" if close else ""
    expected = f"at most {allowed} (a data set may hold a picture twice)"
    likely = ["test-in-training" if shared > allowed else None, "test-near-training"]
    return Outcome(expected, measured, shared <= allowed and not close, likely)


def _looks(images: Tensor) -> Tensor:
    """Averaged to 8 x 8 pixels, centred, of length 1: (N, 64 C), so that brightness and contrast do not count."""
    small = F.adaptive_avg_pool2d(images.float(), 8).flatten(1)
    small = small - small.mean(1, keepdim=True)
    return small / small.norm(dim=1, keepdim=True).clamp(min=1e-6)


def _nearest(some: Tensor, all_: Tensor, place: int) -> Tensor:
    """The likeness (cosine) of each to its nearest, or, where it is there itself, to the nearest but one."""
    return torch.cat([(part @ all_.T).topk(place).values[:, -1] for part in some.split(500)])


def _repeated(pipeline: Pipeline) -> Outcome:
    texts, worst, blank = list[str](), 0.0, 0.0
    for name, (images, _) in _parts(pipeline).items():
        different = len({_digest(image) for image in images})
        texts.append(f"{different} of {len(images)} {name} images differ")
        worst, blank = max(worst, 1 - different / len(images)), max(blank, _blank(images))
    if blank > MOST_REPEATED:
        texts.append(f"{100 * blank:.0f}% are blank or nearly so")
    worst = max(worst, blank)
    likely = ["images-blank" if blank > MOST_REPEATED else None, "images-repeated"]
    expected = f"at least {100 * (1 - MOST_REPEATED):g}% of each part"
    return Outcome(expected, ", ".join(texts), worst <= MOST_REPEATED, likely, worst / MOST_REPEATED)


def _blank(images: Tensor) -> float:
    """The share of blank images, of at most 2,000."""
    return float((images[:: max(1, len(images) // PROBED)].float().std((2, 3)).amax(1) < BLANK).float().mean())


def _like_parts(pipeline: Pipeline) -> Outcome:
    """Brightness, contrast and colour of the images of both parts, in standard errors."""
    train, test = (_colours(images) for images, _ in _both(pipeline).values())
    a, b = train.mean(0), test.mean(0)
    error = np.sqrt(train.var(0) / len(train) + test.var(0) / len(test))
    error += np.array([0.02 * a[0], 0.02 * a[1], 0.01 * a[0], 0.01 * a[0]])[: len(a)]
    off = np.abs(a - b) / np.maximum(error, 1e-9)
    texts = (f"{name} {x:.1f} and {y:.1f}" for name, x, y in zip(LOOKS, a, b, strict=False))
    swapped = off[2:].max(initial=0) > 5 and np.abs(a[2:] - b[:1:-1]).max() < 5 * error[2:].max()
    likely = ["channels-swapped" if swapped else None, "train-test-normalised-differently", "wrong-normalisation"]
    return Outcome("the same to 5 standard errors", ", ".join(texts), off.max() < 5, likely, float(off.max()) / 5)


def _colours(images: Tensor) -> NDArray[np.float64]:
    """Mean and deviation of the pixels, in colour red and blue over green, of at most 2,000 images, (N, 2 or 4)."""
    chosen = images[:: max(1, len(images) // PROBED)].float()
    flat, channels = chosen.flatten(1), chosen.mean((2, 3)).unbind(1)
    colours = [channels[0] - channels[1], channels[2] - channels[1]] if len(channels) == 3 else []
    return torch.stack([flat.mean(1), flat.std(1), *colours], 1).double().numpy()


def _information(pipeline: Pipeline) -> Outcome:
    """Ridge regression from 8 x 8 pixels to the labels: fitted on half of the images, tried on the rest."""
    parts = _probed(pipeline)
    (x, y), test = _features(*parts[0]), _features(*parts[1]) if len(parts) > 1 else None
    half, classes = len(x) // 2, pipeline.expected.num_classes or int(y.max()) + 1
    if half < 10 * classes or classes < 2:
        raise NotApplicable(f"{len(x)} images are too few for a probe of {classes} classes")
    held = _score(_ridge(x[:half], y[:half], classes), x[half:], y[half:], classes)
    tested = _score(_ridge(x, y, classes), *test, classes) if test is not None else None
    ok_train = held[1] > LEARNT
    ok_test = tested is None or (tested[1] > LEARNT and tested[0] > 0.5 * held[0])
    measured = f"{100 * held[0]:.0f}% of training images held out"
    measured += f", {100 * tested[0]:.0f}% of test images" if tested else ""
    unsure = [score for score in (held, tested) if score is not None and UNSURE < score[1] <= LEARNT]
    if not (ok_train and ok_test) and (unsure or half < max(15 * classes, 100)):
        raise NotApplicable(f"{measured}: {len(x)} images are too few to tell")
    likely = ["labels-shuffled", "test-labels-wrong"] if not ok_train else ["test-labels-wrong", "labels-shuffled"]
    if pipeline.data is not None and max(_blank(images) for images, _ in parts) > MOST_REPEATED:
        likely.insert(0, "images-blank")
    expected = f"clearly above chance, {100 / classes:.0f}%, on both"
    return Outcome(expected, measured, ok_train and ok_test, likely)


def _probed(pipeline: Pipeline) -> list[tuple[Tensor, Tensor]]:
    """The raw parts, or where they are not known some batches of both loaders; test images from 100 on."""
    if pipeline.data is not None:
        return list(_parts(pipeline).values())
    tests = list(islice(pipeline.test_batches(pipeline), 40)) if pipeline.test_batches is not None else []
    several = [good_batches(pipeline, 40), tests if sum(len(batch[1]) for batch in tests) >= 100 else []]
    return [(torch.cat([b[0] for b in held]), torch.cat([hard(b[1]) for b in held])) for held in several if held]


def _features(images: Tensor, labels: Tensor) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Evenly spread images, averaged to 8 x 8 pixels, standardised, with a constant: (N, features)."""
    every = max(1, len(images) // PROBED)
    chosen, y = images[::every][:PROBED].float(), labels[::every][:PROBED].cpu().numpy()
    order = np.random.default_rng(0).permutation(len(y))  # a sorted data set gives every half all classes
    small = F.adaptive_avg_pool2d(chosen, 8) if chosen.dim() == 4 else chosen
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

"""Before training: every augmented image is traced back to the raw one it was made of.

The centre, which any crop leaves whole, says which image it is, where the crop lies and whether it is mirrored; then
the rest must be that image on black. Traced are images from all of the first epoch, and some of later ones.
Axis letters: N images, C channels, H, W space.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from experiments.doctor.data.images import LOOKED_UP, Affine, affine_of, digest
from experiments.doctor.data.loader_checks import fault_of_batch, good_batches
from experiments.doctor.pipeline import Batch, Pipeline
from experiments.doctor.runner import CheckRunner, NotApplicable, Outcome

TRACED = 480  # images of the first epoch
FEW = 24  # images of a later epoch
FEWEST = 16  # below which shares are not judged
SURE = 4.5  # standard deviations


@dataclass(frozen=True)
class Trace:
    """What became of a raw image. indices: of the raw images that look so (a set may hold one twice).

    offset: row and column where its centre lies; black: whether what is around it is black, as padding is.
    """

    label: int
    indices: tuple[int, ...] = ()
    test: bool = False
    flipped: bool = False
    offset: tuple[int, int] = (0, 0)
    black: bool = True


def augmentation_checks(runner: CheckRunner, pipeline: Pipeline) -> None:
    """Add the findings about augmentation and about which images an epoch holds."""
    blame = {"blame": "loader-raises"}
    runner.check(
        "augmentation", "crops and flips of training images, with their labels", _augmentation, pipeline, **blame
    )
    runner.check("every image once", "an epoch draws the images without repetition", _coverage, pipeline, **blame)


def _augmentation(pipeline: Pipeline) -> Outcome:
    tracer = Tracer(pipeline)
    traces = tracer.trace(good_batches(pipeline, 1)[:1], LOOKED_UP) + tracer.first_epoch()[0]
    for epoch in sorted({1, 2, max((pipeline.expected.epochs or 2) - 1, 1)}):
        traces += tracer.trace(pipeline.first_batches(1, epoch), FEW)
    count, padding, flip = len(traces), tracer.padding, pipeline.expected.flip
    own = [trace for trace in traces if trace.indices]
    lost, tests = count - len(own), sum(trace.test for trace in traces)
    wrong = sum(trace.label not in tracer.labels(trace) for trace in own)
    flips = sum(trace.flipped for trace in own)
    border = sum(not trace.black for trace in own)
    reach = max((abs(place - padding) for trace in own for place in trace.offset), default=0)
    told = len(own) >= FEWEST
    odd_flips = told and bool(flip) and abs(flips - len(own) / 2) > SURE * math.sqrt(len(own)) / 2
    narrow = told and reach <= padding / 2 and padding > 0
    still = (narrow and reach == 0) or (told and bool(flip) and not flips)
    unwanted = flips if flip is False else 0
    measured = f"{len(own)} of {count} found again, {wrong} with another label, {flips} mirrored"
    measured += f", moved by at most {reach}"
    measured += f", {tests} are test images" if tests else ""
    measured += f", {border} on something else than black" if border else ""
    likely = ["train-is-test" if tests > count / 4 else "test-in-training" if tests else None]
    likely += ["loader-labels-wrong" if wrong else None, "labels-shuffled" if wrong else None]
    likely += ["flip-unwanted" if unwanted else None, "augmentation-missing" if still and not lost else None]
    likely += ["augmentation-wrong"]
    ok = not (lost or wrong or unwanted or still or border or odd_flips or narrow)
    return Outcome(f"all {count} found among the training images, with their labels", measured, ok, likely)


def _coverage(pipeline: Pipeline) -> Outcome:
    """Images drawn more often than they are there; classes drawn more often than they are there; batches counted."""
    data, size = pipeline.data, pipeline.expected.batch_size
    if data is None or not size:
        raise NotApplicable("the raw images or the size of a batch are not known", "data")
    parts, likely = list[str](), list[str | None]()
    meant = max(1, len(data.train_labels) // size)
    try:
        tracer = Tracer(pipeline)
        traces, drawn, batches = tracer.first_epoch()
        times = Counter(trace.indices for trace in traces if trace.indices)
        repeats = sum(max(0, seen - len(indices)) for indices, seen in times.items())
        parts.append(f"{repeats} of {len(traces)} images drawn before")
    except NotApplicable:
        repeats, (drawn, batches) = 0, _labels_of_epoch(pipeline, meant)
    there = data.train_labels.cpu().bincount(minlength=data.num_classes)
    more = int((drawn.bincount(minlength=data.num_classes) - there).clamp(min=0).sum())
    parts.append(f"{batches} batches for {meant}")
    parts += [f"{more} images of a class more than there are"] if more else []
    short = batches != meant and not (batches == meant + 1 and len(data.train_labels) % size)
    likely += ["loader-repeats"] if repeats or more else []
    likely += ["loader-incomplete"] if short else []
    ok = not (repeats or more or short)
    return Outcome("all images, each once", ", ".join(parts), ok, [*likely, "loader-incomplete"])


def _labels_of_epoch(pipeline: Pipeline, meant: int) -> tuple[Tensor, int]:
    labels = [batch[1].cpu() for batch in islice(pipeline.train_batches(pipeline, 0), meant + 2)]
    return torch.cat(labels) if labels else torch.zeros(0, dtype=torch.int64), len(labels)


class Tracer:
    """Finds the raw images behind augmented ones. Raises NotApplicable where the raw images are not known."""

    def __init__(self, pipeline: Pipeline) -> None:
        data, padding, expected = pipeline.data, pipeline.expected.crop_padding, pipeline.expected
        if data is None or padding is None or expected.mean is None or expected.std is None:
            raise NotApplicable("the raw images are not known", "data")
        if padding > 8:
            raise NotApplicable(f"a crop with padding {padding} leaves too little of an image to find it again")
        self.pipeline, self.data, self.padding = pipeline, data, padding
        self._near = Affine(np.array(expected.mean), np.array(expected.std))
        self._raw = data.train_images.cpu().contiguous().numpy()
        self._train, self._test = self._centres(self._raw), self._centres(data.test_images.cpu().contiguous().numpy())

    def labels(self, trace: Trace) -> set[int]:
        """The labels of the raw images behind a trace."""
        return {int(self.data.train_labels[index]) for index in trace.indices}

    def first_epoch(self) -> tuple[list[Trace], Tensor, int]:
        """Traces of images from all over the first epoch, all its labels, (N,), and how many batches it has."""
        meant = max(1, len(self.data.train_labels) // (self.pipeline.expected.batch_size or 1))
        each = max(1, round(TRACED / meant))
        traces, labels = list[Trace](), list[Tensor]()
        for batch in islice(self.pipeline.train_batches(self.pipeline, 0), meant + 2):
            traces += self.trace([batch], each)
            labels.append(batch[1].cpu())
        return traces, torch.cat(labels) if labels else torch.zeros(0, dtype=torch.int64), len(labels)

    def trace(self, batches: Sequence[Batch], most: int) -> list[Trace]:
        """At most `most` images of every batch."""
        return [trace for batch in batches for trace in self._traced(batch, most)]

    def _traced(self, batch: Batch, most: int) -> Iterator[Trace]:
        if fault_of_batch(batch, None, None):
            return
        images, labels = batch[0][:most], batch[1][:most].tolist()
        affine = affine_of(images, self._near)
        if affine is None:
            yield from (Trace(label) for label in labels)
            return
        pixels = np.rint(affine.pixels(images)).clip(0, 255).astype(np.uint8)
        for image, label in zip(pixels, labels, strict=True):
            found = self._found(image, label)
            yield found if found is not None else Trace(label, test=self._is_test(image))

    def _centres(self, images: NDArray[np.uint8]) -> dict[bytes, tuple[int, ...]]:
        """The indices of all images by the digest of their centre, which each crop with this padding shows whole."""
        found: dict[bytes, tuple[int, ...]] = {}
        inner = slice(self.padding, images.shape[-1] - self.padding)
        for index, picture in enumerate(images):
            key = digest(picture[:, inner, inner])
            found[key] = (*found.get(key, ()), index)
        return found

    def _places(self, image: NDArray[np.uint8]) -> Iterator[tuple[bytes, bool, tuple[int, int]]]:
        """Every place where the centre may lie, plain and mirrored, with the digest of what is there."""
        size = image.shape[-1] - 2 * self.padding
        for flipped in (False, True):
            view = image[:, :, ::-1] if flipped else image
            for row in range(2 * self.padding + 1):
                for column in range(2 * self.padding + 1):
                    yield digest(view[:, row : row + size, column : column + size]), flipped, (row, column)

    def _found(self, image: NDArray[np.uint8], label: int) -> Trace | None:
        """The trace whose border is black, or otherwise the first whose centre fits."""
        first = None
        for key, flipped, offset in self._places(image):
            indices = self._train.get(key)
            if indices is None:
                continue
            view = image[:, :, ::-1] if flipped else image
            whole = tuple(index for index in indices if np.array_equal(self._crop(index, offset), view))
            if whole:
                return Trace(label, whole, flipped=flipped, offset=offset)
            first = first or Trace(label, indices, flipped=flipped, offset=offset, black=False)
        return first

    def _crop(self, index: int, offset: tuple[int, int]) -> NDArray[np.uint8]:
        """The raw image on black, with its centre at `offset`."""
        wide, size = 2 * self.padding, self._raw.shape[-1]
        padded = np.pad(self._raw[index], ((0, 0), (self.padding, self.padding), (self.padding, self.padding)))
        row, column = wide - offset[0], wide - offset[1]
        return padded[:, row : row + size, column : column + size]

    def _is_test(self, image: NDArray[np.uint8]) -> bool:
        return any(key in self._test for key, _, _ in self._places(image))

"""Before training: every augmented image is traced back to the raw one it was made of, and the draws are judged.

A crop is the raw image on black, moved by (row - p, column - p), and half of the images are mirrored. The key of a
patch, summed over its channels, is its scalar product with random whole numbers, exact in float64: one convolution
gives the keys at all places of an image, and equal keys say which raw image lies where.

Judged are counts: of n independent draws, each with the share s. By Chernoff's bound n KL(count / n, s) exceeds t with
probability at most 2 exp(-t). SURE = 20 makes that 4e-9 a count: for the two hundred counts of a healthy run less than
one false alarm in a million runs. Axis letters: N images, C channels, H, W space, p padding.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from experiments.doctor.expected import Expected
from experiments.doctor.pipeline import Batch, Pipeline
from experiments.doctor.runner import NotApplicable, Outcome

SURE = 20.0  # nats
TRACED = 1024  # images of the first epoch; half as many of later ones, or, of a small set, a quarter
WHOLE = 4096  # a training set up to this size is walked through in later epochs, too
SIDE = 16  # of the patch that tells images apart
GUESSED = 4  # padding that is looked for where none is promised
HELD = 8  # copies of an image that are told apart


def odd(count: float, n: int, share: float) -> bool:
    """Whether `count` of n draws is out of the question where each has this share."""
    q = count / max(n, 1)
    parts = ((q, share), (1 - q, 1 - share))
    return n * sum(a * math.log(a / b) if b else math.inf for a, b in parts if a) > SURE


class Affine(NamedTuple):
    """x = (pixel / 255 - mean) / std, per channel."""

    mean: NDArray[np.float64]
    std: NDArray[np.float64]

    def pixels(self, images: Tensor) -> NDArray[np.float64]:
        """Back to pixel values 0..255, (N, C, H, W)."""
        x = images.detach().double().cpu().numpy()
        return (x * self.std[:, None, None] + self.mean[:, None, None]) * 255

    def to_bytes(self, images: Tensor) -> Tensor:
        """Pixels as uint8; an image whose values are no pixels becomes white noise, which nothing is found in."""
        pixels = self.pixels(images)
        near = np.rint(pixels)
        bad = (np.abs(pixels - near) > 0.1).any((1, 2, 3)) | (near < 0).any((1, 2, 3)) | (near > 255).any((1, 2, 3))
        near[bad] = np.random.default_rng(1).integers(256, size=near[bad].shape)
        return torch.from_numpy(near.astype(np.uint8))


def affine_of(images: Tensor, near: Affine, unit: Sequence[int] | None = None) -> Affine | None:
    """The normalisation that images went through, read off the spacing unit / (255 std) of their values.

    near: tells apart what the values alone cannot (their absolute level, where black or white does not occur). unit:
    grey levels between neighbouring ones in the raw images, per channel (17 where there are 16 of them); guessed from
    `near` where few levels occur. None where the values do not lie on such a grid.
    """
    if not images.is_floating_point():
        return Affine(np.zeros(images.shape[1]), np.full(images.shape[1], 1 / 255))
    x = images.detach().double().transpose(0, 1).flatten(1).cpu().numpy()
    mean, std = [], []
    for channel, values in enumerate(x):
        levels = np.unique(values.round(6))
        gaps = np.diff(levels)
        gaps = gaps[gaps > 1e-4]
        if not len(gaps) or len(levels) > 600:
            return None
        spacing = float(gaps.sum() / np.rint(gaps / gaps.min()).sum())
        few = max(1, round(255 * spacing * near.std[channel])) if len(levels) <= 64 else 1
        deviation = (few if unit is None else unit[channel]) / (255 * spacing)
        span = round(float(levels[-1] - levels[0]) * deviation * 255)
        if span > 255 or np.abs((values - levels[0]) / spacing - np.rint((values - levels[0]) / spacing)).max() > 0.05:
            return None
        lowest = near.mean[channel] * 255 + levels[0] * deviation * 255
        lowest = float(np.clip(np.rint(lowest), 0, 255 - span))
        std.append(deviation)
        mean.append(lowest / 255 - levels[0] * deviation)
    return Affine(np.array(mean), np.array(std))


@dataclass(frozen=True)
class Trace:
    """What became of a raw image.

    epoch, batch, place: where it was drawn. indices: of the raw images that look so (a set may hold one twice). test:
    whether it is a test image instead. flip, row, column: how it lies, 0..2p; sure: whether no other way fits. black:
    whether what is around it is black, as padding is.
    """

    label: int
    epoch: int
    batch: int
    place: int
    indices: tuple[int, ...] = ()
    test: bool = False
    flip: bool = False
    row: int = 0
    column: int = 0
    sure: bool = False
    black: bool = True


class Epoch(NamedTuple):
    """What an epoch of the loader gave. labels: of the batches that were walked; whole: whether those are all.

    fault: what is wrong with the form of a batch, or an empty string.
    """

    number: int
    labels: Tensor
    batches: int
    traces: list[Trace]
    whole: bool
    fault: str


class Patches:
    """Raw images, found by a patch in their middle. images: uint8 (N, C, H, W)."""

    def __init__(self, images: Tensor, reach: int) -> None:
        self.images, self.reach = images.cpu().contiguous(), reach
        self.side = min(SIDE, *(size - 2 * reach for size in images.shape[2:]))
        numbers = np.random.default_rng(0).integers(2**31, size=(1, 1, self.side, self.side))
        self._kernel = torch.from_numpy(numbers.astype(float))
        self._held: dict[float, tuple[int, ...]] = {}
        for part in torch.arange(len(images)).split(1000):
            for index, key in zip(part.tolist(), self._keys(self.images[part], 0).flatten().tolist(), strict=True):
                held = self._held.get(key, ())
                self._held[key] = (*held, index) if len(held) < HELD else held
        self._known = np.array(list(self._held))

    def _keys(self, images: Tensor, reach: int) -> NDArray[np.float64]:
        """The keys of the patch at every place, (N, 2 reach + 1, 2 reach + 1)."""
        top, left = ((size - self.side) // 2 - reach for size in images.shape[2:])
        wide = self.side + 2 * reach
        middle = images[:, :, top : top + wide, left : left + wide].sum(1, keepdim=True).double()
        return F.conv2d(middle, self._kernel)[:, 0].numpy()

    def find(self, images: Tensor) -> list[list[Trace]]:
        """For every image all ways in which it shows a raw one, those on black first; images: uint8 (N, C, H, W)."""
        found = [list[Trace]() for _ in images]
        for flip in (False, True):
            views = images.flip(3) if flip else images
            keys = self._keys(views, self.reach)
            for n, row, column in np.argwhere(np.isin(keys, self._known)).tolist():
                indices = self._held[float(keys[n, row, column])]
                whole = tuple(i for i in indices if torch.equal(self._crop(i, row, column), views[n]))
                way = Trace(-1, 0, 0, n, whole or indices, False, flip, row, column, black=bool(whole))
                found[n].append(way)
        return [sorted(ways, key=lambda way: not way.black) for ways in found]

    def _crop(self, index: int, row: int, column: int) -> Tensor:
        """The raw image on black, moved by (row - p, column - p)."""
        p, (height, width) = self.reach, self.images.shape[2:]
        padded = F.pad(self.images[index], (p, p, p, p))
        return padded[:, 2 * p - row : 2 * p - row + height, 2 * p - column : 2 * p - column + width]


class Tracer:
    """Finds the raw images behind a loader's. Raises NotApplicable where they are not known.

    fault_of: what is wrong with the form of a batch; promised: whether images are cropped and mirrored and no more.
    """

    def __init__(self, pipeline: Pipeline, fault_of: Callable[[Batch], str]) -> None:
        data, expected = pipeline.data, pipeline.expected
        if data is None:
            raise NotApplicable("the raw images are not known", "data")
        if data.train_images.dtype != torch.uint8:
            raise NotApplicable("the raw images are not bytes")
        self.promised = expected.crop_padding is not None
        self.padding = GUESSED if expected.crop_padding is None else expected.crop_padding
        if 4 * self.padding > min(data.train_images.shape[2:]):
            if self.promised:
                raise NotApplicable(f"a crop with padding {self.padding} leaves too little of an image to find it")
            self.padding = min(data.train_images.shape[2:]) // 4
        self.pipeline, self.data, self._fault_of = pipeline, data, fault_of
        self.raw, self.tests = Patches(data.train_images, self.padding), Patches(data.test_images, self.padding)
        self._affine: Affine | None = None
        self._epochs: list[Epoch] | None = None

    @property
    def batches(self) -> int | None:
        """How many batches an epoch should have at least: floor(N / B)."""
        size = self.pipeline.expected.batch_size
        return max(1, len(self.data.train_labels) // size) if size else None

    @property
    def epochs(self) -> list[Epoch]:
        """The first epochs, one in the middle and the last, each walked through once."""
        if self._epochs is None:
            last = max((self.pipeline.expected.epochs or 3) - 1, 1)
            self._epochs = [self._epoch(number) for number in sorted({0, 1, last // 2 + 1 if last > 2 else 1, last})]
        return self._epochs

    def _epoch(self, number: int) -> Epoch:
        """All of epoch 0 and of a small set, with traces from all over it; else the first batches alone."""
        meant = self.batches or 1 + len(self.data.train_labels) // 32
        small = len(self.data.train_labels) <= WHOLE
        whole = number == 0 or small
        most = TRACED // (1 if number == 0 else 4 if small else 2)
        each = max(2, math.ceil(most / meant)) if whole else most
        labels, traces, complete, fault = list[Tensor](), list[Trace](), True, ""
        for batch in self.pipeline.train_batches(self.pipeline, number):
            if len(labels) > meant + 1 or (not whole and len(traces) >= most):
                complete = False
                break
            wrong = self._fault_of(batch)
            fault = fault or wrong
            traces += [] if wrong else self.trace(batch, number, len(labels), each)
            labels.append(torch.zeros(0).long() if wrong else hard(batch[1]).cpu())
        held = torch.cat(labels) if labels else torch.zeros(0).long()
        return Epoch(number, held, len(labels), traces, complete, fault)

    def trace(self, batch: Batch, epoch: int, number: int, most: int) -> list[Trace]:
        """The first `most` images of a batch."""
        images, labels = batch[0][:most], hard(batch[1])[:most].tolist()
        lost = [Trace(label, epoch, number, place) for place, label in enumerate(labels)]
        if images.shape[1:] != self.data.train_images.shape[1:]:
            return lost
        if self._affine is None:
            self._affine = self.affine(images, self.raw)
        if self._affine is None:
            return lost
        pixels = self._affine.to_bytes(images)
        found = self.raw.find(pixels)
        missing = [place for place, ways in enumerate(found) if not ways]
        tests = dict(zip(missing, self.tests.find(pixels[missing]), strict=True)) if missing else {}
        traces = []
        for trace, ways in zip(lost, found, strict=True):
            best = ways[0] if ways else replace(trace, test=bool(tests[trace.place]))
            sure = sum(way.black for way in ways) == 1
            traces.append(replace(best, label=trace.label, epoch=epoch, batch=number, place=trace.place, sure=sure))
        return traces

    def test_pixels(self, batches: Sequence[Batch]) -> Tensor:
        """The images of the test loader as bytes. Raises NotApplicable where most are no raw ones and may be others."""
        open_, raw = self.pipeline.expected.config is None, self.data.test_images
        if not batches or batches[0][0].shape[1:] != raw.shape[1:]:
            raise NotApplicable("they are of another size than the raw ones")
        affine = self.affine(batches[0][0], self.tests)
        if affine is None:
            raise NotApplicable("they are no pixels on one scale")
        pixels = torch.cat([affine.to_bytes(batch[0]) for batch in batches])
        if open_ and sum(map(bool, self.tests.find(pixels[:64]))) < min(32, len(pixels) / 2):
            raise NotApplicable("they are no raw ones")
        return pixels

    def affine(self, images: Tensor, patches: Patches) -> Affine | None:
        """The normalisation by which most of the images are found: the promised one, or one of the usual ones."""
        expected, unit = self.pipeline.expected, grey_gaps(self.data.train_images)
        raw = some(self.data.train_images).double().transpose(0, 1).flatten(1) / 255
        usual = [(raw.mean(1).numpy(), raw.std(1).numpy()), (np.zeros(len(raw)), np.ones(len(raw)))]
        usual += [(np.full(len(raw), 0.5), np.full(len(raw), 0.5))]
        promised = [] if expected.mean is None else [(np.array(expected.mean), np.array(expected.std))]
        best, most = None, -1
        for mean, std in [*promised, *usual]:
            affine = affine_of(images[:64], Affine(mean, std), unit)
            if affine is None:
                return None
            found = sum(bool(ways) for ways in patches.find(affine.to_bytes(images[:32])))
            if found > most:
                best, most = affine, found
            if found > 16:
                break
        return best


def hard(labels: Tensor) -> Tensor:
    """Labels (N,), of probabilities (N, K) the most likely."""
    return labels.argmax(1) if labels.dim() == 2 else labels


def some(images: Tensor) -> Tensor:
    """At most 1,000 to 2,000 images, evenly spread."""
    return images[:: max(1, len(images) // 1000)]


def grey_gaps(images: Tensor) -> list[int]:
    """The least distance of grey levels that occur, per channel: 17 where there are 16 of them."""
    levels = (torch.cat([channel.unique(), channel.new_zeros(1)]).unique().int() for channel in some(images).unbind(1))
    return [int(level.diff().min()) if len(level) > 1 else 1 for level in levels]


def augmentation(tracer: Tracer) -> Outcome:
    """Crops and flips of training images, with their labels: what was found again, and how the draws are spread."""
    traces = [trace for epoch in tracer.epochs for trace in epoch.traces]
    count, own = len(traces), [trace for trace in traces if trace.indices]
    if not tracer.promised and len(own) < count / 2:
        reason = "what is done to images is not said; most are not crops of raw ones"
        raise NotApplicable(reason, "expected.crop_padding")
    lost, tests = count - len(own), sum(trace.test for trace in traces)
    labels = tracer.data.train_labels.tolist()
    wrong = sum(trace.label not in {labels[index] for index in trace.indices} for trace in own)
    border = sum(not trace.black for trace in own)
    found = [("", ["train-is-test" if tests > count / 4 else "test-in-training"])] if tests else []
    found += [("", ["loader-labels-wrong", "labels-shuffled"])] if wrong else []
    measured = f"{len(own)} of {count} found again, {wrong} with another label"
    measured += f", {tests} are test images" if tests else ""
    if tracer.promised:
        measured += f", {border} on something else than black" if border else ""
        found += [("", ["augmentation-wrong"])] if lost or border else []
        if not (lost or border):
            odds = oddities(tracer.epochs, tracer.padding, tracer.pipeline.expected)
            found += [(text, [key]) for text, key in odds]
    measured = "; ".join([measured, *(text for text, _ in found if text)])
    likely = [key for _, keys in found for key in keys]
    return Outcome(f"all {count} found among the training images, with their labels", measured, not found, likely)


def oddities(epochs: Sequence[Epoch], padding: int, expected: Expected) -> Iterator[tuple[str, str]]:
    """What is not as independent draws are, and the cause: of crops, then of flips."""
    traces = {epoch.number: [trace for trace in epoch.traces if trace.sure] for epoch in epochs}
    if padding:
        yield from _odd_draws("crop", traces, lambda trace: (trace.row, trace.column), padding)
    if expected.flip:
        yield from _odd_draws("flip", traces, lambda trace: trace.flip, 0)
    mirrored = sum(trace.flip for part in traces.values() for trace in part)
    if expected.flip is False and mirrored:
        yield f"{mirrored} mirrored", "flip-unwanted"


def _odd_draws(
    what: str, traces: dict[int, list[Trace]], drawn: Callable[[Trace], object], padding: int
) -> Iterator[tuple[str, str]]:
    """The first thing that is wrong with the draws of an epoch, or with those of two epochs together."""
    fair = 1 / (2 * padding + 1) ** 2 if padding else 0.5
    plain: object = (padding, padding) if padding else False
    for number, part in traces.items():
        where = f" in epoch {number + 1}" if number else ""
        draws = Counter(map(drawn, part))
        most, count = next(iter(draws.most_common(1)), (None, 0))
        share = max(fair, sum(n**2 for n in draws.values()) / max(len(part), 1) ** 2)  # that two draws are the same
        if count >= (0.3 if padding else 0.8) * len(part) and odd(count, len(part), fair):
            key = "augmentation-missing" if count == len(part) else "augmentation-partial"
            key = "augmentation-stops" if number else key
            yield f"the same {what} in {count} of {len(part)}{where}", key if most == plain else "augmentation-range"
        elif same := _alike([(a, b) for a, b in pairwise(part) if a.batch == b.batch], drawn, share):
            yield f"{same} neighbours in a batch with the same {what}{where}", "augmentation-shared"
        elif same := _alike(_in_turn(part), drawn, share):
            yield f"{same} with the {what} of the same place in the batch before{where}", "augmentation-repeated"
        elif text := _uneven_crops(part, padding) if padding else _uneven_flips(part):
            yield f"{text}{where}", "augmentation-tied" if " and " in text else "augmentation-range"
        else:
            continue
        return
    for (a, first), (b, second) in combinations(traces.items(), 2):
        for same_thing in (lambda trace: trace.indices, lambda trace: (trace.batch, trace.place)):
            held = {same_thing(trace): trace for trace in first}
            pairs = [(held[same_thing(trace)], trace) for trace in second if same_thing(trace) in held]
            if same := _alike(pairs, drawn, fair):
                yield f"{same} with the same {what} in epochs {a + 1} and {b + 1}", "augmentation-repeated"
                return


def _alike(pairs: Sequence[tuple[Trace, Trace]], drawn: Callable[[Trace], object], share: float) -> str:
    """ "20 of 24" pairs drawn alike, where chance does not give so many; otherwise an empty string."""
    same = sum(drawn(a) == drawn(b) for a, b in pairs)
    return f"{same} of {len(pairs)}" if same > share * len(pairs) and odd(same, len(pairs), share) else ""


def _in_turn(part: Sequence[Trace]) -> list[tuple[Trace, Trace]]:
    """Images at one place of two batches that follow each other."""
    held = {(trace.batch, trace.place): trace for trace in part}
    return [(trace, held[next_]) for trace in part if (next_ := (trace.batch + 1, trace.place)) in held]


def _uneven_flips(part: Sequence[Trace]) -> str:
    mirrored = sum(trace.flip for trace in part)
    return f"{mirrored} of {len(part)} mirrored" if odd(mirrored, len(part), 0.5) else ""


def _uneven_crops(part: Sequence[Trace], padding: int) -> str:
    """Rows and columns are uniform over 0..2p, and so are, modulo 2p + 1, their sum and their difference."""
    values = 2 * padding + 1
    for name, of in {
        "row": lambda t: t.row,
        "column": lambda t: t.column,
        "row and column": lambda t: (t.row - t.column) % values,
        "row and column, added": lambda t: (t.row + t.column) % values,
    }.items():
        counts = Counter(of(trace) for trace in part)
        worst = max(range(values), key=lambda value: abs(counts[value] - len(part) / values))
        if odd(counts[worst], len(part), 1 / values):
            return f"{name} {worst} in {counts[worst]} of {len(part)} crops"
    return ""

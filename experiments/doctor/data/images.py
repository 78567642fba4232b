"""Raw images and what a loader makes of them: digests, and the affine map of the normalisation.

Axis letters: N images, C channels, H, W space.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from experiments.doctor.pipeline import Batch

LOOKED_UP = 64  # images of a batch that are traced back


@dataclass(frozen=True)
class Affine:
    """x = (pixel / 255 - mean) / std, per channel."""

    mean: NDArray[np.float64]
    std: NDArray[np.float64]

    def pixels(self, images: Tensor) -> NDArray[np.float64]:
        """Back to pixel values 0..255, (N, C, H, W)."""
        x = images.detach().double().cpu().numpy()
        return (x * self.std[:, None, None] + self.mean[:, None, None]) * 255


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


def some(batches: Any, count: int) -> list[Batch]:
    """At most the first `count` batches."""
    return list(islice(batches, count))


def digest(image: NDArray[Any]) -> bytes:
    """A key by which equal images are found."""
    return hashlib.blake2b(np.ascontiguousarray(image).tobytes(), digest_size=12).digest()


def triple(values: NDArray[np.float64]) -> str:
    """`(0.491, 0.482, 0.447)`."""
    return "(" + ", ".join(f"{value:.3f}" for value in values) + ")"

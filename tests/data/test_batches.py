"""ImageData, augmentation, normalisation and the batches of an epoch, against plain numpy.

Axis letters: N images, H = W = 32 pixels.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src import data as door
from src.data import CIFAR10_MEAN, CIFAR10_STD, DataError, ImageData, augment, epoch_batches, normalize, steps_per_epoch


def pixels(count: int, seed: int = 0, height: int = 32, width: int = 32) -> torch.Tensor:
    values = np.random.default_rng(seed).integers(0, 256, (count, 3, height, width), dtype=np.uint8)
    return torch.from_numpy(values)


def made(count: int = 23, test: int = 7, **changes: Any) -> ImageData:
    """Random images; label i of both sets is i modulo 3."""
    parts: dict[str, Any] = {
        "name": "folder",
        "title": "noise",
        "train_images": pixels(count),
        "train_labels": torch.arange(count) % 3,
        "test_images": pixels(test, seed=1),
        "test_labels": torch.arange(test) % 3,
        "class_names": ("a", "b", "c"),
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.3, 0.4),
    }
    return ImageData(**{**parts, **changes})


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_hand(images: np.ndarray, offsets: np.ndarray, flips: np.ndarray, padding: int) -> np.ndarray:
    """Pad, crop and mirror one image after another."""
    out = []
    for image, (row, column), flip in zip(images, offsets, flips, strict=True):
        padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
        crop = padded[:, row : row + image.shape[1], column : column + image.shape[2]]
        out.append(crop[:, :, ::-1] if flip else crop)
    return np.stack(out)


@settings(max_examples=25)
@given(count=st.integers(1, 9), padding=st.integers(0, 6), seed=st.integers(0, 99), width=st.integers(1, 40))
def test_augment_equals_pad_crop_and_mirror_by_hand(count: int, padding: int, seed: int, width: int) -> None:
    draw = np.random.default_rng(seed)
    offsets, flips = draw.integers(0, 2 * padding + 1, (count, 2)), draw.random(count) < 0.5
    images = pixels(count, seed, width=width)
    before = images.clone()
    result = augment(images, torch.from_numpy(offsets), torch.from_numpy(flips), padding)
    assert result.dtype == torch.uint8
    assert result.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(result.numpy(), by_hand(images.numpy(), offsets, flips, padding))
    assert torch.equal(images, before)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_normalize_equals_numpy(layout: torch.memory_format) -> None:
    images = pixels(6).contiguous(memory_format=layout)
    result = normalize(images, CIFAR10_MEAN, CIFAR10_STD)
    mean, std = (np.array(values)[:, None, None] for values in (CIFAR10_MEAN, CIFAR10_STD))
    assert result.dtype == torch.float32
    assert result.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(result.numpy(), (images.numpy() / 255 - mean) / std, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("padding", "flip"), [(4, True), (4, False), (0, True), (0, False)])
@pytest.mark.parametrize("start", [0, 1, 4])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_an_epoch_equals_its_draws_done_by_hand(padding: int, flip: bool, start: int, device: str) -> None:
    """The draw comes before the loop, in this order, whatever the options, the first batch and the device."""
    data, draw, generator = made(), seeded(3), seeded(3)
    order = torch.randperm(23, generator=draw)
    offsets = torch.randint(2 * padding + 1, (23, 2), generator=draw)
    flips = (torch.rand(23, generator=draw) < 0.5) & flip
    batches = epoch_batches(data.to(device), 5, generator, crop_padding=padding, flip=flip, start=start)
    assert torch.equal(generator.get_state(), draw.get_state())
    batches = list(batches)
    assert start + len(batches) == steps_per_epoch(data, 5) == 4
    for step, (images, labels) in enumerate(batches, start):
        part = slice(5 * step, 5 * step + 5)
        crops = by_hand(data.train_images.numpy()[order[part]], offsets[part].numpy(), flips[part].numpy(), padding)
        expected = normalize(torch.from_numpy(crops), data.mean, data.std)
        torch.testing.assert_close(images.cpu(), expected, rtol=0, atol=0 if device == "cpu" else 1e-6)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.tolist() == (order[part] % 3).tolist()


@pytest.mark.parametrize(("size", "steps"), [(3, 3), (10, 1), (11, 1)])
def test_steps_per_epoch(size: int, steps: int) -> None:
    assert steps_per_epoch(made(10), size) == steps
    assert [len(labels) for _, labels in epoch_batches(made(10), size, seeded())] == [min(size, 10)] * steps


def test_test_batches_are_all_images_in_order() -> None:
    data = made()
    batches = list(door.test_batches(data, 3))
    assert [len(labels) for _, labels in batches] == [3, 3, 1]
    assert torch.equal(torch.cat([labels for _, labels in batches]), data.test_labels)
    expected = normalize(data.test_images, data.mean, data.std)
    assert torch.equal(torch.cat([images for images, _ in batches]), expected)


def test_digest_is_a_sha256_of_the_bytes_whatever_their_layout() -> None:
    data = made()
    assert data.train_images.stride() == (3072, 1, 96, 3)
    expected = hashlib.sha256()
    for images, labels in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
        expected.update(f"(({len(labels)}, 3, 32, 32), ({len(labels)},))".encode())
        expected.update(images.numpy().transpose(0, 2, 3, 1).tobytes())
        expected.update(labels.numpy().tobytes())
    assert data.digest == data.to("cpu").digest == expected.hexdigest()


@pytest.mark.parametrize(
    ("labels", "limit", "chosen"),
    [
        ([0, 0, 0, 0, 1, 2, 0, 1, 2, 2, 1], 7, [0, 1, 2, 4, 5, 7, 8]),  # three of class 0, two of 1 and of 2
        ([0, 1, 1, 1, 2, 2, 2, 2], 7, [0, 1, 2, 3, 4, 5, 6]),  # class 0 is short: the others fill up
        ([2, 1, 0], 1000, [0, 1, 2]),
        ([2, 1, 0], None, [0, 1, 2]),
    ],
)
def test_limited_takes_the_first_images_of_every_class(labels: list[int], limit: int, chosen: list[int]) -> None:
    data = made(len(labels), train_labels=torch.tensor(labels), test=2)
    part = data.limited(limit)
    assert torch.equal(part.train_labels, data.train_labels[chosen])
    assert torch.equal(part.train_images, data.train_images[chosen])
    assert part.train_images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(part.test_images, data.test_images)
    assert (part.mean, part.std, part.class_names) == (data.mean, data.std, data.class_names)


def test_a_limit_below_one_image_a_class_is_refused() -> None:
    with pytest.raises(DataError, match=r"limit=2: need a whole number from 3 .* to 23"):
        made().limited(2)

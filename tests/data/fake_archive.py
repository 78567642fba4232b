"""Small stand-ins for the official CIFAR-10 files and their archive, as genuine in form as the real ones.

Their md5 is computed with hashlib here, so it is not the code under test that says what is right.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile

import numpy as np
import pytest

from src.data import cifar10


def md5(payload: bytes) -> str:
    return hashlib.md5(payload).hexdigest()


def batch(count: int, seed: int) -> bytes:
    """A batch file opcode by opcode as Python 2 wrote the official ones: byte strings, numpy.core, dtype(u1, 0, 1)."""
    data = np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8).tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    kind = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN" + 2 * b"J\xff\xff\xff\xff" + b"K\x00tb"
    shape = b"K" + bytes([count]) + b"M" + (3072).to_bytes(2, "little") + b"\x86"
    state = b"(K\x01" + shape + kind + b"\x89T" + len(data).to_bytes(4, "little") + data + b"tb"
    labels = b"](" + b"".join(b"K" + bytes([label % 10]) for label in range(count)) + b"e"
    return b"\x80\x02}(U\x04data" + array + state + b"U\x06labels" + labels + b"u."


def packed(files: dict[str, bytes], extra: tuple[tarfile.TarInfo, ...] = ()) -> bytes:
    """A tar.gz of the files in the official folder, and then the empty members in `extra`."""
    out = io.BytesIO()
    # Without the time of day, so that every process makes the same bytes.
    with gzip.GzipFile(fileobj=out, mode="wb", mtime=0) as zipped, tarfile.open(fileobj=zipped, mode="w:") as tar:
        for name, payload in files.items():
            info = tarfile.TarInfo(f"{cifar10.FOLDER}/{name}")
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
        for info in extra:
            tar.addfile(info)
    return out.getvalue()


FILES = {
    "data_batch_1": batch(4, 0),
    "data_batch_2": batch(15, 1),
    "test_batch": batch(12, 2),
    "batches.meta": b"\x80\x02}(U\x0blabel_names](" + b"".join(b"U\x02c%d" % n for n in range(10)) + b"eu.",
}
PAYLOAD = packed(FILES)


def pretend(
    monkeypatch: pytest.MonkeyPatch,
    sources: tuple[str, ...] = (),
    files: dict[str, bytes] = FILES,
    payload: bytes = PAYLOAD,
) -> None:
    """Make these the official files, archive and sources, for a downloader that loses no time."""
    official = {"MD5": md5(payload), "SIZE_BYTES": len(payload), "SOURCES": sources}
    official["FILES"] = {name: md5(content) for name, content in files.items()}
    for name, value in {**official, "TIMEOUT_SECONDS": 0.6, "PAUSE_SECONDS": 0.0}.items():
        monkeypatch.setattr(cifar10, name, value)
    monkeypatch.delenv("CIFAR10_URL", raising=False)

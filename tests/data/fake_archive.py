"""Small stand-ins for the official CIFAR-10 files and their archive.

Their md5 is computed with hashlib here, so it is not the code under test that says what is right.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import tarfile

import numpy as np
import pytest
from torchvision.datasets import CIFAR10

from src.data import cifar10


def md5(payload: bytes) -> str:
    return hashlib.md5(payload).hexdigest()


def batch(count: int, seed: int) -> bytes:
    """A batch file: `count` random images, label i is i modulo 10."""
    data = np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)
    return pickle.dumps({"data": data, "labels": [label % 10 for label in range(count)]}, protocol=2)


FILES = {
    "data_batch_1": batch(4, 0),
    "data_batch_2": batch(15, 1),
    "test_batch": batch(12, 2),
    "batches.meta": pickle.dumps({"label_names": [f"c{n}" for n in range(10)]}, protocol=2),
}


def _packed() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, payload in FILES.items():
            info = tarfile.TarInfo(f"{cifar10.FOLDER}/{name}")
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return gzip.compress(out.getvalue(), mtime=0)  # without the time of day every process makes the same bytes


PAYLOAD = _packed()


def pretend(monkeypatch: pytest.MonkeyPatch, sources: tuple[str, ...] = ()) -> None:
    """Make these the official files, archive and sources."""
    entries = [[name, md5(content)] for name, content in FILES.items()]
    monkeypatch.setattr(CIFAR10, "train_list", entries[:2])
    monkeypatch.setattr(CIFAR10, "test_list", entries[2:3])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": entries[3][1]})
    for name, value in {"MD5": md5(PAYLOAD), "SIZE_BYTES": len(PAYLOAD), "SOURCES": sources}.items():
        monkeypatch.setattr(cifar10, name, value)
    monkeypatch.delenv("CIFAR10_URL", raising=False)

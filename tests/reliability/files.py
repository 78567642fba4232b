"""Every kind of file that is read: with bytes changed or cut off, or replaced by a foreign one."""

from __future__ import annotations

import io
import os
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from src.data import DataError, cifar10
from src.export import pack, unpack
from src.runs import RunError, SnapshotError, Snapshots, load_checkpoint
from src.storage import StorageError
from tests.data.fake_archive import FILES, pretend
from tests.quantized_networks import small_resnet
from tests.reliability.small_run import Row, Trial, Unbroken, equal


@dataclass(frozen=True)
class Kind:
    """A kind of file. build: lays it out in a folder and returns where. read: of the product; raises `refusal`."""

    build: Callable[[Path, Unbroken], Path]
    read: Callable[[Path], Any]
    refusal: type[Exception]


def _of_run(name: str, folder: Path, unbroken: Unbroken) -> Path:
    return Path(shutil.copy(unbroken.folder / name, folder / name))


def _packed(folder: Path, unbroken: Unbroken) -> Path:
    path = folder / "model.cdq"
    pack(small_resnet(), path)
    return path


def _read_packed(path: Path) -> dict[str, Any]:
    network = unpack(path)
    return {"description": network.description, "state": dict(network.state_dict())}


def _batches(folder: Path, unbroken: Unbroken) -> Path:
    (folder / cifar10.FOLDER).mkdir()
    for name, payload in FILES.items():
        (folder / cifar10.FOLDER / name).write_bytes(payload)
    return folder / cifar10.FOLDER / "data_batch_2"


def _read_batches(path: Path) -> list[Any]:
    with pytest.MonkeyPatch.context() as patch:
        pretend(patch)
        train, test, names = cifar10.read_images(path.parents[1])
    return [array.tolist() for array in (*train, *test)] + names


KINDS = {
    "checkpoint": Kind(partial(_of_run, "checkpoint.pt"), load_checkpoint, RunError),
    "snapshots": Kind(partial(_of_run, "snapshots.npz"), lambda path: [Snapshots.load(path).to_bytes()], SnapshotError),
    "packed network": Kind(_packed, _read_packed, StorageError),
    "dataset file (CIFAR-10 batch)": Kind(_batches, _read_batches, DataError),
}


def damaged(data: bytes, rng: random.Random) -> bytes:
    """A bit changed, some bytes overwritten with noise, or the end cut off."""
    way, place = rng.choice(("bit", "noise", "cut")), rng.randrange(len(data))
    if way == "cut":
        return data[:place]
    if way == "bit":
        return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
    length = min(rng.randrange(1, 65), len(data) - place)
    return data[:place] + rng.randbytes(length) + data[place + length :]


def read_or_refused(kind: Kind, path: Path) -> Any:
    """What is read; None where it is refused. The refusal is for a person: it names the file, in a few lines."""
    try:
        return kind.read(path)
    except kind.refusal as error:
        text = str(error)
    assert path.name in text, f"the message does not name {path.name}: {text}"
    assert len(text) < 2000, "the message is too long to be read"
    assert "Traceback" not in text, "the message holds a traceback"
    return None


def damage(name: str) -> Trial:
    """The file with damage at a random place."""

    def trial(rng: random.Random, tmp: Path, unbroken: Unbroken) -> str:
        kind = KINDS[name]
        path = kind.build(tmp, unbroken)
        data, whole = path.read_bytes(), kind.read(path)
        path.write_bytes(bad := damaged(data, rng))
        found = read_or_refused(kind, path)
        if found is None:
            assert bad != data
            return "refused"
        assert equal(found, whole), "read without an error, with other contents"
        return "read"

    return trial


def damage_with_one_before(rng: random.Random, tmp: Path, unbroken: Unbroken) -> str:
    """checkpoint.pt damaged or gone, checkpoint.previous.pt there."""
    path, before = (_of_run(name, tmp, unbroken) for name in ("checkpoint.pt", "checkpoint.previous.pt"))
    whole, earlier = load_checkpoint(path), load_checkpoint(before)
    assert not equal(whole, earlier)
    path.write_bytes(damaged(path.read_bytes(), rng))
    if rng.random() < 0.1:
        path.unlink()
    said: list[str] = []
    found = load_checkpoint(path, "cpu", said.append)
    assert equal(found, earlier if said else whole)
    assert all("checkpoint.previous.pt" in line for line in said)
    return "the one before it" if said else "read"


class Code:
    """A pickle of it makes the file `marker` when it is loaded without care."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f'echo ran > "{self.marker}"',)


def foreign_files(marker: Path, protocol: int, good: bytes) -> dict[str, bytes]:
    """Contents that are something else, most of them made to run code that writes `marker`."""
    pickled, archive = pickle.dumps(Code(marker), protocol), io.BytesIO()
    torch.save({"format": 2, "model": Code(marker)}, archive)
    return {
        "nothing": b"",
        "pickle": pickled,
        "pickle behind a mark": good[:8] + pickled,
        "pickle in an archive of PyTorch": archive.getvalue(),
    }


def replace_by_foreign(rng: random.Random, tmp: Path, unbroken: Unbroken) -> str:
    """Each kind of file replaced by each foreign one."""
    marker = tmp / "marker"
    pickle.loads(pickle.dumps(Code(marker)))
    assert marker.exists(), "the pickle is meant to run code where nobody takes care"
    marker.unlink()
    for name, kind in KINDS.items():
        folder = tmp / name
        folder.mkdir()
        path = kind.build(folder, unbroken)
        for what, data in foreign_files(marker, rng.randrange(6), path.read_bytes()).items():
            path.write_bytes(data)
            assert read_or_refused(kind, path) is None, f"{name}: {what}: was read as if nothing were wrong"
            assert not marker.exists(), f"{name}: {what}: the code was run"
    return ""


REFUSED = "refused with one clear error that names the file, or read with the same contents as before"
ROWS = {
    **{f"{name} damaged": Row(REFUSED, damage(name)) for name in KINDS},
    "checkpoint damaged or gone, the one before it there": Row(
        "the one before it is read in its place and said so, or the same contents are read", damage_with_one_before
    ),
    "every kind of file replaced by nothing, a pickle that runs code, or nonsense": Row(
        "refused with the project's own error that names the file, and the code was not run",
        replace_by_foreign,
        share=0.1,
    ),
}

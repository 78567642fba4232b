"""Files that were made to do harm: archives that write elsewhere, pickles that run code, sizes beyond all."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from experiments.benchmarks import peak_memory
from experiments.headless import NotebookInputError, read_notebook
from src.data import DataError
from src.data.image_sources import read_folder
from src.export import unpack as unpack_network
from src.runs import RunError, SnapshotError, Snapshots, load_checkpoint
from src.storage import StorageError
from src.storage.container import MARK
from tests.export.test_packing import forged
from tests.torture.damaged_files import small_packed
from tests.torture.fault import Outcome, fault

MOST_BYTES = 64 * 2**20  # of memory that refusing a file may take


class Code:
    """A pickle of it makes a file called `marker` when it is loaded without care."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f'echo ran > "{self.marker}"',)


def torch_file(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def rezipped(data: bytes, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """The zip archive with every entry's content replaced by `change(name, content)`, with checksums that fit."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return out.getvalue()


def _as_checkpoint(payload: bytes) -> bytes:
    """The payload where torch keeps the pickle of a checkpoint."""
    return rezipped(torch_file({"format": 2}), lambda name, old: payload if name.endswith("data.pkl") else old)


def _as_arrays(payload: bytes) -> bytes:
    """The payload where numpy keeps the pickle of an array of objects."""
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (), }"
    header += b" " * (63 - (10 + len(header)) % 64) + b"\n"
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in ("format", "layers", "sizes", "channels", "epochs", "count_bytes", "dead"):
            content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + payload
            archive.writestr(f"{name}.npy", content)
    return out.getvalue()


READERS: dict[str, tuple[Callable[[Path], object], type[Exception], tuple[Callable[[bytes], bytes], ...]]] = {
    "checkpoint": (load_checkpoint, RunError, (lambda payload: payload, _as_checkpoint)),
    "packed network": (unpack_network, StorageError, (lambda payload: payload, lambda payload: MARK + payload)),
    "snapshots": (Snapshots.load, SnapshotError, (lambda payload: payload, _as_arrays)),
    "notebook": (read_notebook, NotebookInputError, (lambda payload: payload,)),
}


@fault(
    "pickle that runs code, in the place of a checkpoint, dataset file, packed network, snapshots or notebook",
    survived="refused with the project's own error, and the code was not run",
    rounds=64,
    quick=16,
)
def code_in_a_pickle(rng: random.Random, tmp: Path, rounds: int) -> Outcome:
    outcome = Outcome()
    cases = [(kind, frame) for kind, (_, _, frames) in READERS.items() for frame in frames]
    marker = tmp / "marker"
    pickle.loads(pickle.dumps(Code(marker)))
    assert marker.exists(), "the pickle is meant to run code where nobody takes care"
    marker.unlink()
    for number in range(rounds):
        kind, frame = cases[number % len(cases)]
        read, refusal, _ = READERS[kind]
        payload = pickle.dumps(Code(marker), protocol=rng.randrange(6))
        path = tmp / "file"
        path.write_bytes(frame(payload))
        with outcome.trial(kind):
            try:
                read(path)
            except refusal:
                pass
            else:
                raise AssertionError("was read as if nothing were wrong")
            finally:
                ran, _ = marker.exists(), marker.unlink(missing_ok=True)
            assert not ran, "the code was run"
    return outcome


def _png_of(width: int, height: int) -> bytes:
    """A PNG of that size whose few kilobytes hold a megabyte of black."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(2**20))) + chunk(b"IEND", b"")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n"


def refused_cheaply(read: Callable[[Path], object], path: Path, refusal: type[Exception]) -> None:
    """`read` raises `refusal`, and takes less than MOST_BYTES for that."""
    messages: list[str] = []

    def take() -> None:
        try:
            read(path)
        except refusal as error:
            messages.append(str(error))

    used = peak_memory(take, torch.device("cpu"))["step_bytes"]
    assert messages, "was read as if nothing were wrong"
    assert path.name in messages[0]
    assert used < MOST_BYTES, f"refusing it took {used / 2**20:.0f} MiB"


def _harmful_image(kind: str, path: Path, rng: random.Random) -> None:
    side = rng.randrange(9_500, 2**31 - 1)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "postscript":
        path.write_bytes(EPS)
    else:
        path.write_bytes(_png_of(side, side if kind == "large" else Image.MAX_IMAGE_PIXELS // side + 1))


@fault(
    "image bomb, pipe or PostScript among the images of a folder",
    survived="refused with the file's name, before its pixels take memory and without starting another program",
    rounds=40,
    quick=4,
)
def image_bomb(rng: random.Random, tmp: Path, rounds: int) -> Outcome:
    outcome = Outcome()
    for part in ("train", "test"):
        for label in ("a", "b"):
            (tmp / part / label).mkdir(parents=True)
            Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp / part / label / "0.png")
    kinds = ("wide", "large", "postscript", *(("pipe",) if hasattr(os, "mkfifo") else ()))
    for number in range(rounds):
        kind = kinds[number % len(kinds)]
        path = tmp / "train" / "a" / f"harm.{rng.choice(('png', 'jpg', 'gif', 'webp'))}"
        _harmful_image(kind, path, rng)
        with outcome.trial(kind, seconds=10), warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            refused_cheaply(lambda _: read_folder(str(tmp), lambda line: None), path, DataError)
        path.unlink()
    return outcome


@fault(
    "packed network that claims absurd sizes, with a checksum that fits",
    survived="refused with the file's name, taking no more than a few megabytes",
    rounds=60,
    quick=6,
)
def absurd_packed_network(rng: random.Random, tmp: Path, rounds: int) -> Outcome:
    path, outcome = tmp / "model.cdq", Outcome()
    data = small_packed(path)
    for _ in range(rounds):
        described: dict[str, Any] = {}

        def enlarge(description: dict[str, Any], described: dict[str, Any] = described) -> None:
            steps = [step for step in description["network"]["steps"] if any(type(v) is int for v in step.values())]
            place = rng.choice([*steps, *description["quantized"], description["network"]])
            name = rng.choice([name for name, value in place.items() if type(value) is int])
            place[name] = described[name] = 10 ** rng.randrange(3, 300)

        path.write_bytes(forged(data, enlarge))
        with outcome.trial(str(described)[:200]):
            refused_cheaply(unpack_network, path, StorageError)
    for length in [rng.randrange(2**20, 2**62) for _ in range(rounds)]:
        head = bytearray(data[:56])
        head[16:24] = length.to_bytes(8, "little")
        path.write_bytes(bytes(head) + data[56:])
        with outcome.trial(f"{length} bytes of tensors"):
            refused_cheaply(unpack_network, path, StorageError)
    return outcome


def _absurd_checkpoints(rng: random.Random) -> dict[str, bytes]:
    """Checkpoints whose few bytes stand for gigabytes, in every way the format knows."""
    large = rng.randrange(2**31, 2**33)
    number = b"\x8a\x05" + large.to_bytes(5, "little")
    plain = torch_file({"format": 2, "tensor": torch.zeros(4)})
    compressed = rezipped(
        plain, lambda name, content: bytes(2**28) if name.endswith("data/0") else content, zipfile.ZIP_DEFLATED
    )
    return {
        "compressed storage": compressed,
        "storage of another length": rezipped(
            plain,
            lambda name, content: content.replace(b"K\x04tq", number + b"tq", 1) if name.endswith("pkl") else content,
        ),
        "byte array": _as_checkpoint(b"\x80\x02cbuiltins\nbytearray\n" + number + b"\x85R."),
        "byte array, old name": _as_checkpoint(b"\x80\x02c__builtin__\nbytearray\n" + number + b"\x85R."),
        "tensor without storage": rezipped(
            plain,
            lambda name, content: content.replace(b"_rebuild_tensor_v2", b"_rebuild_meta_tensor_no_storage"),
        ),
        "text that is not there": _as_checkpoint(b"\x80\x02X" + (2**31 - 1).to_bytes(4, "little") + b"abc."),
        "view of one number": torch_file({"format": 2, "model": {"w": torch.zeros(1).expand(large)}}),
    }


@fault(
    "checkpoint that claims giant tensors",
    survived="refused with the file's name, taking no more than a few megabytes",
    rounds=35,
    quick=7,
)
def absurd_checkpoint(rng: random.Random, tmp: Path, rounds: int) -> Outcome:
    path, outcome = tmp / "checkpoint.pt", Outcome()
    cases: dict[str, bytes] = {}
    for number in range(rounds):
        if number % 7 == 0:
            cases = _absurd_checkpoints(rng)
        kind = list(cases)[number % len(cases)]
        path.write_bytes(cases[kind])
        with outcome.trial(kind):
            refused_cheaply(load_checkpoint, path, RunError)
    return outcome

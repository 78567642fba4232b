"""The container: what was written is read, and nothing else is, whatever a damaged or hostile file claims."""

from __future__ import annotations

import hashlib
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest

from src.storage import DamagedFileError, StorageError, container_bytes, read_container, save_arrays
from src.storage.container import MARK, MAX_COMPRESSED

DESCRIPTION = {"floats": [0.1, 1e-300, 3.0], "text": "Zürich", "none": None, "nested": {"a": [True, {}]}}
ARRAYS = {
    "scalar": np.array(2.5),
    "half": np.array([1.0, -0.0], dtype=np.float16),
    "transposed": np.arange(6, dtype=np.int64).reshape(2, 3).T,
    "nothing": np.zeros((0, 3), dtype=np.float32),
}
TINY = container_bytes("checkpoint", DESCRIPTION, save_arrays(ARRAYS))


def forged(text: bytes = b"{}", body: bytes = save_arrays({}), version: int = 3, claimed: int = 0) -> bytes:
    """A container whose checksum fits, put together from the written format. claimed: bytes it says it has more."""
    head = MARK + struct.pack("<I16sQQ", version, b"checkpoint", len(text), len(body) + claimed)
    return head + hashlib.sha256(head + text + body).digest() + text + body


def safetensors(dtype: str = "F32", shape: str = "1", end: int = 4) -> bytes:
    """A safetensors file of four bytes whose header says what is given."""
    header = f'{{"a":{{"dtype":"{dtype}","shape":[{shape}],"data_offsets":[0,{end}]}}}}'
    return struct.pack("<Q", len(header)) + header.encode() + bytes(4)


def refused(path: Path, data: bytes, words: str, *, kind: str = "checkpoint", damaged: bool = True) -> None:
    """The file is refused, as damaged or not, and that takes no more memory than a few times its size."""
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(StorageError, match=words) as caught:
            read_container(path, kind)
        assert tracemalloc.get_traced_memory()[1] < 4 * len(data) + 2**22
    finally:
        tracemalloc.stop()
    assert path.name in str(caught.value)
    assert isinstance(caught.value, DamagedFileError) == damaged


def test_what_was_written_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(TINY)
    description, arrays = read_container(tmp_path / "file", "checkpoint")
    assert description == DESCRIPTION
    assert arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert (arrays[name].dtype, arrays[name].shape) == (array.dtype, array.shape)
        assert arrays[name].tobytes() == array.tobytes()
    (tmp_path / "file").write_bytes(forged(b'{"a": 1}', safetensors()))
    assert read_container(tmp_path / "file", "checkpoint") == ({"a": 1}, {"a": np.zeros(1)})


@pytest.mark.parametrize("length", [MAX_COMPRESSED - 8, MAX_COMPRESSED, 4 * MAX_COMPRESSED])
def test_a_description_of_any_length_is_read(tmp_path: Path, length: int) -> None:
    """{"a":"..."} has 8 characters beside its text."""
    (tmp_path / "file").write_bytes(container_bytes("checkpoint", {"a": "x" * length}, save_arrays({})))
    assert read_container(tmp_path / "file", "checkpoint")[0] == {"a": "x" * length}


def test_every_changed_byte_and_every_other_length_is_noticed(tmp_path: Path) -> None:
    """About 5 s: each of the file's 600 bytes is changed, and each length is tried."""
    for place in range(len(TINY)):
        changed = bytes([TINY[place] ^ (1 << place % 8)])
        refused(tmp_path / "file", TINY[:place] + changed + TINY[place + 1 :], "damaged")
        refused(tmp_path / "file", TINY[:place], "damaged")
    refused(tmp_path / "file", TINY + b"\0", "its header says")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (forged(claimed=2**31), r"it has \d+ bytes, its header says 2,147,"),
        (forged(claimed=2**63), r"it has \d+ bytes, its header says 9,223,"),
        *((forged(text), "its description cannot be read") for text in (b"", b"{", b"\xff\xfe", b'{"a":' * 200_000)),
        (forged(zlib.compress(b" " * 10**7)), "its description cannot be read .cut off, or longer than 262,144 bytes"),
        (forged(zlib.compress(b"{}")[:-1]), "its description cannot be read .cut off"),
        (forged(zlib.compress(b"[" * 200_000)), "its description cannot be read"),
        (forged(zlib.compress(b"1" * 10_000)), "its description cannot be read"),
        (forged(zlib.compress(b"[1]")), "its description cannot be read .not a JSON object"),
        *((forged(body=body), "its tensors cannot be read") for body in (b"", b"noise", struct.pack("<Q", 2**62))),
        (forged(body=safetensors(shape="1000000000000", end=4 * 10**12)), "its tensors cannot be read"),
        (forged(body=safetensors(dtype="PICKLE")), "its tensors cannot be read"),
        (forged(body=safetensors(dtype="BF16", shape="2")), "its tensors cannot be read"),  # numpy has no such type
    ],
)
def test_a_hostile_file_is_refused_cheaply(data: bytes, words: str, tmp_path: Path) -> None:
    refused(tmp_path / "file", data, words)


@pytest.mark.parametrize("mark", [b"PK\x03\x04", b"\x89CDQP\r\n\x1a"])
def test_an_earlier_version_is_named(mark: bytes, tmp_path: Path) -> None:
    words = r"an earlier version of the project \(format 1 or 2, this one reads 3\): read it with the version that"
    refused(tmp_path / "file", mark + TINY, words, damaged=False)
    refused(tmp_path / "file", b"x" + mark, "not a checkpoint file: it starts with")


def test_another_kind_and_a_later_version_are_named(tmp_path: Path) -> None:
    refused(tmp_path / "file", TINY, "not a packed file: its kind is b'checkpoint'", kind="packed", damaged=False)
    refused(tmp_path / "file", forged(version=4), "format version 4, this version .* reads 3", damaged=False)

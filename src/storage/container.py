"""The container of the project's own files: checkpoint, snapshots and packed network.

    bytes  what (whole numbers are little-endian)
    8      mark  89 C D Q 0D 0A 1A 0A, which a text transfer destroys
    4      format version
    16     kind of file, ASCII, filled up with zeros
    8      length D of the description
    8      length T of the tensors
    32     sha256 over all of the file but these 32 bytes
    D      description: a JSON object, compressed with zlib where it is at most MAX_COMPRESSED bytes long
    T      tensors: a safetensors file

Reading a file runs no code from it. Lengths and checksum are checked first, so that a file takes no more memory than it
has bytes, whatever it claims. Every later format keeps these first 76 bytes, so that its files are recognized.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from src.storage.files import StorageError

MARK = b"\x89CDQ\r\n\x1a\n"
VERSION = 3
MAX_COMPRESSED = 2**18  # bytes of JSON: short enough that what a damaged file unpacks to does no harm
EARLIER = (b"PK\x03\x04", b"\x89CDQP\r\n\x1a")  # how archives of PyTorch and NumPy, and the first packed files, begin

_HEADER = struct.Struct("<8sI16sQQ32s")


class DamagedFileError(StorageError):
    """A file that was cut or changed since it was written, or that is no container."""


def save_arrays(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """The arrays as a safetensors file. safetensors itself writes wrong numbers for an array that is not contiguous."""
    return safetensors.numpy.save({name: np.asarray(array, order="C") for name, array in arrays.items()})


def container_bytes(kind: str, description: Mapping[str, Any], body: bytes) -> bytes:
    """The bytes of a file. description: what JSON can hold. body: a safetensors file (`save_arrays`)."""
    text = json.dumps(description, separators=(",", ":")).encode()
    if len(text) <= MAX_COMPRESSED:
        text = zlib.compress(text, 9)
    fields = (MARK, VERSION, kind.encode(), len(text), len(body))
    head = _HEADER.pack(*fields, bytes(32))[:-32]
    return b"".join((head, _digest(head, text, body), text, body))


def read_container(
    path: str | Path, kind: str, load: Callable[[bytes], dict[str, Any]] = safetensors.numpy.load
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Description and tensors of a file. load: what makes tensors of the bytes of a safetensors file.

    Raises DamagedFileError for a damaged file, StorageError for one of another version or kind, and OSError. None of
    these errors says what to do, which depends on the kind of file.
    """
    with open(path, "rb") as file:
        head = file.read(_HEADER.size)
        _check_mark(path, kind, head)
        _, version, found, text_bytes, body_bytes, digest = _HEADER.unpack(head.ljust(_HEADER.size, b"\0"))
        actual, claimed = os.fstat(file.fileno()).st_size, _HEADER.size + text_bytes + body_bytes
        if actual != claimed:
            raise _damaged(path, f"it has {actual:,} bytes, its header says {claimed:,}")
        text, body = file.read(text_bytes), file.read(body_bytes)
    if _digest(head[:-32], text, body) != digest:
        raise _damaged(path, "its checksum does not fit its contents")
    if version != VERSION:
        raise StorageError(f"{str(path)!r} has format version {version}, this version of the project reads {VERSION}")
    if found != kind.encode().ljust(len(found), b"\0"):
        raise StorageError(f"{str(path)!r} is not a {kind} file: its kind is {found.rstrip(bytes(1))!r}")
    description = _parse(path, text)
    try:
        return description, load(body)
    except Exception as error:  # safetensors names none of the errors that its readers raise
        raise _damaged(path, f"its tensors cannot be read ({error})") from error


def _digest(*parts: bytes) -> bytes:
    sha = hashlib.sha256()
    for part in parts:  # one by one: joined, they would take their memory twice
        sha.update(part)
    return sha.digest()


def _check_mark(path: str | Path, kind: str, head: bytes) -> None:
    if head and MARK.startswith(head[: len(MARK)]):
        return
    if head.startswith(EARLIER):
        raise StorageError(
            f"{str(path)!r} was written by an earlier version of the project (format 1 or 2, this one reads "
            f"{VERSION}): read it with the version that wrote it"
        )
    raise DamagedFileError(
        f"{str(path)!r} is damaged, or not a {kind} file: it starts with {head[: len(MARK)]!r}, need {MARK!r}"
    )


def _parse(path: str | Path, text: bytes) -> dict[str, Any]:
    reader = zlib.decompressobj()
    try:
        if not text.startswith(b"{"):
            text = reader.decompress(text, MAX_COMPRESSED + 1)
            if not reader.eof or reader.unused_data:
                raise ValueError(f"cut off, or longer than {MAX_COMPRESSED:,} bytes")
        description = json.loads(text)
        if not isinstance(description, dict):
            raise ValueError("not a JSON object")
    except (zlib.error, ValueError, RecursionError) as error:
        raise _damaged(path, f"its description cannot be read ({error!s:.200})") from error
    return description


def _damaged(path: str | Path, what: str) -> DamagedFileError:
    return DamagedFileError(f"{str(path)!r} is damaged: {what}")

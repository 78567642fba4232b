"""The frame of a packed file: a mark, a version, a checksum over everything, a description, and tensors.

    bytes   what (whole numbers are little-endian)
    8       mark  89 C D Q P 0D 0A 1A, which a text transfer destroys
    4       format version
    4       length D of the description
    8       length T of the tensors
    32      sha256 over all of the file but these 32 bytes
    D       description: JSON, zlib
    T       tensors: a safetensors file, with the entries named in TENSORS, each one-dimensional

A reader looks at the lengths and the checksum first, which takes a megabyte whatever the file claims; then at the
description, which is limited; and reads the tensors only where their length fits what the description says.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

MARK = b"\x89CDQP\r\n\x1a"
VERSION = 1
MAX_DESCRIPTION = 2**18  # bytes of JSON; a residual network of 110 layers takes a fifth of it
MAX_SAFETENSORS_HEADER = 1024
# stream: entropy-coded indices. grid: step and shift of every quantized layer. float32, counters: everything else.
# check: sha256 of the indices, so that no other version of a library decodes them differently unnoticed.
TENSORS: dict[str, str] = {"stream": "<u4", "grid": "<f4", "float32": "<f4", "counters": "<i8", "check": "|u1"}

Tensors = dict[str, NDArray[Any]]
_HEADER = struct.Struct("<8sIIQ32s")
_CHUNK = 2**20


class PackedFileError(ValueError):
    """A file that is not a packed network, is damaged, or belongs to another version."""


def write_frame(description: Mapping[str, Any], tensors: Tensors) -> bytes:
    """The bytes of a file. Raises PackedFileError where the description is longer than a reader accepts."""
    text = json.dumps(description, separators=(",", ":"), allow_nan=False).encode()
    if len(text) > MAX_DESCRIPTION:
        raise PackedFileError(
            f"the network's description takes {len(text):,} bytes: a packed file holds at most {MAX_DESCRIPTION:,}; "
            "save its state_dict and description instead"
        )
    packed = zlib.compress(text, 9)
    plain = {name: np.ascontiguousarray(tensors[name], dtype=kind) for name, kind in TENSORS.items()}
    body = safetensors.numpy.save(plain)
    head = _HEADER.pack(MARK, VERSION, len(packed), len(body), bytes(32))
    digest = hashlib.sha256(_hashed(head) + packed + body).digest()
    return _HEADER.pack(MARK, VERSION, len(packed), len(body), digest) + packed + body


def read_frame(
    path: str | Path, expected: Callable[[dict[str, Any], int], Mapping[str, int | range]]
) -> tuple[dict[str, Any], Tensors]:
    """Description and tensors of a file, checked.

    expected(description, file bytes): how many numbers each of TENSORS holds, or a range of that. It is asked before
    the tensors are read, and raises PackedFileError, with what is wrong, for a description that it does not accept.
    Raises PackedFileError for any file that `write_frame` cannot have written; OSError where it cannot be read.
    """
    with open(path, "rb") as file:
        packed_bytes, body_bytes = _check_header(path, file)
        description = _parse(path, file.read(packed_bytes))
        try:
            counts = expected(description, os.fstat(file.fileno()).st_size)
        except PackedFileError as error:
            raise _damaged(path, str(error)) from error
        width = {name: np.dtype(kind).itemsize for name, kind in TENSORS.items()}
        most = sum(width[name] * (n if isinstance(n, int) else n[-1]) for name, n in counts.items())
        if body_bytes > most + MAX_SAFETENSORS_HEADER:
            raise _damaged(path, f"{body_bytes:,} bytes of tensors where the network described has {most:,}")
        body = file.read(body_bytes)
    try:
        tensors = safetensors.numpy.load(body)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"its tensors cannot be read ({error})") from error
    return description, {name: _checked(path, name, tensors, counts[name]) for name in TENSORS}


def _check_header(path: str | Path, file: BinaryIO) -> tuple[int, int]:
    """Lengths of the description and of the tensors, after the checksum over the whole file has been seen to fit."""
    actual = os.fstat(file.fileno()).st_size
    head = file.read(_HEADER.size)
    if head[: len(MARK)] != MARK[: len(head)] or not head:
        raise PackedFileError(
            f"{str(path)!r} is not a packed network: it starts with {head[:8]!r} where {MARK!r} is needed; "
            "name a file that pack() wrote"
        )
    if len(head) < _HEADER.size:
        raise _damaged(path, f"it has {actual} bytes, and needs at least {_HEADER.size}")
    _, version, packed_bytes, body_bytes, digest = _HEADER.unpack(head)
    if version != VERSION:
        raise PackedFileError(
            f"{str(path)!r} has format version {version}, this program reads version {VERSION}: read it with the "
            "program that wrote it, or pack the network again (or the file is damaged)"
        )
    if actual != _HEADER.size + packed_bytes + body_bytes:
        raise _damaged(path, f"it has {actual:,} bytes, its header says {_HEADER.size + packed_bytes + body_bytes:,}")
    if packed_bytes > MAX_DESCRIPTION:
        raise _damaged(path, f"its description takes {packed_bytes:,} bytes, at most {MAX_DESCRIPTION:,} are allowed")
    sha = hashlib.sha256(_hashed(head))
    while chunk := file.read(_CHUNK):
        sha.update(chunk)
    if sha.digest() != digest:
        raise _damaged(path, "its checksum does not fit its contents")
    file.seek(_HEADER.size)
    return packed_bytes, body_bytes


def _hashed(head: bytes) -> bytes:
    return head[: _HEADER.size - 32]


def _parse(path: str | Path, packed: bytes) -> dict[str, Any]:
    try:
        reader = zlib.decompressobj()
        text = reader.decompress(packed, MAX_DESCRIPTION + 1)
        if len(text) > MAX_DESCRIPTION or not reader.eof or reader.unused_data:
            raise _damaged(path, f"its description is cut off, or longer than {MAX_DESCRIPTION:,} bytes")
        description = json.loads(text)
    except (zlib.error, ValueError, RecursionError) as error:
        if isinstance(error, PackedFileError):
            raise
        raise _damaged(path, f"its description cannot be read ({type(error).__name__})") from error
    if not isinstance(description, dict):
        raise _damaged(path, "its description is not a JSON object")
    return description


def _checked(path: str | Path, name: str, tensors: Tensors, count: int | range) -> NDArray[Any]:
    allowed = range(count, count + 1) if isinstance(count, int) else count
    tensor = tensors.get(name)
    if set(tensors) != set(TENSORS) or tensor is None:
        raise _damaged(path, f"it holds the tensors {sorted(tensors)!r:.200}, need {sorted(TENSORS)}")
    if tensor.dtype != np.dtype(TENSORS[name]) or tensor.ndim != 1 or tensor.size not in allowed:
        got = f"{tensor.dtype} {tensor.shape}"
        words = f"{allowed[0]:,}" if len(allowed) == 1 else f"{allowed[0]:,} to {allowed[-1]:,}"
        raise _damaged(path, f"tensor {name!r} is {got}, need {words} numbers of type {np.dtype(TENSORS[name])}")
    return tensor


def _damaged(path: str | Path, what: str) -> PackedFileError:
    return PackedFileError(f"{str(path)!r} is damaged: {what}; copy it again, or pack the network again")

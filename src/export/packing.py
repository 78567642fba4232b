"""A trained network as one small file, and back: exact removal, indices on a grid, entropy coding.

`pack` compacts the network and writes the indices of its quantized weights near their entropy, and all else (stem,
classifier, BatchNorm, constants) in float32. `unpack` gives the compact network with, bit for bit, the weights that
were evaluated. The file holds data only (src/storage/packed_file.py): reading it runs nothing that it brings along.

Worked case: 1,000 weights of 4 bits, of which 900 are 0 and 100 are spread evenly over the 14 other values. As float32
they take 4,000 bytes, as the bit widths say 500, by their entropy 0.9 * 0.152 + 0.1 * (3.322 + 3.807) = 0.850 bits each
or 106 bytes.
Axis letters: O output channels, I input channels, k kernel.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor, nn

from src.export.entropy_coding import CodingError, decode, encode, entropy_bits
from src.export.integer_weights import IndexedWeight, compact_with_indices
from src.export.pack_report import PackedLayer, PackReport, fp32_state_bytes
from src.pruning import CompactionError, CompactNetwork, Shape, state_shapes
from src.quantizer import LARGEST_BITS, MIN_BITS
from src.storage import (
    StorageError,
    check_arrays,
    check_output,
    container_bytes,
    read_container,
    save_arrays,
    write_output,
)

KIND = "packed"
# Zeros cost next to nothing, so a short file could stand for endless weights. A file has at least one byte for so many
# weights (it is filled up where it would be shorter), and a reader believes no more.
MAX_WEIGHTS_PER_BYTE = 256


@torch.no_grad()
def pack(
    model: nn.Module, path: str | Path, *, input_size: tuple[int, int, int] = (3, 32, 32), force: bool = False
) -> PackReport:
    """Compact `model`, write it to `path`, and say what it takes. The model is left as it is, on its device.

    model: in eval mode, float32, its quantizers attached and switched on. Without quantizers all is stored in float32,
    and the report says so. input_size: (C, H, W) of one image. force: write over an existing file.
    Raises StorageError for the path, CompactionError or IndexingError for the model (see `compact_with_indices`);
    nothing is written then.
    """
    check_output(path, force)
    network, indexed = compact_with_indices(model, input_size)
    data, report = _contents(network, indexed, fp32_state_bytes(model), str(path))
    write_output(path, data, force)
    return report


@torch.no_grad()
def unpack(path: str | Path) -> CompactNetwork:
    """The network in a file that `pack` wrote, on the CPU, in eval mode, ready to run.

    Raises StorageError for a file that is damaged, of another version or not a packed network, before more memory than
    a few times the file's size is used, and also where the file cannot be read.
    """
    try:
        described, tensors = read_container(path, KIND)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(f"{str(path)!r} cannot be read ({reason}); name a file that pack() wrote") from error
    except StorageError as error:
        raise StorageError(f"{error}; copy the file again, or pack the network again") from error
    try:
        shapes, layers = _check_contents(described, tensors, Path(path).stat().st_size)
        counts = [(layer["bits"], math.prod(_indexed_shape(shapes, layer))) for layer in layers]
        decoded = decode(tensors["stream"], counts)
        network = CompactNetwork(described["network"])
    except (StorageError, CodingError, CompactionError) as error:
        raise StorageError(f"{str(path)!r} is damaged: {error}; pack the network again") from error
    if _digest(decoded) != tensors["check"].tobytes():
        raise StorageError(
            f"{str(path)!r}: its weights decode to others than were encoded; it was written with another version of "
            "the library constriction: read it with that one, or pack the network again"
        )
    grid = torch.from_numpy(tensors["grid"].reshape(-1, 2).copy())
    indexed = {
        layer["name"]: IndexedWeight(
            layer["bits"], step, shift, torch.from_numpy(q.reshape(_indexed_shape(shapes, layer)))
        )
        for layer, q, (step, shift) in zip(layers, decoded, grid, strict=True)
    }
    network.load_state_dict(_joined(shapes, indexed, tensors))
    return network.eval()


def _contents(
    network: CompactNetwork, indexed: Mapping[str, IndexedWeight], dense_bytes: int, path: str
) -> tuple[bytes, PackReport]:
    own = network.state_dict()
    state = {name: own[name] for name in state_shapes(network.description)}  # the order a reader knows
    layers: list[dict[str, Any]] = [
        {"name": name, "bits": part.bits, "columns": part.indices.shape[1]} for name, part in indexed.items()
    ]
    flat = [part.indices.numpy().ravel() for part in indexed.values()]
    stream = encode([(layer["bits"], q) for layer, q in zip(layers, flat, strict=True)])
    shortest = sum(tensor.numel() for tensor in state.values()) // MAX_WEIGHTS_PER_BYTE // 4 + 1
    if len(stream) < shortest and layers:
        stream = np.concatenate([stream, np.zeros(shortest - len(stream), dtype=np.uint32)])
    rest = dict(_rest(state, indexed))
    floats = [part.flatten() for name, part in rest.items() if _pool(name) == "float32"]
    counters = [part.flatten() for name, part in rest.items() if _pool(name) == "counters"]
    tensors: dict[str, Any] = {
        "stream": stream,
        "grid": np.array([[part.step.item(), part.shift.item()] for part in indexed.values()], dtype="<f4").ravel(),
        "float32": torch.cat([torch.zeros(0), *floats]).numpy(),
        "counters": torch.cat([torch.zeros(0, dtype=torch.int64), *counters]).numpy(),
        "check": np.frombuffer(_digest(flat), dtype=np.uint8),
    }
    data = container_bytes(KIND, {"network": network.description, "quantized": layers}, save_arrays(tensors))
    raw = b"".join(
        q.astype("<i1" if layer["bits"] <= 8 else "<i2").tobytes() for layer, q in zip(layers, flat, strict=True)
    )
    report = PackReport(
        path=path,
        fp32_state_bytes=dense_bytes,
        compact_state_bytes=fp32_state_bytes(network),
        stream_bytes=stream.nbytes,
        zstd_bytes=len(zstandard.ZstdCompressor(level=19).compress(raw)) if raw else 0,
        float32_bytes=tensors["float32"].nbytes + tensors["counters"].nbytes,
        file_bytes=len(data),
        layers=tuple(
            PackedLayer(layer["name"], q.size, layer["bits"], entropy_bits(q) / 8)
            for layer, q in zip(layers, flat, strict=True)
        ),
    )
    return data, report


def _rest(state: Mapping[str, Tensor], indexed: Mapping[str, IndexedWeight]) -> Iterator[tuple[str, Tensor]]:
    """What the indices leave out, in the state's order: whole tensors, and columns behind the quantized ones."""
    for name, tensor in state.items():
        part = indexed.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        yield name, tensor if part is None else tensor[:, part.indices.shape[1] :]


def _joined(
    shapes: Mapping[str, Shape], indexed: Mapping[str, IndexedWeight], tensors: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The state dictionary: the inverse of `_rest`, with the values of the indices."""
    pools = {name: torch.from_numpy(tensors[name].copy()) for name in ("float32", "counters")}
    used = dict.fromkeys(pools, 0)
    state = {}
    for name, shape in shapes.items():
        part = indexed.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        pool = _pool(name)
        shape = shape if part is None else (shape[0], shape[1] - part.indices.shape[1], *shape[2:])
        size = math.prod(shape)
        rest = pools[pool][used[pool] : used[pool] + size].view(shape)
        used[pool] += size
        state[name] = rest.clone() if part is None else torch.cat([part.values(), rest], dim=1)
    return state


def _check_contents(
    described: dict[str, Any], tensors: dict[str, Any], file_bytes: int
) -> tuple[dict[str, Shape], list[dict[str, Any]]]:
    """Shapes of the state dictionary and the quantized layers. Raises StorageError, CompactionError with what is wrong.

    The tensors of a file, one-dimensional: stream, the entropy-coded indices; grid, step and shift of every quantized
    layer; float32 and counters, everything else; check, sha256 of the indices, so that no other version of a library
    decodes them differently unnoticed.
    """
    shapes = state_shapes(described.get("network") or {})
    layers = _layers(described)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    if sum(sizes.values()) > MAX_WEIGHTS_PER_BYTE * file_bytes:
        raise StorageError(
            f"{file_bytes:,} bytes cannot hold {sum(sizes.values()):,} parameters, at most "
            f"{MAX_WEIGHTS_PER_BYTE * file_bytes:,} are allowed"
        )
    for layer in layers:
        _check_layer(shapes, layer)
    weights = sum(math.prod(_indexed_shape(shapes, layer)) for layer in layers)
    counters = sum(size for name, size in sizes.items() if _pool(name) == "counters")
    check_arrays(
        tensors,
        {
            "stream": ("<u4", (None,)),
            "grid": ("<f4", (2 * len(layers),)),
            "float32": ("<f4", (sum(sizes.values()) - counters - weights,)),
            "counters": ("<i8", (counters,)),
            "check": ("|u1", (hashlib.sha256().digest_size,)),
        },
    )
    return shapes, layers


def _layers(described: Mapping[str, Any]) -> list[dict[str, Any]]:
    layers = described.get("quantized")
    if set(described) != {"network", "quantized"} or not isinstance(layers, list):
        raise StorageError("its description needs exactly network and quantized")
    for layer in layers:
        whole = isinstance(layer, dict) and set(layer) == {"name", "bits", "columns"}
        if not whole or not isinstance(layer["name"], str):
            raise StorageError(f"quantized layer {layer!r:.100} needs exactly name, bits and columns")
    if len({layer["name"] for layer in layers}) != len(layers):
        raise StorageError("a quantized layer is named twice")
    return layers


def _check_layer(shapes: Mapping[str, Shape], layer: Mapping[str, Any]) -> None:
    shape = shapes.get(f"{layer['name']}.weight", ())
    for field, least, most in (("bits", MIN_BITS, LARGEST_BITS), ("columns", 1, shape[1] if len(shape) > 1 else 0)):
        value = layer[field]
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise StorageError(f"layer {layer['name']!r:.80} has {field}={value!r:.50}, need {least} to {most}")


def _indexed_shape(shapes: Mapping[str, Shape], layer: Mapping[str, Any]) -> Shape:
    rows, _, *kernel = shapes[f"{layer['name']}.weight"]
    return (rows, layer["columns"], *kernel)


def _pool(name: str) -> str:
    return "counters" if name.endswith(".num_batches_tracked") else "float32"


def _digest(layers: list[Any]) -> bytes:
    """sha256 over the indices of all layers as little-endian int32."""
    sha = hashlib.sha256()
    for q in layers:
        sha.update(np.ascontiguousarray(q, dtype="<i4").tobytes())
    return sha.digest()

"""A trained network as one small file, and back: exact removal, indices on a grid, entropy coding.

`pack` compacts the network and writes the indices of its quantized weights near their entropy, and all else (stem,
classifier, BatchNorm, constants) in float32. `unpack` gives the compact network with, bit for bit, the weights that
were evaluated. The file is a container (src/storage/container.py): reading it runs no code from it.

Worked case: 1,000 weights of 4 bits, of which 900 are 0 and 100 are spread evenly over the 14 other values. As float32
they take 4,000 bytes, as the bit widths say 500, by their entropy 0.9 * 0.152 + 0.1 * (3.322 + 3.807) = 0.850 bits each
or 106 bytes.
Axis letters: O output channels, I input channels, k kernel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray
from torch import Tensor, nn

from src.export.entropy_coding import CodingError, decode, encode, entropy_bits
from src.export.integer_weights import IndexedWeight, compact_with_indices
from src.pruning import CompactionError, CompactNetwork
from src.quantizer import LARGEST_BITS, MIN_BITS, check_range
from src.storage import (
    DamagedFileError,
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
_STORED = {torch.float32: "<f4", torch.int64: "<i8"}


@dataclass(frozen=True)
class PackedLayer:
    """One quantized layer of the compacted network. entropy_bytes: order-0 entropy of its indices."""

    name: str
    weights: int
    bits: int
    entropy_bytes: float


@dataclass(frozen=True)
class PackReport:
    """What a network takes, in bytes, from FP32 to the file.

    fp32_state_bytes: all parameters and buffers of the dense network without its quantizers: weights, biases,
        BatchNorm's scales, shifts and statistics in float32, BatchNorm's counters in int64.
    compact_state_bytes: the same for the compacted network.
    Of the indices of the quantized weights that are left after exact removal:
        bit_width_bytes: weights x bit width; entropy_bytes: their order-0 entropy, layer by layer;
        stream_bytes: in the file, coded, with the tables; zstd_bytes: zstd -19 over them as int8 (int16 above 8 bits).
    float32_bytes: all else that the file holds of the network. file_bytes: the file.
    """

    path: str
    fp32_state_bytes: int
    compact_state_bytes: int
    stream_bytes: int
    zstd_bytes: int
    float32_bytes: int
    file_bytes: int
    layers: tuple[PackedLayer, ...]

    @property
    def bit_width_bytes(self) -> float:
        """Bytes of the indices at their layers' bit widths."""
        return sum(layer.weights * layer.bits for layer in self.layers) / 8

    @property
    def entropy_bytes(self) -> float:
        """Bytes of the indices at their entropy."""
        return sum(layer.entropy_bytes for layer in self.layers)

    @property
    def ratio(self) -> float:
        """FP32 state of the dense network / file, in bytes."""
        return self.fp32_state_bytes / self.file_bytes

    def text(self) -> str:
        """The table: one size a line, and its share of the dense network's FP32 state."""
        other = self.file_bytes - self.stream_bytes - self.float32_bytes
        weights = sum(layer.weights for layer in self.layers)
        rows = [
            ("FP32 state of the dense network", self.fp32_state_bytes),
            ("FP32 state of the compacted network", self.compact_state_bytes),
            (f"its {weights:,} quantized weights: as the bit widths say", self.bit_width_bytes),
            ("    order-0 entropy of the indices", self.entropy_bytes),
            ("    zstd -19 over the raw indices", self.zstd_bytes),
            ("    in the file, entropy-coded", self.stream_bytes),
            ("all else in float32, in the file", self.float32_bytes),
            ("description, steps, checksums, frame, in the file", other),
            ("the file", self.file_bytes),
        ]
        lines = [f"{'packed file':<58} {'bytes':>11} {'share':>8}", "-" * 79]
        lines += [f"{name:<58} {size:>11,.0f} {100 * size / self.fp32_state_bytes:>6.2f} %" for name, size in rows]
        lines.append(f"{self.ratio:.2f} times smaller than the FP32 state: {self.path}")
        if not self.layers:
            lines.append("The network has no quantized layer: all of its weights are stored in float32.")
        return "\n".join(lines)


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
    state = network.state_dict()
    layers = [{"name": name, "bits": part.bits, "columns": part.indices.shape[1]} for name, part in indexed.items()]
    flat = [part.indices.numpy().ravel() for part in indexed.values()]
    bits = [part.bits for part in indexed.values()]
    stream = encode(list(zip(bits, flat, strict=True)))
    shortest = sum(tensor.numel() for tensor in state.values()) // MAX_WEIGHTS_PER_BYTE // 4 + 1
    if len(stream) < shortest and layers:
        stream = np.concatenate([stream, np.zeros(shortest - len(stream), dtype=np.uint32)])
    rest = b"".join(part.numpy().astype(_STORED[part.dtype]).tobytes() for part in _rest(state, layers).values())
    tensors = {
        "stream": stream,
        "grid": np.array([[part.step.item(), part.shift.item()] for part in indexed.values()], dtype="<f4").ravel(),
        "rest": np.frombuffer(rest, dtype=np.uint8),
        "check": np.frombuffer(_digest(flat), dtype=np.uint8),
    }
    data = container_bytes(KIND, {"network": network.description, "quantized": layers}, save_arrays(tensors))
    write_output(path, data, force)
    raw = b"".join(q.astype("<i1" if b <= 8 else "<i2").tobytes() for b, q in zip(bits, flat, strict=True))
    return PackReport(
        path=str(path),
        fp32_state_bytes=_fp32_state_bytes(model),
        compact_state_bytes=_fp32_state_bytes(network),
        stream_bytes=stream.nbytes,
        zstd_bytes=len(zstandard.ZstdCompressor(level=19).compress(raw)) if raw else 0,
        float32_bytes=len(rest),
        file_bytes=len(data),
        layers=tuple(
            PackedLayer(name, q.size, b, entropy_bits(q) / 8) for name, b, q in zip(indexed, bits, flat, strict=True)
        ),
    )


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
        copy_it = "copy the file again, or " if isinstance(error, DamagedFileError) else ""
        raise StorageError(f"{error}; {copy_it}pack the network again") from error
    try:
        network = CompactNetwork(described.get("network") or {})
        state = network.state_dict()  # on the "meta" device: shapes, and no numbers yet
        layers = _checked_layers(described, state)
        _check_tensors(tensors, state, layers, Path(path).stat().st_size)
        shapes = [state[f"{layer['name']}.weight"][:, : layer["columns"]].shape for layer in layers]
        decoded = decode(tensors["stream"], [(each["bits"], s.numel()) for each, s in zip(layers, shapes, strict=True)])
    except (StorageError, CodingError, CompactionError) as error:
        raise StorageError(f"{str(path)!r} is damaged: {error}; pack the network again") from error
    if _digest(decoded) != tensors["check"].tobytes():
        raise StorageError(
            f"{str(path)!r}: its weights decode to others than were encoded; it was written with another version of "
            "the library constriction: read it with that one, or pack the network again"
        )
    read = 0
    for name, part in _rest(state, layers).items():
        values = tensors["rest"][read : read + part.nbytes].view(_STORED[part.dtype])
        state[name] = torch.from_numpy(values.reshape(part.shape).copy())
        read += part.nbytes
    grid = torch.from_numpy(tensors["grid"].reshape(-1, 2).copy())
    for layer, q, shape, (step, shift) in zip(layers, decoded, shapes, grid, strict=True):
        weight = f"{layer['name']}.weight"
        indexed = IndexedWeight(layer["bits"], step, shift, torch.from_numpy(q.reshape(shape)))
        state[weight] = torch.cat([indexed.values(), state[weight]], dim=1)
    network.load_state_dict(state)
    return network.eval()


def _rest(state: Mapping[str, Tensor], layers: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """What the indices leave out, in the state's order: whole tensors, and columns behind the quantized ones."""
    columns = {f"{layer['name']}.weight": layer["columns"] for layer in layers}
    return {name: tensor[:, columns[name] :] if name in columns else tensor for name, tensor in state.items()}


def _checked_layers(described: Mapping[str, Any], state: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """The quantized layers of a description: name, bits and columns of each. Raises StorageError with what is wrong."""
    layers = described.get("quantized")
    if set(described) != {"network", "quantized"} or not isinstance(layers, list):
        raise StorageError("its description needs exactly network and quantized")
    for layer in layers:
        if not isinstance(layer, dict) or set(layer) != {"name", "bits", "columns"}:
            raise StorageError(f"quantized layer {layer!r:.100} needs exactly name, bits and columns")
        name, weight = f"layer {layer['name']!r:.80}", state.get(f"{layer['name']}.weight")
        if weight is None or weight.dim() < 2:
            raise StorageError(f"quantized {name} is not a convolution or linear layer of its network")
        check_range(f"{name} has bits", layer["bits"], MIN_BITS, LARGEST_BITS, error=StorageError)
        check_range(f"{name} has columns", layer["columns"], 1, weight.shape[1], error=StorageError)
    if len({layer["name"] for layer in layers}) != len(layers):
        raise StorageError("a quantized layer is named twice")
    return layers


def _check_tensors(
    tensors: dict[str, Any], state: Mapping[str, Tensor], layers: Sequence[Mapping[str, Any]], file_bytes: int
) -> None:
    """Raise StorageError unless the tensors of a file hold as many numbers as its description says.

    All are one-dimensional: stream, the entropy-coded indices; grid, step and shift of every quantized layer; rest, the
    bytes of everything else; check, sha256 of the indices, so that no other version of a library decodes them
    differently unnoticed.
    """
    parameters, most = sum(tensor.numel() for tensor in state.values()), MAX_WEIGHTS_PER_BYTE * file_bytes
    if parameters > most:
        raise StorageError(f"{file_bytes:,} bytes cannot hold {parameters:,} parameters, at most {most:,} are allowed")
    needed: dict[str, tuple[str, tuple[int | None, ...]]] = {
        "stream": ("<u4", (None,)),
        "grid": ("<f4", (2 * len(layers),)),
        "rest": ("|u1", (sum(part.nbytes for part in _rest(state, layers).values()),)),
        "check": ("|u1", (hashlib.sha256().digest_size,)),
    }
    check_arrays(tensors, needed)


def _digest(layers: Sequence[NDArray[np.int32]]) -> bytes:
    """sha256 over the indices of all layers as little-endian int32."""
    return hashlib.sha256(b"".join(np.asarray(q, dtype="<i4").tobytes() for q in layers)).digest()


def _fp32_state_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers without the quantizers' own: 4 a float, a counter as it is."""
    return sum(
        tensor.numel() * (4 if tensor.is_floating_point() else tensor.element_size())
        for name, tensor in model.state_dict().items()
        if ".parametrizations." not in name or name.endswith(".original")
    )

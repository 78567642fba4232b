"""A trained network as one small file, and back: exact removal, indices on a grid, LZMA.

`pack` compacts the network and writes the indices of its quantized weights, compressed, and all else (stem, classifier,
BatchNorm, constants) in float32. `unpack` gives the compact network with, bit for bit, the weights that were evaluated.
The file is a container (src/storage/container.py): reading it runs no code from it. Its tensors are

    stream  the indices, layer after layer, as int8 (little-endian int16 above 8 bits), compressed with LZMA
    grid    step and shift of every quantized layer
    rest    the bytes of everything else, in the order of the network's state

Worked case: 1,000 weights of 4 bits, of which 900 are 0 and 100 are spread evenly over the 14 other values. As float32
they take 4,000 bytes, as the bit widths say 500, by their entropy 0.9 * 0.152 + 0.1 * (3.322 + 3.807) = 0.850 bits each
or 106 bytes.
Axis letters: O output channels, I input channels, k kernel.
"""

from __future__ import annotations

import io
import lzma
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from src.export.integer_weights import IndexedNetwork, IndexedWeight, compact_with_indices, fp32_state_bytes
from src.pruning import CompactNetwork, InputSize, own_calls
from src.storage import (
    DamagedFileError,
    StorageError,
    check_output,
    container_bytes,
    read_container,
    save_arrays,
    write_output,
)

KIND = "packed"
VERSION = 2  # of what is in the container; the first one came without a number
# dict_size: 1 MiB instead of 64 takes less memory. pb, lc: every byte is an index by itself, and best told from as many
# bits of the one before as LZMA2 allows.
LZMA: list[dict[str, Any]] = [
    {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 2**20, "pb": 0, "lc": 4}
]


@dataclass(frozen=True)
class PackReport:
    """What a network takes, in bytes, from FP32 to the file.

    written: False where the file held the same already, and was left as it is.
    fp32_state_bytes: all parameters and buffers of the dense network without its quantizers: weights, biases,
        BatchNorm's scales, shifts and statistics in float32, BatchNorm's counters in int64.
    compact_state_bytes: the same for the compacted network.
    weights: quantized weights that are left after exact removal. Of their indices:
        bit_width_bytes: weights x bit width; entropy_bytes: their order-0 entropy, layer by layer;
        stream_bytes: in the file, compressed with LZMA.
    float32_bytes: all else that the file holds of the network. file_bytes: the file.
    """

    path: str
    written: bool
    fp32_state_bytes: int
    compact_state_bytes: int
    weights: int
    bit_width_bytes: float
    entropy_bytes: float
    stream_bytes: int
    float32_bytes: int
    file_bytes: int

    @property
    def ratio(self) -> float:
        """FP32 state of the dense network / file, in bytes."""
        return self.fp32_state_bytes / self.file_bytes

    def text(self) -> str:
        """The table: one size a line, and its share of the dense network's FP32 state."""
        other = self.file_bytes - self.stream_bytes - self.float32_bytes
        rows = [
            ("FP32 state of the dense network", self.fp32_state_bytes),
            ("FP32 state of the compacted network", self.compact_state_bytes),
            (f"its {self.weights:,} quantized weights: as the bit widths say", self.bit_width_bytes),
            ("    order-0 entropy of the indices", self.entropy_bytes),
            ("    in the file, compressed with LZMA", self.stream_bytes),
            ("all else in float32, in the file", self.float32_bytes),
            ("description, steps, checksum, frame, in the file", other),
            ("the file", self.file_bytes),
        ]
        lines = [f"{'packed file':<58} {'bytes':>11} {'share':>8}", "-" * 79]
        lines += [f"{name:<58} {size:>11,.0f} {100 * size / self.fp32_state_bytes:>6.2f} %" for name, size in rows]
        lines.append(f"{self.ratio:.2f} times smaller than the FP32 state: {self.path}")
        if not self.weights:
            lines.append("The network has no quantized layer: all of its weights are stored in float32.")
        return "\n".join(lines)


def pack(
    model: nn.Module | IndexedNetwork,
    path: str | Path,
    *,
    input_size: InputSize = (3, 32, 32),
    force: bool = False,
) -> PackReport:
    """Compact `model`, write it to `path`, and say what it takes. The model is left as it is, on its device.

    model: in eval mode, float32, its quantizers attached and switched on. Without quantizers all is stored in float32,
    and the report says so. input_size: (C, H, W) of one image. force: write over a file with other content.
    Raises StorageError for the path, CompactionError or IndexingError for the model (see `compact_with_indices`);
    nothing is written then.
    """
    check_output(path)
    compacted = compact_with_indices(model, input_size)
    state = compacted.network.state_dict()
    layers = [
        {"name": name, "bits": part.bits, "columns": part.indices.shape[1]} for name, part in compacted.weights.items()
    ]
    parts = compacted.weights.values()
    raw = b"".join(part.indices.numpy().astype(_type(part.bits)).tobytes() for part in parts)
    stream = lzma.compress(raw, lzma.FORMAT_RAW, filters=LZMA)
    rest = b"".join(part.numpy().tobytes() for part in _rest(state, layers).values())
    grid = [[part.step.item(), part.shift.item()] for part in parts]
    tensors = {
        "stream": np.frombuffer(stream, dtype=np.uint8),
        "grid": np.array(grid, dtype="<f4").ravel(),
        "rest": np.frombuffer(rest, dtype=np.uint8),
    }
    description = {"version": VERSION, "network": compacted.network.description, "quantized": layers}
    data = container_bytes(KIND, description, save_arrays(tensors))
    written = write_output(path, data, force)
    return PackReport(
        path=str(path),
        written=written,
        fp32_state_bytes=compacted.dense_bytes,
        compact_state_bytes=fp32_state_bytes(compacted.network),
        weights=sum(part.indices.numel() for part in parts),
        bit_width_bytes=sum(part.bits * part.indices.numel() for part in parts) / 8,
        entropy_bytes=sum(entropy_bits(part.indices.numpy()) for part in parts) / 8,
        stream_bytes=len(stream),
        float32_bytes=len(rest),
        file_bytes=len(data),
    )


def entropy_bits(q: NDArray[np.integer]) -> float:
    """Order-0 entropy of n whole numbers, in bits altogether: -sum over values of count log2(count / n)."""
    counts = np.unique(q, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


@torch.no_grad()
def unpack(path: str | Path, like: nn.Module | None = None) -> CompactNetwork:
    """The network in a file that `pack` wrote, on the CPU, in eval mode, ready to run.

    like: a network of the class that was packed, for one with operations that src/pruning/operations.py does not know:
    a file holds no code. Raises CompactionError where it is needed and not given, or of another class.
    Raises StorageError for a file that is damaged, of another version or not a packed network, and where the file
    cannot be read.
    """
    try:
        described, tensors = read_container(path, KIND)
        if (version := described.get("version", 1)) != VERSION:
            raise StorageError(f"{str(path)!r} is a packed file of version {version}, need version {VERSION}")
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(f"{str(path)!r} cannot be read ({reason}); name a file that pack() wrote") from error
    except StorageError as error:
        copy_it = "copy the file again, or " if isinstance(error, DamagedFileError) else ""
        raise StorageError(f"{error}; {copy_it}pack the network again") from error
    description = described["network"]
    further = [step["shape"][1:] for step in description["steps"] if step["op"] == "input"]
    sizes = [description["input_size"], *further]
    network = CompactNetwork(description, own_calls(like, sizes) if like is not None else None)
    state = network.state_dict()  # on the "meta" device: shapes, and no numbers yet
    layers = described["quantized"]
    shapes = [state[f"{layer['name']}.weight"][:, : layer["columns"]].shape for layer in layers]
    types = [_type(layer["bits"]) for layer in layers]
    sizes = [shape.numel() * kind.itemsize for kind, shape in zip(types, shapes, strict=True)]
    raw = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=LZMA).decompress(tensors["stream"].tobytes(), sum(sizes))
    left = _rest(state, layers)
    stored = torch.from_numpy(tensors["rest"].copy()).split([part.nbytes for part in left.values()])
    for (name, part), values in zip(left.items(), stored, strict=True):
        state[name] = values.clone().view(part.dtype).reshape(part.shape)
    grid = torch.from_numpy(tensors["grid"].reshape(-1, 2).copy())
    indices = io.BytesIO(raw)
    for layer, kind, size, shape, (step, shift) in zip(layers, types, sizes, shapes, grid, strict=True):
        weight = f"{layer['name']}.weight"
        q = np.frombuffer(indices.read(size), kind).astype(np.int32).reshape(shape)
        indexed = IndexedWeight(layer["bits"], step, shift, torch.from_numpy(q))
        state[weight] = torch.cat([indexed.values(), state[weight]], dim=1)
    network.load_state_dict(state)
    return network.eval()


def _rest(state: Mapping[str, Tensor], layers: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """What the indices leave out, in the state's order: whole tensors, and columns behind the quantized ones."""
    columns = {f"{layer['name']}.weight": layer["columns"] for layer in layers}
    return {name: tensor[:, columns[name] :] if name in columns else tensor for name, tensor in state.items()}


def _type(bits: int) -> np.dtype[Any]:
    """How an index of so many bits is stored."""
    return np.dtype("<i1" if bits <= 8 else "<i2")

"""What a packed network takes, from FP32 to the file, in bytes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


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
        return sum(layer.weights * layer.bits for layer in self.layers) / 8

    @property
    def entropy_bytes(self) -> float:
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


def fp32_state_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers without the quantizers' own: 4 a float, a counter as it is."""
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if ".parametrizations." not in name or name.endswith(".original")
    }
    return sum(
        tensor.numel() * (4 if tensor.is_floating_point() else tensor.element_size()) for tensor in state.values()
    )

"""The compacted network in 8-bit integer arithmetic: an ONNX file made by ONNX Runtime's own quantization tool.

BatchNorm is folded into the convolutions; then QuantizeLinear and DequantizeLinear stand around every convolution and
what joins them, which ONNX Runtime replaces by integer kernels. Weights are int8 with a step for every output channel,
activations uint8 between the smallest and the largest value that training images gave (uint8, because int8 activations
took twice the time). The classifier stays in float32: it is small, and 8-bit logits would be cut off at the largest
one that calibration saw.

A dead-zone level s q + delta sign(q) is not in general a multiple of the step max |w| / 127 of its row, so the weights
are rounded once more. Folding BatchNorm scales whole rows and changes nothing of that.
Axis letters: N batch, C channels, H W space, O output channels.
"""

from __future__ import annotations

import copy
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

from src.export.integer_weights import IndexedNetwork
from src.export.onnx_file import export_onnx, logits_of, open_session, run_onnx
from src.export.onnx_graph import INPUT, OnnxError
from src.pruning import CompactNetwork
from src.storage import check_output, write_output

CALIBRATION_BATCH = 64
MOST_LOST = 0.005  # of the accuracy
# Multiply 8-bit integers and add the products in 32 bits: VNNI and AMX on x86, dot products on ARM.
INSTRUCTIONS = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"}


@dataclass(frozen=True)
class Int8Report:
    """What was written, and how it compares with the float32 network on the test images.

    written: False where the file held the same already, and was left as it is.
    right: right answers in "float32", with the "weights" alone rounded to 8 bits, and in "int8".
    largest_change, rms_change: of a convolution's weight by the rounding, over its layer's largest |weight|.
    """

    path: str
    written: bool
    file_bytes: int
    images: int
    right: Mapping[str, int]
    differing: int
    largest_difference: float
    largest_change: float
    rms_change: float

    @property
    def passed(self) -> bool:
        """At most half a point of accuracy is lost."""
        return self.right["float32"] - self.right["int8"] <= MOST_LOST * self.images

    def text(self) -> str:
        """What rounding the weights costs, the accuracy of each step, and what differs from the float32 network."""
        shares = {name: f"{right:,} ({right / self.images:.2%})" for name, right in self.right.items()}
        return (
            f"int8 ONNX file: {self.file_bytes:,} bytes: {self.path}\n"
            f"weights rounded to 8 bits by at most {self.largest_change:.2%} of their layer's largest, RMS "
            f"{self.rms_change:.2%}\n"
            f"right of {self.images:,} test images: float32 {shares['float32']}, int8 weights alone "
            f"{shares['weights']}, int8 {shares['int8']}\n"
            f"int8 against float32: {self.differing} predictions differ, largest logit difference "
            f"{self.largest_difference:.1e}"
        )


def export_int8(
    compacted: IndexedNetwork,
    path: str | Path,
    calibration: Tensor,
    images: Tensor,
    labels: Tensor,
    *,
    force: bool = False,
) -> Int8Report:
    """Quantize the compacted network, compare it with itself in float32 on the test images, and write it to `path`.

    calibration: training images; images, labels: the test set; all images (N, C, H, W), as the
    network reads them. force: write over a file with other content.
    Raises StorageError for the path, OnnxError where ONNX Runtime cannot quantize the network; nothing is written then.
    """
    check_output(path)
    data = quantized_onnx(compacted, calibration)
    rounded, largest_change, rms_change = round_weights(compacted.network)
    logits = {
        "float32": logits_of(compacted.network, images),
        "weights": logits_of(rounded, images),
        "int8": run_onnx(open_session(data), images),
    }
    return Int8Report(
        path=str(path),
        file_bytes=len(data),
        images=len(images),
        right={name: int((found.argmax(1) == labels).sum()) for name, found in logits.items()},
        differing=int((logits["int8"].argmax(1) != logits["float32"].argmax(1)).sum()),
        largest_difference=(logits["int8"] - logits["float32"]).abs().max().item(),
        largest_change=largest_change,
        rms_change=rms_change,
        written=write_output(path, data, force),  # last: what cannot be measured is not written
    )


def quantized_onnx(compacted: IndexedNetwork, calibration: Tensor) -> bytes:
    """The bytes of the ONNX file. calibration: images (N, C, H, W). Raises OnnxError."""
    with tempfile.TemporaryDirectory() as folder:
        plain, folded, target = (str(Path(folder) / f"{name}.onnx") for name in ("plain", "folded", "int8"))
        export_onnx(compacted, plain, integer_weights=False)
        try:
            quant_pre_process(plain, folded, skip_symbolic_shape=True)
            classifier = [node.name for node in onnx.load(folded).graph.node if node.op_type == "Gemm"]
            quantize_static(
                folded,
                target,
                _Images(calibration),
                per_channel=True,
                reduce_range=reduced_range(),
                activation_type=QuantType.QUInt8,
                nodes_to_exclude=classifier,
            )
        except Exception as error:  # the tool's errors share no class of their own
            raise OnnxError(f"ONNX Runtime cannot quantize this network ({error}); export it without int8") from error
        return Path(target).read_bytes()


@torch.no_grad()
def round_weights(network: CompactNetwork) -> tuple[CompactNetwork, float, float]:
    """The network with the weights of its convolutions as int8 holds them, and the largest and the RMS change.

    Changes are shares of the layer's largest |weight|.
    """
    rounded, changes = copy.deepcopy(network), []
    for layer in rounded.modules():
        if isinstance(layer, nn.Conv2d):
            rows = layer.weight.flatten(1)  # (O, ...)
            step = rows.abs().amax(1, keepdim=True).clamp(min=1e-30) / (64 if reduced_range() else 127)
            on_grid = step * (rows / step).round()
            changes.append(((on_grid - rows) / rows.abs().max()).flatten())
            layer.weight.copy_(on_grid.view_as(layer.weight))
    change = torch.cat(changes)
    return rounded, change.abs().max().item(), change.square().mean().sqrt().item()


def int8_instructions() -> list[str]:
    """Those of INSTRUCTIONS that this CPU has, as far as the system says so (Linux does)."""
    path = Path("/proc/cpuinfo")
    return sorted(INSTRUCTIONS.intersection(path.read_text().split())) if path.exists() else []


def reduced_range() -> bool:
    """Whether weights get 7 bits instead of 8: on x86 without VNNI, sums of two products overflow 16 bits."""
    return platform.machine().lower() in ("x86_64", "amd64") and not int8_instructions()


class _Images(CalibrationDataReader):
    """The images a batch at a time, as the tool asks for them."""

    def __init__(self, images: Tensor) -> None:
        self.batches = iter(images.contiguous().split(CALIBRATION_BATCH))

    def get_next(self) -> dict[str, Any] | None:
        """The next batch, or None behind the last."""
        batch = next(self.batches, None)
        return None if batch is None else {INPUT: batch.numpy()}

"""A trained network as an ONNX file after exact removal, and the proof that ONNX Runtime computes the same.

`export_onnx` writes quantized weights as int4, int8 or int16 with DequantizeLinear (src/export/onnx_graph.py), or
everything in float32 for a comparison. `check_onnx` runs the file on images and compares the logits with the network's.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from src.export.integer_weights import compact_with_indices
from src.export.onnx_graph import INPUT, OPSET, OUTPUT, build_graph, integer_type
from src.storage import check_output, write_output

TOLERANCE = 1e-3  # of a logit
BATCH_SIZE = 256


class OnnxError(ValueError):
    """An ONNX file that ONNX Runtime cannot read, or images it cannot be checked on."""


@dataclass(frozen=True)
class OnnxReport:
    """What was written. weight_types: int4, int8, int16 or float32 for every convolution and linear layer, by name.

    weight_bytes: what these weights take in the file. file_bytes: the file.
    """

    path: str
    file_bytes: int
    weight_bytes: int
    weight_types: dict[str, str]

    def text(self) -> str:
        counts = Counter(self.weight_types.values())
        types = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        return (
            f"ONNX file: {self.file_bytes:,} bytes, of which weights {self.weight_bytes:,}; opset {OPSET}; "
            f"layers by the type of their weights: {types}: {self.path}"
        )


@dataclass(frozen=True)
class OnnxCheck:
    """ONNX Runtime against PyTorch, both on the CPU: images, differing predictions, largest |logit difference|."""

    images: int
    differing: int
    largest_difference: float

    @property
    def passed(self) -> bool:
        """The same prediction for every image, and logits within 1e-3. False for logits that are not numbers."""
        return self.differing == 0 and self.largest_difference < TOLERANCE

    def text(self) -> str:
        return (
            f"ONNX Runtime against PyTorch on {self.images:,} images: {self.differing} predictions differ, largest "
            f"logit difference {self.largest_difference:.1e} (allowed: 0, and below {TOLERANCE:g})"
        )


@torch.no_grad()
def export_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    input_size: tuple[int, int, int] = (3, 32, 32),
    integer_weights: bool = True,
    force: bool = False,
) -> OnnxReport:
    """Compact `model` and write it to `path` as ONNX: input "images" (N, *input_size), output "logits", any N.

    model: as for `src.export.pack`, or a CompactNetwork, whose weights are all float32. integer_weights: store the
    quantized layers as whole numbers; False stores every weight in float32. force: write over an existing file.
    Raises StorageError for the path, CompactionError or IndexingError for the model; nothing is written then.
    """
    check_output(path, force)
    network, indexed = compact_with_indices(model, input_size)
    if not integer_weights:
        indexed = {}
    graph = build_graph(network, indexed)
    onnx.checker.check_model(graph, full_check=True)
    layers = [step["name"] for step in network.description["steps"] if step["op"] in ("conv", "linear")]
    types = {name: integer_type(indexed[name]) if name in indexed else "float32" for name in layers}
    owned = tuple(f"{name}.{part}" for name in layers for part in ("weight", "indices", "step", "shift", "constants"))
    data = graph.SerializeToString()
    write_output(path, data, force)
    stored = {tensor.name: len(tensor.raw_data) for tensor in graph.graph.initializer}
    return OnnxReport(str(path), len(data), sum(stored.get(name, 0) for name in owned), types)


def open_session(path: str | Path, threads: int | None = None) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU; threads: as many as PyTorch uses where None. Raises OnnxError."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads() if threads is None else threads
    options.inter_op_num_threads = 1
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library's errors share no class of their own
        raise OnnxError(f"ONNX Runtime cannot read {str(path)!r} ({error}); export it again") from error


def run_onnx(session: onnxruntime.InferenceSession, images: Tensor, batch_size: int = BATCH_SIZE) -> Tensor:
    """Logits of all images, (N, classes), a batch at a time."""
    parts = []
    for batch in images.detach().cpu().float().split(batch_size):
        parts.append(session.run([OUTPUT], {INPUT: np.ascontiguousarray(batch.numpy())})[0])
    return torch.from_numpy(np.concatenate(parts))


@torch.no_grad()
def check_onnx(path: str | Path, network: nn.Module, images: Tensor, batch_size: int = BATCH_SIZE) -> OnnxCheck:
    """Run the file in ONNX Runtime and `network` in PyTorch on `images` (N, C, H, W), as the network reads them.

    Raises OnnxError where the file cannot be read, there is no image, or the network is in training mode.
    """
    if len(images) == 0 or any(module.training for module in network.modules()):
        raise OnnxError(f"got {len(images)} images, need at least one, and a network in eval mode; call .eval() first")
    device = next((tensor.device for tensor in network.parameters()), images.device)
    found = run_onnx(open_session(path), images, batch_size)
    batches = images.split(batch_size)
    expected = torch.cat([network(batch.to(device)).float().cpu() for batch in batches])
    differing = int((found.argmax(1) != expected.argmax(1)).sum())
    return OnnxCheck(len(images), differing, (found - expected).abs().max().item())

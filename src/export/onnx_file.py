"""A trained network as an ONNX file after exact removal, and the proof that ONNX Runtime computes the same.

The operations of a compact network are written by src/export/onnx_writers.py, quantized weights as whole numbers by
src/export/onnx_graph.py.
Axis letters: N batch, C channels, H W space.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from src.export.integer_weights import IndexedNetwork, compact_with_indices
from src.export.onnx_graph import INPUT, OnnxError, OnnxGraph
from src.export.onnx_writers import OPERATION_WRITERS
from src.pruning import OPERATIONS, InputSize
from src.storage import check_output, write_output

OPSET = 21  # the first in which DequantizeLinear reads int4 and int16
IR_VERSION = 10  # the file format that goes with it; readers refuse newer ones than they know
OUTPUT, BATCH = "logits", "batch"
TOLERANCE = 1e-3  # of a logit
BATCH_SIZE = 256


@dataclass(frozen=True)
class OnnxReport:
    """What was written. weight_types: int4, int8, int16 or float32 for every convolution and linear layer, by name.

    weight_bytes: what these weights take in the file. file_bytes: the file. written: False where it held the same
    already, and was left as it is.
    """

    path: str
    written: bool
    file_bytes: int
    weight_bytes: int
    weight_types: dict[str, str]

    def text(self) -> str:
        """One line: bytes, opset, and how many layers have weights of which type."""
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
        """One line: what was compared, what differs, and what is allowed."""
        return (
            f"ONNX Runtime against PyTorch on {self.images:,} images: {self.differing} predictions differ, largest "
            f"logit difference {self.largest_difference:.1e} (allowed: 0, and below {TOLERANCE:g})"
        )


def export_onnx(
    model: nn.Module | IndexedNetwork,
    path: str | Path,
    *,
    input_size: InputSize = (3, 32, 32),
    integer_weights: bool = True,
    force: bool = False,
) -> OnnxReport:
    """Compact `model` and write it to `path` as ONNX: input "images" (N, *input_size), output "logits", any N.

    model: as for `pack`, or a CompactNetwork, whose weights are all float32. integer_weights: store the quantized
    layers as whole numbers; False stores every weight in float32. force: write over a file with other content.
    Raises StorageError for the path, CompactionError or IndexingError for the model; nothing is written then.
    """
    check_output(path)
    compacted = compact_with_indices(model, input_size)
    graph = OnnxGraph(compacted, integer_weights)
    data = _model(graph).SerializeToString()
    written = write_output(path, data, force)
    return OnnxReport(str(path), written, len(data), graph.weight_bytes, graph.weight_types)


def open_session(model: str | Path | bytes) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU with as many threads as PyTorch uses. model: a file, or its bytes.

    Raises OnnxError.
    """
    source = model if isinstance(model, bytes) else str(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library's errors share no class of their own
        raise OnnxError(f"ONNX Runtime cannot read {source!r:.100} ({error}); export it again") from error


def run_onnx(session: onnxruntime.InferenceSession, images: Tensor, batch_size: int = BATCH_SIZE) -> Tensor:
    """Logits of all images, (N, classes), a batch at a time."""
    batches = images.detach().cpu().float().contiguous().split(batch_size)
    return torch.from_numpy(np.concatenate([session.run([OUTPUT], {INPUT: batch.numpy()})[0] for batch in batches]))


def check_onnx(path: str | Path, network: nn.Module, images: Tensor) -> OnnxCheck:
    """Run the file in ONNX Runtime and `network` in PyTorch on `images` (N, C, H, W), as the network reads them.

    network: in eval mode. Raises OnnxError where the file cannot be read.
    """
    found = run_onnx(open_session(path), images)
    expected = logits_of(network, images)
    differing = int((found.argmax(1) != expected.argmax(1)).sum())
    return OnnxCheck(len(images), differing, (found - expected).abs().max().item())


@torch.no_grad()
def logits_of(network: nn.Module, images: Tensor) -> Tensor:
    """Logits of all images in PyTorch, (N, classes), a batch at a time. network: in eval mode."""
    return torch.cat([network(batch) for batch in images.split(BATCH_SIZE)])


def _model(graph: OnnxGraph) -> onnx.ModelProto:
    """The network as an ONNX model with a dynamic batch axis: images (N, C, H, W) float32 -> logits (N, ...)."""
    names = [INPUT, *(f"value_{number}" for number in range(1, len(graph.shapes)))]
    names[graph.description["output"]] = OUTPUT
    for name, shape, operation in zip(names[1:], graph.shapes[1:], graph.description["steps"], strict=True):
        inputs = [names[value] for value in operation["inputs"]]
        if operation["op"] not in OPERATION_WRITERS:
            what = "several inputs or outputs, which this export does not write"
            if operation["op"] == "own":
                what = f"an operation that ONNX export does not know ({operation['name']!r})"
            raise OnnxError(
                f"the network has {what}: write the compacted network with torch.onnx.export(compact(model, "
                "input_size), ...)"
            )
        said = {**OPERATIONS[operation["op"]].usual, **operation, "shape": shape}
        kind, inputs, attributes = OPERATION_WRITERS[operation["op"]](graph, said, inputs, name)
        graph.node(kind, inputs, name, **attributes)
    images, logits = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [BATCH, *graph.shapes[value]])
        for name, value in ((INPUT, 0), (OUTPUT, graph.description["output"]))
    )
    made = helper.make_graph(graph.nodes, "compact_network", [images], [logits], list(graph.stored.values()))
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(made, opset_imports=opsets, ir_version=IR_VERSION, producer_name="codeq-walkthrough")
    onnx.checker.check_model(model, full_check=True)
    return model

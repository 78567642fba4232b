"""A trained network as an ONNX file after exact removal, and the proof that ONNX Runtime computes the same.

Every operation of a compact network has an ONNX writer in OPERATION_WRITERS, by its name in src/pruning/operations.py.
A quantized weight is stored as the whole numbers q (int4 where all lie in -8..7, else int8, above 8 bits int16) and
becomes s q + delta sign(q) inside the graph:

    q --DequantizeLinear(scale s)--> s q --Sign--> sign(q) --Mul delta--> + <-- s q

which is what src/quantizer.py computes, operation by operation, so that the weights agree to the last bit. Sign is
taken of s q, because s > 0 and Sign of 4-bit numbers is not in ONNX. Columns that lie on no grid follow by Concat.
Axis letters: N batch, C channels, H W space.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from src.export.integer_weights import IndexedNetwork, compact_with_indices
from src.pruning import Operation
from src.storage import check_output, write_output

OPSET = 21  # the first in which DequantizeLinear reads int4 and int16
IR_VERSION = 10  # the file format that goes with it; readers refuse newer ones than they know
INPUT, OUTPUT, BATCH = "images", "logits", "batch"
END = 2**63 - 1  # "to the end" in Slice
INTEGER_TYPES = {"int4": TensorProto.INT4, "int8": TensorProto.INT8, "int16": TensorProto.INT16}
TOLERANCE = 1e-3  # of a logit
BATCH_SIZE = 256


class OnnxError(ValueError):
    """An ONNX file that ONNX Runtime cannot read, or a network that it cannot quantize."""


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
    input_size: tuple[int, int, int] = (3, 32, 32),
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
    graph = _Graph(compacted, integer_weights)
    data = graph.model().SerializeToString()
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


def integer_type(indices: Tensor) -> str:
    """The narrowest of INTEGER_TYPES that holds the indices."""
    least, most = int(indices.min()), int(indices.max())
    if least >= -8 and most <= 7:
        return "int4"
    return "int8" if least >= -128 and most <= 127 else "int16"


class _Graph:
    """Nodes and stored tensors, in the order of the operations. Value i of the description is called `value_i`."""

    def __init__(self, compacted: IndexedNetwork, integer_weights: bool) -> None:
        self.description, self.state = compacted.network.description, compacted.network.state_dict()
        self.indexed = compacted.weights if integer_weights else {}
        self.shapes = compacted.network.shapes
        self.nodes: list[onnx.NodeProto] = []
        self.stored: dict[str, onnx.TensorProto] = {}
        self.weight_types: dict[str, str] = {}
        self.weight_bytes = 0

    def model(self) -> onnx.ModelProto:
        """The network as an ONNX model with a dynamic batch axis: images (N, C, H, W) float32 -> logits (N, ...)."""
        names = [INPUT, *(f"value_{number}" for number in range(1, len(self.shapes)))]
        names[self.description["output"]] = OUTPUT
        for name, operation in zip(names[1:], self.description["steps"], strict=True):
            inputs = [names[value] for value in operation["inputs"]]
            kind, inputs, attributes = OPERATION_WRITERS[operation["op"]](self, operation, inputs, name)
            self.node(kind, inputs, name, **attributes)
        images, logits = (
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [BATCH, *self.shapes[value]])
            for name, value in ((INPUT, 0), (OUTPUT, self.description["output"]))
        )
        graph = helper.make_graph(self.nodes, "compact_network", [images], [logits], list(self.stored.values()))
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="codeq-walkthrough")
        onnx.checker.check_model(model, full_check=True)
        return model

    def node(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=name, **attributes))
        return output

    def store(self, name: str, values: Tensor | NDArray[Any]) -> str:
        self.stored[name] = numpy_helper.from_array(np.ascontiguousarray(values).reshape(values.shape), name)
        return name

    def whole_numbers(self, name: str, values: Sequence[int]) -> str:
        return self.store(name, np.array(values, dtype=np.int64))

    def parameters(self, layer: str, *entries: str) -> list[str]:
        return [self.store(f"{layer}.{entry}", self.state[f"{layer}.{entry}"]) for entry in entries]

    def weight_and_bias(self, operation: Operation) -> list[str]:
        """Names of the layer's weight, dequantized inside the graph where it is stored as integers, and of its bias."""
        layer, before = operation["name"], set(self.stored)
        self.weight_types[layer] = integer_type(self.indexed[layer].indices) if layer in self.indexed else "float32"
        weight = [self.dequantized(layer)] if layer in self.indexed else self.parameters(layer, "weight")
        self.weight_bytes += sum(len(self.stored[name].raw_data) for name in self.stored.keys() - before)
        return [*weight, *(self.parameters(layer, "bias") if operation["bias"] else [])]

    def dequantized(self, layer: str) -> str:
        name, part = f"{layer}.weight", self.indexed[layer]
        integers = helper.tensor_dtype_to_np_dtype(INTEGER_TYPES[self.weight_types[layer]])
        indices = self.store(f"{layer}.indices", part.indices.numpy().astype(integers))  # two int4 a byte
        scale, shift = self.store(f"{layer}.step", part.step), self.store(f"{layer}.shift", part.shift)
        # without a zero point it is 0, and ONNX Runtime reads every integer type
        scaled = self.node("DequantizeLinear", [indices, scale], f"{layer}.scaled")
        sign = self.node("Sign", [scaled], f"{layer}.sign")
        outside = self.node("Mul", [sign, shift], f"{layer}.outside")
        tail = self.state[name][:, part.indices.shape[1] :]
        if not tail.numel():
            return self.node("Add", [scaled, outside], name)
        on_grid = self.node("Add", [scaled, outside], f"{layer}.on_grid")
        return self.node("Concat", [on_grid, self.store(f"{layer}.constants", tail)], name, axis=1)


Node = tuple[str, list[str], dict[str, Any]]  # kind, inputs, attributes


def _conv(graph: _Graph, operation: Operation, inputs: list[str], output: str) -> Node:
    padding, kernel, dilation = (operation[name] for name in ("padding", "kernel_size", "dilation"))
    pads = [*padding, *padding]
    if padding == "same":
        spare = [step * (side - 1) for step, side in zip(dilation, kernel, strict=True)]
        pads = [total // 2 for total in spare] + [total - total // 2 for total in spare]
    window = {"kernel_shape": kernel, "strides": operation["stride"], "dilations": dilation, "pads": pads}
    return "Conv", [*inputs, *graph.weight_and_bias(operation)], window


def _linear(graph: _Graph, operation: Operation, inputs: list[str], output: str) -> Node:
    return "Gemm", [*inputs, *graph.weight_and_bias(operation)], {"transB": 1}


def _batchnorm(graph: _Graph, operation: Operation, inputs: list[str], output: str) -> Node:
    name = operation["name"]
    statistics = graph.parameters(name, "running_mean", "running_var")
    if not operation["affine"]:
        ones = torch.ones_like(graph.state[f"{name}.running_mean"])
        graph.state |= {f"{name}.weight": ones, f"{name}.bias": 0 * ones}
    affine = graph.parameters(name, "weight", "bias")
    return "BatchNormalization", [*inputs, *affine, *statistics], {"epsilon": float(operation["eps"])}


def _shift(graph: _Graph, operation: Operation, inputs: list[str], output: str) -> Node:
    name = f"{operation['name']}.value"
    space = len(graph.shapes[operation["inputs"][0]]) - 1
    return "Add", [*inputs, graph.store(name, graph.state[name].view(-1, *[1] * space))], {}


def _pool(graph: _Graph, operation: Operation, inputs: list[str], output: str) -> Node:
    kind = "AveragePool" if operation["average"] else "MaxPool"
    if operation["kernel_size"] is None:
        return f"Global{kind}", inputs, {}
    return kind, inputs, {"kernel_shape": [operation["kernel_size"]] * 2, "strides": [operation["stride"]] * 2}


def _stride(graph: _Graph, operation: Operation, inputs: list[str], output: str) -> Node:
    roles = {"starts": [0, 0], "ends": [END, END], "axes": [2, 3], "steps": [operation["step"]] * 2}
    return "Slice", [*inputs, *(graph.whole_numbers(f"{output}.{role}", n) for role, n in roles.items())], {}


def _select(graph: _Graph, operation: Operation, inputs: list[str], output: str) -> Node:
    available, *space = graph.shapes[operation["inputs"][0]]
    if min(operation["channels"]) < 0:  # one channel of zeros behind the others, for those that are not there
        none = [0] * len(space)
        pads = graph.whole_numbers(f"{output}.pads", [0, 0, *none, 0, 1, *none])
        inputs = [graph.node("Pad", [*inputs, pads], f"{output}.padded")]
    chosen = [available if channel < 0 else channel for channel in operation["channels"]]
    return "Gather", [*inputs, graph.whole_numbers(f"{output}.channels", chosen)], {"axis": 1}


def _fill(graph: _Graph, operation: Operation, inputs: list[str], output: str) -> Node:
    """(N, *size) of one number, where N is the images'."""
    batch = graph.node("Shape", [INPUT], f"{output}.batch", start=0, end=1)
    size = graph.whole_numbers(f"{output}.size", operation["size"])
    shape = graph.node("Concat", [batch, size], f"{output}.shape", axis=0)
    return "Expand", [graph.store(f"{output}.number", np.array([operation["value"]], dtype=np.float32)), shape], {}


OPERATION_WRITERS: dict[str, Callable[[_Graph, Operation, list[str], str], Node]] = {
    "conv": _conv,
    "linear": _linear,
    "batchnorm": _batchnorm,
    "shift": _shift,
    "pool": _pool,
    "stride": _stride,
    "select": _select,
    "fill": _fill,
    "relu": lambda graph, operation, inputs, output: ("Relu", inputs, {}),
    "add": lambda graph, operation, inputs, output: ("Add", inputs, {}),
    "flatten": lambda graph, operation, inputs, output: ("Flatten", inputs, {"axis": 1}),
    "join": lambda graph, operation, inputs, output: ("Concat", inputs, {"axis": 1}),
}

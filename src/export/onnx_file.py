"""A trained network as an ONNX file after exact removal, and the proof that ONNX Runtime computes the same.

The operations of a compact network have ONNX writers in OPERATION_WRITERS, by their name in src/pruning/operations.py.
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
from src.pruning import InputSize, Operation
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


Node = tuple[str, list[str], dict[str, Any]]  # kind, inputs, attributes
Writer = Callable[["_Graph", Operation, list[str], str], Node]


class _Graph:
    """Nodes and stored tensors, in the order of the operations. Value i of the description is called `value_i`."""

    def __init__(self, compacted: IndexedNetwork, integer_weights: bool) -> None:
        self.description, self.state = compacted.network.description, compacted.network.state_dict()
        self.indexed = compacted.weights if integer_weights else {}
        self.shapes: list[Any] = compacted.network.shapes  # of tensors all, where every operation is known
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
            if operation["op"] not in OPERATION_WRITERS:
                raise OnnxError(
                    f"the network has an operation that ONNX export does not know ({operation.get('name')!r}): write "
                    "the compacted network with torch.onnx.export(compact(model, input_size), ...)"
                )
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

    def number(self, name: str, value: float) -> str:
        return self.store(name, np.array(value, dtype=np.float32))

    def shape_of(self, operation: Operation) -> tuple[int, ...]:
        """The shape of what an operation gives for one image."""
        number = next(n for n, step in enumerate(self.description["steps"], start=1) if step is operation)
        return tuple(self.shapes[number])

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


def _conv(graph: _Graph, operation: Operation, inputs: list[str], output: str) -> Node:
    padding, kernel, dilation = (operation[name] for name in ("padding", "kernel_size", "dilation"))
    pads = [*padding, *padding]
    if padding == "same":
        spare = [step * (side - 1) for step, side in zip(dilation, kernel, strict=True)]
        pads = [total // 2 for total in spare] + [total - total // 2 for total in spare]
    if operation["padding_mode"] != "zeros":
        half = len(pads) // 2
        amounts = graph.whole_numbers(f"{output}.pads", [0, 0, *pads[:half], 0, 0, *pads[half:]])
        mode = PAD_MODES[operation["padding_mode"]]
        inputs, pads = [graph.node("Pad", [*inputs, amounts], f"{output}.padded", mode=mode)], [0] * len(pads)
    window = {"kernel_shape": kernel, "strides": operation["stride"], "dilations": dilation, "pads": pads}
    return "Conv", [*inputs, *graph.weight_and_bias(operation)], window | {"group": operation["groups"]}


def _conv_transpose(graph: _Graph, operation: Operation, inputs: list[str], output: str) -> Node:
    window = {
        "kernel_shape": operation["kernel_size"],
        "strides": operation["stride"],
        "dilations": operation["dilation"],
        "pads": [*operation["padding"], *operation["padding"]],
        "output_padding": operation["output_padding"],
    }
    return "ConvTranspose", [*inputs, *graph.weight_and_bias(operation)], window


def _linear(graph: _Graph, operation: Operation, inputs: list[str], output: str) -> Node:
    weight, *bias = graph.weight_and_bias(operation)
    if len(graph.shape_of(operation)) == 1:
        return "Gemm", [*inputs, weight, *bias], {"transB": 1}
    transposed = graph.node("Transpose", [weight], f"{output}.weight", perm=[1, 0])
    if not bias:
        return "MatMul", [*inputs, transposed], {}
    return "Add", [graph.node("MatMul", [*inputs, transposed], f"{output}.product"), *bias], {}


def _batchnorm(graph: _Graph, operation: Operation, inputs: list[str], output: str) -> Node:
    name = operation["name"]
    statistics = graph.parameters(name, "running_mean", "running_var")
    ones = torch.ones_like(graph.state[f"{name}.running_mean"])
    graph.state = {f"{name}.weight": ones, f"{name}.bias": 0 * ones} | graph.state
    affine = graph.parameters(name, "weight", "bias")
    return "BatchNormalization", [*inputs, *affine, *statistics], {"epsilon": float(operation["eps"])}


def _per_channel(kind: str, entry: str) -> Writer:
    """An operation with one number for each channel, of which the layer has one in all or one each."""

    def write(graph: _Graph, operation: Operation, inputs: list[str], output: str) -> Node:
        name = f"{operation['name']}.{entry}"
        behind = len(graph.shape_of(operation)) - operation.get("dim", 1)
        return kind, [*inputs, graph.store(name, graph.state[name].view(-1, *[1] * behind))], {}

    return write


def _window(graph: _Graph, operation: Operation) -> dict[str, Any]:
    padding = operation["padding"]
    window = {"kernel_shape": operation["kernel_size"], "strides": operation["stride"], "pads": [*padding, *padding]}
    return window | {"ceil_mode": int(operation["ceil_mode"])}


def _max_pool(graph: _Graph, operation: Operation, inputs: list[str], output: str) -> Node:
    return "MaxPool", inputs, _window(graph, operation) | {"dilations": operation["dilation"]}


def _avg_pool(graph: _Graph, operation: Operation, inputs: list[str], output: str) -> Node:
    if operation["divisor_override"]:
        raise OnnxError("ONNX has no average pooling with a divisor of its own; export without divisor_override")
    counted = {"count_include_pad": int(operation["count_include_pad"])}
    return "AveragePool", inputs, _window(graph, operation) | counted


def _adaptive(kind: str) -> Writer:
    def write(graph: _Graph, operation: Operation, inputs: list[str], output: str) -> Node:
        before, after = graph.shapes[operation["inputs"][0]][1:], graph.shape_of(operation)[1:]
        if all(side == 1 for side in after):
            return f"Global{kind}", inputs, {}
        if any(side % parts for side, parts in zip(before, after, strict=True)):
            raise OnnxError(
                f"ONNX has no adaptive pooling of {before} to {after}; choose an output size that divides it"
            )
        sides = [side // parts for side, parts in zip(before, after, strict=True)]
        return kind, inputs, {"kernel_shape": sides, "strides": sides}

    return write


def _mean(graph: _Graph, operation: Operation, inputs: list[str], output: str) -> Node:
    dims = graph.whole_numbers(f"{output}.dims", operation["dim"])
    return "ReduceMean", [*inputs, dims], {"keepdims": int(operation["keepdim"])}


def _affine(graph: _Graph, operation: Operation, inputs: list[str], output: str) -> Node:
    scaled = graph.node("Mul", [*inputs, graph.number(f"{output}.scale", operation["scale"])], f"{output}.scaled")
    return "Add", [scaled, graph.number(f"{output}.shift", operation["shift"])], {}


def _clip(lowest: str, highest: str) -> Writer:
    """Limits, of which None is none."""

    def write(graph: _Graph, operation: Operation, inputs: list[str], output: str) -> Node:
        limits = {"lowest": operation.get(lowest), "highest": operation.get(highest)}
        return (
            "Clip",
            [*inputs, *("" if n is None else graph.number(f"{output}.{k}", n) for k, n in limits.items())],
            {},
        )

    return write


def _silu(graph: _Graph, operation: Operation, inputs: list[str], output: str) -> Node:
    return "Mul", [*inputs, graph.node("Sigmoid", inputs, f"{output}.gate")], {}


def _softplus(graph: _Graph, operation: Operation, inputs: list[str], output: str) -> Node:
    beta = graph.number(f"{output}.beta", operation["beta"])
    scaled = graph.node("Mul", [*inputs, beta], f"{output}.scaled")
    return "Div", [graph.node("Softplus", [scaled], f"{output}.plus"), beta], {}


def _slice(graph: _Graph, operation: Operation, inputs: list[str], output: str) -> Node:
    starts, ends, steps = ([each[place] for each in operation["slices"]] for place in range(3))
    axes = list(range(2, 2 + len(starts)))
    ends = [END if end is None else end for end in ends]
    roles = {"starts": [start or 0 for start in starts], "ends": ends, "axes": axes, "steps": [n or 1 for n in steps]}
    return "Slice", [*inputs, *(graph.whole_numbers(f"{output}.{role}", n) for role, n in roles.items())], {}


def _select(graph: _Graph, operation: Operation, inputs: list[str], output: str) -> Node:
    size, dim = graph.shapes[operation["inputs"][0]], operation["dim"]
    available = size[dim - 1]
    if min(operation["channels"]) < 0:  # one channel of zeros behind the others, for those that are not there
        behind = [int(place == dim) for place in range(len(size) + 1)]
        pads = graph.whole_numbers(f"{output}.pads", [0] * len(behind) + behind)
        inputs = [graph.node("Pad", [*inputs, pads], f"{output}.padded")]
    chosen = [available if channel < 0 else channel for channel in operation["channels"]]
    return "Gather", [*inputs, graph.whole_numbers(f"{output}.channels", chosen)], {"axis": dim}


def _pad(graph: _Graph, operation: Operation, inputs: list[str], output: str) -> Node:
    pairs = list(zip(operation["pad"][::2], operation["pad"][1::2], strict=True))[::-1]
    pairs = [(0, 0)] * (len(graph.shape_of(operation)) + 1 - len(pairs)) + pairs
    amounts = graph.whole_numbers(f"{output}.pads", [before for before, _ in pairs] + [after for _, after in pairs])
    value = [graph.number(f"{output}.value", operation["value"])] if operation["mode"] == "constant" else []
    return "Pad", [*inputs, amounts, *value], {"mode": PAD_MODES[operation["mode"]]}


def _resize(graph: _Graph, operation: Operation, inputs: list[str], output: str) -> Node:
    mode = {"nearest": "nearest", "bilinear": "linear", "linear": "linear"}.get(operation["mode"])
    if mode is None:
        raise OnnxError(f"ONNX export does not resize by {operation['mode']!r}; use nearest or bilinear")
    before, after = graph.shapes[operation["inputs"][0]], graph.shape_of(operation)
    factors = [1.0, 1.0, *(b / a for a, b in zip(before[1:], after[1:], strict=True))]
    scales = graph.store(f"{output}.scales", np.array(factors, dtype=np.float32))
    aligned = "align_corners" if operation["align_corners"] else "half_pixel"
    how = {"mode": mode, "coordinate_transformation_mode": "asymmetric" if mode == "nearest" else aligned}
    return "Resize", [*inputs, "", scales], how | ({"nearest_mode": "floor"} if mode == "nearest" else {})


def _shaped(graph: _Graph, operation: Operation, inputs: list[str], output: str) -> Node:
    """(N, C, ...) in another shape behind the channels."""
    return "Reshape", [*inputs, graph.whole_numbers(f"{output}.shape", [0, *graph.shape_of(operation)])], {}


def _expand(graph: _Graph, operation: Operation, inputs: list[str], output: str) -> Node:
    return "Expand", [*inputs, graph.whole_numbers(f"{output}.shape", [1, *graph.shape_of(operation)])], {}


def _fill(graph: _Graph, operation: Operation, inputs: list[str], output: str) -> Node:
    """(N, *size) of one number, where N is the images'."""
    batch = graph.node("Shape", [INPUT], f"{output}.batch", start=0, end=1)
    size = graph.whole_numbers(f"{output}.size", operation["size"])
    shape = graph.node("Concat", [batch, size], f"{output}.shape", axis=0)
    return "Expand", [graph.store(f"{output}.number", np.array([operation["value"]], dtype=np.float32)), shape], {}


def _simple(kind: str, *fields: str, **fixed: Any) -> Writer:
    """An ONNX operation with attributes of the values that torch's fields have."""
    names = {"negative_slope": "alpha"}
    return lambda graph, operation, inputs, output: (
        kind,
        inputs,
        fixed | {names.get(field, field): operation[field] for field in fields},
    )


PAD_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
OPERATION_WRITERS: dict[str, Writer] = {
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "linear": _linear,
    "batchnorm": _batchnorm,
    "prelu": _per_channel("PRelu", "weight"),
    "scale": _per_channel("Mul", "value"),
    "shift": _per_channel("Add", "value"),
    "select": _select,
    "relu": _simple("Relu"),
    "relu6": lambda graph, operation, inputs, output: _clip("min", "max")(graph, {"min": 0, "max": 6}, inputs, output),
    "leaky_relu": _simple("LeakyRelu", "negative_slope"),
    "elu": _simple("Elu", "alpha"),
    "selu": _simple("Selu"),
    "celu": _simple("Celu", "alpha"),
    "gelu": _simple("Gelu", "approximate"),
    "silu": _silu,
    "mish": _simple("Mish"),
    "hardswish": _simple("HardSwish"),
    "hardsigmoid": _simple("HardSigmoid", alpha=1 / 6),
    "hardtanh": _clip("min_val", "max_val"),
    "sigmoid": _simple("Sigmoid"),
    "tanh": _simple("Tanh"),
    "softplus": _softplus,
    "softsign": _simple("Softsign"),
    "abs": _simple("Abs"),
    "neg": _simple("Neg"),
    "clamp": _clip("min", "max"),
    "contiguous": _simple("Identity"),
    "affine": _affine,
    "add": _simple("Add"),
    "sub": _simple("Sub"),
    "mul": _simple("Mul"),
    "join": lambda graph, operation, inputs, output: ("Concat", inputs, {"axis": operation["dim"]}),
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "adaptive_avg_pool": _adaptive("AveragePool"),
    "adaptive_max_pool": _adaptive("MaxPool"),
    "mean": _mean,
    "pad": _pad,
    "resize": _resize,
    "slice": _slice,
    "flatten": _simple("Flatten", axis=1),
    "reshape": _shaped,
    "expand": _expand,
    "permute": lambda graph, operation, inputs, output: ("Transpose", inputs, {"perm": operation["dims"]}),
    "fill": _fill,
}

"""The ONNX graph of a compact network, a node or a few for every step of its description.

A quantized weight is stored as the whole numbers q (int4 where all lie in -8..7, else int8, above 8 bits int16) and
becomes s q + delta sign(q) inside the graph:

    q --DequantizeLinear(scale s)--> s q --Sign--> sign(q) --Mul delta--> + <-- s q

which is what src/quantizer.py computes, operation by operation, so that the weights agree to the last bit. Sign is
taken of s q, because s > 0 and Sign of 4-bit numbers is not in ONNX. Columns that lie on no grid follow by Concat.
Axis letters: N batch, C channels, H W space.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from src.export.integer_weights import IndexedWeight
from src.pruning import CompactNetwork, Operation, Shape, value_shapes

OPSET = 21  # the first in which DequantizeLinear reads int4 and int16
IR_VERSION = 10  # the file format that goes with it; readers refuse newer ones than they know
INPUT, OUTPUT, BATCH = "images", "logits", "batch"
END = 2**63 - 1  # "to the end" in Slice

INTEGER_TYPES = {"int4": TensorProto.INT4, "int8": TensorProto.INT8, "int16": TensorProto.INT16}


def build_graph(network: CompactNetwork, indexed: Mapping[str, IndexedWeight]) -> onnx.ModelProto:
    """The network as an ONNX model with a dynamic batch axis: images (N, C, H, W) float32 -> logits (N, ...).

    indexed: weights to store as whole numbers, by layer; all others are float32.
    """
    return _Graph(network, indexed).model()


def integer_type(part: IndexedWeight) -> str:
    """The narrowest of INTEGER_TYPES that holds the indices."""
    least, most = int(part.indices.min()), int(part.indices.max())
    if least >= -8 and most <= 7:
        return "int4"
    return "int8" if least >= -128 and most <= 127 else "int16"


class _Graph:
    """Nodes and stored tensors, in the order of the steps. Value i of the description is called `value_i`."""

    def __init__(self, network: CompactNetwork, indexed: Mapping[str, IndexedWeight]) -> None:
        self.description, self.indexed = network.description, indexed
        self.state = network.state_dict()
        self.shapes = value_shapes(self.description)
        self.nodes: list[onnx.NodeProto] = []
        self.stored: dict[str, onnx.TensorProto] = {}

    def model(self) -> onnx.ModelProto:
        for number, step in enumerate(self.description["steps"], start=1):
            _WRITERS[step["op"]](self, step, [self._value(source) for source in step["inputs"]], self._value(number))
        axes: list[list[str | int]] = [[BATCH, *self.shapes[value]] for value in (0, self.description["output"])]
        graph = helper.make_graph(
            self.nodes,
            "compact_network",
            [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, axes[0])],
            [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, axes[1])],
            list(self.stored.values()),
        )
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="codeq-walkthrough")

    def _value(self, number: int) -> str:
        if number == 0:
            return INPUT
        return OUTPUT if number == self.description["output"] else f"value_{number}"

    def node(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(
            helper.make_node(kind, list(inputs), [output], name=f"{kind}_{len(self.nodes)}", **attributes)
        )
        return output

    def store(self, name: str, values: Tensor | NDArray[Any]) -> str:
        array = values.detach().numpy() if isinstance(values, Tensor) else values
        self.stored[name] = numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
        return name

    def weight(self, layer: str) -> str:
        """The name of the layer's float32 weight, dequantized inside the graph where it is stored as integers."""
        name, part = f"{layer}.weight", self.indexed.get(layer)
        weight = self.state[name]
        if part is None:
            return self.store(name, weight)
        kind, columns = integer_type(part), part.indices.shape[1]
        q = part.indices.numpy()
        stored = helper.make_tensor(f"{layer}.indices", INTEGER_TYPES[kind], q.shape, _packed(q, kind), raw=True)
        self.stored[stored.name] = stored
        scale, shift = self.store(f"{layer}.step", part.step), self.store(f"{layer}.shift", part.shift)
        # without a zero point it is 0, and ONNX Runtime reads every integer type
        scaled = self.node("DequantizeLinear", [stored.name, scale], f"{layer}.scaled")
        sign = self.node("Sign", [scaled], f"{layer}.sign")
        outside = self.node("Mul", [sign, shift], f"{layer}.outside")
        if columns == weight.shape[1]:
            return self.node("Add", [scaled, outside], name)
        on_grid = self.node("Add", [scaled, outside], f"{layer}.on_grid")
        tail = self.store(f"{layer}.constants", weight[:, columns:])
        return self.node("Concat", [on_grid, tail], name, axis=1)

    def parameters(self, layer: str, *entries: str) -> list[str]:
        return [self.store(f"{layer}.{entry}", self.state[f"{layer}.{entry}"]) for entry in entries]

    def whole_numbers(self, output: str, role: str, values: Sequence[int]) -> str:
        return self.store(f"{output}.{role}", np.array(values, dtype=np.int64))


def _packed(q: NDArray[np.int32], kind: str) -> bytes:
    """Little-endian bytes; two int4 a byte, the first in the lower half."""
    if kind != "int4":
        return q.astype("<i1" if kind == "int8" else "<i2").tobytes()
    nibbles = (q.ravel() & 15).astype(np.uint8)
    padded = np.concatenate([nibbles, np.zeros(len(nibbles) % 2, dtype=np.uint8)])
    return bytes(padded[::2] | padded[1::2] << 4)


def _conv(graph: _Graph, step: Operation, inputs: list[str], output: str) -> None:
    if step["padding"] == "same":
        spare = [dilation * (side - 1) for dilation, side in zip(step["dilation"], step["kernel"], strict=True)]
        before = [total // 2 for total in spare]
        pads = before + [total - first for total, first in zip(spare, before, strict=True)]
    else:
        pads = [*step["padding"], *step["padding"]]
    bias = graph.parameters(step["name"], "bias") if step["bias"] else []
    window = {"kernel_shape": step["kernel"], "strides": step["stride"], "dilations": step["dilation"], "pads": pads}
    graph.node("Conv", [*inputs, graph.weight(step["name"]), *bias], output, **window)


def _linear(graph: _Graph, step: Operation, inputs: list[str], output: str) -> None:
    bias = graph.parameters(step["name"], "bias") if step["bias"] else []
    graph.node("Gemm", [*inputs, graph.weight(step["name"]), *bias], output, transB=1)


def _batchnorm(graph: _Graph, step: Operation, inputs: list[str], output: str) -> None:
    name = step["name"]
    statistics = graph.parameters(name, "running_mean", "running_var")
    if step["affine"]:
        affine = graph.parameters(name, "weight", "bias")
    else:
        channels = graph.state[f"{name}.running_mean"].shape[0]
        affine = [
            graph.store(f"{name}.{entry}", np.full(channels, number, dtype=np.float32))
            for entry, number in (("weight", 1), ("bias", 0))
        ]
    graph.node("BatchNormalization", [*inputs, *affine, *statistics], output, epsilon=float(step["eps"]))


def _shift(graph: _Graph, step: Operation, inputs: list[str], output: str) -> None:
    name = f"{step['name']}.value"
    shape: Shape = graph.shapes[step["inputs"][0]]
    constants = graph.store(name, graph.state[name].view(-1, *[1] * (len(shape) - 1)))
    graph.node("Add", [*inputs, constants], output)


def _pool(graph: _Graph, step: Operation, inputs: list[str], output: str) -> None:
    kind = "Average" if step["average"] else "Max"
    if step["kernel"] is None:
        graph.node(f"Global{kind}Pool", inputs, output)
    else:
        graph.node(f"{kind}Pool", inputs, output, kernel_shape=[step["kernel"]] * 2, strides=[step["stride"]] * 2)


def _stride(graph: _Graph, step: Operation, inputs: list[str], output: str) -> None:
    roles = {"starts": [0, 0], "ends": [END, END], "axes": [2, 3], "steps": [step["step"]] * 2}
    graph.node("Slice", [*inputs, *(graph.whole_numbers(output, role, n) for role, n in roles.items())], output)


def _select(graph: _Graph, step: Operation, inputs: list[str], output: str) -> None:
    shape = graph.shapes[step["inputs"][0]]
    source, available = inputs[0], shape[0]
    if min(step["channels"]) < 0:  # one channel of zeros behind the others, for those that are not there
        none = [0] * len(shape)
        pads = graph.whole_numbers(output, "pads", [0, *none, 0, 1, *none[1:]])
        source = graph.node("Pad", [source, pads], f"{output}.padded")
    chosen = [available if channel < 0 else channel for channel in step["channels"]]
    graph.node("Gather", [source, graph.whole_numbers(output, "channels", chosen)], output, axis=1)


def _fill(graph: _Graph, step: Operation, inputs: list[str], output: str) -> None:
    """(N, *size) of one number, where N is the images'."""
    batch = graph.node("Shape", [INPUT], f"{output}.batch", start=0, end=1)
    size = graph.whole_numbers(output, "size", step["size"])
    shape = graph.node("Concat", [batch, size], f"{output}.shape", axis=0)
    number = graph.store(f"{output}.number", np.array([step["value"]], dtype=np.float32))
    graph.node("Expand", [number, shape], output)


def _plain(kind: str, **attributes: Any) -> Callable[[_Graph, Operation, list[str], str], None]:
    def write(graph: _Graph, step: Operation, inputs: list[str], output: str) -> None:
        graph.node(kind, inputs, output, **attributes)

    return write


_WRITERS: dict[str, Callable[[_Graph, Operation, list[str], str], None]] = {
    "conv": _conv,
    "linear": _linear,
    "batchnorm": _batchnorm,
    "shift": _shift,
    "pool": _pool,
    "stride": _stride,
    "select": _select,
    "fill": _fill,
    "relu": _plain("Relu"),
    "add": _plain("Add"),
    "flatten": _plain("Flatten", axis=1),
    "join": _plain("Concat", axis=1),
}

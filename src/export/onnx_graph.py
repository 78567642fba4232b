"""The nodes and stored tensors of an ONNX graph while it is written, and weights as whole numbers in it.

A quantized weight is stored as the whole numbers q (int4 where all lie in -8..7, else int8, above 8 bits int16) and
becomes s q + delta sign(q) inside the graph:

    q --DequantizeLinear(scale s)--> s q --Sign--> sign(q) --Mul delta--> + <-- s q

which is what src/quantizer.py computes, operation by operation, so that the weights agree to the last bit. Sign is
taken of s q, because s > 0 and Sign of 4-bit numbers is not in ONNX. Columns that lie on no grid follow by Concat.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from src.export.integer_weights import IndexedNetwork
from src.pruning import Operation

INPUT = "images"
INTEGER_TYPES = {"int4": TensorProto.INT4, "int8": TensorProto.INT8, "int16": TensorProto.INT16}


class OnnxError(ValueError):
    """An ONNX file that ONNX Runtime cannot read, or a network that it cannot quantize or ONNX cannot say."""


def integer_type(indices: Tensor) -> str:
    """The narrowest of INTEGER_TYPES that holds the indices."""
    least, most = int(indices.min()), int(indices.max())
    if least >= -8 and most <= 7:
        return "int4"
    return "int8" if least >= -128 and most <= 127 else "int16"


class OnnxGraph:
    """Nodes and stored tensors, in the order of the operations. Value i of the description is called `value_i`."""

    def __init__(self, compacted: IndexedNetwork, integer_weights: bool) -> None:
        self.description, self.state = compacted.network.description, compacted.network.state_dict()
        self.indexed = compacted.weights if integer_weights else {}
        self.shapes: list[Any] = compacted.network.shapes  # of tensors all, where every operation is known
        self.nodes: list[onnx.NodeProto] = []
        self.stored: dict[str, onnx.TensorProto] = {}
        self.weight_types: dict[str, str] = {}
        self.weight_bytes = 0

    def node(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Add a node, and return the name of its output."""
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=name, **attributes))
        return output

    def store(self, name: str, values: Tensor | NDArray[Any]) -> str:
        """Add a tensor, and return its name."""
        self.stored[name] = numpy_helper.from_array(np.ascontiguousarray(values).reshape(values.shape), name)
        return name

    def whole_numbers(self, name: str, values: Sequence[int]) -> str:
        """`store` for sizes and indices."""
        return self.store(name, np.array(values, dtype=np.int64))

    def number(self, name: str, value: float) -> str:
        """`store` for one number."""
        return self.store(name, np.array(value, dtype=np.float32))

    def parameters(self, layer: str, *entries: str) -> list[str]:
        """Entries of the network's state."""
        return [self.store(f"{layer}.{entry}", self.state[f"{layer}.{entry}"]) for entry in entries]

    def weight_and_bias(self, operation: Operation) -> list[str]:
        """Names of the layer's weight, dequantized inside the graph where it is stored as integers, and of its bias."""
        layer, before = operation["name"], set(self.stored)
        self.weight_types[layer] = integer_type(self.indexed[layer].indices) if layer in self.indexed else "float32"
        weight = [self.dequantized(layer)] if layer in self.indexed else self.parameters(layer, "weight")
        self.weight_bytes += sum(len(self.stored[name].raw_data) for name in self.stored.keys() - before)
        return [*weight, *(self.parameters(layer, "bias") if operation["bias"] else [])]

    def dequantized(self, layer: str) -> str:
        """The weight of a layer whose indices are stored."""
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

"""How each operation of a compact network is written in ONNX, by its name in src/pruning/operations.py.

A writer takes the graph that is being written, the operation with all of its fields and the "shape" of its result for
one image, the names of its inputs and of its output. It adds the nodes before the last one, and returns the last.
Axis letters: N batch, C channels, H W space.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from src.export.onnx_graph import INPUT, OnnxError, OnnxGraph
from src.pruning import Operation

END = 2**63 - 1  # "to the end" in Slice
Node = tuple[str, list[str], dict[str, Any]]  # kind, inputs, attributes
Writer = Callable[[OnnxGraph, Operation, list[str], str], Node]


def _conv(graph: OnnxGraph, operation: Operation, inputs: list[str], output: str) -> Node:
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


def _conv_transpose(graph: OnnxGraph, operation: Operation, inputs: list[str], output: str) -> Node:
    window = {
        "kernel_shape": operation["kernel_size"],
        "strides": operation["stride"],
        "dilations": operation["dilation"],
        "pads": [*operation["padding"], *operation["padding"]],
        "output_padding": operation["output_padding"],
    }
    return "ConvTranspose", [*inputs, *graph.weight_and_bias(operation)], window


def _linear(graph: OnnxGraph, operation: Operation, inputs: list[str], output: str) -> Node:
    weight, *bias = graph.weight_and_bias(operation)
    if len(operation["shape"]) == 1:
        return "Gemm", [*inputs, weight, *bias], {"transB": 1}
    transposed = graph.node("Transpose", [weight], f"{output}.weight", perm=[1, 0])
    if not bias:
        return "MatMul", [*inputs, transposed], {}
    return "Add", [graph.node("MatMul", [*inputs, transposed], f"{output}.product"), *bias], {}


def _batchnorm(graph: OnnxGraph, operation: Operation, inputs: list[str], output: str) -> Node:
    name = operation["name"]
    statistics = graph.parameters(name, "running_mean", "running_var")
    ones = torch.ones_like(graph.state[f"{name}.running_mean"])
    graph.state = {f"{name}.weight": ones, f"{name}.bias": 0 * ones} | graph.state
    affine = graph.parameters(name, "weight", "bias")
    return "BatchNormalization", [*inputs, *affine, *statistics], {"epsilon": float(operation["eps"])}


def _norm(kind: str, *fields: str, **fixed: Any) -> Writer:
    """A normalisation by what one image has itself, with a weight and a bias for every channel."""

    def write(graph: OnnxGraph, operation: Operation, inputs: list[str], output: str) -> Node:
        name = operation["name"]
        channels = operation["shape"][operation.get("dim", 1) - 1]
        graph.state = {f"{name}.weight": torch.ones(channels), f"{name}.bias": torch.zeros(channels)} | graph.state
        attributes = {"epsilon": float(operation["eps"])} | {field: operation[field] for field in fields} | fixed
        return kind, [*inputs, *graph.parameters(name, "weight", "bias")], attributes

    return write


def _per_channel(kind: str, entry: str) -> Writer:
    """An operation with one number for each channel, of which the layer has one in all or one each."""

    def write(graph: OnnxGraph, operation: Operation, inputs: list[str], output: str) -> Node:
        name = f"{operation['name']}.{entry}"
        behind = len(operation["shape"]) - operation.get("dim", 1)
        return kind, [*inputs, graph.store(name, graph.state[name].view(-1, *[1] * behind))], {}

    return write


def _window(graph: OnnxGraph, operation: Operation) -> dict[str, Any]:
    padding = operation["padding"]
    window = {"kernel_shape": operation["kernel_size"], "strides": operation["stride"], "pads": [*padding, *padding]}
    return window | {"ceil_mode": int(operation["ceil_mode"])}


def _max_pool(graph: OnnxGraph, operation: Operation, inputs: list[str], output: str) -> Node:
    return "MaxPool", inputs, _window(graph, operation) | {"dilations": operation["dilation"]}


def _avg_pool(graph: OnnxGraph, operation: Operation, inputs: list[str], output: str) -> Node:
    if operation["divisor_override"]:
        raise OnnxError("ONNX has no average pooling with a divisor of its own; export without divisor_override")
    counted = {"count_include_pad": int(operation["count_include_pad"])}
    return "AveragePool", inputs, _window(graph, operation) | counted


def _adaptive(kind: str) -> Writer:
    def write(graph: OnnxGraph, operation: Operation, inputs: list[str], output: str) -> Node:
        before, after = graph.shapes[operation["inputs"][0]][1:], operation["shape"][1:]
        if all(side == 1 for side in after):
            return f"Global{kind}", inputs, {}
        if any(side % parts for side, parts in zip(before, after, strict=True)):
            raise OnnxError(
                f"ONNX has no adaptive pooling of {before} to {after}; choose an output size that divides it"
            )
        sides = [side // parts for side, parts in zip(before, after, strict=True)]
        return kind, inputs, {"kernel_shape": sides, "strides": sides}

    return write


def _mean(graph: OnnxGraph, operation: Operation, inputs: list[str], output: str) -> Node:
    dims = graph.whole_numbers(f"{output}.dims", operation["dim"])
    return "ReduceMean", [*inputs, dims], {"keepdims": int(operation["keepdim"])}


def _affine(graph: OnnxGraph, operation: Operation, inputs: list[str], output: str) -> Node:
    scaled = graph.node("Mul", [*inputs, graph.number(f"{output}.scale", operation["scale"])], f"{output}.scaled")
    return "Add", [scaled, graph.number(f"{output}.shift", operation["shift"])], {}


def _clip(lowest: str, highest: str) -> Writer:
    """Limits, of which None is none."""

    def write(graph: OnnxGraph, operation: Operation, inputs: list[str], output: str) -> Node:
        limits = {"lowest": operation.get(lowest), "highest": operation.get(highest)}
        return (
            "Clip",
            [*inputs, *("" if n is None else graph.number(f"{output}.{k}", n) for k, n in limits.items())],
            {},
        )

    return write


def _silu(graph: OnnxGraph, operation: Operation, inputs: list[str], output: str) -> Node:
    return "Mul", [*inputs, graph.node("Sigmoid", inputs, f"{output}.gate")], {}


def _softplus(graph: OnnxGraph, operation: Operation, inputs: list[str], output: str) -> Node:
    beta = graph.number(f"{output}.beta", operation["beta"])
    scaled = graph.node("Mul", [*inputs, beta], f"{output}.scaled")
    return "Div", [graph.node("Softplus", [scaled], f"{output}.plus"), beta], {}


def _slice(graph: OnnxGraph, operation: Operation, inputs: list[str], output: str) -> Node:
    starts, ends, steps = ([each[place] for each in operation["slices"]] for place in range(3))
    axes = list(range(2, 2 + len(starts)))
    ends = [END if end is None else end for end in ends]
    roles = {"starts": [start or 0 for start in starts], "ends": ends, "axes": axes, "steps": [n or 1 for n in steps]}
    return "Slice", [*inputs, *(graph.whole_numbers(f"{output}.{role}", n) for role, n in roles.items())], {}


def _select(graph: OnnxGraph, operation: Operation, inputs: list[str], output: str) -> Node:
    size, dim = graph.shapes[operation["inputs"][0]], operation["dim"]
    available = size[dim - 1]
    if min(operation["channels"]) < 0:  # one channel of zeros behind the others, for those that are not there
        behind = [int(place == dim) for place in range(len(size) + 1)]
        pads = graph.whole_numbers(f"{output}.pads", [0] * len(behind) + behind)
        inputs = [graph.node("Pad", [*inputs, pads], f"{output}.padded")]
    chosen = [available if channel < 0 else channel for channel in operation["channels"]]
    return "Gather", [*inputs, graph.whole_numbers(f"{output}.channels", chosen)], {"axis": dim}


def _pad(graph: OnnxGraph, operation: Operation, inputs: list[str], output: str) -> Node:
    pairs = list(zip(operation["pad"][::2], operation["pad"][1::2], strict=True))[::-1]
    pairs = [(0, 0)] * (len(operation["shape"]) + 1 - len(pairs)) + pairs
    amounts = graph.whole_numbers(f"{output}.pads", [before for before, _ in pairs] + [after for _, after in pairs])
    value = [graph.number(f"{output}.value", operation["value"])] if operation["mode"] == "constant" else []
    return "Pad", [*inputs, amounts, *value], {"mode": PAD_MODES[operation["mode"]]}


def _resize(graph: OnnxGraph, operation: Operation, inputs: list[str], output: str) -> Node:
    mode = {"nearest": "nearest", "bilinear": "linear", "linear": "linear"}.get(operation["mode"])
    if mode is None:
        raise OnnxError(f"ONNX export does not resize by {operation['mode']!r}; use nearest or bilinear")
    before, after = graph.shapes[operation["inputs"][0]], operation["shape"]
    factors = [1.0, 1.0, *(b / a for a, b in zip(before[1:], after[1:], strict=True))]
    scales = graph.store(f"{output}.scales", np.array(factors, dtype=np.float32))
    aligned = "align_corners" if operation["align_corners"] else "half_pixel"
    how = {"mode": mode, "coordinate_transformation_mode": "asymmetric" if mode == "nearest" else aligned}
    return "Resize", [*inputs, "", scales], how | ({"nearest_mode": "floor"} if mode == "nearest" else {})


def _shaped(graph: OnnxGraph, operation: Operation, inputs: list[str], output: str) -> Node:
    """(N, C, ...) in another shape behind the channels."""
    return "Reshape", [*inputs, graph.whole_numbers(f"{output}.shape", [0, *operation["shape"]])], {}


def _expand(graph: OnnxGraph, operation: Operation, inputs: list[str], output: str) -> Node:
    return "Expand", [*inputs, graph.whole_numbers(f"{output}.shape", [1, *operation["shape"]])], {}


def _fill(graph: OnnxGraph, operation: Operation, inputs: list[str], output: str) -> Node:
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
    "groupnorm": _norm("GroupNormalization", "num_groups"),
    "layernorm": _norm("LayerNormalization", axis=-1),
    "instancenorm": _norm("InstanceNormalization"),
    "pixel_shuffle": lambda graph, operation, inputs, output: (
        "DepthToSpace",
        inputs,
        {"blocksize": operation["upscale_factor"], "mode": "CRD"},
    ),
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
    "softmax": lambda graph, operation, inputs, output: ("Softmax", inputs, {"axis": operation["dim"]}),
    "log_softmax": lambda graph, operation, inputs, output: ("LogSoftmax", inputs, {"axis": operation["dim"]}),
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

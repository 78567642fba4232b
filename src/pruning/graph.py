"""A network as a short program of operations on channels, read off its torch.fx graph.

Each operation says which earlier values it reads and what it does to their channels; weights are looked up in the
modules when they are needed. What is not recognised becomes an "opaque" operation, which every later analysis treats
with caution: nothing that flows into it or out of it may be removed.
Axis letters: N batch, C channels, H W space.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx, nn

from utils_quantization import eval_mode

AVERAGE = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
MAXIMUM = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
POOLING: dict[Any, tuple[str, ...]] = {F.avg_pool2d: AVERAGE, F.max_pool2d: MAXIMUM}


class GraphError(ValueError):
    """The network cannot be read: wrong input size, or no torch.fx graph."""


@dataclass(frozen=True)
class Op:
    """One operation. `inputs` are names of earlier operations; `channels`, `height`, `width` describe its output.

    kind, and what it does to channel c (with the settings it carries):
        input                          the image
        conv      module               every output channel reads every input channel (groups = 1)
        linear    module               the same for features
        batchnorm module               one scale and shift per channel
        relu | pass                    channel by channel; `pass` is dropout or identity, nothing in eval mode
        pool      settings             channel by channel; a constant stays that constant
        stride    settings["step"]     every step-th pixel, channel by channel
        pad       settings["before"]   channel c becomes channel c + before; the new ones are 0
        flatten   settings["area"]     channel c becomes features c * area to (c + 1) * area - 1
        add                            channel by channel
        output                         what the network returns
        opaque                         anything else
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    channels: int
    height: int = 1
    width: int = 1
    module: str | None = None
    settings: Mapping[str, int] = field(default_factory=dict)


def trace(model: nn.Module, input_size: tuple[int, int, int] = (3, 32, 32)) -> list[Op]:
    """The operations of `model` in the order they run, for one image of `input_size` (C, H, W).

    The network is run once, in eval mode, on one blank image to learn the shapes; its state is left as it was. Raises
    GraphError where torch.fx cannot follow the forward pass or the image does not fit.
    """
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:  # whatever the forward pass does to a proxy
        raise GraphError(
            f"{type(model).__name__} cannot be traced ({error}): its forward pass depends on values; channels can only "
            "be followed through a fixed graph"
        ) from error
    shapes, sizes = _shapes(model, graph, input_size)
    modules = dict(model.named_modules())
    ops: list[Op] = []
    for node in graph.nodes:
        op = _read(node, modules, shapes, sizes)
        if op is not None:
            ops.append(op)
    calls = Counter(op.module for op in ops)
    # A module that is called twice shares its weights between two places: its channels cannot be changed in one.
    return [replace(op, kind="opaque") if op.module and calls[op.module] > 1 else op for op in ops]


def _shapes(
    model: nn.Module, graph: fx.Graph, input_size: tuple[int, int, int]
) -> tuple[dict[str, torch.Size], dict[str, Any]]:
    """By node: the shape of every tensor, and the value of everything that only asks for a size (`x.size(0)`)."""
    parameter = next(model.parameters(), torch.zeros(()))
    image = torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype)
    recorder = _ShapeRecorder(fx.GraphModule(model, graph))
    try:
        with eval_mode(model), torch.no_grad():
            recorder.run(image)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise GraphError(
            f"{type(model).__name__} does not accept an image of size {input_size} ({reason}); give the input_size it "
            "was built for"
        ) from error
    return recorder.shapes, recorder.sizes


class _ShapeRecorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[str, torch.Size] = {}
        self.sizes: dict[str, Any] = {}
        self.extra_traceback = False  # an error's own message is enough, and comes seconds sooner

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, torch.Tensor):
            self.shapes[n.name] = result.shape
        elif isinstance(result, (int, torch.Size)):
            self.sizes[n.name] = result
        return result


def _read(
    node: fx.Node, modules: Mapping[str, nn.Module], shapes: Mapping[str, torch.Size], sizes: Mapping[str, Any]
) -> Op | None:
    shape = shapes.get(node.name)
    if node.op == "get_attr" or node.name in sizes or (shape is None and not node.all_input_nodes):
        return None
    inputs = tuple(source.name for source in node.all_input_nodes if source.name in shapes)
    channels = shape[1] if shape is not None and len(shape) > 1 else 0
    height, width = (shape[2], shape[3]) if shape is not None and len(shape) == 4 else (1, 1)

    def op(kind: str, module: str | None = None, **settings: int) -> Op:
        return Op(node.name, kind, inputs, channels, height, width, module, settings)

    if node.op == "placeholder":
        return op("input")
    if node.op == "output":
        return op("output")
    if any(source.op == "get_attr" for source in node.all_input_nodes) or _overwrites_shared(node, modules):
        return op("opaque")
    if node.op == "call_module":
        return _read_module(node, modules[cast(str, node.target)], op, shapes)
    return _read_function(node, op, shapes, sizes)


def _read_module(node: fx.Node, module: nn.Module, op: Callable[..., Op], shapes: Mapping[str, torch.Size]) -> Op:
    target = cast(str, node.target)
    if isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros":
        return op("conv", target)
    if isinstance(module, nn.Linear) and len(shapes[node.name]) == 2:
        return op("linear", target)
    if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
        return op("batchnorm", target)
    if isinstance(module, nn.ReLU):
        return op("relu")
    if isinstance(module, (nn.Identity, nn.Dropout, nn.Dropout2d)):
        return op("pass")
    if isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)):
        return op("pool", average=1)
    if isinstance(module, (nn.AvgPool2d, nn.MaxPool2d)):
        settings = _pooling(vars(module), isinstance(module, nn.AvgPool2d))
        return op("pool", **settings) if settings else op("opaque", target)
    if isinstance(module, nn.Flatten) and module.start_dim == 1 and module.end_dim == -1:
        return _flatten(node, op, shapes)
    return op("opaque", target)


def _read_function(
    node: fx.Node, op: Callable[..., Op], shapes: Mapping[str, torch.Size], sizes: Mapping[str, Any]
) -> Op:
    target, arguments = node.target, node.args
    if target in (F.relu, torch.relu, "relu"):
        return op("relu")
    both_nodes = len(arguments) == 2 and all(isinstance(argument, fx.Node) for argument in arguments)
    if target in (operator.add, operator.iadd, torch.add, "add", "add_") and both_nodes and not node.kwargs:
        left, right = (cast(fx.Node, argument) for argument in arguments)
        if left is not right and shapes.get(left.name) == shapes.get(right.name) is not None:
            return op("add")
    if target is F.adaptive_avg_pool2d and _one((node.kwargs | dict(enumerate(arguments))).get(1)) == 1:
        return op("pool", average=1)
    if target in (torch.flatten, "flatten") and tuple(arguments[1:]) in ((1,), (1, -1)) and not node.kwargs:
        return _flatten(node, op, shapes)
    if target in ("view", "reshape", torch.reshape) and len(shapes[node.name]) == 2:
        source = shapes[node.all_input_nodes[0].name]
        # with one image in the batch, two dimensions and as many numbers can only be (N, C H W)
        if len(source) == 4 and shapes[node.name].numel() == source.numel() and shapes[node.name][0] == 1:
            return _flatten(node, op, shapes)
    if target in POOLING:
        names = POOLING[target]
        given = dict(zip(names, arguments, strict=False)) | node.kwargs
        known = {name: sizes.get(v.name) if isinstance(v, fx.Node) else v for name, v in given.items()}
        if settings := _pooling(known, names is AVERAGE):
            return op("pool", **settings)
    if target is operator.getitem and (step := _stride(arguments[1])) is not None:
        return op("stride", step=step)
    if target is F.pad and (before := _channel_padding(node)) is not None:
        return op("pad", before=before)
    return op("opaque")


def _overwrites_shared(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the operation writes in place over a value that something else reads too, itself or a view of it."""
    module = modules.get(node.target) if isinstance(node.target, str) else None
    written = getattr(module, "inplace", False) or node.target in (operator.iadd, "add_")
    if not (written or node.kwargs.get("inplace") or (node.target is F.relu and node.args[1:] == (True,))):
        return False
    source = node.all_input_nodes[0]
    while len(source.users) == 1:
        module = modules.get(str(source.target)) if source.op == "call_module" else None
        viewed = isinstance(module, (nn.Identity, nn.Dropout, nn.Dropout2d, nn.Flatten))
        called = source.target if source.op in ("call_function", "call_method") else None
        if not (viewed or called in (operator.getitem, torch.flatten, "flatten")):
            return False
        source = source.all_input_nodes[0]
    return True


def _pooling(given: Mapping[str, Any], average: bool) -> dict[str, int] | None:
    """Settings of a pooling without padding, or None for one with a setting that would change constants."""
    kernel = _one(given.get("kernel_size"))
    stride = _one(given["stride"]) if given.get("stride") is not None else kernel
    plain = _one(given.get("padding", 0)) == 0 and _one(given.get("dilation", 1)) == 1
    # a divisor of its own changes constants, and indices come as a second output
    unusual = any(given.get(name) for name in ("ceil_mode", "divisor_override", "return_indices"))
    if kernel is None or stride is None or not plain or unusual:
        return None
    return {"average": int(average), "kernel": kernel, "stride": stride}


def _flatten(node: fx.Node, op: Callable[..., Op], shapes: Mapping[str, torch.Size]) -> Op:
    source = shapes[node.all_input_nodes[0].name]
    if len(source) == 4:
        return op("flatten", area=source[2] * source[3])
    return op("pass") if len(source) == 2 else op("opaque")


def _stride(index: Any) -> int | None:
    """The step of x[:, :, ::step, ::step], or None where the index is anything else."""
    whole = slice(None, None, None)
    if not (isinstance(index, tuple) and len(index) == 4 and index[0] == whole and index[1] == whole):
        return None
    rows, columns = index[2], index[3]
    if rows != columns or not isinstance(rows, slice) or (rows.start, rows.stop) != (None, None):
        return None
    return rows.step if isinstance(rows.step, int) and rows.step > 0 else None


def _channel_padding(node: fx.Node) -> int | None:
    """Zero channels put in front by F.pad(x, (0, 0, 0, 0, before, after)), or None for any other padding."""
    given = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | node.kwargs
    padding = given.get("pad")
    zeros = given.get("mode", "constant") == "constant" and given.get("value") in (None, 0)
    if zeros and isinstance(padding, (tuple, list)) and len(padding) == 6 and tuple(padding[:4]) == (0, 0, 0, 0):
        before, after = padding[4:]
        if isinstance(before, int) and isinstance(after, int) and before >= 0 and after >= 0:
            return before
    return None


def _one(value: Any) -> int | None:
    """The number in 3 or (3, 3), else None."""
    if isinstance(value, (tuple, list)):
        return value[0] if len(set(value)) == 1 and isinstance(value[0], int) else None
    return value if isinstance(value, int) else None

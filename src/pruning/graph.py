"""A network as a short program of operations on channels, read off its torch.fx graph.

Each operation says which earlier values it reads and what it does to their channels; weights are looked up in the
modules when they are needed. What is not recognised becomes an "opaque" operation, which every later analysis treats
with caution: nothing that flows into it or out of it may be removed.
Axis letters: N batch, C channels, H W space.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import fx, nn

from src.pruning.operations import settings_of
from utils_quantization import eval_mode, unwrapped

LAYERS = ("conv", "linear")
CHANNELWISE = ("batchnorm", "relu", "pass", "pool", "stride", "select", "flatten", "add")
AVERAGE = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
MAXIMUM = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
POOLING: dict[Any, tuple[str, ...]] = {F.avg_pool2d: AVERAGE, F.max_pool2d: MAXIMUM}

Settings = dict[str, Any]


class GraphError(ValueError):
    """The network cannot be read: wrong input size, or no torch.fx graph."""


@dataclass(frozen=True)
class Op:
    """One operation. `inputs` are names of earlier operations; `channels`, `height`, `width` describe its output.

    kind: a row of src/pruning/operations.py, with the fields of that row as `settings`, or one of
        input     the image
        pass      dropout or identity, nothing in eval mode
        output    what the network returns
        opaque    anything else
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    channels: int
    height: int = 1
    width: int = 1
    module: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def channel_map(self, available: int) -> NDArray[np.int64]:
        """The input channel that each output channel comes from, -1 for a channel of zeros, (channels,).

        For the kinds in CHANNELWISE, which compute every channel of their output from one channel of each input.
        available: how many channels the input has.
        """
        if self.kind == "select":
            return np.array(self.settings["channels"], dtype=np.int64)
        if self.kind == "flatten":  # the pixels of a channel become features beside each other
            return np.arange(self.channels) // (self.channels // available)
        return np.arange(self.channels)


def trace(model: nn.Module, input_size: tuple[int, int, int] = (3, 32, 32)) -> list[Op]:
    """The operations of `model` in the order they run, for one image of `input_size` (C, H, W).

    The network is run once, in eval mode, on one blank image to learn the shapes; its state is left as it was. Raises
    GraphError where torch.fx cannot follow the forward pass or the image does not fit.
    """
    model = unwrapped(model)
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:  # whatever the forward pass does to a proxy
        raise GraphError(
            f"{type(model).__name__} cannot be traced ({error}): its forward pass depends on values; channels can only "
            "be followed through a fixed graph"
        ) from error
    _record_results(model, graph, input_size)
    modules = dict(model.named_modules())
    ops = [op for op in (_read(node, modules) for node in graph.nodes) if op is not None]
    calls = Counter(op.module for op in ops)
    # A module that is called twice shares its weights between two places: its channels cannot be changed in one.
    return [replace(op, kind="opaque") if op.module and calls[op.module] > 1 else op for op in ops]


def _record_results(model: nn.Module, graph: fx.Graph, input_size: tuple[int, int, int]) -> None:
    """Leave with every node the shape of its tensor, or the value of what only asks for a size (`x.size(0)`)."""
    parameter = next(model.parameters(), torch.zeros(()))
    image = torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype)
    recorder = _Recorder(fx.GraphModule(model, graph))
    try:
        with eval_mode(model), torch.no_grad():
            recorder.run(image)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise GraphError(
            f"{type(model).__name__} does not accept an image of size {input_size} ({reason}); give the input_size it "
            "was built for"
        ) from error


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False  # an error's own message is enough, and comes seconds sooner

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, torch.Tensor):
            n.meta["shape"] = result.shape
        elif isinstance(result, (int, torch.Size)):
            n.meta["size"] = result
        return result


def _read(node: fx.Node, modules: Mapping[str, nn.Module]) -> Op | None:
    shape = node.meta.get("shape", ())
    if node.op == "get_attr" or "size" in node.meta or not (shape or node.all_input_nodes):
        return None
    inputs = tuple(source.name for source in node.all_input_nodes if "shape" in source.meta)
    kind, settings = _recognised(node, modules)
    module = str(node.target) if node.op == "call_module" and kind in (*LAYERS, "batchnorm", "opaque") else None
    channels = shape[1] if len(shape) > 1 else 0
    height, width = shape[2:] if len(shape) == 4 else (1, 1)
    return Op(node.name, kind, inputs, channels, height, width, module, settings)


def _recognised(node: fx.Node, modules: Mapping[str, nn.Module]) -> tuple[str, Settings]:
    """Kind and settings of an operation."""
    if node.op in ("placeholder", "output"):
        return {"placeholder": "input"}.get(node.op, node.op), {}
    if any(source.op == "get_attr" for source in node.all_input_nodes) or _overwrites_shared(node, modules):
        return "opaque", {}
    found = _module_kind(modules[str(node.target)]) if node.op == "call_module" else _function_kind(node)
    kind, settings = found or ("opaque", {})
    if kind == "linear" and len(node.meta["shape"]) != 2:
        return "opaque", {}
    if kind == "flatten":
        return {4: "flatten", 2: "pass"}.get(len(_source_shape(node)), "opaque"), {}
    return kind, settings


def _module_kind(module: nn.Module) -> tuple[str, Settings] | None:
    if isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros":
        return "conv", settings_of("conv", module)
    if isinstance(module, nn.Linear):
        return "linear", {}
    if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
        return "batchnorm", settings_of("batchnorm", module)
    if isinstance(module, nn.ReLU):
        return "relu", {}
    if isinstance(module, (nn.Identity, nn.Dropout, nn.Dropout2d)):
        return "pass", {}
    if isinstance(module, nn.AdaptiveAvgPool2d) and _one(module.output_size) == 1:
        return "pool", {"average": True, "kernel_size": None, "stride": None}
    if isinstance(module, (nn.AvgPool2d, nn.MaxPool2d)):
        return _pooling(vars(module), isinstance(module, nn.AvgPool2d))
    if isinstance(module, nn.Flatten) and module.start_dim == 1 and module.end_dim == -1:
        return "flatten", {}
    return None


def _function_kind(node: fx.Node) -> tuple[str, Settings] | None:
    target, arguments = node.target, node.args
    given = dict(enumerate(arguments)) | node.kwargs
    if target in (F.relu, torch.relu, "relu"):
        return "relu", {}
    if target in (operator.add, operator.iadd, torch.add, "add", "add_") and len(arguments) == 2 and not node.kwargs:
        shapes = [argument.meta.get("shape") if isinstance(argument, fx.Node) else None for argument in arguments]
        if arguments[0] is not arguments[1] and shapes[0] == shapes[1] is not None:
            return "add", {}
    if target is F.adaptive_avg_pool2d and _one(given.get(1, given.get("output_size"))) == 1:
        return "pool", {"average": True, "kernel_size": None, "stride": None}
    if target in (torch.flatten, "flatten") and arguments[1:] in ((1,), (1, -1)) and not node.kwargs:
        return "flatten", {}
    if target in ("view", "reshape", torch.reshape):
        source, shape = _source_shape(node), node.meta["shape"]
        # with one image in the batch, two dimensions and as many numbers can only be (N, C H W)
        if len(shape) == 2 and len(source) == 4 and shape.numel() == source.numel() and shape[0] == 1:
            return "flatten", {}
    if target in POOLING:
        named = dict(zip(POOLING[target], arguments, strict=False)) | node.kwargs
        known = {name: v.meta.get("size") if isinstance(v, fx.Node) else v for name, v in named.items()}
        return _pooling(known, target is F.avg_pool2d)
    if target is operator.getitem:
        return _stride(arguments[1])
    if target is F.pad:
        return _channel_padding(node)
    return None


def _source_shape(node: fx.Node) -> torch.Size:
    return cast(torch.Size, node.all_input_nodes[0].meta["shape"])


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


def _pooling(given: Mapping[str, Any], average: bool) -> tuple[str, Settings] | None:
    """A pooling without padding, or None for one with a setting that would change constants."""
    kernel = _one(given.get("kernel_size"))
    stride = _one(given["stride"]) if given.get("stride") is not None else kernel
    plain = _one(given.get("padding", 0)) == 0 and _one(given.get("dilation", 1)) == 1
    # a divisor of its own changes constants, and indices come as a second output
    unusual = any(given.get(name) for name in ("ceil_mode", "divisor_override", "return_indices"))
    if kernel is None or stride is None or not plain or unusual:
        return None
    return "pool", {"average": average, "kernel_size": kernel, "stride": stride}


def _stride(index: Any) -> tuple[str, Settings] | None:
    """x[:, :, ::step, ::step], or None where the index is anything else."""
    step = index[2].step if isinstance(index, tuple) and len(index) == 4 and isinstance(index[2], slice) else None
    steps, everything = slice(None, None, step), slice(None)
    if index == (everything, everything, steps, steps) and isinstance(step, int) and step > 0:
        return "stride", {"step": step}
    return None


def _channel_padding(node: fx.Node) -> tuple[str, Settings] | None:
    """Zero channels by F.pad(x, (0, 0, 0, 0, before, after)), or None for any other padding."""
    given = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | node.kwargs
    padding: Any = given.get("pad")
    zeros = given.get("mode", "constant") == "constant" and given.get("value") in (None, 0)
    plain = isinstance(padding, (tuple, list)) and all(isinstance(count, int) and count >= 0 for count in padding)
    if not (zeros and plain and tuple(padding[:4]) == (0, 0, 0, 0) and len(padding) == 6):
        return None
    return "select", {"channels": [-1] * padding[4] + [*range(_source_shape(node)[1])] + [-1] * padding[5]}


def _one(value: Any) -> int | None:
    """The number in 3 or (3, 3), else None."""
    if isinstance(value, (tuple, list)):
        return value[0] if len(set(value)) == 1 and isinstance(value[0], int) else None
    return value if isinstance(value, int) else None

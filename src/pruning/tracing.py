"""The torch.fx graph of a network, with what every node gave for one image.

Every operation is run as it is recorded, in eval mode, so that a forward pass may ask for sizes, ranks and flags and
decide by them: only a decision by the values of an image cannot be followed. Convolutions, linear layers and attention
are single nodes whatever class of them they are; other modules of torch.nn are, too, and all else is looked into.
Axis letters: N batch, C channels, H W space.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from utils_quantization import eval_mode

DEEP = 10_000  # calls: recording takes seven for each module that is inside another
WHOLE = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention)

InputSize = Sequence[int] | Sequence[Sequence[int]]


class GraphError(ValueError):
    """The network cannot be read: wrong input size, or no torch.fx graph."""


def recorded_graph(model: nn.Module, input_size: InputSize) -> fx.Graph:
    """The graph of `model` for one image. The network is left as it was. Of every node, meta says

        value     what it gave
        image     whether that depends on the image
        written   addresses of the memory that it overwrote
        rows      of a function: by how many rows it multiplied each weight, by the weight's address

    input_size: (C, H, W), or one such size for each input. Raises GraphError where torch.fx cannot follow the forward
    pass or the image does not fit.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise GraphError(
            f"{type(model).__name__} is a ScriptModule, which cannot be followed: trace what it was made from"
        )
    attributes, limit = set(vars(model)), sys.getrecursionlimit()
    tracer = _Recorder(model)
    sys.setrecursionlimit(max(limit, DEEP))
    try:
        with eval_mode(model), torch.inference_mode(False), torch.no_grad():  # inference tensors have no version
            tracer.prepare(input_size)
            return tracer.trace(model, _defaults(model) or None)
    except Exception as error:  # whatever the forward pass does to a proxy, or an operation to the image
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        if tracer.running:
            raise GraphError(
                f"{type(model).__name__} does not accept an image of size {tuple(input_size)} ({reason}); give the "
                "input_size it was built for"
            ) from error
        raise GraphError(
            f"{type(model).__name__} cannot be traced ({reason}): its forward pass depends on values; channels can "
            "only be followed through a fixed graph"
        ) from error
    finally:
        sys.setrecursionlimit(limit)
        for name in set(vars(model)) - attributes:  # constants that the tracer hangs on the network
            delattr(model, name)


def _defaults(model: nn.Module) -> dict[str, Any]:
    """The arguments that may be left out: the network is read without them."""
    parameters = inspect.signature(model.forward).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty}


def overwritten(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that write in place over a value that is read again later, and all views of that value.

    Such a network is not a graph of values: what it computes depends on which of them share memory. A write that nobody
    else sees is none of them: `x = relu_(x)` is `x = relu(x)`.
    """
    place = {node: number for number, node in enumerate(graph.nodes)}
    sharing: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        if isinstance(value := node.meta.get("value"), torch.Tensor):
            sharing.setdefault(value.untyped_storage().data_ptr(), []).append(node)
    found: set[fx.Node] = set()
    for node in graph.nodes:
        for memory in node.meta.get("written", ()):
            nodes = sharing[memory]
            before = [each for each in nodes if place[each] < place[node]]
            if any(place[user] > place[node] for each in before for user in each.users):
                found.update(nodes[1:], [node])
    return found


class _Recorder(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.parameter = next(model.parameters(), torch.zeros(()))
        self.images: list[torch.Tensor] = []
        self.weights: dict[str, fx.Proxy] = {}
        self.inputs = 0
        self.running = False  # an operation, whose own calls and parameters are not recorded

    def prepare(self, input_size: InputSize) -> None:
        """Make the images that the network is run on: noise, before which hooks and functions show what they do."""
        sizes = [input_size] if all(isinstance(side, int) for side in input_size) else list(input_size)
        random = torch.Generator().manual_seed(0)
        images = [torch.rand(1, *cast(Sequence[int], size), generator=random, device="cpu") for size in sizes]
        self.images = [image.to(self.parameter.device, self.parameter.dtype) for image in images]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, WHOLE) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self.running:
            return forward(*args, **kwargs)
        if isinstance(m, parametrize.ParametrizationList):  # somebody reads a parametrized weight, which is a weight
            path = self.path_of_module(m).replace(".parametrizations", "")
            if path not in self.weights:  # as torch.fx does for parameters
                self.weights[path] = self.create_proxy("get_attr", path, (), {})
            return self.weights[path]
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self.running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> fx.Node:
        node = super().create_node(kind, target, args, kwargs, *rest, **named)
        if kind == "output":
            return node
        read = [value for each in node.all_input_nodes if isinstance(value := each.meta["value"], torch.Tensor)]
        read = [value for value in read if not value.is_inference()]
        versions = [value._version for value in read]
        self.running = True
        node.meta["value"] = self._result(node)
        self.running = False
        written = [value for value, version in zip(read, versions, strict=True) if value._version != version]
        node.meta["written"] = {value.untyped_storage().data_ptr() for value in written}
        placed = node.op == "placeholder" and isinstance(node.meta["value"], torch.Tensor) and not node.args
        node.meta["image"] = placed or any(source.meta["image"] for source in node.all_input_nodes)
        return node

    def _result(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            if str(node.target).startswith("*"):  # further arguments, of which there are none
                return {} if str(node.target).startswith("**") else ()
            if node.args:  # an argument with a default keeps it
                return node.args[0]
            self.inputs += 1
            return self.images[min(self.inputs, len(self.images)) - 1]
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            return getattr(self.root.get_submodule(owner), name)
        args = fx.map_arg(node.args, lambda source: source.meta["value"])
        kwargs = fx.map_arg(node.kwargs, lambda source: source.meta["value"])
        if node.op == "call_module":
            return self.root.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        with _LinearUses() as uses:
            result = cast(Any, node.target)(*args, **kwargs)
        node.meta["rows"] = uses.rows
        return result

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _KnownProxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        value = obj.node.meta["value"]
        if isinstance(value, torch.Tensor) and obj.node.meta["image"]:
            raise fx.proxy.TraceError("it branches on the values of an image")
        return bool(value)

    def iter(self, obj: Any) -> Iterator[Any]:
        return iter([obj[number] for number in range(len(obj.node.meta["value"]))])


class _LinearUses(TorchFunctionMode):
    """Counts how many rows a function multiplies by each weight, by the weight's address: rows of F.linear's output."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.linear:
            address = args[1].data_ptr()
            self.rows[address] = self.rows.get(address, 0) + result.numel() // result.shape[-1]
        return result


class _KnownProxy(fx.Proxy):
    """A proxy that knows how many dimensions or entries its value has."""

    def __len__(self) -> int:
        return len(self.node.meta["value"])

    def dim(self) -> int:
        return int(self.node.meta["value"].dim())

    @property
    def ndim(self) -> int:
        return self.dim()

"""A network as a short program of operations on channels, read off its torch.fx graph.

Each operation says which earlier values it reads and what it does to their channels; weights are looked up in the
modules when they are needed. What is not recognised becomes an "opaque" operation, which every later analysis treats
with caution: nothing that flows into it or out of it may be removed, and compaction keeps it exactly as it is.
Axis letters: N batch, C channels, H W space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from src.pruning.recognition import Reading, Recognizer, shape_of
from src.pruning.tracing import InputSize, overwritten, recorded_graph
from utils_quantization import unwrapped

LAYERS = ("conv", "conv_transpose", "linear")
# Of these nothing that is read or made may be removed.
MIXING = ("opaque", "softmax", "log_softmax", "groupnorm", "layernorm", "instancenorm", "pixel_shuffle")
NOT_CHANNELWISE = (*LAYERS, *MIXING, "input", "output", "fill")
PARAMETRIC = ("batchnorm", "prelu")


@dataclass(frozen=True)
class Ref:
    """In the arguments of a call: the value of its input number `number`."""

    number: int


@dataclass(frozen=True)
class Call:
    """An operation as the user's network has it: a node of its torch.fx graph, with `Ref`s for the values it reads.

    attribute: the module that is called, or the parameter that is read. writes: whether it overwrites what it reads.
    rows: by how many rows it multiplies each weight, by the weight's address.
    """

    kind: str
    target: Any
    args: Any
    kwargs: Any
    attribute: Any = None
    writes: bool = False
    rows: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Op:
    """One operation. `inputs` are names of earlier operations. `shape`: of its output for one image, () for no tensor.

    kind: a row of src/pruning/operations.py, with the fields of that row as `settings`, or one of
        input     an image
        pass      dropout or identity, nothing in eval mode
        output    what the network returns
        opaque    anything else; `call` says what
    channels: how many there are along dimension `axis` of the output. values: numbers of a scale or shift, (C,).
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    channels: int
    shape: tuple[int, ...] = ()
    axis: int = 1
    module: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    values: Tensor | None = None
    call: Call | None = None

    @property
    def channelwise(self) -> bool:
        """Whether every channel of the output is computed from one channel of each input, see `channel_maps`."""
        return self.kind not in NOT_CHANNELWISE or self.is_depthwise

    @property
    def is_depthwise(self) -> bool:
        """Whether it is a convolution in which every output channel reads one input channel."""
        return bool(self.settings.get("depthwise"))

    def channel_maps(self, available: Sequence[int]) -> list[NDArray[np.int64]]:
        """Of each input, the channel that each output channel comes from, -1 for none, (channels,).

        For channelwise operations. available: how many channels each input has.
        """
        own = np.arange(self.channels)
        if self.kind == "select":
            return [np.array(self.settings["channels"], dtype=np.int64)]
        if self.kind in ("flatten", "conv"):  # the pixels of a channel become features beside each other
            return [own // (self.channels // available[0])]
        if self.kind == "join":
            starts = np.cumsum([0, *available])
            return [np.where((own >= start) & (own < end), own - start, -1) for start, end in pairwise(starts)]
        return [own] * len(self.inputs)


def trace(model: nn.Module, input_size: InputSize = (3, 32, 32)) -> list[Op]:
    """The operations of `model` in the order they run, for one image of `input_size` (C, H, W).

    The network is run once, in eval mode, on one image of noise; its state is left as it was.
    input_size: for a network of several inputs, one size for each, or one that is that of all. Raises GraphError where
    torch.fx cannot follow the forward pass or the image does not fit.
    """
    model = unwrapped(model)
    graph = recorded_graph(model, input_size)
    opaque = overwritten(graph)
    ops = _Reader(model, opaque).ops(graph)
    shared = _shared_parameters(model, ops)
    return _Reader(model, opaque | {n for n in graph.nodes if n.name in shared}).ops(graph) if shared else ops


class _Reader:
    """Turns nodes into operations. opaque: nodes that are left as they are although they could be understood."""

    def __init__(self, model: nn.Module, opaque: set[fx.Node]) -> None:
        self.model, self.opaque = model, opaque
        self.recognizer = Recognizer(model)
        self.found: dict[str, Op] = {}

    def ops(self, graph: fx.Graph) -> list[Op]:
        """The operations that the output needs, and those that overwrite a value."""
        for node in graph.nodes:
            reading = None if node in self.opaque or not node.meta.get("image") else self.recognizer.read(node)
            if node.op == "output" or reading is None:
                self._enter_unknown(node)
            else:
                self._enter(node, reading)
        needed: set[str] = set()
        kept: list[Op] = []
        for op in reversed(self.found.values()):
            if op.name in needed or op.kind in ("input", "output") or (op.call and op.call.writes):
                needed.update(op.inputs)
                kept.append(op)
        return kept[::-1]

    def _enter(self, node: fx.Node, reading: Reading) -> None:
        self.recognizer.axis[node] = reading.axis
        settings = dict(reading.settings)
        if reading.kind == "conv":
            settings["depthwise"] = 1 < settings["groups"] == shape_of(reading.inputs[0])[1]
        inputs = tuple(self._along(source, reading) for source in reading.inputs)
        shape, module = shape_of(node), reading.module or None
        self.found[node.name] = Op(
            node.name, reading.kind, inputs, shape[reading.axis], shape, reading.axis, module, settings, reading.values
        )

    def _enter_unknown(self, node: fx.Node) -> None:
        shape = tuple(value.shape) if isinstance(value := node.meta.get("value"), Tensor) else ()
        image = node.op == "placeholder" and node.meta["image"]
        if image and len(shape) != 3:  # the channels of (N, L, C) may be last
            self.recognizer.axis[node] = 1
        self.found[node.name] = Op(
            name=node.name,
            kind="output" if node.op == "output" else "input" if image else "opaque",
            inputs=tuple(source.name for source in node.all_input_nodes),
            channels=shape[1] if len(shape) > 1 else 0,
            shape=shape,
            module=str(node.target) if node.op == "call_module" else None,
            call=self._call(node),
        )

    def _along(self, source: fx.Node, reading: Reading) -> str:
        """The name of a value, or of the same one read along the dimension where its channels are wanted."""
        op = self.found[source.name]
        wanted = op.axis if reading.kind in ("permute", "mean", "fill") else reading.axis
        if wanted == op.axis:
            return op.name
        name = f"{op.name}:{wanted}"
        self.found.setdefault(name, Op(name, "opaque", (op.name,), op.shape[wanted], op.shape, wanted))
        return name

    def _call(self, node: fx.Node) -> Call:
        number: dict[fx.Node, Any] = {source: Ref(place) for place, source in enumerate(node.all_input_nodes)}
        args, kwargs = (fx.map_arg(given, number.__getitem__) for given in (node.args, node.kwargs))
        held = node.meta["value"] if node.op == "get_attr" else None
        if node.op == "call_module":
            held = self.model.get_submodule(str(node.target))
        return Call(node.op, node.target, args, kwargs, held, bool(node.meta.get("written")), node.meta.get("rows", {}))


def _weights_of(held: Any) -> list[Tensor]:
    """A tensor, or the parameters of a module; of a parametrized weight the latent one alone: a quantizer has no
    channels, and layers may share one.
    """
    if isinstance(held, nn.Module):
        named = held.named_parameters()
        return [p for name, p in named if "parametrizations." not in name or ".original" in name]
    return [held] if isinstance(held, Tensor) else []


def _shared_parameters(model: nn.Module, ops: Sequence[Op]) -> set[str]:
    """Operations that have a parameter in common: its channels cannot be changed in one of them alone."""
    readers: dict[int, set[str]] = {}
    for op in ops:
        held = model.get_submodule(op.module) if op.module else op.call and op.call.attribute
        if op.call and op.call.kind == "get_attr":
            owner, _, name = str(op.call.target).rpartition(".")
            if parametrize.is_parametrized(layer := model.get_submodule(owner), name):
                held = layer
        for parameter in _weights_of(held):
            readers.setdefault(id(parameter), set()).add(op.name)
    return set().union(*(names for names in readers.values() if len(names) > 1))

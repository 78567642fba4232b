"""A network built from a description (src/pruning/operations.py): ordinary layers and what joins them.

A description may come out of a file that somebody else wrote: only operations of the table are built, with the fields
they have, and on the "meta" device, so that no size in it allocates anything. What the table does not know is called as
the user's network calls it; a description says its name alone, and the network itself has to come with it (`own`).
Axis letters: N batch, C channels, H W space.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from src.pruning.graph import Call, Op, Ref
from src.pruning.operations import OPERATIONS, Operation, fields_of
from src.pruning.tracing import recorded_graph
from utils_quantization import default_tensors

FORMAT = 3
COMPACT_AGAIN = "compact the original network again"
COMPARED = 2  # images on which a smaller network is compared with the original


class CompactionError(ValueError):
    """A network that cannot be made smaller exactly, or a description that cannot be built."""


class CompactNetwork(nn.Module):
    """The network that `description` says: (N, *size) images of its `input_size` -> the result of its `output`.

    description: a copy, which `json.dumps` can write. shapes: of every value for one image, the image first; None for a
    value that is no tensor. own: the calls of operations that the table does not know, by their name.
    Layers keep the names they had in the network it was made from, and so do the keys of the state dictionary. Restore
    with `net = CompactNetwork(description); net.load_state_dict(state)`: until then its parameters are on the "meta"
    device and nothing is allocated; it takes over the state's tensors, with their device and dtype.
    Raises CompactionError for a description that is damaged, or one with operations that are not in `own`.
    """

    @default_tensors()
    def __init__(self, description: Mapping[str, Any], own: Mapping[str, Call] | None = None) -> None:
        super().__init__()
        if description.get("format") != FORMAT:
            raise CompactionError(
                f"the description has format {description.get('format')!r:.50}: this version reads format {FORMAT}; "
                f"{COMPACT_AGAIN}"
            )
        self.description = copy.deepcopy(dict(description))
        self._module_names: dict[int, str] = {}
        self._calls = dict(own or {})
        self._check_own()
        try:
            values: dict[int, Any] = {0: torch.empty(1, *description["input_size"], device="meta")}
            self._operations: list[Operation] = self.description["steps"]
            for number, operation in enumerate(self._operations, start=1):
                inputs = [values[value] for value in operation["inputs"]]
                self._build(number, operation, inputs)
                self.eval()  # BatchNorm then takes a single image
                if "shape" in operation:
                    shape = operation["shape"]
                    values[number] = None if shape is None else torch.empty(shape, device="meta")
                else:
                    values[number] = self._result(number, operation, inputs or [values[0]])
            values[description["output"]]
            self.train()
        except Exception as error:  # whatever Python and torch say of fields and sizes that do not fit
            reason = f"{type(error).__name__}: {error}"
            raise CompactionError(f"the description is damaged ({reason:.200}); {COMPACT_AGAIN}") from error
        self.shapes = [tuple(value.shape[1:]) if isinstance(value, Tensor) else None for value in values.values()]
        self.input_size = cast(tuple[int, ...], self.shapes[0])
        # activations are large and most are read once: each goes after the operation that reads it last
        self._last_use = {value: number for number, each in enumerate(self._operations, 1) for value in each["inputs"]}
        self._last_use[description["output"]] = len(self._operations) + 1

    def forward(self, x: Tensor, *more: Tensor) -> Any:
        """(N, *input_size) -> the output, usually (N, classes). more: further inputs of a network that has them.

        Raises CompactionError for images of another size.
        """
        if tuple(x.shape[1:]) != self.input_size:
            raise CompactionError(
                f"got images of shape {tuple(x.shape[1:])}: this network was made for {self.input_size}; compact the "
                "original network with the input_size you need"
            )
        return self._run((x, *more), self._last_use)[self.description["output"]]

    def results(self, *images: Tensor) -> dict[int, Any]:
        """All values, by their number."""
        return self._run(images, dict.fromkeys(self._last_use, len(self._operations) + 1))

    def _run(self, images: tuple[Tensor, ...], last_use: Mapping[int, int]) -> dict[int, Any]:
        """The values that are still needed in the end."""
        values: dict[int, Any] = {0: images[0]}
        for number, operation in enumerate(self._operations, start=1):
            if operation["op"] == "input":
                values[number] = images[operation["number"]]
            else:
                inputs = [values[value] for value in operation["inputs"]]
                values[number] = self._result(number, operation, inputs or [images[0]])
            values = {value: held for value, held in values.items() if last_use.get(value, 0) > number}
        return values

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = True) -> Any:
        """As nn.Module does, with `assign=True`, because the parameters of a new network are on the "meta" device."""
        return super().load_state_dict(state_dict, strict, assign)

    @property
    def own_operations(self) -> list[str]:
        """Names of the operations that the table does not know."""
        return [step["name"] for step in self.description.get("steps", []) if step["op"] == "own"]

    def _check_own(self) -> None:
        missing = [name for name in self.own_operations if name not in self._calls]
        if missing:
            names = ", ".join(missing[:3]) + (" and more" if len(missing) > 3 else "")
            raise CompactionError(
                f"the network has operations of its own ({names}), whose code is not in the description; "
                "give a network of that class: unpack(path, like=MyNetwork())"
            )

    def _build(self, number: int, operation: Operation, inputs: list[Tensor]) -> None:
        """Add the module of an operation, if it has one, with as many channels as its input has."""
        if operation["op"] == "own":
            held, target = self._calls[operation["name"]].attribute, str(self._calls[operation["name"]].target)
            if held is not None:
                self._add(target, held)
            return
        make = OPERATIONS[operation["op"]].layer
        if make is not None:
            fields = fields_of(operation)
            dim = fields.get("dim", -1 if operation["op"] == "linear" else 1)
            self._module_names[number] = operation.get("name", f"_{operation['op']}_{number}")
            self._add(self._module_names[number], make(inputs[0].shape[dim], **fields, device="meta"))

    def _add(self, path: str, held: Any) -> None:
        """Put a module, parameter or buffer at a path, unless it is there."""
        *above, leaf = path.split(".")
        parent: nn.Module = self
        for part in above:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        if isinstance(held, Tensor) and hasattr(parent, leaf):
            return
        if isinstance(held, nn.Module):
            if dict(parent.named_children()).get(leaf) is not held:
                parent.add_module(leaf, held)
        elif isinstance(held, nn.Parameter):
            parent.register_parameter(leaf, held)
        else:
            parent.register_buffer(leaf, held)

    def _result(self, number: int, operation: Operation, inputs: list[Any]) -> Any:
        if operation["op"] == "own":
            return self._called(self._calls[operation["name"]], inputs)
        if number in self._module_names:
            return self.get_submodule(self._module_names[number])(*inputs)
        run = OPERATIONS[operation["op"]].run
        assert run is not None
        return run(*inputs, **fields_of(operation))

    def _called(self, call: Call, inputs: list[Any]) -> Any:
        """What an operation of the user's network gives for these values."""
        args, kwargs = _filled(call.args, inputs), _filled(call.kwargs, inputs)
        if call.kind == "call_function":
            return call.target(*args, **kwargs)
        if call.kind == "call_method":
            return getattr(args[0], call.target)(*args[1:], **kwargs)
        if call.kind == "call_module":
            return self.get_submodule(call.target)(*args, **kwargs)
        if call.kind == "get_attr":
            owner, _, name = call.target.rpartition(".")
            return getattr(self.get_submodule(owner), name)
        return args[0]  # an argument with its default, or what the network returns


def _filled(template: Any, values: list[Any]) -> Any:
    """The arguments of a call with the values in their places."""
    if isinstance(template, Ref):
        return values[template.number]
    if isinstance(template, slice):
        return slice(*(_filled(each, values) for each in (template.start, template.stop, template.step)))
    if isinstance(template, dict):
        return {name: _filled(each, values) for name, each in template.items()}
    if isinstance(template, tuple):
        return tuple(_filled(each, values) for each in template)
    return [_filled(each, values) for each in template] if isinstance(template, list) else template


def compare(
    model: nn.Module, network: CompactNetwork, places: Mapping[Op, tuple[int, NDArray[np.int64]]], atol: float
) -> None:
    """Raise CompactionError where a network and the smaller one differ on random images, with the first operation that
    does. places: of each operation, in their order, the smaller network's value and the channels that it keeps.
    """
    first = next(model.parameters())
    random = torch.Generator().manual_seed(0)
    sizes = [op.shape[1:] for op in places if op.kind == "input"]
    images = [torch.randn(COMPARED, *size, generator=random).to(first.device, first.dtype) for size in sizes]
    expected, found = model(*copy.deepcopy(images)), network(*copy.deepcopy(images))
    if _differ(expected, found, atol) is None:
        return
    graph = recorded_graph(model, sizes)
    original = _Results(model, graph)
    original.run(*copy.deepcopy(images))
    results = network.results(*images)
    for op, (number, kept) in places.items():
        whole = original.found.get(op.name)
        if not isinstance(whole, Tensor) or not op.channels:
            continue
        channels = torch.from_numpy(kept).to(whole.device)
        if (difference := _differ(whole.index_select(op.axis, channels), results[number], atol)) is not None:
            raise CompactionError(
                f"the smaller network differs from {type(model).__name__} by {difference:.1e} of the largest value "
                f"(allowed: {atol:g}), first behind {op.module or op.name!r} ({op.kind}): its forward pass does "
                "something that its graph does not show; allow more by atol, or leave the network as it is"
            )
    raise CompactionError(
        f"the smaller network's output differs from {type(model).__name__}'s by more than {atol:g}: the network itself "
        "has hooks or a forward of its own, which are not followed; make it a submodule of another"
    )


def _differ(expected: Any, found: Any, atol: float) -> float | None:
    """By how much the tensors differ at most, relative to the largest number, where it is more than `atol`."""
    pairs = zip(_tensors(expected), _tensors(found), strict=True)
    worst = 0.0
    for a, b in pairs:
        scale = a.abs().amax().clamp(min=1) if a.numel() else 1
        if a.shape != b.shape:
            return float("inf")
        worst = max(worst, float(((a - b).abs().nan_to_num(0) / scale).amax())) if a.numel() else worst
    return worst if worst > atol else None


def _tensors(value: Any) -> list[Tensor]:
    """All floating-point tensors in a network's output."""
    if isinstance(value, Mapping):
        return [tensor for each in value.values() for tensor in _tensors(each)]
    if isinstance(value, (tuple, list)):
        return [tensor for each in value for tensor in _tensors(each)]
    return [value] if isinstance(value, Tensor) and value.is_floating_point() else []


class _Results(fx.Interpreter):
    """Runs a network's graph and keeps what every node gave, by name."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(fx.GraphModule(model, graph))
        self.found: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.found[n.name] = super().run_node(n)
        return self.found[n.name]

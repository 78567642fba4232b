"""A network built from a description (src/pruning/operations.py): ordinary layers and what joins them.

A description may come out of a file that somebody else wrote, so every field and every size is checked before anything
is allocated.
Axis letters: N batch, C channels, H W space.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from src.pruning.operations import INPUT_SIZE, MAX_CHANNELS, OPERATIONS, Operation, Shape
from src.quantizer import check_range

FORMAT = 2
MAX_OPERATIONS = 10_000
MAX_VALUES = 2**28  # numbers in one operation's result, for one image


class CompactionError(ValueError):
    """A network that cannot be made smaller exactly, or a description that cannot be built."""


class CompactNetwork(nn.Module):
    """The network that `description` says: (N, C, H, W) images of its `input_size` -> the result of its `output`.

    description: a copy, which `json.dumps` can write. input_size: (C, H, W) of one image.
    Layers keep the names they had in the network it was made from, and so do the keys of the state dictionary. Restore
    with `net = CompactNetwork(description); net.load_state_dict(state)`: until then its parameters are on the "meta"
    device and nothing is allocated; it takes over the state's tensors, with their device and dtype.
    Raises CompactionError for a description that is damaged, or larger than the limits of src/pruning/operations.py.
    """

    def __init__(self, description: Mapping[str, Any]) -> None:
        super().__init__()
        shapes = value_shapes(description)
        self.description = copy.deepcopy(dict(description))
        self.input_size: Shape = shapes[0]
        self._operations: list[Operation] = self.description["steps"]
        self._module_names: dict[int, str] = {}
        for number, operation in enumerate(self._operations, start=1):
            kind = OPERATIONS[operation["op"]]
            if kind.layer is not None:
                name = operation.get("name", f"_{operation['op']}_{number}")
                fields = {field: operation[field] for field in kind.fields if field != "name"}
                _place(self, name, kind.layer(shapes[operation["inputs"][0]][0], **fields, device="meta"))
                self._module_names[number] = name
        # activations are large and most are read once: each goes after the operation that reads it last
        self._last_use = {value: number for number, each in enumerate(self._operations, 1) for value in each["inputs"]}
        self._last_use[description["output"]] = len(self._operations) + 1

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the output, usually (N, classes). Raises CompactionError for images of another size."""
        if tuple(x.shape[1:]) != self.input_size:
            raise CompactionError(
                f"got images of shape {tuple(x.shape[1:])}: this network was made for {self.input_size}; compact the "
                "original network with the input_size you need"
            )
        values = {0: x}
        for number, operation in enumerate(self._operations, start=1):
            inputs = [values[value] for value in operation["inputs"]] or [x]
            if number in self._module_names:
                values[number] = self.get_submodule(self._module_names[number])(*inputs)
            else:
                run = OPERATIONS[operation["op"]].run
                assert run is not None
                values[number] = run(operation, *inputs)
            values = {value: held for value, held in values.items() if self._last_use.get(value, 0) > number}
        return values[self.description["output"]]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = True) -> Any:
        """As nn.Module does, with `assign=True`, because the parameters of a new network are on the "meta" device."""
        return super().load_state_dict(state_dict, strict, assign)

    def extra_repr(self) -> str:
        """The image size and how many operations there are."""
        return f"input_size={self.input_size}, {len(self._operations)} operations"


def value_shapes(description: Mapping[str, Any]) -> list[Shape]:
    """Shape of every value for one image, the input first. Allocates nothing; raises CompactionError (all checks)."""
    if not isinstance(description, Mapping) or set(description) != {"format", "input_size", "steps", "output"}:
        raise _damaged("the description", "needs exactly format, input_size, steps and output")
    if description["format"] != FORMAT:
        raise CompactionError(
            f"the description has format {description['format']!r:.50}: this version reads format {FORMAT}; compact "
            "the original network again"
        )
    size, operations = description["input_size"], description["steps"]
    if not isinstance(operations, list) or not 1 <= len(operations) <= MAX_OPERATIONS:
        raise _damaged("steps", f"need a list of 1 to {MAX_OPERATIONS} operations")
    where = "input_size"
    try:
        INPUT_SIZE("input_size", size)
        shapes: list[Shape] = [tuple(size)]
        for number, operation in enumerate(operations, start=1):
            where = f"step {number}"
            _check_fields(operation, number)
            shapes.append(_result(operation, [shapes[value] for value in operation["inputs"]]))
        where = "output"
        check_range("output", description["output"], 1, len(operations), error=ValueError)
    except ValueError as error:
        raise _damaged(where, str(error)) from error
    return shapes


def _check_fields(operation: Any, number: int) -> None:
    name = operation.get("op") if isinstance(operation, dict) else operation
    if not isinstance(operation, dict) or not isinstance(name, str) or name not in OPERATIONS:
        raise ValueError(f"operation {name!r:.50} is unknown: need one of {', '.join(OPERATIONS)}")
    kind = OPERATIONS[name]
    if set(operation) != {"op", "inputs", *kind.fields}:
        raise ValueError(f"{name} needs exactly the fields {', '.join(('op', 'inputs', *kind.fields))}")
    inputs = operation["inputs"]
    if not isinstance(inputs, (list, tuple)) or len(inputs) != kind.inputs:
        raise ValueError(f"{name} has inputs={inputs!r:.50}: need a list of {kind.inputs}")
    for value in inputs:
        check_range(f"{name} has an input", value, 0, number - 1, error=ValueError)
    for field, check in kind.fields.items():
        check(f"{name} has {field}", operation[field])


def _result(operation: Operation, sources: list[Shape]) -> Shape:
    """Shape that an operation gives. Raises ValueError where its inputs do not fit, or the result is too large."""
    kind = OPERATIONS[operation["op"]]
    if kind.dimensions and any(len(source) != kind.dimensions for source in sources):
        raise ValueError(f"{operation['op']} cannot read a value of shape {sources[0]}")
    shape = kind.shape(operation, sources)
    if math.prod(shape) > MAX_VALUES or shape[0] > MAX_CHANNELS or min(shape) < 1:
        limits = f"1 to {MAX_CHANNELS} channels and at most {MAX_VALUES} numbers"
        raise ValueError(f"{operation['op']} gives a value of shape {shape}: need {limits}")
    return shape


def _place(root: nn.Module, name: str, module: nn.Module) -> None:
    """Make `module` the submodule `name` of `root`, with plain modules on the way to it."""
    *path, leaf = name.split(".")
    parent = root
    for part in path:
        if not hasattr(parent, part):
            parent.add_module(part, nn.Module())
        parent = getattr(parent, part)
        if type(parent) is not nn.Module:
            raise _damaged(f"layer {name!r}", f"{part!r} is an attribute or a layer already")
    if hasattr(parent, leaf):
        raise _damaged(f"layer {name!r}", f"{leaf!r} is an attribute or a layer already")
    parent.add_module(leaf, module)


def _damaged(where: str, what: str) -> CompactionError:
    return CompactionError(f"{where}: {what}; the description is damaged: compact the original network again")

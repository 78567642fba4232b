"""A network built from a description (src/pruning/operations.py): ordinary layers and what joins them.

A description may come out of a file that somebody else wrote: only operations of the table are built, with the fields
they have, and on the "meta" device, so that no size in it allocates anything.
Axis letters: N batch, C channels, H W space.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from src.pruning.operations import OPERATIONS, Operation
from utils_quantization import default_tensors

FORMAT = 2
COMPACT_AGAIN = "compact the original network again"


class CompactionError(ValueError):
    """A network that cannot be made smaller exactly, or a description that cannot be built."""


class CompactNetwork(nn.Module):
    """The network that `description` says: (N, C, H, W) images of its `input_size` -> the result of its `output`.

    description: a copy, which `json.dumps` can write. shapes: of every value for one image, the image first.
    Layers keep the names they had in the network it was made from, and so do the keys of the state dictionary. Restore
    with `net = CompactNetwork(description); net.load_state_dict(state)`: until then its parameters are on the "meta"
    device and nothing is allocated; it takes over the state's tensors, with their device and dtype.
    Raises CompactionError for a description that is damaged.
    """

    @default_tensors()
    def __init__(self, description: Mapping[str, Any]) -> None:
        super().__init__()
        if description.get("format") != FORMAT:
            raise CompactionError(
                f"the description has format {description.get('format')!r:.50}: this version reads format {FORMAT}; "
                f"{COMPACT_AGAIN}"
            )
        self.description = copy.deepcopy(dict(description))
        self._module_names: dict[int, str] = {}
        try:
            values = {0: torch.empty(1, *description["input_size"], device="meta")}
            self._operations: list[Operation] = self.description["steps"]
            for number, operation in enumerate(self._operations, start=1):
                inputs = [values[value] for value in operation["inputs"]] or [values[0]]
                self._build(number, operation, inputs[0].shape[1])
                self.eval()  # BatchNorm then takes a single image
                values[number] = self._result(number, operation, inputs)
            values[description["output"]]
            self.train()
        except Exception as error:  # whatever Python and torch say of fields and sizes that do not fit
            reason = f"{type(error).__name__}: {error}"
            raise CompactionError(f"the description is damaged ({reason:.200}); {COMPACT_AGAIN}") from error
        self.shapes = [tuple(value.shape[1:]) for value in values.values()]
        self.input_size = self.shapes[0]
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
            values[number] = self._result(number, operation, inputs)
            values = {value: held for value, held in values.items() if self._last_use.get(value, 0) > number}
        return values[self.description["output"]]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = True) -> Any:
        """As nn.Module does, with `assign=True`, because the parameters of a new network are on the "meta" device."""
        return super().load_state_dict(state_dict, strict, assign)

    def _build(self, number: int, operation: Operation, channels: int) -> None:
        """Add the module of an operation, if it has one. channels: of its input."""
        kind = OPERATIONS[operation["op"]]
        if kind.layer is not None:
            fields = {field: operation[field] for field in kind.fields if field != "name"}
            self._module_names[number] = operation.get("name", f"_{operation['op']}_{number}")
            *path, leaf = self._module_names[number].split(".")
            parent: nn.Module = self
            for part in path:
                if part not in dict(parent.named_children()):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(leaf, kind.layer(channels, **fields, device="meta"))

    def _result(self, number: int, operation: Operation, inputs: list[Tensor]) -> Tensor:
        if number in self._module_names:
            return cast(Tensor, self.get_submodule(self._module_names[number])(*inputs))
        run = OPERATIONS[operation["op"]].run
        assert run is not None
        return run(operation, *inputs)

"""A network built from a description (src/pruning/compact_description.py): ordinary layers and what joins them.

Axis letters: N batch, C channels, H W space.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.pruning.compact_description import CompactionError, Operation, Shape, value_shapes


class CompactNetwork(nn.Module):
    """The network that `description` says: (N, C, H, W) images of its `input_size` -> what its `output` step gives.

    Layers keep the names they had in the network it was made from, and so do the keys of the state dictionary. Restore
    with `net = CompactNetwork(description); net.load_state_dict(state)`. device, dtype: of the new parameters; on the
    "meta" device nothing is allocated until `load_state_dict(state, assign=True)`.
    Raises CompactionError for a description that is damaged, or larger than its limits.
    """

    def __init__(
        self, description: Mapping[str, Any], device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        shapes = value_shapes(description)
        self._description = copy.deepcopy(dict(description))
        self._input_size: Shape = shapes[0]
        self._output = int(description["output"])
        self._steps: list[Operation] = self._description["steps"]
        self._finished = _last_uses(self._steps, self._output)
        # Index lists are part of the description: they are no part of the state, and exist on "meta" too.
        place = None if device is None or torch.device(device).type == "meta" else device
        for number, step in enumerate(self._steps, start=1):
            if step["op"] == "select":
                available = shapes[step["inputs"][0]][0]  # also the index of the zero channel that `_select` adds
                indices = [available if channel < 0 else channel for channel in step["channels"]]
                self.register_buffer(_index_name(number), torch.tensor(indices, device=place), persistent=False)
        for step in self._steps:
            if step["op"] in _LAYERS:
                channels = shapes[step["inputs"][0]][0]
                layer = _LAYERS[step["op"]](step, channels, {"device": device, "dtype": dtype})
                _place(self, step["name"], layer)

    @classmethod
    def from_description(
        cls, description: Mapping[str, Any], device: torch.device | str | None = None
    ) -> CompactNetwork:
        """The network of a description that was read from somewhere. Raises CompactionError (see the class)."""
        return cls(description, device)

    @property
    def description(self) -> dict[str, Any]:
        """The description, a copy, ready for `json.dumps`."""
        return copy.deepcopy(self._description)

    @property
    def input_size(self) -> Shape:
        """(C, H, W) of one image."""
        return self._input_size

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the output, usually (N, classes). Raises CompactionError for images of another size."""
        if tuple(x.shape[1:]) != self._input_size:
            raise CompactionError(
                f"got images of shape {tuple(x.shape[1:])}: this network was made for {self._input_size}; compact the "
                "original network with the input_size you need"
            )
        image = x
        values = {0: x}
        for number, step in enumerate(self._steps, start=1):
            sources = [values[value] for value in step["inputs"]]
            values[number] = self._run(number, step, sources, image)
            for value in self._finished[number]:
                del values[value]
        return values[self._output]

    def _run(self, number: int, step: Operation, sources: list[Tensor], image: Tensor) -> Tensor:
        kind = step["op"]
        if kind == "fill":
            return image.new_full((image.shape[0], *step["size"]), step["value"])
        if kind == "join":
            return torch.cat(sources, dim=1)
        if kind == "add":
            return sources[0] + sources[1]
        x = sources[0]
        if kind in _LAYERS:
            return cast(Tensor, self.get_submodule(step["name"])(x))
        if kind == "relu":
            return F.relu(x)
        if kind == "flatten":
            return x.flatten(1)
        if kind == "stride":
            return x[:, :, :: step["step"], :: step["step"]]
        if kind == "select":
            return self._select(number, step["channels"], x)
        return _pool(step, x)

    def _select(self, number: int, channels: Sequence[int], x: Tensor) -> Tensor:
        behind = (0, 0, 0, 0) if x.dim() == 4 else ()
        padding = _plain_padding(channels, x.shape[1])
        if padding is not None:
            return F.pad(x, (*behind, *padding))
        if min(channels) < 0:
            x = F.pad(x, (*behind, 0, 1))
        return x.index_select(1, self.get_buffer(_index_name(number)))

    def extra_repr(self) -> str:
        return f"input_size={self._input_size}, {len(self._steps)} steps"


class Shift(nn.Module):
    """x + one learnable constant per channel: what removed channels added to those that stayed."""

    def __init__(
        self, channels: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.value.view(-1, *[1] * (x.dim() - 2))


def _conv(step: Operation, channels: int, at: dict[str, Any]) -> nn.Module:
    settings = {key: _tuple(step[key]) for key in ("stride", "padding", "dilation")}
    return nn.Conv2d(channels, step["out"], tuple(step["kernel"]), bias=step["bias"], **settings, **at)


def _linear(step: Operation, channels: int, at: dict[str, Any]) -> nn.Module:
    return nn.Linear(channels, step["out"], bias=step["bias"], **at)


def _batchnorm(step: Operation, channels: int, at: dict[str, Any]) -> nn.Module:
    return nn.BatchNorm2d(channels, eps=step["eps"], momentum=step["momentum"], affine=step["affine"], **at)


def _shift(step: Operation, channels: int, at: dict[str, Any]) -> nn.Module:
    return Shift(channels, **at)


_LAYERS: dict[str, Callable[[Operation, int, dict[str, Any]], nn.Module]] = {
    "conv": _conv,
    "linear": _linear,
    "batchnorm": _batchnorm,
    "shift": _shift,
}


def _pool(step: Operation, x: Tensor) -> Tensor:
    if step["kernel"] is None:
        return F.adaptive_avg_pool2d(x, 1) if step["average"] else F.adaptive_max_pool2d(x, 1)
    pool = F.avg_pool2d if step["average"] else F.max_pool2d
    return pool(x, step["kernel"], step["stride"])


def _plain_padding(channels: Sequence[int], available: int) -> tuple[int, int] | None:
    """(before, after) where the selection is all channels in order between runs of zeros, None where it is not."""
    before = next((place for place, channel in enumerate(channels) if channel >= 0), 0)
    after = len(channels) - before - available
    if after < 0 or list(channels[before : before + available]) != list(range(available)):
        return None
    return (before, after) if all(channel < 0 for channel in channels[before + available :]) else None


def _last_uses(steps: Sequence[Operation], output: int) -> list[list[int]]:
    """Values that are not needed any more after each step; activations are large, and most are read once."""
    last = {value: number for number, step in enumerate(steps, start=1) for value in (number, *step["inputs"])}
    finished: list[list[int]] = [[] for _ in range(len(steps) + 1)]
    for value, number in last.items():
        if value != output:
            finished[number].append(value)
    return finished


def _place(root: nn.Module, name: str, layer: nn.Module) -> None:
    *path, leaf = name.split(".")
    parent = root
    for part in path:
        if part not in parent._modules:
            _add(parent, part, nn.Module(), name)
        parent = cast(nn.Module, parent._modules[part])
    _add(parent, leaf, layer, name)


def _add(parent: nn.Module, part: str, module: nn.Module, name: str) -> None:
    if hasattr(parent, part):
        raise CompactionError(f"a layer cannot be called {name!r}: {part!r} is an attribute already; rename the module")
    parent.add_module(part, module)


def _index_name(number: int) -> str:
    return f"_channels_{number}"


def _tuple(value: Any) -> Any:
    return value if isinstance(value, str) else tuple(value)

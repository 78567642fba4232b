"""The table of operations: what a compact network can compute, and all there is to know about each operation.

A compact network is described by plain data (JSON): the image size, its operations in the order they run, and which one
gives the output. Value 0 is the image, value i the result of operation i, so that `{"op": "add", "inputs": [3, 7]}`
adds what operations 3 and 7 gave.

    conv, linear, batchnorm   nn.Conv2d, nn.Linear, nn.BatchNorm2d
    shift                     x + one learnable constant per channel
    relu, add, flatten        as named
    pool                      average or maximum; kernel_size null: over all pixels
    stride                    every step-th row and column
    select                    channel j is input channel channels[j], zeros for -1
    fill                      (N, *size) of one number, 0 or 1
    join                      the channels of its two inputs, one after the other

A row of the table says which fields an operation has, and how torch computes it. Fields of layers have the names of
torch's own arguments. The traced graph (src/pruning/graph.py) uses the same names and fields;
src/export/onnx_file.py has an ONNX writer for every row. `fill` reads no value, but is given the image, which says how
many there are, and where.

Axis letters: N batch, C channels, H W space.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Operation = dict[str, Any]


@dataclass(frozen=True)
class OperationType:
    """One row of the table.

    fields: what an operation says besides "op" and "inputs".
    run: operation, inputs -> result, for an operation without a module of its own.
    layer: class of the module that computes it, for all others, made of the input channels and the fields.
    """

    fields: tuple[str, ...] = ()
    run: Callable[..., Tensor] | None = None
    layer: Callable[..., nn.Module] | None = None


class Shift(nn.Module):
    """x + one learnable constant per channel: what removed channels added to those that stayed."""

    def __init__(self, channels: int, device: str) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.empty(channels, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) or (N, C) -> the same shape."""
        return x + self.value.view(-1, *[1] * (x.dim() - 2))


class Select(nn.Module):
    """Channel j is input channel `channels[j]`, or zeros where that is -1. available: how many channels the input has.

    The indices belong to the description: they are there before the state is, follow the network to a device, and are
    not part of its state.
    """

    def __init__(self, available: int, channels: list[int], device: str) -> None:
        super().__init__()
        self.padded = min(channels) < 0
        indices = torch.tensor([available if channel < 0 else channel for channel in channels])
        self.register_buffer("indices", indices, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) or (N, C) -> the same with the selected channels."""
        if self.padded:  # one channel of zeros after the others
            x = F.pad(x, (*[0, 0] * (x.dim() - 2), 0, 1))
        return x.index_select(1, self.get_buffer("indices"))


def settings_of(kind: str, module: nn.Module) -> dict[str, Any]:
    """The fields of an operation that a module of the original network gives, without its name, width and bias."""
    found = {name: getattr(module, name) for name in OPERATIONS[kind].fields if name not in WRITTEN_ANEW}
    if found.get("padding") == "valid":
        found["padding"] = (0, 0)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def _pool(operation: Operation, x: Tensor) -> Tensor:
    if operation["kernel_size"] is None:
        return F.adaptive_avg_pool2d(x, 1) if operation["average"] else F.adaptive_max_pool2d(x, 1)
    pool = F.avg_pool2d if operation["average"] else F.max_pool2d
    return pool(x, operation["kernel_size"], operation["stride"])


WRITTEN_ANEW = ("name", "out_channels", "out_features", "bias")  # fields that removal changes
OPERATIONS: dict[str, OperationType] = {
    "conv": OperationType(
        ("name", "out_channels", "kernel_size", "stride", "padding", "dilation", "bias"), layer=nn.Conv2d
    ),
    "linear": OperationType(("name", "out_features", "bias"), layer=nn.Linear),
    "batchnorm": OperationType(("name", "eps", "momentum", "affine"), layer=nn.BatchNorm2d),
    "shift": OperationType(("name",), layer=Shift),
    "relu": OperationType(run=lambda operation, x: F.relu(x)),
    "flatten": OperationType(run=lambda operation, x: x.flatten(1)),
    "add": OperationType(run=lambda operation, x, y: x + y),
    "join": OperationType(run=lambda operation, x, y: torch.cat([x, y], dim=1)),
    "pool": OperationType(("average", "kernel_size", "stride"), run=_pool),
    "stride": OperationType(("step",), run=lambda operation, x: x[:, :, :: operation["step"], :: operation["step"]]),
    "select": OperationType(("channels",), layer=Select),
    "fill": OperationType(
        ("value", "size"),
        run=lambda operation, image: image.new_full((image.shape[0], *operation["size"]), operation["value"]),
    ),
}

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

A row of the table says which fields an operation has and what they may hold, the shape of its result, and how torch
computes it. Fields of layers have the names of torch's own arguments. The traced graph (src/pruning/graph.py) uses the
same names and fields; src/export/onnx_file.py has an ONNX writer for every row.

`fill` reads no value, but is given the image, which says how many there are, and where.

Axis letters: N batch, C channels, H W space. A shape is that of one image's value, without N.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.quantizer import check_range

MAX_CHANNELS = 2**16
MAX_SIDE = 2**12  # pixels along one side of an image or kernel
NAME = re.compile(r"[A-Za-z0-9_]{1,100}(\.[A-Za-z0-9_]{1,100}){0,9}")

Operation = dict[str, Any]
Shape = tuple[int, ...]  # of one image's value: (C, H, W), or (C,) for features
Check = Callable[[str, Any], None]  # (name of the field, its value) -> None, or ValueError


@dataclass(frozen=True)
class OperationType:
    """One row of the table.

    fields: what an operation says besides "op" and "inputs", and the check of each field.
    inputs: how many values it reads. dimensions: of which kind: 3 for (C, H, W), 1 for features, None for both.
    shape: operation, shapes of its inputs -> shape of its result. Raises ValueError where they do not fit.
    run: operation, inputs -> result, for an operation without a module of its own.
    layer: class of the module that computes it, for all others, made of the input channels and the fields.
    """

    fields: Mapping[str, Check] = field(default_factory=dict)
    inputs: int = 1
    dimensions: int | None = None
    shape: Callable[[Operation, list[Shape]], Shape] = lambda operation, sources: sources[0]
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


def _number(lowest: float, highest: float, whole: bool = True) -> Check:
    return lambda name, value: check_range(name, value, lowest, highest, whole=whole, error=ValueError)


def _numbers(lowest: int, highest: int, shortest: int, longest: int) -> Check:
    def check(name: str, value: Any) -> None:
        if not isinstance(value, (list, tuple)) or not shortest <= len(value) <= longest:
            raise ValueError(f"{name}={value!r:.80}: need a list of {shortest}..{longest} numbers")
        for number in value:
            check_range(name, number, lowest, highest, error=ValueError)

    return check


def _or(literal: str | None, check: Check) -> Check:
    return lambda name, value: None if value is None is literal or value == literal else check(name, value)


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r:.80}: need true or false")


def _path(name: str, value: Any) -> None:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise ValueError(f"{name}={value!r:.80}: need a module path such as 'layer1.0.conv1'")


def _conv_shape(operation: Operation, sources: list[Shape]) -> Shape:
    _, *sides = sources[0]
    kernel, stride, padding, dilation = (operation[name] for name in ("kernel_size", "stride", "padding", "dilation"))
    if padding == "same":
        if tuple(stride) != (1, 1):
            raise ValueError(f"padding='same' with stride {tuple(stride)}: need stride 1")
        return (operation["out_channels"], *sides)
    return (
        operation["out_channels"],
        *(_windows(sides[i], kernel[i], stride[i], padding[i], dilation[i]) for i in (0, 1)),
    )


def _windows(side: int, kernel: int, stride: int, padding: int = 0, dilation: int = 1) -> int:
    """Places along one side where a window of `kernel` fits."""
    return (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _pool_shape(operation: Operation, sources: list[Shape]) -> Shape:
    channels, *sides = sources[0]
    kernel, stride = operation["kernel_size"], operation["stride"]
    if (kernel is None) != (stride is None):
        raise ValueError(f"kernel_size={kernel} and stride={stride}: need two numbers, or null for both")
    return (channels, *(1 if kernel is None else _windows(side, kernel, stride) for side in sides))


def _pool(operation: Operation, x: Tensor) -> Tensor:
    if operation["kernel_size"] is None:
        return F.adaptive_avg_pool2d(x, 1) if operation["average"] else F.adaptive_max_pool2d(x, 1)
    pool = F.avg_pool2d if operation["average"] else F.max_pool2d
    return pool(x, operation["kernel_size"], operation["stride"])


def _add_shape(operation: Operation, sources: list[Shape]) -> Shape:
    if sources[0] != sources[1]:
        raise ValueError(f"cannot add values of shapes {sources[0]} and {sources[1]}")
    return sources[0]


def _join_shape(operation: Operation, sources: list[Shape]) -> Shape:
    if sources[0][1:] != sources[1][1:]:
        raise ValueError(f"cannot join values of shapes {sources[0]} and {sources[1]}")
    return (sources[0][0] + sources[1][0], *sources[0][1:])


def _select_shape(operation: Operation, sources: list[Shape]) -> Shape:
    if max(operation["channels"]) >= sources[0][0]:
        raise ValueError(f"channel {max(operation['channels'])} of a value with {sources[0][0]} channels")
    return (len(operation["channels"]), *sources[0][1:])


def _fill_shape(operation: Operation, sources: list[Shape]) -> Shape:
    if len(operation["size"]) == 2:
        raise ValueError(f"size={operation['size']}: need one or three numbers")
    return tuple(operation["size"])


def settings_of(kind: str, module: nn.Module) -> dict[str, Any]:
    """The fields of an operation that a module of the original network gives, without its name, width and bias."""
    found = {name: getattr(module, name) for name in OPERATIONS[kind].fields if name not in WRITTEN_ANEW}
    if found.get("padding") == "valid":
        found["padding"] = (0, 0)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


WRITTEN_ANEW = ("name", "out_channels", "out_features", "bias")  # fields that removal changes
INPUT_SIZE = _numbers(1, MAX_SIDE, 3, 3)
COUNT, SIDE, PAIR = _number(1, MAX_CHANNELS), _number(1, MAX_SIDE), _numbers(1, MAX_SIDE, 2, 2)
OPERATIONS: dict[str, OperationType] = {
    "conv": OperationType(
        fields={
            "name": _path,
            "out_channels": COUNT,
            "kernel_size": PAIR,
            "stride": PAIR,
            "padding": _or("same", _numbers(0, MAX_SIDE, 2, 2)),
            "dilation": PAIR,
            "bias": _flag,
        },
        dimensions=3,
        shape=_conv_shape,
        layer=nn.Conv2d,
    ),
    "linear": OperationType(
        fields={"name": _path, "out_features": COUNT, "bias": _flag},
        dimensions=1,
        shape=lambda operation, sources: (operation["out_features"],),
        layer=nn.Linear,
    ),
    "batchnorm": OperationType(
        fields={
            "name": _path,
            "eps": _number(0, 1e6, whole=False),
            "momentum": _or(None, _number(0, 1, whole=False)),
            "affine": _flag,
        },
        dimensions=3,
        layer=nn.BatchNorm2d,
    ),
    "shift": OperationType(fields={"name": _path}, layer=Shift),
    "relu": OperationType(run=lambda operation, x: F.relu(x)),
    "flatten": OperationType(
        shape=lambda operation, sources: (math.prod(sources[0]),), run=lambda operation, x: x.flatten(1)
    ),
    "add": OperationType(inputs=2, shape=_add_shape, run=lambda operation, x, y: x + y),
    "join": OperationType(inputs=2, shape=_join_shape, run=lambda operation, x, y: torch.cat([x, y], dim=1)),
    "pool": OperationType(
        fields={"average": _flag, "kernel_size": _or(None, SIDE), "stride": _or(None, SIDE)},
        dimensions=3,
        shape=_pool_shape,
        run=_pool,
    ),
    "stride": OperationType(
        fields={"step": SIDE},
        dimensions=3,
        shape=lambda operation, sources: (sources[0][0], *(-(-side // operation["step"]) for side in sources[0][1:])),
        run=lambda operation, x: x[:, :, :: operation["step"], :: operation["step"]],
    ),
    "select": OperationType(
        fields={"channels": _numbers(-1, MAX_CHANNELS, 1, MAX_CHANNELS)},
        shape=_select_shape,
        layer=Select,
    ),
    "fill": OperationType(
        fields={"value": _number(0, 1), "size": _numbers(1, MAX_CHANNELS, 1, 3)},
        inputs=0,
        shape=_fill_shape,
        run=lambda operation, image: image.new_full((image.shape[0], *operation["size"]), operation["value"]),
    ),
}

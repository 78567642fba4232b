"""The table of operations: what a compact network can compute, and all there is to know about each operation.

A compact network is described by plain data (JSON): the image size, its operations in the order they run, and which one
gives the output. Value 0 is the image, value i the result of operation i, so that `{"op": "add", "inputs": [3, 7]}`
adds what operations 3 and 7 gave. There are

    layers          which mix channels: conv, conv_transpose (of 1 to 3 dimensions), linear
    channelwise     every channel of the output comes from one channel of each input; `src/pruning/graph.py` says which:
                    batchnorm, prelu, scale, shift     with parameters for each channel
                    activations, add, sub, mul, ...    alike for all channels
                    pools, mean, pad, resize, slice    within a channel
                    select, join, flatten, permute     which channel stands where
    mixing          softmax, groupnorm, layernorm, instancenorm, pixel_shuffle: all channels they read stay
    fill            (N, *size) of one number, 0 or 1
    input, collect  a further input of the network; several outputs, as a tuple or a dict
    own             anything else, exactly as the user's network does it: its code is not in the description

A row of the table says which fields an operation has, and how torch computes it. Fields have the names of torch's own
arguments. src/export/onnx_file.py has an ONNX writer for every row but `own`.
Axis letters: N batch, C channels, H W space.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Operation = dict[str, Any]
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
INSTANCE_NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@dataclass(frozen=True)
class OperationType:
    """One row of the table.

    fields: what an operation says besides "op" and "inputs". usual: values that it need not say.
    run: fields by name, and inputs -> result, for an operation without a module of its own.
    layer: makes the module that computes it, for all others, from the input channels and the fields.
    """

    fields: tuple[str, ...] = ()
    run: Callable[..., Any] | None = None
    layer: Callable[..., nn.Module] | None = None
    usual: Mapping[str, Any] = field(default_factory=dict)


class PerChannel(nn.Module):
    """What scale and shift have in common: one learnable number for each channel, which lie along dimension `dim`."""

    def __init__(self, channels: int, device: str, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim
        self.value = nn.Parameter(torch.empty(channels, device=device))

    def spread(self, x: Tensor) -> Tensor:
        """The numbers, in a shape that broadcasts over x."""
        return self.value.view(-1, *[1] * (x.dim() - 1 - self.dim))


class Scale(PerChannel):
    """x * one learnable number per channel."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, ..., C, ...) -> the same shape."""
        return x * self.spread(x)


class Shift(PerChannel):
    """x + one learnable number per channel: a bias, or what removed channels added to those that stayed."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, ..., C, ...) -> the same shape."""
        return x + self.spread(x)


class Select(nn.Module):
    """Channel j is input channel `channels[j]`, or zeros where that is -1. available: how many channels the input has.

    The indices belong to the description: they are there before the state is, follow the network to a device, and are
    not part of its state.
    """

    def __init__(self, available: int, channels: list[int], device: str, dim: int = 1) -> None:
        super().__init__()
        self.padded, self.dim = min(channels) < 0, dim
        indices = torch.tensor([available if channel < 0 else channel for channel in channels])
        self.register_buffer("indices", indices, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, ..., C, ...) -> the same with the selected channels."""
        if self.padded:  # one channel of zeros after the others
            x = F.pad(x, (*[0, 0] * (x.dim() - 1 - self.dim), 0, 1))
        return x.index_select(self.dim, self.get_buffer("indices"))


def _conv(channels: int, kernel_size: Any, **fields: Any) -> nn.Module:
    return CONVOLUTIONS[len(kernel_size)](channels, kernel_size=kernel_size, **fields)


def _conv_transpose(channels: int, kernel_size: Any, **fields: Any) -> nn.Module:
    return TRANSPOSED[len(kernel_size)](channels, kernel_size=kernel_size, **fields)


def _batchnorm(channels: int, dims: int, bias: bool, **fields: Any) -> nn.Module:
    return NORMS[dims](channels, **fields, **({} if bias else {"bias": False}))


def _groupnorm(channels: int, num_groups: int, **fields: Any) -> nn.Module:
    return nn.GroupNorm(num_groups, channels, **fields)


def _layernorm(channels: int, affine: bool, dim: int, **fields: Any) -> nn.Module:
    return nn.LayerNorm(channels, elementwise_affine=affine, **fields)


def _instancenorm(channels: int, dims: int, **fields: Any) -> nn.Module:
    return INSTANCE_NORMS[dims](channels, **fields)


def _prelu(channels: int, shared: bool, device: str) -> nn.Module:
    return nn.PReLU(1 if shared else channels, device=device)


def of_space(name: str) -> Callable[..., Tensor]:
    """`F.<name>1d`, 2d or 3d, for as many dimensions behind the channels as the input has."""
    return lambda x, **fields: getattr(F, f"{name}{x.dim() - 2}d")(x, **fields)


def _avg_pool(x: Tensor, *, divisor_override: int | None = None, **fields: Any) -> Tensor:
    extra = {} if divisor_override is None else {"divisor_override": divisor_override}  # not in one dimension
    return of_space("avg_pool")(x, **fields, **extra)


def _slice(x: Tensor, *, slices: list[list[int | None]]) -> Tensor:
    return x[(slice(None), slice(None), *(slice(*each) for each in slices))]


def _collect(*values: Any, keys: list[str] | None = None) -> Any:
    return values if keys is None else dict(zip(keys, values, strict=True))


# Functions of one input that act on every number alone: their fields, and the values that torch gives them.
ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "relu": (torch.relu, {}),
    "relu6": (F.relu6, {}),
    "leaky_relu": (F.leaky_relu, {"negative_slope": 0.01}),
    "elu": (F.elu, {"alpha": 1.0}),
    "selu": (F.selu, {}),
    "celu": (F.celu, {"alpha": 1.0}),
    "gelu": (F.gelu, {"approximate": "none"}),
    "silu": (F.silu, {}),
    "mish": (F.mish, {}),
    "hardswish": (F.hardswish, {}),
    "hardsigmoid": (F.hardsigmoid, {}),
    "hardtanh": (F.hardtanh, {"min_val": -1.0, "max_val": 1.0}),
    "sigmoid": (torch.sigmoid, {}),
    "tanh": (torch.tanh, {}),
    "softplus": (F.softplus, {"beta": 1.0, "threshold": 20.0}),
    "softsign": (F.softsign, {}),
    "abs": (torch.abs, {}),
    "neg": (torch.neg, {}),
    "clamp": (torch.clamp, {"min": None, "max": None}),
    "contiguous": (lambda x: x.contiguous(), {}),
}
WRITTEN_ANEW = ("name", "out_channels", "out_features", "bias")  # fields that removal changes
WINDOW = ("kernel_size", "stride", "padding")
OPERATIONS: dict[str, OperationType] = {
    "conv": OperationType(
        ("name", "out_channels", *WINDOW, "dilation", "groups", "padding_mode", "bias"),
        layer=_conv,
        usual={"groups": 1, "padding_mode": "zeros"},
    ),
    "conv_transpose": OperationType(
        ("name", "out_channels", *WINDOW, "output_padding", "dilation", "bias"), layer=_conv_transpose
    ),
    "linear": OperationType(("name", "out_features", "bias"), layer=nn.Linear),
    "batchnorm": OperationType(
        ("name", "dims", "eps", "momentum", "affine", "bias"),
        layer=_batchnorm,
        usual={"dims": 2, "affine": True, "bias": True},
    ),
    "prelu": OperationType(("name", "shared"), layer=_prelu),
    "scale": OperationType(("name", "dim"), layer=Scale, usual={"dim": 1}),
    "shift": OperationType(("name", "dim"), layer=Shift, usual={"dim": 1}),
    "select": OperationType(("channels", "dim"), layer=Select, usual={"dim": 1}),
    **{name: OperationType(tuple(fields), run=run) for name, (run, fields) in ACTIVATIONS.items()},
    "groupnorm": OperationType(("name", "num_groups", "eps", "affine"), layer=_groupnorm),
    "layernorm": OperationType(("name", "eps", "affine", "dim"), layer=_layernorm),
    "instancenorm": OperationType(("name", "dims", "eps", "affine"), layer=_instancenorm),
    "pixel_shuffle": OperationType(("upscale_factor",), run=F.pixel_shuffle),
    "softmax": OperationType(("dim",), run=torch.softmax),
    "log_softmax": OperationType(("dim",), run=torch.log_softmax),
    "affine": OperationType(("scale", "shift"), run=lambda x, scale, shift: x * scale + shift),
    "add": OperationType(run=lambda x, y: x + y),
    "sub": OperationType(run=lambda x, y: x - y),
    "mul": OperationType(run=lambda x, y: x * y),
    "join": OperationType(("dim",), run=lambda *inputs, dim: torch.cat(inputs, dim), usual={"dim": 1}),
    "max_pool": OperationType((*WINDOW, "dilation", "ceil_mode"), run=of_space("max_pool")),
    "avg_pool": OperationType((*WINDOW, "ceil_mode", "count_include_pad", "divisor_override"), run=_avg_pool),
    "adaptive_avg_pool": OperationType(("output_size",), run=of_space("adaptive_avg_pool")),
    "adaptive_max_pool": OperationType(("output_size",), run=of_space("adaptive_max_pool")),
    "mean": OperationType(("dim", "keepdim"), run=lambda x, dim, keepdim: x.mean(dim, keepdim)),
    "pad": OperationType(("pad", "mode", "value"), run=lambda x, pad, mode, value: F.pad(x, pad, mode, value)),
    "resize": OperationType(("size", "scale_factor", "mode", "align_corners"), run=F.interpolate),
    "slice": OperationType(("slices",), run=_slice),
    "flatten": OperationType(run=lambda x: x.flatten(1)),
    "reshape": OperationType(("space",), run=lambda x, space: x.reshape(*x.shape[:2], *space)),
    "expand": OperationType(("space",), run=lambda x, space: x.expand(-1, -1, *space)),
    "permute": OperationType(("dims",), run=lambda x, dims: x.permute(dims)),
    "fill": OperationType(
        ("value", "size"), run=lambda image, value, size: image.new_full((image.shape[0], *size), value)
    ),
    "input": OperationType(("number",)),
    "collect": OperationType(("keys",), run=_collect),
    "own": OperationType(("name", "size")),
}


def fields_of(operation: Operation) -> dict[str, Any]:
    """The fields of an operation that its module or function takes, by name."""
    row = OPERATIONS[operation["op"]]
    said = {**row.usual, **operation}
    return {name: said[name] for name in row.fields if name != "name"}


def described(kind: str, inputs: Sequence[int], fields: Mapping[str, Any]) -> Operation:
    """An operation of a description, without the fields that have their usual values."""
    usual = OPERATIONS[kind].usual
    return {"op": kind, "inputs": list(inputs)} | {n: v for n, v in fields.items() if n not in usual or usual[n] != v}


# What torch.fx records, and which row it is: functions and methods, and modules of torch.nn without parameters. A row
# is a kind of the table, or one of dropout, pass, pad_module, batch_norm and index_select, which become another.
BINARY: dict[Any, str] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), "add"),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, "sub", "sub_"), "sub"),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), "mul"),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div, "div", "div_"), "div"),
}
PADDING_MODES = {"Reflection": "reflect", "Replication": "replicate", "Circular": "circular"}
POOL_DEFAULTS: dict[str, dict[str, Any]] = {
    "max_pool": {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False},
    "avg_pool": {
        "stride": None, "padding": 0, "ceil_mode": False, "count_include_pad": True, "divisor_override": None,
    },
    "adaptive_avg_pool": {},
    "adaptive_max_pool": {},
}  # fmt: skip
ALIASES = {"relu": ("relu_",), "clamp": ("clip", "clamp_"), "neg": ("negative",), "contiguous": ("clone",)}
MODULE_NAMES = {
    "relu": "ReLU", "relu6": "ReLU6", "leaky_relu": "LeakyReLU", "elu": "ELU", "selu": "SELU", "celu": "CELU",
    "gelu": "GELU", "silu": "SiLU", "mish": "Mish", "hardswish": "Hardswish", "hardsigmoid": "Hardsigmoid",
    "hardtanh": "Hardtanh", "sigmoid": "Sigmoid", "tanh": "Tanh", "softplus": "Softplus", "softsign": "Softsign",
}  # fmt: skip
READERS = {
    **dict.fromkeys(("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool"), "pool"),
    "log_softmax": "softmax",
    "flatten": "reshape",
}


def _functions() -> dict[Any, tuple[str, tuple[str, ...]]]:
    """Row and names of the arguments of functions and methods, by what fx records."""
    found: dict[Any, tuple[str, tuple[str, ...]]] = {}

    def enter(row: str, names: Sequence[str], *targets: Any) -> None:
        found.update(dict.fromkeys(targets, (row, ("input", *names))))

    for row, (run, fields) in ACTIVATIONS.items():
        for name in (row, *ALIASES.get(row, ())):
            made = {getattr(place, name, name) for place in (torch, F)}
            enter(row, (*fields, "inplace"), run, name, f"{name}_", *made)
    enter("neg", (), operator.neg)
    enter("pixel_shuffle", ("upscale_factor",), F.pixel_shuffle, torch.pixel_shuffle)
    for row in ("softmax", "log_softmax"):
        enter(row, ("dim", "_stacklevel", "dtype"), getattr(torch, row), getattr(F, row), row)
    window = ("kernel_size", "stride", "padding")
    for dims in (1, 2, 3):
        names = [*window, "dilation", "ceil_mode", "return_indices"]
        enter("max_pool", names, *(getattr(place, f"max_pool{dims}d") for place in (F, torch)))
        names = [*window, "ceil_mode", "count_include_pad", *(["divisor_override"] if dims > 1 else [])]
        enter("avg_pool", names, getattr(F, f"avg_pool{dims}d"))
        for row in ("adaptive_avg_pool", "adaptive_max_pool"):
            enter(row, ("output_size", "return_indices"), getattr(F, f"{row}{dims}d"))
    enter("dropout", ("p", "training", "inplace"), F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
    enter("pass", (), "float", "double")
    enter("reshape", ("start_dim", "end_dim"), torch.flatten, "flatten")
    shaped = (torch.squeeze, "squeeze", torch.unsqueeze, "unsqueeze", torch.reshape, "reshape", "view")
    enter("reshape", [f"shape{number}" for number in range(8)], *shaped)
    enter("expand", [f"size{number}" for number in range(8)], "expand", "expand_as")
    moved = (torch.permute, "permute", torch.transpose, "transpose", torch.swapaxes, "swapaxes")
    enter("permute", [f"dim{number}" for number in range(8)], *moved)
    enter("mean", ("dim", "keepdim"), torch.mean, "mean")
    enter("pad", ("pad", "mode", "value"), F.pad)
    names = ["size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias"]
    enter("resize", names, F.interpolate)
    names = ["running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"]
    enter("batch_norm", names, F.batch_norm)
    enter("fill", ("size", "fill_value"), "new_full")
    enter("index_select", ("dim", "index"), "index_select", torch.index_select)
    return found


def _modules() -> dict[Any, str]:
    """Row of the modules of torch.nn without parameters, by class."""
    named = {name: row for row, name in MODULE_NAMES.items()}
    named |= dict.fromkeys(("Identity", "Dropout", "AlphaDropout", "FeatureAlphaDropout"), "pass")
    named |= dict.fromkeys(("Upsample", "UpsamplingNearest2d", "UpsamplingBilinear2d"), "resize")
    named |= {"Softmax": "softmax", "LogSoftmax": "log_softmax", "Flatten": "flatten", "PixelShuffle": "pixel_shuffle"}
    for dims in (1, 2, 3):
        named |= {f"MaxPool{dims}d": "max_pool", f"AvgPool{dims}d": "avg_pool", f"Dropout{dims}d": "pass"}
        named |= {f"Adaptive{kind}Pool{dims}d": f"adaptive_{kind.lower()}_pool" for kind in ("Avg", "Max")}
        pads = ("ZeroPad", "ConstantPad", "ReflectionPad", "ReplicationPad", "CircularPad")
        named |= {f"{name}{dims}d": "pad_module" for name in pads}
    return {getattr(nn, name): row for name, row in named.items()}


FUNCTIONS = _functions()
MODULES = _modules()

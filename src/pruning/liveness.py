"""Which channels of a network can be taken out exactly, and what is then left of every layer.

Worked case, a basic block. If filter 3 of conv1 is zero, the channel behind it is not zero but *constant*: BatchNorm
turns 0 into beta - gamma mean / sqrt(var + eps), ReLU passes that on where it is positive, and at the border conv2's
zero padding makes its effect differ from the middle. It can still be removed: one channel of ones carries all constants
of conv2.

A convolution of several groups is left with the same number of filters and of slices in every group that stays: the
largest that any of them needs, the others filled up with zeros. Such a layer and a transposed one carry no constants:
they read the few that matter.
Axis letters: O output channels, I input channels, k kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from src.pruning.graph import LAYERS, MIXING, Op, trace
from src.pruning.groups import group_numbers, groups_of
from src.pruning.operations import OPERATIONS
from src.pruning.tracing import InputSize
from src.quantizer import check_range
from utils_quantization import CANDIDATES, eval_mode, shared_quantized_weights, unwrapped

Flags = NDArray[np.bool_]
Values = NDArray[np.float64]


# Operations that leave a constant channel what it is, wherever they put it.
MOVES = (
    *("pass", "select", "join", "flatten", "reshape", "expand", "permute", "slice", "mean"),
    *("max_pool", "adaptive_avg_pool", "adaptive_max_pool"),
)
IN_SPACE = ("avg_pool", "pad", "resize")  # which may make the border differ from the middle


@dataclass(frozen=True)
class LayerLiveness:
    """One convolution or linear layer, and what exact removal would leave of it.

    in_channels: channels that it reads, in all groups. groups: of a convolution. transposed: its weight is (I, O, ...).
    dead_out: whether all weights of the filter are zero (O,).
    kept_out, kept_in: indices of the output channels, and of the input channels read by them, after removal.
    carries_constants: whether the layer then needs one more input channel, of ones, for the constants it reads.
    pixels: how often each weight is used for one image. parameter: which of the module's parameters the weight is.
    """

    name: str
    out_channels: int
    in_channels: int
    dead_out: Flags
    kept_out: NDArray[np.int64]
    kept_in: NDArray[np.int64]
    carries_constants: bool
    pixels: int
    groups: int = 1
    transposed: bool = False
    parameter: str = "weight"

    @property
    def inputs_after_removal(self) -> int:
        """Input channels of the smaller layer, with the channel of ones."""
        return len(self.kept_in) + int(self.carries_constants)

    def arrangement(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of the smaller layer, the input channel in each of its places, (G, I'), and the position among `kept_out` of
        the filter in each, (G, O'), -1 where there is none. G: groups of which a filter is kept.
        """
        out_group = self.kept_out // (self.out_channels // self.groups)
        in_group = self.kept_in // (self.in_channels // self.groups)
        blocks = [(np.flatnonzero(out_group == g), self.kept_in[in_group == g]) for g in np.unique(out_group)]
        made = np.full((len(blocks), max((len(out) for out, _ in blocks), default=0)), -1)
        wanted = np.full((len(blocks), max((len(read) for _, read in blocks), default=0)), -1)
        for number, (out, read) in enumerate(blocks):
            made[number, : len(out)], wanted[number, : len(read)] = out, read
        return wanted, made

    def smaller_weight(self, weight: Tensor) -> Tensor:
        """The part of a weight, or of anything of its shape, that is left, without the channel of ones."""
        if self.transposed:
            return weight[self.kept_in][:, self.kept_out]
        if self.groups == 1:
            return weight[self.kept_out][:, self.kept_in]
        wanted, made = self.arrangement()
        rows = weight[self.kept_out[made]]  # (G, O', I, ...), filters that are not there are the last one
        index = torch.from_numpy(wanted % weight.shape[1])
        found = torch.stack([part[:, each] for part, each in zip(rows, index, strict=True)])
        there = torch.from_numpy((made >= 0)[:, :, None] & (wanted >= 0)[:, None]).to(weight.device)
        return (found * there.view(*there.shape, *[1] * (weight.dim() - 2))).flatten(0, 1)

    def weights_after_removal(self, taps: int) -> int:
        """Weights of the smaller layer. taps: of a kernel."""
        if self.groups == 1:
            return len(self.kept_out) * self.inputs_after_removal * taps
        wanted, made = self.arrangement()
        return made.size * wanted.shape[1] * taps


@dataclass(frozen=True)
class Liveness:
    """What exact removal would keep. Arrays by operation name, one entry per channel of its output.

    constant: the value where the channel is the same for every image and pixel, NaN where it is live.
    kept: live, and read by something that reaches the output; or kept in addition, for a round number of channels.
    """

    ops: tuple[Op, ...]
    constant: dict[str, Values]
    kept: dict[str, Flags]
    layers: tuple[LayerLiveness, ...]

    def propagated_constants(self, layer: str) -> Values:
        """What a layer's constant output channels come to after the BatchNorm and ReLU behind it, NaN for live, (O,).

        A dead filter gives 0 at first, which BatchNorm turns into its shift and ReLU limits from below.
        """
        name = next(op.name for op in self.ops if op.module == layer)
        while True:
            readers = [op for op in self.ops if name in op.inputs]
            if len(readers) != 1 or readers[0].kind not in ("batchnorm", "relu", "pass"):
                return self.constant[name]
            name = readers[0].name


@torch.no_grad()
def analyze_liveness(model: nn.Module, input_size: InputSize = (3, 32, 32), multiple_of: int = 1) -> Liveness:
    """Follow every channel of `model` as it would compute in eval mode, with the quantizers as they are switched.

    Forwards: a channel is constant where every weight that reads a live channel is zero, and where no nonzero constant
    is read through zero padding. Backwards: a live channel is kept where a nonzero weight of a kept channel reads it.
    multiple_of: round the number of channels up, as `compact` says. Works in float64. Raises GraphError where the
    network cannot be traced.
    """
    model = unwrapped(model)
    ops = trace(model, input_size)
    modules = dict(model.named_modules())
    whole, shapes = _whole(ops), {op.name: op.shape for op in ops}
    constant: dict[str, Values] = {}
    reads: dict[str, Flags] = {}
    with eval_mode(model), shared_quantized_weights(model):
        for op in ops:
            sources = [constant[name] for name in op.inputs]
            if op.kind in LAYERS:
                module = modules[cast(str, op.module)]
                weight = _weight(op, module)
                reads[op.name] = _spread(np.asarray(weight.any(axis=2)), op)
                value = _constant_of_layer(op, module, weight, reads[op.name], sources[0])
            else:
                value = _constant(op, modules.get(op.module or ""), sources, [shapes[name] for name in op.inputs])
            constant[op.name] = np.full_like(value, np.nan) if op.name in whole else value
        norms = _group_norms(ops, modules) if multiple_of > 1 else {}
    keep = partial(_kept, ops, constant, reads, whole)
    kept = _rounded_up(ops, keep, norms, multiple_of) if multiple_of > 1 else keep({})
    layers: list[LayerLiveness] = []
    for op in ops:
        if op.kind in LAYERS:
            layers.append(_layer(op, shapes[op.inputs[0]], reads[op.name], constant, kept, norms))
        elif op.kind == "opaque" and op.module:
            layers += _kept_whole(op.module, modules[op.module], _read_shape(op, shapes), op.shape)
        elif op.call and op.call.kind == "get_attr":  # the weight of a layer, read by a function
            owner, _, leaf = str(op.call.target).rpartition(".")
            readers = [each.call for each in ops if each.call and op.name in each.inputs]
            pixels = sum(call.rows.get(op.call.attribute.data_ptr(), 0) for call in readers)
            if leaf == "weight" and pixels and isinstance(modules[owner], nn.Linear):
                layers.append(_whole_layer(owner, modules[owner], "weight", pixels))
    return Liveness(tuple(ops), constant, kept, tuple(_once(layers)))


def _constant(op: Op, module: nn.Module | None, sources: list[Values], shapes: list[tuple[int, ...]]) -> Values:
    """The constants of one operation's output, NaN for live channels. sources, shapes: of what it reads."""
    if op.kind == "fill":
        return np.full(op.channels, float(op.settings["value"]))
    if not op.channelwise:
        return np.full(op.channels, np.nan)
    maps = op.channel_maps([len(source) for source in sources])
    mapped = [np.append(source, 0.0)[channels] for source, channels in zip(sources, maps, strict=True)]  # -1 takes 0
    if op.kind in MOVES:
        return cast(Values, sum(mapped[1:], start=mapped[0]))
    if op.kind == "batchnorm":
        scale, shift = batchnorm_affine(cast(nn.BatchNorm2d, module), op.settings["eps"])
        return np.where(scale == 0, shift, scale * mapped[0] + shift)
    if op.kind == "prelu":
        return np.where(mapped[0] < 0, mapped[0] * _numpy(cast(nn.PReLU, module).weight), mapped[0])
    if op.kind in ("scale", "shift"):
        values = _numpy(cast(Tensor, op.values))
        return mapped[0] + values if op.kind == "shift" else np.where(values == 0, 0, mapped[0] * values)
    run = partial(cast(Callable[..., Tensor], OPERATIONS[op.kind].run), **op.settings)
    filled = [torch.from_numpy(np.nan_to_num(each)) for each in mapped]
    if op.kind in IN_SPACE:
        spread = filled[0].view(1, -1, *[1] * (len(shapes[0]) - 2)).expand(shapes[0])
        result = run(spread).flatten(2)[0].numpy()
        uniform = np.ptp(result, axis=1) <= 1e-12 * np.abs(result).max(axis=1)
        value = np.where(uniform, result[:, 0], np.nan)
    else:
        value = run(*filled).numpy()
    live = np.any([np.isnan(each) for each in mapped], axis=0)
    if op.kind == "mul":  # by zero
        live &= ~np.any([each == 0 for each in mapped], axis=0)
    return np.where(live, np.nan, value)


def _constant_of_layer(op: Op, module: nn.Module, weight: Values, reads: Flags, source: Values) -> Values:
    live = np.isnan(source)
    value = np.where(live, 0, source)
    moving = reads[:, live].any(axis=1)
    if is_padded(op):  # a nonzero constant read through zero padding differs between border and middle
        moving |= reads[:, value != 0].any(axis=1)
    bias = getattr(module, "bias", None)
    fixed = _spread(weight.sum(axis=2), op) @ value + (0 if bias is None else _numpy(bias))
    return np.where(moving, np.nan, fixed)


def _kept(
    ops: Sequence[Op],
    constant: dict[str, Values],
    reads: dict[str, Flags],
    whole: set[str],
    also: dict[str, Flags],
) -> dict[str, Flags]:
    """Channels that are live and needed, and those of `also`."""
    needed = {op.name: np.full(op.channels, op.kind == "input" or op.name in whole) for op in ops}
    kept: dict[str, Flags] = {}
    for op in reversed(ops):
        kept[op.name] = wanted = needed[op.name] & np.isnan(constant[op.name]) | also.get(op.name, np.False_)
        if op.kind in LAYERS:
            needed[op.inputs[0]] |= reads[op.name][wanted].any(axis=0)
        elif op.channelwise:
            maps = op.channel_maps([len(needed[name]) for name in op.inputs])
            for name, channels in zip(op.inputs, maps, strict=True):
                read = channels[wanted]
                needed[name][read[read >= 0]] = True
    return kept


def _rounded_up(
    ops: Sequence[Op],
    keep: Callable[[dict[str, Flags]], dict[str, Flags]],
    norms: dict[str, Values],
    multiple_of: int,
) -> dict[str, Flags]:
    """`keep({})`, and as many channels more as the multiple asks for, the same ones in all operations that are tied.

    What is added may need more of what it reads, so this is repeated until nothing changes.
    """
    kept, (numbers, _) = keep({}), group_numbers(ops)
    tied: dict[bytes, list[str]] = {}
    for op in ops:
        tied.setdefault(numbers[op.name].tobytes(), []).append(op.name)
    widths = [tied[numbers[op.name].tobytes()] for op in ops if op.kind in LAYERS]
    while True:
        also: dict[str, Flags] = {}
        for names in widths:
            alive = [name for name in names if kept[name].any()]  # a branch that is gone stays gone
            if alive:
                union = np.asarray(np.any([kept[name] for name in alive], axis=0))
                by_norm = np.argsort(np.where(union, -np.inf, -norms[alive[0]]), kind="stable")
                union[by_norm[: -(-int(union.sum()) // multiple_of) * multiple_of]] = True
                also |= dict.fromkeys(alive, union)
        for op in ops:
            if op.kind == "flatten" and op.name not in also:  # a channel's pixels are features beside each other
                source = kept[op.inputs[0]]
                also[op.name] = source[op.channel_maps([len(source)])[0]]
        before, kept = kept, keep(also)
        if all(np.array_equal(before[name], flags) for name, flags in kept.items()):
            return kept


def _group_norms(ops: Sequence[Op], modules: dict[str, nn.Module]) -> dict[str, Values]:
    """The norm of the group of each channel of each operation's output, -1 where it is in none, by operation name."""
    numbers, names = group_numbers(ops)
    squares = np.zeros(len(names) + 1)
    for member in groups_of(ops, modules).members:
        values = _numpy(getattr(modules[member.module], member.parameter)) ** 2
        others = tuple(dim for dim in range(values.ndim) if dim != member.dim)
        np.add.at(squares, member.groups, values.sum(axis=others))
    norms = np.append(np.sqrt(squares[:-1]), -1)
    return {name: norms[own] for name, own in numbers.items()}


def _layer(
    op: Op,
    read_shape: tuple[int, ...],
    reads: Flags,
    constant: dict[str, Values],
    kept: dict[str, Flags],
    norms: dict[str, Values],
) -> LayerLiveness:
    """norms: of the channels' groups, empty where numbers of channels are not rounded up."""
    name, groups = op.inputs[0], op.settings.get("groups", 1)
    source, kept_out = constant[name], np.flatnonzero(kept[op.name])
    read = np.asarray(reads[kept_out].any(axis=0))  # (I,): by a kept output channel
    transposed = op.kind == "conv_transpose"
    if groups > 1 or transposed:
        taken, carries = read & (kept[name] | (is_padded(op) & (source != 0))), False
    else:
        taken = kept[name] & (len(kept_out) > 0 if norms else read)
        carries = bool(is_padded(op) and (read & ~taken & (source != 0)).any())
        spare = np.flatnonzero(taken & ~np.isnan(source))
        if carries and len(spare):  # the channel of ones takes the place of the one that matters least
            taken[spare[np.argmin(norms[name][spare])]] = False
    return LayerLiveness(
        name=cast(str, op.module),
        out_channels=reads.shape[0],
        in_channels=reads.shape[1],
        dead_out=~np.asarray(reads.any(axis=1)),
        kept_out=kept_out,
        kept_in=np.flatnonzero(taken),
        carries_constants=carries,
        pixels=math.prod(read_shape) // reads.shape[1] if transposed else math.prod(op.shape) // op.channels,
        groups=groups,
        transposed=transposed,
    )


def _read_shape(op: Op, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of the first tensor that an operation reads, (1,) where it reads none."""
    return next((shape for name in op.inputs if (shape := shapes[name])), (1,))


def _kept_whole(
    name: str, module: nn.Module, read_shape: tuple[int, ...], shape: tuple[int, ...]
) -> list[LayerLiveness]:
    """The layers of a module that is left as it is: nothing of them is removed, but their cost counts.

    read_shape, shape: of what it reads and of its output.
    """
    found = []
    tokens = math.prod(read_shape) // read_shape[-1]
    for path, layer in module.named_modules(prefix=name):
        attention = isinstance(layer, nn.MultiheadAttention) and layer.in_proj_weight is not None
        if isinstance(layer, nn.modules.conv._ConvTransposeNd):
            pixels = math.prod(read_shape) // layer.in_channels
        elif isinstance(layer, nn.modules.conv._ConvNd):
            pixels = math.prod(shape) // layer.out_channels
        elif isinstance(layer, nn.Linear) or attention:
            pixels = tokens
        else:
            continue
        found.append(_whole_layer(path, layer, "in_proj_weight" if attention else "weight", pixels))
    return found


def _whole_layer(name: str, layer: nn.Module, parameter: str, pixels: int) -> LayerLiveness:
    weight = _numpy(getattr(layer, parameter))
    outputs, inputs = np.arange(weight.shape[0]), np.arange(weight.shape[1])
    dead = ~np.asarray(weight.reshape(len(weight), -1).any(axis=1))
    return LayerLiveness(name, len(outputs), len(inputs), dead, outputs, inputs, False, pixels, parameter=parameter)


def _once(layers: Sequence[LayerLiveness]) -> list[LayerLiveness]:
    """A layer that is called more than once, with the pixels of all calls."""
    found: dict[str, LayerLiveness] = {}
    for layer in layers:
        pixels = layer.pixels + (found[layer.name].pixels if layer.name in found else 0)
        found[layer.name] = replace(layer, pixels=pixels)
    return list(found.values())


def check_multiple(model: nn.Module, multiple_of: int, error: type[ValueError]) -> None:
    """Raise `error` unless `multiple_of` is a whole number from 1 to the width of the widest layer."""
    layers = [module for module in model.modules() if isinstance(module, CANDIDATES)]
    widths = [int(getattr(layer, "out_channels", 0) or getattr(layer, "out_features", 1)) for layer in layers]
    remedy = "the widest layer has no more channels"
    check_range("multiple_of", multiple_of, 1, max(widths, default=1), remedy=remedy, error=error)


def is_padded(op: Op) -> bool:
    """Whether a layer reads zeros beyond its input's border, or puts its input where the border differs."""
    if op.kind == "conv_transpose":
        return True
    if op.kind != "conv" or op.settings["padding_mode"] != "zeros":
        return False
    padding = op.settings["padding"]
    if isinstance(padding, str):
        return padding == "same" and any(size > 1 for size in op.settings["kernel_size"])
    return any(size > 0 for size in padding)


def batchnorm_affine(norm: nn.BatchNorm2d, eps: float) -> tuple[Values, Values]:
    """BatchNorm in eval mode as scale and shift, float64: y = scale x + shift, both (C,)."""
    mean, variance = _numpy(cast(Tensor, norm.running_mean)), _numpy(cast(Tensor, norm.running_var))
    scale = 1 / np.sqrt(variance + eps)
    if norm.weight is not None:
        scale = scale * _numpy(norm.weight)
    return scale, (0 if norm.bias is None else _numpy(norm.bias)) - mean * scale


def _whole(ops: Sequence[Op]) -> set[str]:
    """Operations whose output must stay whole because the network's output or an opaque operation reads it."""
    whole: set[str] = {op.name for op in ops if op.kind in (*MIXING, "input")}
    for op in reversed(ops):
        moves = op.name in whole and op.channelwise and op.kind not in LAYERS
        if op.kind in (*MIXING, "output") or moves:
            whole.update(op.inputs)
    return whole


def _weight(op: Op, module: nn.Module) -> Values:
    """The weight of a layer as (O, I / groups, k...)."""
    weight = _numpy(cast(Tensor, module.weight))
    weight = weight.swapaxes(0, 1) if op.kind == "conv_transpose" else weight
    return weight.reshape(*weight.shape[:2], -1)


def _spread(matrix: NDArray[Any], op: Op) -> NDArray[Any]:
    """(O, I / groups) of a grouped convolution as (O, I), with zeros between channels of different groups."""
    if (groups := op.settings.get("groups", 1)) == 1:
        return matrix
    outputs, inputs = matrix.shape
    spread = np.zeros((groups, outputs // groups, groups, inputs), matrix.dtype)
    each = np.arange(groups)
    spread[each, :, each] = matrix.reshape(groups, -1, inputs)
    return spread.reshape(outputs, groups * inputs)


def _numpy(tensor: Tensor) -> Values:
    return tensor.detach().cpu().double().numpy()  # in this order: MPS has no float64

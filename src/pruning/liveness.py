"""Which channels of a network can be taken out exactly, and what is then left of every layer.

Worked case, a basic block. If filter 3 of conv1 is zero, the channel behind it is not zero but *constant*: BatchNorm
turns 0 into beta - gamma mean / sqrt(var + eps), ReLU passes that on where it is positive, and at the border conv2's
zero padding makes its effect differ from the middle. It can still be removed: one channel of ones carries all constants
of conv2.

Axis letters: O output channels, I input channels, k kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from src.pruning.graph import CHANNELWISE, LAYERS, Op, trace
from src.pruning.groups import group_numbers, groups_of
from src.quantizer import check_range
from utils_quantization import shared_quantized_weights, unwrapped

Flags = NDArray[np.bool_]
Values = NDArray[np.float64]


@dataclass(frozen=True)
class LayerLiveness:
    """One convolution or linear layer, and what exact removal would leave of it.

    in_channels: channels that one filter reads: all of them, or those of its group in a grouped convolution.
    dead_out: whether all weights of the filter are zero (O,).
    kept_out, kept_in: indices of the output channels, and of the input channels read by them, after removal.
    carries_constants: whether the layer then needs one more input channel, of ones, for the constants it reads.
    """

    name: str
    out_channels: int
    in_channels: int
    dead_out: Flags
    kept_out: NDArray[np.int64]
    kept_in: NDArray[np.int64]
    carries_constants: bool
    pixels: int

    @property
    def inputs_after_removal(self) -> int:
        """Input channels of the smaller layer, with the channel of ones."""
        return len(self.kept_in) + int(self.carries_constants)


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
def analyze_liveness(
    model: nn.Module, input_size: tuple[int, int, int] = (3, 32, 32), multiple_of: int = 1
) -> Liveness:
    """Follow every channel of `model` as it would compute in eval mode, with the quantizers as they are switched.

    Forwards: a channel is constant where every weight that reads a live channel is zero, and where no nonzero constant
    is read through zero padding. Backwards: a live channel is kept where a nonzero weight of a kept channel reads it.
    multiple_of: round the number of channels up, as `compact` says. Works in float64. Raises GraphError where the
    network cannot be traced.
    """
    model = unwrapped(model)
    ops = trace(model, input_size)
    modules = dict(model.named_modules())
    with shared_quantized_weights(model):
        weights = {
            op.name: _numpy(module.weight)
            for op in ops
            if isinstance(module := modules.get(op.module or ""), (nn.Conv2d, nn.Linear))
        }
        norms = _group_norms(ops, modules) if multiple_of > 1 else {}
    whole = _whole(ops)
    constant: dict[str, Values] = {}
    for op in ops:
        sources = [constant[name] for name in op.inputs]
        value = _constant(op, modules.get(op.module or ""), weights.get(op.name), sources)
        constant[op.name] = np.full_like(value, np.nan) if op.name in whole else value
    reads = {name: _reads(weight) for name, weight in weights.items()}
    keep = partial(_kept, ops, constant, reads, whole)
    kept = _rounded_up(ops, keep, norms, multiple_of) if multiple_of > 1 else keep({})
    layers = [
        _layer(op, modules[op.module], weights[op.name], constant, kept, norms)
        for op in ops
        if op.module and op.name in weights
    ]
    return Liveness(tuple(ops), constant, kept, tuple(layers))


def _constant(op: Op, module: nn.Module | None, weight: Values | None, sources: list[Values]) -> Values:
    """The constants of one operation's output, NaN for live channels."""
    if op.kind in LAYERS:
        return _constant_of_layer(cast(nn.Module, module), cast(Values, weight), sources[0])
    if op.kind not in CHANNELWISE:
        return np.full(op.channels, np.nan)
    mapped = [np.append(source, 0.0)[op.channel_map(len(source))] for source in sources]  # -1 takes the 0
    value: Values = sum(mapped[1:], start=mapped[0])
    if op.kind == "batchnorm":
        scale, shift = batchnorm_affine(cast(nn.BatchNorm2d, module))
        return np.where(scale == 0, shift, scale * value + shift)
    return np.maximum(value, 0) if op.kind == "relu" else value


def _constant_of_layer(module: nn.Module, weight: Values, source: Values) -> Values:
    reads = _reads(weight)
    live = np.isnan(source)
    value = np.where(live, 0, source)
    moving = reads[:, live].any(axis=1)
    if is_padded(module):  # a nonzero constant read through zero padding differs between border and middle
        moving |= reads[:, value != 0].any(axis=1)
    bias = getattr(module, "bias", None)
    fixed = weight.reshape(*weight.shape[:2], -1).sum(axis=2) @ value + (0 if bias is None else _numpy(bias))
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
        for name in op.inputs:
            if op.kind in LAYERS:
                needed[name] |= reads[op.name][wanted].any(axis=0)
            elif op.kind in CHANNELWISE:
                channels = op.channel_map(len(needed[name]))[wanted]
                needed[name][channels[channels >= 0]] = True
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
                also[op.name] = kept[op.inputs[0]][op.channel_map(len(kept[op.inputs[0]]))]
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
    module: nn.Module,
    weight: Values,
    constant: dict[str, Values],
    kept: dict[str, Flags],
    norms: dict[str, Values],
) -> LayerLiveness:
    """norms: of the channels' groups, empty where numbers of channels are not rounded up."""
    outputs, inputs = weight.shape[:2]
    reads = _reads(weight)  # (O, I)
    if op.kind == "opaque":  # a grouped or shared layer: nothing of it is removed, but its cost counts
        source, kept_out = np.full(inputs, np.nan), np.arange(outputs)
        taken = read = np.full(inputs, True)
    else:
        source, kept_out = constant[op.inputs[0]], np.flatnonzero(kept[op.name])
        read = np.asarray(reads[kept_out].any(axis=0))  # (I,): by a kept output channel
        taken = kept[op.inputs[0]] & (len(kept_out) > 0 if norms else read)
    carries = bool(is_padded(module) and (read & ~taken & (source != 0)).any())
    spare = np.flatnonzero(taken & ~np.isnan(source))
    if carries and len(spare):  # the channel of ones takes the place of the one that matters least
        taken[spare[np.argmin(norms[op.inputs[0]][spare])]] = False
    return LayerLiveness(
        name=cast(str, op.module),
        out_channels=outputs,
        in_channels=inputs,
        dead_out=~np.asarray(reads.any(axis=1)),
        kept_out=kept_out,
        kept_in=np.flatnonzero(taken),
        carries_constants=carries,
        pixels=op.height * op.width,
    )


def check_multiple(model: nn.Module, multiple_of: int, error: type[ValueError]) -> None:
    """Raise `error` unless `multiple_of` is a whole number from 1 to the width of the widest layer."""
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    widest = max(layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features for layer in layers)
    check_range("multiple_of", multiple_of, 1, widest, remedy="the widest layer has no more channels", error=error)


def is_padded(module: nn.Module) -> bool:
    """Whether a layer reads beyond its input's border."""
    if not isinstance(module, nn.Conv2d):
        return False
    if isinstance(module.padding, str):
        return module.padding == "same" and any(size > 1 for size in module.kernel_size)
    return any(size > 0 for size in module.padding)


def batchnorm_affine(norm: nn.BatchNorm2d) -> tuple[Values, Values]:
    """BatchNorm in eval mode as scale and shift, float64: y = scale x + shift, both (C,)."""
    mean, variance = _numpy(cast(Tensor, norm.running_mean)), _numpy(cast(Tensor, norm.running_var))
    scale = 1 / np.sqrt(variance + norm.eps)
    if norm.affine:
        scale = scale * _numpy(norm.weight)
    return scale, (_numpy(norm.bias) if norm.affine else 0) - mean * scale


def _whole(ops: Sequence[Op]) -> set[str]:
    """Operations whose output must stay whole because the network's output or an opaque operation reads it."""
    whole: set[str] = {op.name for op in ops if op.kind in ("opaque", "input")}
    for op in reversed(ops):
        if op.kind in ("output", "opaque") or (op.name in whole and op.kind in CHANNELWISE):
            whole.update(op.inputs)
    return whole


def _reads(weight: Values) -> Flags:
    """Which output channel reads which input channel, through any weight that is not zero, (O, I)."""
    return np.asarray(weight.reshape(*weight.shape[:2], -1).any(axis=2))


def _numpy(tensor: Tensor) -> Values:
    return tensor.detach().cpu().double().numpy()  # in this order: MPS has no float64

"""Exact removal: a smaller network that computes what the given one computes, to rounding.

What can go is what src/pruning/liveness.py says: a channel stays where it depends on the image and something on the way
to the output reads it. All others are left out, with their filters, their BatchNorm entries and the slices that read
them. What constant channels contributed is kept in these places:

    a convolution that reads beyond the border   one more input channel, of ones, that carries all constants of the
                                                 layer: weight[o, last] = sum over c of value_c * weight[o, c]
    any other convolution, a linear layer        its bias: bias[o] += sum over c, k of value_c * weight[o, c, k]
    an add                                       one constant per channel, added behind it
    anything else that reads them                the constants themselves, put where the channels were

Worked case. A 3x3 convolution with padding 1 reads a channel that is 2 everywhere with weights of 0.5: in the middle of
the image it adds 9 * 0.5 * 2 = 9, at an edge 6, in a corner 4. No bias can do that; a channel of ones with weights
0.5 * 2 = 1 does.
An operation that is not understood is left exactly as it is, and all channels that touch it stay. A convolution of
several groups keeps as many channels in each group as the widest of them needs.
Axis letters: N batch, O output channels, I input channels, C channels, k kernel, H W space.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize

from src.pruning.compact_network import FORMAT, CompactionError, CompactNetwork, compare
from src.pruning.graph import LAYERS, MIXING, Call, Op, Ref, trace
from src.pruning.liveness import LayerLiveness, Liveness, analyze_liveness, check_multiple, is_padded
from src.pruning.operations import OPERATIONS, WRITTEN_ANEW, Operation, described
from src.pruning.tracing import InputSize
from utils_quantization import default_tensors, shared_quantized_weights, unwrapped

Indices = NDArray[np.int64]
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}  # of the largest output; half precision: HALF
HALF = 5e-2


@torch.no_grad()
@default_tensors()
def compact(
    model: nn.Module, input_size: InputSize = (3, 32, 32), multiple_of: int = 1, atol: float | None = None
) -> CompactNetwork:
    """`model` without the channels that exact removal takes out, in eval mode, on its device and in its dtype.

    Logits agree to rounding (1e-10 relative in float64, 1e-4 in float32) and MACs are those that
    metrics.QuantizationComparison.calculate_stats counts. Quantized weights become plain parameters, bit for bit;
    `model` is left as it is. Every network that torch.fx can trace is compacted, at worst to itself: an operation that
    is not in the table of src/pruning/operations.py stays as it is, with all channels it reads and makes.
    input_size: (C, H, W) of one image, or one size for each input.

    multiple_of: above 1, a layer of which something is removed keeps the next multiple of that many output channels, or
    all it has. Layers tied by residual connections keep one set: what is live in any of them, rounded up; a branch of
    which nothing is left stays away. Kept in addition are the channels whose groups (src/pruning/groups.py) have the
    largest norm with quantized weights; they compute what they did. A layer reads all kept channels. A channel of ones,
    where constants of removed channels are left, takes the place of a kept constant channel; where there is none, it
    comes on top of the multiple.

    atol: the result is compared with `model` on two random images, and may differ by so much, relative to the largest
    output where that is above 1; None for 1e-8 in float64, 1e-3 in float32, 0.05 in half precision.

    Raises CompactionError for a `multiple_of` that is not a whole number from 1 to the widest layer's width; for a
    network in training mode, with weights that are not finite, or whose output does not depend on the image; and where
    the outputs differ, with the first operation that does. GraphError where the network cannot be traced.
    """
    model = unwrapped(model)
    if any(module.training for module in model.modules()):
        raise CompactionError(
            f"{type(model).__name__} is in training mode, where BatchNorm's statistics move and constants are not "
            "constant; call model.eval() first"
        )
    check_multiple(model, multiple_of, CompactionError)
    liveness = analyze_liveness(model, input_size, multiple_of)
    first = next(model.parameters())
    modules = dict(model.named_modules())
    with shared_quantized_weights(model):
        for layer in liveness.layers:
            if not cast(Tensor, getattr(modules[layer.name], layer.parameter)).isfinite().all():
                raise CompactionError(
                    f"layer {layer.name!r} has weights that are not finite: the network diverged; train it again"
                )
        writer = _Writer(liveness, modules)
        network = CompactNetwork(writer.description(), writer.own)
    state = {name: value.detach().clone() for name, value in writer.state.items()}
    network.load_state_dict(network.state_dict() | state)
    network = network.to(first.device).eval()
    places = {op: (writer.value[op.name], writer.kept[op.name]) for op in liveness.ops if op.name in writer.value}
    compare(model, network, places, atol if atol is not None else TOLERANCE.get(first.dtype, HALF))
    return network


def own_calls(model: nn.Module, input_size: InputSize) -> dict[str, Call]:
    """The calls of the operations of `model` that the table does not know, by their name."""
    return {op.name: _own_copy(op.call) for op in trace(model, input_size) if op.call}


def _own_copy(call: Call) -> Call:
    """A call with a copy of its module, whose quantized weights are plain parameters."""
    held = call.attribute
    if not isinstance(held, (nn.Module, Tensor)):
        return call
    if isinstance(held, Tensor):
        copied = held.detach().clone()
        return replace(call, attribute=nn.Parameter(copied) if isinstance(held, nn.Parameter) else copied)
    held = copy.deepcopy(held)
    for module in list(held.modules()):
        if parametrize.is_parametrized(module):  # torch's own removal would change the class that both share
            values = {
                name: getattr(module, name).detach().clone() for name in cast(nn.ModuleDict, module.parametrizations)
            }
            module.__class__ = parametrize.type_before_parametrizations(module)
            del module.parametrizations
            for name, value in values.items():
                module.register_parameter(name, nn.Parameter(value))
    return replace(call, attribute=held)


class _Writer:
    """Walks the traced operations and describes a smaller one for each that still has channels. All on the CPU.

    value[op]: number of the described operation that gives the kept channels of `op`, in ascending order.
    moving: values that depend on the image; a padded convolution of constants alone varies in space, but not with it.
    """

    def __init__(self, liveness: Liveness, modules: Mapping[str, nn.Module]) -> None:
        self.liveness, self.modules = liveness, modules
        self.layers = {layer.name: layer for layer in liveness.layers}
        self.kept: dict[str, Indices] = {name: np.flatnonzero(flags) for name, flags in liveness.kept.items()}
        self.ops = {op.name: op for op in liveness.ops}
        self.operations: list[Operation] = []
        self.state: dict[str, Tensor] = {}
        self.own: dict[str, Call] = {}
        self.value: dict[str, int] = {}
        self.moving: set[int] = {0}

    def description(self) -> dict[str, Any]:
        """The description of the smaller network; `self.state` is its state dictionary then."""
        images = [op for op in self.liveness.ops if op.kind == "input"]
        for number, op in enumerate(images):
            self.value[op.name] = self._describe("input", number=number, shape=list(op.shape)) if number else 0
        self.moving.update(self.value.values())
        for op in self.liveness.ops:
            if op.kind == "output":
                output = self._output(op)
            elif op.kind == "opaque" or (op.kind != "input" and len(self.kept[op.name])):
                self.value[op.name] = self._write(op)
        if output not in self.moving:
            cut = [layer.name for layer in self.liveness.layers if not len(layer.kept_out)]
            raise CompactionError(
                "the network is dead: its output is the same for every image (layers of which nothing is left: "
                f"{', '.join(cut) or 'none'}); train it with a smaller penalty or a later ramp"
            )
        size = list(images[0].shape[1:])
        return {"format": FORMAT, "input_size": size, "steps": self.operations, "output": output}

    def _output(self, op: Op) -> int:
        """The value that the network returns, or a step that collects several."""
        call = cast(Call, op.call)
        given = call.args[0]
        if len(op.inputs) == 1 and not isinstance(given, (tuple, list, dict)):
            return self.value[op.inputs[0]]
        keys = list(given) if isinstance(given, dict) else None
        entries = list(given.values()) if isinstance(given, dict) else list(given)
        if not all(isinstance(each, Ref) for each in entries) or isinstance(given, list):
            return self._own(op)
        values = [self.value[op.inputs[each.number]] for each in entries]
        return self._describe("collect", *values, keys=keys, shape=None)

    def _own(self, op: Op) -> int:
        """An operation that is left as it is."""
        call = cast(Call, op.call)
        self.own[op.name] = _own_copy(call)
        shape = list(op.shape) if op.shape else None
        return self._describe("own", *(self.value[name] for name in op.inputs), name=op.name, shape=shape)

    def _write(self, op: Op) -> int:
        if op.kind == "opaque":
            return self._own(op) if op.call else self.value[op.inputs[0]]
        if op.kind in LAYERS:
            return self._layer(op, self.layers[cast(str, op.module)])
        if op.kind == "add":
            return self._add(op)
        if op.kind == "join":
            return self._join(op)
        kept = self.kept[op.name]
        if op.kind == "fill":
            return self._blank(op, kept, op.settings["value"])
        maps = op.channel_maps([self.ops[name].channels for name in op.inputs])
        source = op.inputs[0]
        if op.kind == "flatten":  # of the features of a kept channel, the reader may need only some
            features = np.flatnonzero(np.isin(maps[0], self.kept[source]))
            return self._chosen(self._describe("flatten", self.value[source]), features, kept)
        if op.kind in MIXING:  # what it reads is whole
            values = [self.value[name] for name in op.inputs]
        else:
            values = [self._select(name, channels[kept]) for name, channels in zip(op.inputs, maps, strict=True)]
        if op.kind in ("pass", "select"):
            return values[0]
        if op.kind in ("scale", "shift"):
            name = f"{op.kind}_{op.name}"
            self.state[f"{name}.value"] = self._like_weights(cast(Tensor, op.values)[kept])
            return self._describe(op.kind, *values, name=name, dim=op.axis)
        if op.module:  # a normalisation, PReLU
            name = op.module
            for entry, tensor in self.modules[name].state_dict().items():
                whole = tensor.dim() == 0 or len(tensor) != op.channels
                self.state[f"{name}.{entry}"] = tensor.cpu() if whole else tensor.cpu()[kept]
            return self._describe(op.kind, *values, name=name, **op.settings)
        return self._describe(op.kind, *values, **op.settings)

    def _layer(self, op: Op, layer: LayerLiveness) -> int:
        """A convolution or linear layer: filters that stay, slices that stay, and the constants it reads."""
        module, source = self.modules[layer.name], op.inputs[0]
        whole = cast(Tensor, module.weight).detach().cpu()
        weight = layer.smaller_weight(whole)
        bias = None if module.bias is None else cast(Tensor, module.bias).detach().cpu()[layer.kept_out]
        carried = self._carried(layer, whole, source)  # (O, ...)
        wanted, made = layer.arrangement() if layer.groups > 1 else (layer.kept_in, np.arange(len(layer.kept_out)))
        value = self._select(source, wanted.reshape(-1)) if wanted.size else None
        if layer.carries_constants:
            weight = torch.cat([weight, carried.unsqueeze(1).to(weight.dtype)], dim=1)
            ones = self._describe("fill", value=1, size=[1, *self.ops[source].shape[2:]])
            value = ones if value is None else self._describe("join", value, ones, dim=1)
        elif not is_padded(op) and carried.any():
            folded = carried.reshape(len(carried), -1).sum(dim=1)
            bias = folded if bias is None else folded + bias
        if value is None:  # an output that must stay although its weights are zero: its bias is all there is
            blank = self._blank(op, layer.kept_out)
            return blank if bias is None else self._shift(layer.name, blank, bias, op.axis)
        places = made.reshape(-1)
        self.state[f"{layer.name}.weight"] = weight.contiguous()
        if bias is not None:
            self.state[f"{layer.name}.bias"] = self._like_weights(
                torch.where(torch.from_numpy(places) < 0, 0, bias[places])
            )
        fields = {field: op.settings[field] for field in OPERATIONS[op.kind].fields if field not in WRITTEN_ANEW}
        fields["out_features" if op.kind == "linear" else "out_channels"] = len(places)
        if layer.groups > 1:
            fields["groups"] = len(made)
        value = self._describe(op.kind, value, name=layer.name, **fields, bias=bias is not None)
        return self._chosen(value, places, np.arange(len(layer.kept_out)))

    def _carried(self, layer: LayerLiveness, weight: Tensor, source: str) -> Tensor:
        """What the constants of removed input channels come to in each kept filter, a number for each tap, (O, ...)."""
        constants = np.nan_to_num(self.liveness.constant[source])
        constants[layer.kept_in] = 0
        rows = (weight.transpose(0, 1) if layer.transposed else weight)[layer.kept_out].double()
        group_of = layer.kept_out // (layer.out_channels // layer.groups)
        read = torch.from_numpy(constants).view(layer.groups, -1)
        if layer.groups == 1:
            return torch.tensordot(rows, read[0], dims=([1], [0]))
        return (rows * read[group_of].view(*rows.shape[:2], *[1] * (rows.dim() - 2))).sum(1)

    def _add(self, op: Op) -> int:
        """Each branch is put where its channels belong; what its constant channels add becomes one shift."""
        kept = self.kept[op.name]
        constants = np.zeros(len(kept))
        branches = []
        for name in op.inputs:
            constants += self._removed(name)[kept]
            if np.isin(kept, self.kept[name]).any():
                branches.append(self._chosen(self.value[name], self.kept[name], kept, op.axis))
        value = branches[0] if len(branches) == 1 else self._describe("add", *branches)
        if not constants.any():
            return value
        return self._shift(f"constant_{op.name}", value, torch.from_numpy(constants), op.axis)

    def _join(self, op: Op) -> int:
        """The kept channels of all parts, one part after the other."""
        kept, parts = self.kept[op.name], []
        maps = op.channel_maps([self.ops[name].channels for name in op.inputs])
        for name, channels in zip(op.inputs, maps, strict=True):
            wanted = channels[kept]
            if (wanted >= 0).any():
                parts.append(self._select(name, wanted[wanted >= 0]))
        return parts[0] if len(parts) == 1 else self._describe("join", *parts, dim=op.axis)

    def _select(self, source: str, wanted: Indices) -> int:
        """The channels `wanted` of a value, those that were removed as the constants they are, -1 for zeros."""
        op = self.ops[source]
        there = np.isin(wanted, self.kept[source]).any()
        value = (
            self._chosen(self.value[source], self.kept[source], wanted, op.axis) if there else self._blank(op, wanted)
        )
        constants = np.append(self._removed(source), 0.0)[wanted]  # -1 takes the 0
        name = f"constant_{source.replace(':', '_')}_{len(self.operations)}"
        return self._shift(name, value, torch.from_numpy(constants), op.axis) if constants.any() else value

    def _removed(self, source: str) -> NDArray[np.float64]:
        """What the removed channels of a value are, 0 for those that are kept or that nothing needs."""
        constants = np.nan_to_num(self.liveness.constant[source])
        constants[self.kept[source]] = 0
        return constants

    def _chosen(self, value: int, have: Indices, wanted: Indices, axis: int = 1) -> int:
        """`value` has the channels `have`; give those of `wanted`, zeros where it has none."""
        if np.array_equal(have, wanted):
            return value
        place = {int(channel): position for position, channel in enumerate(have) if channel >= 0}
        channels = [place.get(int(channel), -1) for channel in wanted]
        return self._describe("select", value, channels=channels, dim=axis)

    def _shift(self, name: str, value: int, constants: Tensor, axis: int = 1) -> int:
        self.state[f"{name}.value"] = self._like_weights(constants)
        return self._describe("shift", value, name=name, dim=axis)

    def _blank(self, op: Op, channels: Indices, value: float = 0) -> int:
        """One number in place of a value of which nothing is left."""
        size = list(op.shape[1:])
        size[op.axis - 1] = len(channels)
        return self._describe("fill", value=value, size=size)

    def _like_weights(self, values: Tensor) -> Tensor:
        dtype = next((p.dtype for m in self.modules.values() for p in m.parameters()), torch.float32)
        return values.detach().cpu().to(dtype)

    def _describe(self, kind: str, *inputs: int, **fields: Any) -> int:
        self.operations.append(described(kind, inputs, fields))
        number = len(self.operations)
        if self.moving.intersection(inputs):
            self.moving.add(number)
        return number

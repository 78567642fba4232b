"""Exact removal: a smaller network that computes what the given one computes, to rounding.

What can go is what src/pruning/liveness.py says: a channel stays where it depends on the image and something on the way
to the output reads it. All others are left out, with their filters, their BatchNorm entries and the slices that read
them. What constant channels contributed is kept in three places:

    a convolution that reads beyond the border   one more input channel, of ones, that carries all constants of the
                                                 layer: weight[o, last] = sum over c of value_c * weight[o, c]
    any other convolution, a linear layer        its bias: bias[o] += sum over c, k of value_c * weight[o, c, k]
    an add                                       one constant per channel, added behind it

Worked case. A 3x3 convolution with padding 1 reads a channel that is 2 everywhere with weights of 0.5: in the middle of
the image it adds 9 * 0.5 * 2 = 9, at an edge 6, in a corner 4. No bias can do that; a channel of ones with weights
0.5 * 2 = 1 does.
Axis letters: N batch, O output channels, I input channels, C channels, k kernel, H W space.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from src.pruning.compact_description import FORMAT, CompactionError, state_shapes
from src.pruning.compact_network import CompactNetwork
from src.pruning.graph import Op
from src.pruning.liveness import LayerLiveness, Liveness, analyze_liveness, is_padded
from utils_quantization import shared_quantized_weights

__all__ = ["CompactNetwork", "CompactionError", "compact", "state_shapes"]

Indices = NDArray[np.int64]


@torch.no_grad()
def compact(model: nn.Module, input_size: tuple[int, int, int] = (3, 32, 32)) -> CompactNetwork:
    """`model` without the channels that exact removal takes out, in eval mode, on its device and in its dtype.

    Logits agree to rounding (1e-10 relative in float64, 1e-4 in float32) and MACs are those that
    metrics.QuantizationComparison.calculate_stats counts. Quantized weights become plain parameters, bit for bit;
    `model` is left as it is. input_size: (C, H, W) of one image.

    Raises CompactionError for a network in training mode, with an operation that src/pruning/graph.py does not know,
    without layers, with weights that are not finite, or whose output does not depend on the image;
    GraphError where the network cannot be traced.
    """
    if any(module.training for module in model.modules()):
        raise CompactionError(
            f"{type(model).__name__} is in training mode, where BatchNorm's statistics move and constants are not "
            "constant; call model.eval() first"
        )
    liveness = analyze_liveness(model, input_size)
    modules = dict(model.named_modules())
    _check_supported(liveness.ops)
    with shared_quantized_weights(model):
        weights = {flow.name: cast(Tensor, modules[flow.name].weight).detach().clone() for flow in liveness.layers}
    device, dtype = _place_of(weights)
    removal = _Removal(liveness, modules, weights)
    description, state = removal.written(input_size)
    network = CompactNetwork(description, device="meta")
    network.load_state_dict({name: _to(value, device, dtype) for name, value in state.items()}, assign=True)
    return network.to(device).eval()


def _check_supported(ops: tuple[Op, ...]) -> None:
    opaque = [op for op in ops if op.kind == "opaque"]
    if opaque:
        op = opaque[0]
        raise CompactionError(
            f"the network holds an operation that is not known: {op.module or op.name!r}; the metrics count everything "
            "around it as not removable, and it cannot be rebuilt. Known are Conv2d (groups=1), Linear, BatchNorm2d, "
            "ReLU, pooling without padding, flatten, dropout, add and option-A shortcuts"
        )
    inputs, output = [op for op in ops if op.kind == "input"], ops[-1]
    if len(inputs) != 1 or output.kind != "output" or len(output.inputs) != 1 or not output.channels:
        raise CompactionError("the network must take one image tensor and return one tensor; wrap it so that it does")


def _place_of(weights: Mapping[str, Tensor]) -> tuple[torch.device, torch.dtype]:
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise CompactionError(
                f"layer {name!r} has weights that are not finite: the network diverged; train it again"
            )
    if not weights:
        raise CompactionError("the network has no convolution and no linear layer: there is nothing to compact")
    first = next(iter(weights.values()))
    return first.device, first.dtype


class _Removal:
    """Walks the operations and writes a step for every one that still has channels.

    value[op]: number of the step that gives the kept channels of `op`, in ascending order.
    moving: values that depend on the image; a padded convolution of constants alone varies in space, but not with it.
    """

    def __init__(self, liveness: Liveness, modules: dict[str, nn.Module], weights: dict[str, Tensor]) -> None:
        self.liveness, self.modules, self.weights = liveness, modules, weights
        self.flows = {flow.name: flow for flow in liveness.layers}
        self.kept: dict[str, Indices] = {name: np.flatnonzero(flags) for name, flags in liveness.kept.items()}
        self.steps: list[dict[str, Any]] = []
        self.state: dict[str, Tensor] = {}
        self.value: dict[str, int] = {}
        self.moving: set[int] = {0}
        self.ops = {op.name: op for op in liveness.ops}

    def written(self, input_size: tuple[int, int, int]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The description and the state dictionary of the smaller network."""
        for op in self.liveness.ops:
            if op.kind == "input":
                self.value[op.name] = 0
            elif op.kind != "output" and len(self.kept[op.name]):
                self.value[op.name] = self._write(op)
        output = self.value.get(self.liveness.ops[-1].inputs[0], -1)
        if output not in self.moving:
            cut = [flow.name for flow in self.liveness.layers if not len(flow.kept_out)]
            where = f"; nothing is left of {', '.join(cut[:5])}{' and others' if len(cut) > 5 else ''}" if cut else ""
            raise CompactionError(
                f"the network is dead: its output is the same for every image{where}. There is nothing to compact; "
                "train it with a smaller penalty or a later ramp"
            )
        size = [int(n) for n in input_size]
        return {"format": FORMAT, "input_size": size, "steps": self.steps, "output": output}, self.state

    def _write(self, op: Op) -> int:
        if op.kind in ("conv", "linear"):
            return self._layer(op, self.flows[cast(str, op.module)])
        if op.kind == "add":
            return self._add(op)
        kept = self.kept[op.name]
        if op.kind == "pad":  # the channels it adds are zero: left out, or selected as zeros where all must stay
            return self._select(op.inputs[0], kept - op.settings["before"])
        if op.kind == "flatten":
            return self._flatten(op)
        source = self._select(op.inputs[0], kept)
        if op.kind == "pass":
            return source
        if op.kind == "batchnorm":
            return self._batchnorm(cast(str, op.module), source, kept)
        if op.kind == "pool":
            window = {key: op.settings.get(key) for key in ("kernel", "stride")}
            return self._step("pool", source, average=bool(op.settings["average"]), **window)
        return self._step(op.kind, source, **op.settings)

    def _layer(self, op: Op, flow: LayerLiveness) -> int:
        """A convolution or linear layer: filters that stay, slices that stay, and the constants it reads."""
        module, source = self.modules[flow.name], op.inputs[0]
        weight = self.weights[flow.name][self._index(flow.kept_out)]  # (O, I, ...)
        own_bias = cast("Tensor | None", module.bias)
        bias = None if own_bias is None else own_bias.detach()[self._index(flow.kept_out)]
        constants = _constants(self.liveness.constant[source])
        carried = torch.tensordot(weight.cpu().double(), torch.from_numpy(constants), dims=([1], [0]))  # (O, ...)
        weight = weight[:, self._index(flow.kept_in)]
        value = self._select(source, flow.kept_in) if len(flow.kept_in) else None
        if flow.carries_constants:
            weight = torch.cat([weight, carried.unsqueeze(1).to(weight.dtype).to(weight.device)], dim=1)
            height, width = self.ops[source].height, self.ops[source].width
            ones = self._step("fill", value=1, size=[1, height, width])
            value = ones if value is None else self._step("join", value, ones)
        elif not is_padded(module) and carried.any():
            folded = carried.reshape(len(carried), -1).sum(dim=1)
            bias = (folded if bias is None else folded + bias.cpu().double()).to(weight.dtype).to(weight.device)
        if value is None:  # an output that must stay although its weights are zero: its bias is all there is
            space = [op.height, op.width] if op.kind == "conv" else []
            blank = self._step("fill", value=0, size=[len(flow.kept_out), *space])
            return blank if bias is None else self._shift(flow.name, blank, bias)
        settings = _conv_settings(cast(nn.Conv2d, module)) if op.kind == "conv" else {}
        self.state[f"{flow.name}.weight"] = weight.contiguous()
        if bias is not None:
            self.state[f"{flow.name}.bias"] = bias
        return self._step(op.kind, value, name=flow.name, out=len(flow.kept_out), **settings, bias=bias is not None)

    def _batchnorm(self, name: str, source: int, kept: Indices) -> int:
        norm = cast(nn.BatchNorm2d, self.modules[name])
        for entry, tensor in norm.state_dict().items():
            self.state[f"{name}.{entry}"] = tensor.clone() if tensor.dim() == 0 else tensor[self._index(kept)]
        return self._step("batchnorm", source, name=name, eps=norm.eps, momentum=norm.momentum, affine=norm.affine)

    def _add(self, op: Op) -> int:
        """Each branch is put where its channels belong; what its constant channels add becomes one shift."""
        kept = self.kept[op.name]
        constants = np.zeros(len(kept))
        branches = []
        for name in op.inputs:
            constants += _constants(self.liveness.constant[name])[kept]
            if np.isin(kept, self.kept[name]).any():
                branches.append(self._select(name, kept))
        value = branches[0] if len(branches) == 1 else self._step("add", *branches)
        return self._shift(f"constant_{op.name}", value, torch.from_numpy(constants)) if constants.any() else value

    def _flatten(self, op: Op) -> int:
        """Channel c becomes features c * area to (c + 1) * area - 1, of which the reader may need only some."""
        area, channels = op.settings["area"], self.kept[op.inputs[0]]
        value = self._step("flatten", self.value[op.inputs[0]])
        features = (channels[:, None] * area + np.arange(area)).ravel()
        return self._chosen(value, features, self.kept[op.name])

    def _select(self, source: str, wanted: Indices) -> int:
        return self._chosen(self.value[source], self.kept[source], wanted)

    def _chosen(self, value: int, have: Indices, wanted: Indices) -> int:
        """`value` has the channels `have`; give those of `wanted`, zeros where it has none."""
        if np.array_equal(have, wanted):
            return value
        place = {int(channel): position for position, channel in enumerate(have)}
        return self._step("select", value, channels=[place.get(int(channel), -1) for channel in wanted])

    def _shift(self, name: str, value: int, constants: Tensor) -> int:
        self.state[f"{name}.value"] = constants
        return self._step("shift", value, name=name)

    def _step(self, kind: str, *inputs: int, **fields: Any) -> int:
        self.steps.append({"op": kind, "inputs": list(inputs), **fields})
        number = len(self.steps)
        if self.moving.intersection(inputs):
            self.moving.add(number)
        return number

    def _index(self, indices: Indices) -> Tensor:
        device = next(iter(self.weights.values())).device
        return torch.from_numpy(indices).to(device)


def _constants(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """What constant channels add: their value, and 0 where the channel is live (NaN) and speaks for itself."""
    return np.where(np.isnan(values), 0.0, values)


def _conv_settings(conv: nn.Conv2d) -> dict[str, Any]:
    padding: str | list[int] = conv.padding if isinstance(conv.padding, str) else list(conv.padding)
    return {
        "kernel": list(conv.kernel_size),
        "stride": list(conv.stride),
        "padding": [0, 0] if padding == "valid" else padding,
        "dilation": list(conv.dilation),
    }


def _to(value: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """In the network's dtype, except for counters, which are integers."""
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)

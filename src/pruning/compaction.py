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

from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from src.pruning.compact_network import FORMAT, CompactionError, CompactNetwork
from src.pruning.graph import LAYERS, Op
from src.pruning.liveness import LayerLiveness, Liveness, analyze_liveness, check_multiple, is_padded
from src.pruning.operations import Operation
from utils_quantization import shared_quantized_weights, unwrapped

Indices = NDArray[np.int64]


@torch.no_grad()
def compact(model: nn.Module, input_size: tuple[int, int, int] = (3, 32, 32), multiple_of: int = 1) -> CompactNetwork:
    """`model` without the channels that exact removal takes out, in eval mode, on its device and in its dtype.

    Logits agree to rounding (1e-10 relative in float64, 1e-4 in float32) and MACs are those that
    metrics.QuantizationComparison.calculate_stats counts. Quantized weights become plain parameters, bit for bit;
    `model` is left as it is. input_size: (C, H, W) of one image.

    multiple_of: above 1, a layer of which something is removed keeps the next multiple of that many output channels, or
    all it has. Layers tied by residual connections keep one set: what is live in any of them, rounded up; a branch of
    which nothing is left stays away. Kept in addition are the channels whose groups (src/pruning/groups.py) have the
    largest norm with quantized weights; they compute what they did. A layer reads all kept channels. A channel of ones,
    where constants of removed channels are left, takes the place of a kept constant channel; where there is none, it
    comes on top of the multiple.

    Raises CompactionError for a `multiple_of` that is not a whole number from 1 to the widest layer's width; for a
    network in training mode, with an operation that src/pruning/graph.py does not know,
    with weights that are not finite, or whose output does not depend on the image; GraphError where the network cannot
    be traced.
    """
    model = unwrapped(model)
    if any(module.training for module in model.modules()):
        raise CompactionError(
            f"{type(model).__name__} is in training mode, where BatchNorm's statistics move and constants are not "
            "constant; call model.eval() first"
        )
    check_multiple(model, multiple_of, CompactionError)
    liveness = analyze_liveness(model, input_size, multiple_of)
    _check_supported(liveness.ops)
    modules = dict(model.named_modules())
    with shared_quantized_weights(model):
        own = {layer.name: cast(Tensor, modules[layer.name].weight).detach() for layer in liveness.layers}
    for name, weight in own.items():
        if not weight.isfinite().all():
            raise CompactionError(
                f"layer {name!r} has weights that are not finite: the network diverged; train it again"
            )
    first = next(iter(own.values()))
    writer = _Writer(liveness, modules, {name: weight.cpu() for name, weight in own.items()})
    network = CompactNetwork(writer.description(input_size))
    network.load_state_dict({name: value.detach().clone() for name, value in writer.state.items()})
    return network.to(first.device, first.dtype).eval()  # counters and indices stay whole numbers


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


class _Writer:
    """Walks the traced operations and describes a smaller one for each that still has channels. All on the CPU.

    value[op]: number of the described operation that gives the kept channels of `op`, in ascending order.
    moving: values that depend on the image; a padded convolution of constants alone varies in space, but not with it.
    """

    def __init__(self, liveness: Liveness, modules: dict[str, nn.Module], weights: dict[str, Tensor]) -> None:
        self.liveness, self.modules, self.weights = liveness, modules, weights
        self.layers = {layer.name: layer for layer in liveness.layers}
        self.kept: dict[str, Indices] = {name: np.flatnonzero(flags) for name, flags in liveness.kept.items()}
        self.ops = {op.name: op for op in liveness.ops}
        self.operations: list[Operation] = []
        self.state: dict[str, Tensor] = {}
        self.value: dict[str, int] = {}
        self.moving: set[int] = {0}

    def description(self, input_size: tuple[int, int, int]) -> dict[str, Any]:
        """The description of the smaller network; `self.state` is its state dictionary then."""
        for op in self.liveness.ops:
            if op.kind == "input":
                self.value[op.name] = 0
            elif op.kind != "output" and len(self.kept[op.name]):
                self.value[op.name] = self._write(op)
        output = self.value.get(self.liveness.ops[-1].inputs[0], -1)
        if output not in self.moving:
            cut = [layer.name for layer in self.liveness.layers if not len(layer.kept_out)]
            raise CompactionError(
                "the network is dead: its output is the same for every image (layers of which nothing is left: "
                f"{', '.join(cut) or 'none'}); train it with a smaller penalty or a later ramp"
            )
        size = [int(side) for side in input_size]
        return {"format": FORMAT, "input_size": size, "steps": self.operations, "output": output}

    def _write(self, op: Op) -> int:
        if op.kind in LAYERS:
            return self._layer(op, self.layers[cast(str, op.module)])
        if op.kind == "add":
            return self._add(op)
        source, kept = op.inputs[0], self.kept[op.name]
        channels = op.channel_map(len(self.liveness.kept[source]))
        if op.kind == "flatten":  # of the features of a kept channel, the reader may need only some
            features = np.flatnonzero(np.isin(channels, self.kept[source]))
            return self._chosen(self._describe("flatten", self.value[source]), features, kept)
        value = self._select(source, channels[kept])
        if op.kind in ("pass", "select"):
            return value
        if op.kind == "batchnorm":
            name = cast(str, op.module)
            for entry, tensor in self.modules[name].state_dict().items():
                self.state[f"{name}.{entry}"] = tensor.cpu() if tensor.dim() == 0 else tensor.cpu()[kept]
            return self._describe("batchnorm", value, name=name, **op.settings)
        return self._describe(op.kind, value, **op.settings)

    def _layer(self, op: Op, layer: LayerLiveness) -> int:
        """A convolution or linear layer: filters that stay, slices that stay, and the constants it reads."""
        module, source = self.modules[layer.name], op.inputs[0]
        weight = self.weights[layer.name][layer.kept_out]  # (O, I, ...)
        bias = None if module.bias is None else cast(Tensor, module.bias).detach().cpu()[layer.kept_out]
        constants = np.nan_to_num(self.liveness.constant[source])
        constants[layer.kept_in] = 0
        carried = torch.tensordot(weight.double(), torch.from_numpy(constants), dims=([1], [0]))  # (O, ...)
        weight = weight[:, layer.kept_in]
        value = self._select(source, layer.kept_in) if len(layer.kept_in) else None
        if layer.carries_constants:
            weight = torch.cat([weight, carried.unsqueeze(1).to(weight.dtype)], dim=1)
            ones = self._describe("fill", value=1, size=[1, self.ops[source].height, self.ops[source].width])
            value = ones if value is None else self._describe("join", value, ones)
        elif not is_padded(module) and carried.any():
            folded = carried.reshape(len(carried), -1).sum(dim=1)
            bias = folded if bias is None else folded + bias
        if value is None:  # an output that must stay although its weights are zero: its bias is all there is
            space = [op.height, op.width] if op.kind == "conv" else []
            blank = self._describe("fill", value=0, size=[len(layer.kept_out), *space])
            return blank if bias is None else self._shift(layer.name, blank, bias)
        self.state[f"{layer.name}.weight"] = weight.contiguous()
        if bias is not None:
            self.state[f"{layer.name}.bias"] = bias
        width = {"out_channels" if op.kind == "conv" else "out_features": len(layer.kept_out)}
        return self._describe(op.kind, value, name=layer.name, **width, **op.settings, bias=bias is not None)

    def _add(self, op: Op) -> int:
        """Each branch is put where its channels belong; what its constant channels add becomes one shift."""
        kept = self.kept[op.name]
        constants = np.zeros(len(kept))
        branches = []
        for name in op.inputs:
            constants += self._removed(name)[kept]
            if np.isin(kept, self.kept[name]).any():
                branches.append(self._chosen(self.value[name], self.kept[name], kept))
        value = branches[0] if len(branches) == 1 else self._describe("add", *branches)
        return self._shift(f"constant_{op.name}", value, torch.from_numpy(constants)) if constants.any() else value

    def _select(self, source: str, wanted: Indices) -> int:
        value = self._chosen(self.value[source], self.kept[source], wanted)
        constants = np.append(self._removed(source), 0.0)[wanted]  # -1 takes the 0
        name = f"constant_{source}_{len(self.operations)}"
        return self._shift(name, value, torch.from_numpy(constants)) if constants.any() else value

    def _removed(self, source: str) -> NDArray[np.float64]:
        """What the removed channels of a value are, 0 for those that are kept or that nothing needs."""
        constants = np.nan_to_num(self.liveness.constant[source])
        constants[self.kept[source]] = 0
        return constants

    def _chosen(self, value: int, have: Indices, wanted: Indices) -> int:
        """`value` has the channels `have`; give those of `wanted`, zeros where it has none."""
        if np.array_equal(have, wanted):
            return value
        place = {int(channel): position for position, channel in enumerate(have)}
        return self._describe("select", value, channels=[place.get(int(channel), -1) for channel in wanted])

    def _shift(self, name: str, value: int, constants: Tensor) -> int:
        self.state[f"{name}.value"] = constants
        return self._describe("shift", value, name=name)

    def _describe(self, kind: str, *inputs: int, **fields: Any) -> int:
        self.operations.append({"op": kind, "inputs": list(inputs), **fields})
        number = len(self.operations)
        if self.moving.intersection(inputs):
            self.moving.add(number)
        return number

"""A compact network whose quantized weights are also known as what they are: whole numbers on a grid.

A quantized weight is s q + delta sign(q) with a whole number q, a step s and a shift delta (src/quantizer.py). A
packed file and an ONNX file store q. A compacted convolution may read one more channel, of ones, which carries the
constants of removed channels (src/pruning/compaction.py): that last column is a sum of many weights, not on the grid.
Axis letters: O output channels, I input channels, k kernel.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from src.pruning import CompactNetwork, LayerLiveness, analyze_liveness, compact
from src.quantizer import DeadZoneLDZCompander, dequantize
from utils_quantization import FakeQuantParametrization, latent_weight, quantized_layers, quantizer_of


class IndexingError(ValueError):
    """A network whose weights cannot be written as indices on a grid."""


@dataclass(frozen=True, eq=False)
class IndexedWeight:
    """The quantized part of one layer's weight, on the CPU.

    bits: bit width b; |q| <= 2^(b - 1) - 1. step, shift: float32 (), in weight units.
    indices: q, int32 (O, I, ...), where I leaves out a column of constants behind the quantized ones.
    """

    bits: int
    step: Tensor
    shift: Tensor
    indices: Tensor

    def values(self) -> Tensor:
        """s q + delta sign(q), float32, bit for bit what the network was evaluated with."""
        return dequantize(self.indices.to(torch.float32), self.step, self.shift)


@torch.no_grad()
def compact_with_indices(
    model: nn.Module, input_size: tuple[int, int, int] = (3, 32, 32)
) -> tuple[CompactNetwork, dict[str, IndexedWeight]]:
    """`model` compacted, on the CPU, and the indices of those of its layers that are quantized, by name.

    Grid and indices are computed on the model's own device, as they were for its evaluation. A network without
    quantizers gives no indices; a CompactNetwork is taken as it is. Raises IndexingError where a quantizer is switched
    off or has no grid, or the weights are not float32; CompactionError as `compact` does.
    """
    _check_dtype(model)
    layers = quantized_layers(model)
    for name, layer in layers.items():
        _check_quantizer(name, layer)
    if isinstance(model, CompactNetwork) and not layers:
        return copy.deepcopy(model).cpu().eval(), {}
    network = compact(model, input_size).cpu()
    state = network.state_dict()
    liveness = {layer.name: layer for layer in analyze_liveness(model, input_size).layers} if layers else {}
    found = {
        name: _indexed(name, layer, liveness[name], state[f"{name}.weight"])
        for name, layer in layers.items()
        if f"{name}.weight" in state
    }
    return network, found


def _indexed(name: str, layer: nn.Module, liveness: LayerLiveness, weight: Tensor) -> IndexedWeight:
    quantizer, latent = cast(DeadZoneLDZCompander, quantizer_of(layer)), latent_weight(layer).detach()
    grid = quantizer.grid(latent)
    rows, columns = torch.from_numpy(liveness.kept_out), torch.from_numpy(liveness.kept_in)
    indices = quantizer.indices(latent).cpu()[rows][:, columns].contiguous()
    bits = int(quantizer.get_bitwidth().item())
    found = IndexedWeight(bits, grid.step.cpu(), grid.shift.cpu(), indices)
    on_grid = weight[:, : len(columns)].contiguous()
    if not torch.equal(found.values().view(torch.int32), on_grid.view(torch.int32)):
        raise IndexingError(
            f"layer {name!r}: its weights are not those of its quantizer's grid; attach the quantizer alone, with no "
            "other parametrization of the weight"
        )
    return found


def _check_dtype(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise IndexingError(f"{name!r} is {tensor.dtype}: need float32 throughout; call model.float() first")


def _check_quantizer(name: str, layer: nn.Module) -> None:
    stack = list(cast(nn.ModuleList, cast(nn.ModuleDict, layer.parametrizations)["weight"]))
    if not all(part.enabled for part in stack if isinstance(part, FakeQuantParametrization)):
        raise IndexingError(
            f"the quantizer of layer {name!r} is switched off, so its weights are on no grid; switch all on with "
            "toggle_quantization(model, True)"
        )
    quantizer = quantizer_of(layer)
    if not isinstance(quantizer, DeadZoneLDZCompander):
        raise IndexingError(
            f"layer {name!r} is quantized by {type(quantizer).__name__}, whose grid is not known here: need "
            "DeadZoneLDZCompander; exclude the layer from quantization to keep it in float32"
        )

"""A compact network whose quantized weights are also known as what they are: whole numbers on a grid.

A quantized weight is s q + delta sign(q) with a whole number q, a step s and a shift delta (src/quantizer.py). A
packed file and an ONNX file store q. A compacted convolution may read one more channel, of ones, which carries the
constants of removed channels (src/pruning/compaction.py): that last column is a sum of many weights, not on the grid.
Axis letters: O output channels, I input channels, k kernel.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from src.pruning import CompactNetwork, InputSize, LayerLiveness, analyze_liveness, compact
from src.quantizer import DeadZoneLDZCompander, dequantize
from utils_quantization import latent_weight, quantized_layers, quantizer_of, unwrapped


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


@dataclass(frozen=True, eq=False)
class IndexedNetwork:
    """A compacted network, on the CPU, and the weights of those of its layers that are quantized, by name.

    dense_bytes: FP32 state of the network it was made from, see `fp32_state_bytes`.
    """

    network: CompactNetwork
    weights: dict[str, IndexedWeight]
    dense_bytes: int


@torch.no_grad()
def compact_with_indices(
    model: nn.Module | IndexedNetwork, input_size: InputSize = (3, 32, 32), multiple_of: int = 1
) -> IndexedNetwork:
    """`model` compacted, with the indices of its quantized weights. What was compacted before is taken as it is.
    multiple_of: as in `compact`.

    Grid and indices are computed on the model's own device, as they were for its evaluation. A network without
    quantizers gives no indices. Raises IndexingError where a quantizer is switched off or has no grid, or the weights
    are not float32; CompactionError as `compact` does.
    """
    if isinstance(model, IndexedNetwork):
        return model
    model = unwrapped(model)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise IndexingError(f"{name!r} is {tensor.dtype}: need float32 throughout; call model.float() first")
    layers = quantized_layers(model)
    if isinstance(model, CompactNetwork) and not layers:
        return IndexedNetwork(copy.deepcopy(model).cpu().eval(), {}, fp32_state_bytes(model))
    network = compact(model, input_size, multiple_of).cpu()
    state = network.state_dict()
    liveness = {layer.name: layer for layer in analyze_liveness(model, input_size, multiple_of).layers}
    weights = {
        name: _indexed(layer, liveness[name], state[f"{name}.weight"])
        for name, layer in layers.items()
        if f"{name}.weight" in state
    }
    return IndexedNetwork(network, weights, fp32_state_bytes(model))


def fp32_state_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers without the quantizers' own: 4 a float, a counter as it is."""
    return sum(
        tensor.numel() * (4 if tensor.is_floating_point() else tensor.element_size())
        for name, tensor in model.state_dict().items()
        if ".parametrizations." not in name or name.endswith(".original")
    )


def _indexed(layer: nn.Module, liveness: LayerLiveness, weight: Tensor) -> IndexedWeight:
    quantizer, latent = quantizer_of(layer), latent_weight(layer).detach()
    if not isinstance(quantizer, DeadZoneLDZCompander):
        raise IndexingError(
            f"layer {liveness.name!r} is quantized by {type(quantizer).__name__}, whose grid is not known here: need "
            "DeadZoneLDZCompander; exclude the layer from quantization to keep it in float32"
        )
    grid = quantizer.grid(latent)
    indices = liveness.smaller_weight(quantizer.indices(latent).cpu()).contiguous()
    found = IndexedWeight(int(quantizer.get_bitwidth().item()), grid.step.cpu(), grid.shift.cpu(), indices)
    if not torch.equal(found.values(), weight[:, : indices.shape[1]]):
        raise IndexingError(
            f"layer {liveness.name!r}: its weights are not on its quantizer's grid; switch all quantizers on with "
            "toggle_quantization(model, True), and attach them alone, with no other parametrization of the weight"
        )
    return found

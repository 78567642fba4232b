"""Networks as training leaves them: quantized with a bit width per layer, some channels dead, BatchNorm moved."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from resnet import BasicBlock, ResNet, resnet20
from src.quantizer import DeadZoneLDZCompander
from utils_quantization import attach_weight_quantizers, latent_weight, quantized_layers, quantizer_of

SMALL_SIZE = (3, 8, 8)


def bit_logit(bits: int, max_bits: int = 8) -> float:
    """theta with |tanh theta| (max - 2) + 2 = bits, just inside for the largest."""
    return math.atanh(min(0.999, (bits - 2) / (max_bits - 2)))


@torch.no_grad()
def as_trained(
    model: nn.Module, bits: Sequence[int] = (8,), dead: float = 0.3, max_bits: int = 8, seed: int = 1
) -> nn.Module:
    """Attach quantizers to all block convolutions of a ResNet; layer i gets `bits[i % len(bits)]`."""
    attach_weight_quantizers(model, ["conv1", "bn", "linear"], DeadZoneLDZCompander, {"max_bits": max_bits})
    generator = torch.Generator().manual_seed(seed)
    for place, layer in enumerate(quantized_layers(model).values()):
        quantizer, weight = quantizer_of(layer), latent_weight(layer)
        quantizer.logit_bit.fill_(bit_logit(bits[place % len(bits)], max_bits))
        quantizer.logit_dz.fill_((0.5, 1.2, 3.0)[place % 3])  # 3.0: the shift is negative at few bits
        weight.normal_(0, 0.1, generator=generator)
        weight[torch.rand(len(weight), generator=generator) < dead] = 0
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            module.bias.normal_(0, 0.2, generator=generator)
            module.num_batches_tracked.fill_(5)
    return model.eval()


def mixed_resnet20() -> nn.Module:
    """resnet20 with 2, 3, 4, ..., 8, 2, 3, ... bits in its 18 block convolutions and 3 of 10 filters dead."""
    return as_trained(resnet20(), bits=range(2, 9))


def small_resnet(bits: Sequence[int] = (8,), max_bits: int = 8, option: str = "A") -> nn.Module:
    """Widths 4, 6, 8 with one block a stage, for images of 8 x 8 pixels."""
    return as_trained(ResNet(BasicBlock, [1, 1, 1], 5, option=option, widths=(4, 6, 8)), bits, 0.2, max_bits)

"""The quantizer written out piece by piece, and the subclasses that get one piece wrong.

`PlainQuantizer` computes what `DeadZoneLDZCompander` computes, one layer at a time, from methods that a subclass can
replace. Every class below it replaces one of them and is otherwise whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from src.quantizer import DeadZoneLDZCompander, clip_ste, quantize, relu_ste, round_ste, weight_ranges


class PlainQuantizer(DeadZoneLDZCompander):
    """The equations of src/quantizer.py, each in a method of its own. w: any shape; returns the same shape."""

    def forward(self, w: Tensor) -> Tensor:
        range_, bits = self.range_of(w), self.get_bitwidth()
        dead_zone = self.dead_zone(range_)
        levels = self.levels(bits)
        step = (range_ - dead_zone / 2) / (levels - 0.5) + 1e-8
        shift = dead_zone / 2 - step / 2
        outside = self.sign(w) * self.relu(w.abs() - shift)
        q = self.clip(self.round(outside / step), levels) + 0.0
        return step * q + shift * self.value_sign(q, w)

    @staticmethod
    def quantize_many(quantizers: Sequence[DeadZoneLDZCompander], weights: Sequence[Tensor]) -> list[Tensor]:
        return [quantizer(w) for quantizer, w in zip(quantizers, weights, strict=True)]

    def range_of(self, w: Tensor) -> Tensor:
        return weight_ranges([w.flatten()])[0]

    def dead_zone(self, range_: Tensor) -> Tensor:
        return 2 * range_ * (1 - self.logit_dz.tanh().abs())

    def levels(self, bits: Tensor) -> Tensor:
        return torch.exp2(bits - 1) - 1

    def round(self, x: Tensor) -> Tensor:
        return round_ste(x)

    def relu(self, x: Tensor) -> Tensor:
        return relu_ste(x)

    def clip(self, x: Tensor, bound: Tensor) -> Tensor:
        return clip_ste(x, bound)

    def sign(self, w: Tensor) -> Tensor:
        return w.sign()

    def value_sign(self, q: Tensor, w: Tensor) -> Tensor:
        return q.sign()


class ReluStops(PlainQuantizer):
    def relu(self, x: Tensor) -> Tensor:
        return x.relu()


class ClipStops(PlainQuantizer):
    def clip(self, x: Tensor, bound: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(x, -bound.detach()), bound.detach())


class SignPasses(PlainQuantizer):
    def sign(self, w: Tensor) -> Tensor:
        return w.sign().detach() + w - w.detach()


class IndexSignPasses(PlainQuantizer):
    def value_sign(self, q: Tensor, w: Tensor) -> Tensor:
        return q.sign().detach() + q - q.detach()


class QuantilePasses(PlainQuantizer):
    def range_of(self, w: Tensor) -> Tensor:
        return torch.quantile(w.abs().flatten(), 0.99)


class RangeIsMaximum(PlainQuantizer):
    def range_of(self, w: Tensor) -> Tensor:
        return w.detach().abs().max()


class RangeOfSignedWeights(PlainQuantizer):
    def range_of(self, w: Tensor) -> Tensor:
        return torch.quantile(w.detach().flatten(), 0.99).clamp(min=1e-8)


class DeadZoneDoubled(PlainQuantizer):
    def dead_zone(self, range_: Tensor) -> Tensor:
        return 2 * super().dead_zone(range_)


class DeadZoneDetached(PlainQuantizer):
    def dead_zone(self, range_: Tensor) -> Tensor:
        return super().dead_zone(range_).detach()


class ShiftOnZeros(PlainQuantizer):
    """The shift goes to every weight instead of every non-zero index, so nothing is ever exactly 0."""

    def value_sign(self, q: Tensor, w: Tensor) -> Tensor:
        return w.sign()


class OneBitMore(PlainQuantizer):
    def levels(self, bits: Tensor) -> Tensor:
        return torch.exp2(bits) - 1


class RoundedInBfloat16(PlainQuantizer):
    def forward(self, w: Tensor) -> Tensor:
        return super().forward(w).bfloat16().float()


class BitsRoundedDown(PlainQuantizer):
    def get_bitwidth(self) -> Tensor:
        if not self._learns_bits:
            return self.fixed_bit
        x = self.logit_bit.tanh().abs() * (self.max_bits - self.min_bits) + self.min_bits
        return x + (x.floor() - x).detach()


class BitsFrozen(PlainQuantizer):
    def get_bitwidth(self) -> Tensor:
        return super().get_bitwidth().detach()


class BitsUnlimited(PlainQuantizer):
    def get_bitwidth(self) -> Tensor:
        return round_ste(self.logit_bit.abs() * (self.max_bits - self.min_bits) + self.min_bits)


class BitsNotRounded(PlainQuantizer):
    def get_bitwidth(self) -> Tensor:
        return self.logit_bit.tanh().abs() * (self.max_bits - self.min_bits) + self.min_bits


class FirstResultKept(PlainQuantizer):
    """The quantized weight is computed at the first step and reused ever after: a cache that nobody empties."""

    def forward(self, w: Tensor) -> Tensor:
        self.__dict__.setdefault("_kept", {}).setdefault(w.shape, super().forward(w).detach())
        return self.__dict__["_kept"][w.shape] + (w - w.detach())


class OffInTraining(PlainQuantizer):
    def forward(self, w: Tensor) -> Tensor:
        return w if self.training else super().forward(w)


class OffInEvaluation(PlainQuantizer):
    def forward(self, w: Tensor) -> Tensor:
        return super().forward(w) if self.training else w


class NoisyQuantizer(PlainQuantizer):
    """Dithering noise of half a step that is never switched off: no two evaluations are the same."""

    def round(self, x: Tensor) -> Tensor:
        return super().round(x + torch.rand_like(x) - 0.5)


class RangeOfFilter(PlainQuantizer):
    """R is the quantile of each filter; a flat tensor has only one."""

    def range_of(self, w: Tensor) -> Tensor:
        if w.dim() < 2:
            return super().range_of(w)
        ranges = weight_ranges(list(w.flatten(1)))
        return ranges.view(-1, *[1] * (w.dim() - 1))


class RangeRemembered(PlainQuantizer):
    """R is a running average over all the weights that the quantizer has seen in training mode."""

    def range_of(self, w: Tensor) -> Tensor:
        now = super().range_of(w)
        if self.training:
            before = self.__dict__.get("_average", now)
            self.__dict__["_average"] = 0.9 * before.to(now.dtype) + 0.1 * now
        return self.__dict__.get("_average", now)


class BitsOfNeighbour(DeadZoneLDZCompander):
    """Alone a layer has its own bits; where all are computed at once, those of the layer before."""

    @staticmethod
    def quantize_many(quantizers: Sequence[DeadZoneLDZCompander], weights: Sequence[Tensor]) -> list[Tensor]:
        bits = torch.stack([quantizer.get_bitwidth() for quantizer in quantizers])
        return quantize(weights, torch.stack([quantizer.logit_dz for quantizer in quantizers]), bits.roll(1))


class PrunedStopTogether(DeadZoneLDZCompander):
    """Where all layers are computed at once, a pruned weight gets no gradient."""

    @staticmethod
    def quantize_many(quantizers: Sequence[DeadZoneLDZCompander], weights: Sequence[Tensor]) -> list[Tensor]:
        values = [quantizer(w) for quantizer, w in zip(quantizers, weights, strict=True)]
        return [value * (value.detach() != 0) for value in values]


class OneForAll:
    """Hands the same quantizer to every layer."""

    def __init__(self) -> None:
        self._only: nn.Module | None = None

    def __call__(self, **settings: Any) -> nn.Module:
        self._only = self._only or DeadZoneLDZCompander(**settings)
        return self._only

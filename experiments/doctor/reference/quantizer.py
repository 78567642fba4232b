"""CoDeQ's quantizer as equations in torch, float64 where the weights are, in pieces that can each be exchanged.

For the weights w of one layer:
    R = 0.99-quantile of |w|, no gradient          d = 2 R (1 - |tanh theta_dz|)
    b = round(|tanh theta_bit| (b_max - 2) + 2)    Q = 2^(b - 1) - 1
    s = (R - d/2) / (Q - 1/2) + 1e-8               delta = d/2 - s/2
    q = clip(round(sign(w) relu(|w| - delta) / s), -Q, Q)
    v = s q + delta sign(q)
round, relu and clip pass the gradient straight through; sign and the clip's bound have none.
Axis letters: T weights of the layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

RANGE_QUANTILE = 0.99


def straight_through(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """function(x, ...) forward; backward the identity for x, and nothing for the rest."""
    return lambda x, *rest: function(x, *rest).detach() + (x - x.detach())


round_ste = straight_through(torch.round)
relu_ste = straight_through(torch.relu)
clip_ste = straight_through(lambda x, bound: x.clamp(-bound, bound))


@dataclass(frozen=True)
class Grid:
    """The grid over one layer's weights, in weight units; `levels` on each side of 0."""

    range: Tensor
    dead_zone: Tensor
    bits: Tensor
    levels: Tensor
    step: Tensor
    shift: Tensor


@dataclass(frozen=True)
class QuantizerEquations:
    """The quantizer of one layer: `equations(w, theta_dz, theta_bit)`. Logits are ().

    fixed_bits: the bit width where none is learned. latent(w, theta_dz, theta_bit): what is quantized.
    value(q, w, s, delta), result(v, w, training): what a weight becomes, and what the layer reads.
    """

    max_bits: float = 8.0
    min_bits: float = 2.0
    fixed_bits: float | None = None
    latent: Callable[..., Tensor] = lambda w, theta_dz, theta_bit: w
    range_of: Callable[[Tensor], Tensor] = lambda w: w.detach().abs().flatten().quantile(RANGE_QUANTILE)
    zero_share: Callable[[Tensor], Tensor] = lambda theta: 1 - theta.tanh().abs()
    dead_zone: Callable[[Tensor, Tensor], Tensor] = lambda range_, share: 2 * range_ * share
    bit_share: Callable[[Tensor], Tensor] = lambda theta: theta.tanh().abs()
    round_bits: Callable[[Tensor], Tensor] = round_ste
    levels: Callable[[Tensor], Tensor] = lambda bits: torch.exp2(bits - 1) - 1
    step: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda r, d, levels: (r - d / 2) / (levels - 0.5) + 1e-8
    shift: Callable[[Tensor, Tensor], Tensor] = lambda dead_zone, step: dead_zone / 2 - step / 2
    sign: Callable[[Tensor], Tensor] = torch.sign
    relu: Callable[[Tensor], Tensor] = relu_ste
    round: Callable[[Tensor], Tensor] = round_ste
    clip: Callable[[Tensor, Tensor], Tensor] = clip_ste
    value: Callable[..., Tensor] = lambda q, w, step, shift: step * q + shift * q.sign()
    result: Callable[..., Tensor] = lambda v, w, training: v

    def bits(self, theta_bit: Tensor) -> Tensor:
        """b, ()."""
        if self.fixed_bits is not None:
            return torch.full_like(theta_bit, self.fixed_bits)
        return self.round_bits(self.bit_share(theta_bit) * (self.max_bits - self.min_bits) + self.min_bits)

    def grid(self, w: Tensor, theta_dz: Tensor, theta_bit: Tensor) -> Grid:
        """The grid for the weights w, any shape."""
        range_, bits = self.range_of(w), self.bits(theta_bit)
        dead_zone, levels = self.dead_zone(range_, self.zero_share(theta_dz)), self.levels(bits)
        step = self.step(range_, dead_zone, levels)
        return Grid(range_, dead_zone, bits, levels, step, self.shift(dead_zone, step))

    def __call__(self, w: Tensor, theta_dz: Tensor, theta_bit: Tensor, training: bool = True) -> Tensor:
        """The quantized weights, of w's shape. training: the mode that the quantizer is in, which changes nothing."""
        w = self.latent(w, theta_dz, theta_bit)
        grid = self.grid(w, theta_dz, theta_bit)
        outside = self.sign(w) * self.relu(w.abs() - grid.shift)
        q = self.clip(self.round(outside / grid.step), grid.levels)
        return self.result(self.value(q, w, grid.step, grid.shift), w, training)


def near_a_threshold(w: Tensor, grid: Grid, tolerance: float = 2e-4) -> Tensor:
    """Which weights are so close to where the index changes that float32 may fall on the other side; bool."""
    place = (w.abs() - grid.shift).relu() / grid.step
    return (place - place.floor() - 0.5).abs() < tolerance * (grid.range / grid.step / 64).clamp(min=1.0)

"""The quantizer with one mistake in it: how its values, gradients and bit widths are usually got wrong.

Mutants of one key are one kind of mistake in several forms. What a quantizer remembers is an object that is copied with
it, so that every layer has its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from experiments.doctor.causes.explain import Mutant
from experiments.doctor.reference.quantizer import RANGE_QUANTILE, QuantizerEquations, straight_through

INITIAL_LOGIT = 3.0


def mutant(key: str, **pieces: Any) -> Mutant[QuantizerEquations]:
    """The equations with other pieces, which do not depend on the right ones."""
    return Mutant(key, lambda right: replace(right, **pieces))


def detached(piece: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The piece without a gradient."""
    return lambda *arguments: piece(*arguments).detach()


def passing(piece: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The piece with the identity as its gradient."""
    return straight_through(piece)


@dataclass
class Kept:
    """A piece whose first result is given ever after, without gradient; moved: how far a later one draws it along."""

    piece: Callable[..., Tensor]
    moved: float = 0.0
    result: Tensor | None = None

    def __call__(self, *arguments: Any) -> Tensor:
        """The result that is kept, in the type of this call's."""
        now = self.piece(*arguments).detach()
        before = now if self.result is None else self.result.to(now.dtype)
        self.result = before + self.moved * (now - before)
        return self.result


def quantile(share: float) -> Callable[[Tensor], Tensor]:
    """The range as another quantile of |w|."""
    return lambda w: w.detach().abs().flatten().quantile(share)


def range_read_off(values: Tensor, w: Tensor) -> Mutant[QuantizerEquations]:
    """The range that quantized values show, whose largest is the last level: a share of the largest weight."""
    share = values.abs().max() / w.abs().max()
    return mutant("range-wrong", range_of=lambda w: share * w.detach().abs().max())


def per_filter(w: Tensor) -> Tensor:
    """A range for every filter, (O, 1, ...); a flat tensor has one."""
    rows = w.detach().abs().flatten(1).quantile(RANGE_QUANTILE, dim=1) if w.dim() > 1 else w.detach().abs().amax()
    return rows.view(-1, *[1] * (w.dim() - 1)) if w.dim() > 1 else rows


def decimals(places: float) -> Callable[..., Tensor]:
    """The weights in multiples of 1 / places."""
    return passing(lambda w, *_: (w * places).round() / places)


def cast(dtype: torch.dtype) -> Callable[..., Tensor]:
    """The first argument as it is after a stay in another type."""
    return lambda x, *_: x.to(dtype).to(x.dtype)


def bound_learned(x: Tensor, bound: Tensor) -> Tensor:
    """A straight-through clip whose bound has a gradient."""
    return x.detach().clamp(-bound, bound) + (x - x.detach())


TWICE = Mutant[QuantizerEquations]("quantized-twice", lambda right: replace(right, latent=right))

WRONG_VALUES: tuple[Mutant[QuantizerEquations], ...] = (
    mutant("range-wrong", range_of=per_filter),
    *(
        Mutant("range-kept", lambda right, moved=moved: replace(right, range_of=Kept(right.range_of, moved)))  # type: ignore[misc]
        for moved in (0.0, 0.01, 0.1, 0.5)
    ),
    *(
        mutant("dead-zone-wrong", dead_zone=lambda r, share, factor=factor: factor * r * share)
        for factor in (0.5, 1.0, 4.0)
    ),
    mutant("dead-zone-wrong", zero_share=lambda theta: theta.tanh().abs()),
    mutant("dead-zone-squashed", zero_share=lambda theta: 1 - theta.tanh()),
    mutant("dead-zone-squashed", zero_share=lambda theta: 1 - theta.sigmoid()),
    mutant("dead-zone-squashed", zero_share=lambda theta: 1 - theta.abs().sigmoid()),
    mutant("dead-zone-squashed", zero_share=lambda theta: theta.sigmoid()),
    mutant("dead-zone-frozen", zero_share=lambda theta: torch.full_like(theta, 1 - math.tanh(INITIAL_LOGIT))),
    Mutant("dead-zone-frozen", lambda right: replace(right, zero_share=Kept(right.zero_share))),
    mutant("grid-wrong", levels=lambda bits: torch.exp2(bits) - 1),
    mutant("grid-wrong", levels=lambda bits: torch.exp2(bits - 1)),
    mutant("grid-wrong", step=lambda r, d, levels: (r - d / 2) / levels),
    mutant("grid-wrong", step=lambda r, d, levels: (r - d) / (levels - 0.5)),
    mutant("grid-wrong", step=lambda r, d, levels: r / (levels - 0.5)),
    mutant("grid-wrong", shift=lambda d, step: d / 2),
    mutant("grid-wrong", shift=lambda d, step: torch.zeros_like(step)),
    mutant("grid-wrong", value=lambda q, w, step, shift: step * q),
    mutant("grid-wrong", value=lambda q, w, step, shift: step * q + shift * w.sign()),
    mutant("grid-wrong", round=passing(torch.floor)),
    mutant("grid-wrong", round=passing(torch.trunc)),
    mutant("clip-missing", clip=lambda x, bound: x),
    mutant("bits-floored", round_bits=passing(torch.floor)),
    mutant("bits-ceiled", round_bits=passing(torch.ceil)),
    mutant("bits-not-rounded", round_bits=lambda x: x),
    mutant("bits-out-of-range", bit_share=lambda theta: theta.abs()),
    mutant("bits-wrong", bit_share=lambda theta: theta.tanh()),
    mutant("bits-wrong", bit_share=lambda theta: theta.sigmoid()),
    mutant("bits-wrong", bit_share=lambda theta: theta.tanh().square()),
    mutant("bits-frozen", bit_share=lambda theta: torch.full_like(theta, math.tanh(INITIAL_LOGIT))),
    Mutant("bits-frozen", lambda right: replace(right, bit_share=Kept(right.bit_share))),
    *(mutant("quantizer-settings", max_bits=float(most), fixed_bits=None) for most in (*range(2, 9), 10, 12, 16)),
    *(mutant("quantizer-settings", fixed_bits=float(bits)) for bits in range(2, 9)),
    *(mutant("weights-changed-first", latent=cast(dtype)) for dtype in (torch.float16, torch.bfloat16)),
    mutant("weights-changed-first", latent=lambda w, *_: w - w.mean()),
    mutant("weights-changed-first", latent=lambda w, *_: w - w.mean().detach()),
    mutant("weights-changed-first", latent=lambda w, *_: (w - w.mean()) / w.std()),
    mutant("weights-changed-first", latent=lambda w, *_: w.tanh()),
    *(mutant("weights-changed-first", latent=decimals(places)) for places in (10, 100, 1000, 64, 128, 256, 1024)),
    TWICE,
    *(
        mutant("quantizer-precision", result=lambda v, w, training, dtype=dtype: cast(dtype)(v))
        for dtype in (torch.bfloat16, torch.float16)
    ),
    mutant("not-quantized", result=lambda v, w, training: w),
    mutant("quantizers-off-in-training", result=lambda v, w, training: w if training else v),
    mutant("quantizers-off-in-evaluation", result=lambda v, w, training: v if training else w),
    Mutant("weights-stale", lambda right: replace(right, result=Kept(right.result))),
)
"""Mistakes that change values; the first of equals is named."""

WRONG_GRADIENTS: tuple[Mutant[QuantizerEquations], ...] = (
    TWICE,  # where the largest level holds a hundredth of the weights, values are the same
    mutant("no-ste-round", round=torch.round),
    mutant("no-ste-relu", relu=torch.relu),
    mutant("no-ste-clip", clip=lambda x, bound: x.clamp(-bound.detach(), bound.detach())),
    mutant("no-ste-clip", clip=lambda x, bound: x.clamp(-bound, bound)),
    mutant("gradient-through-clip-bound", clip=bound_learned),
    mutant("gradient-through-sign", sign=passing(torch.sign)),
    mutant("gradient-through-sign", value=lambda q, w, step, shift: step * q + shift * passing(torch.sign)(q)),
    mutant("gradient-through-quantile", range_of=lambda w: w.abs().flatten().quantile(RANGE_QUANTILE)),
    Mutant("logits-detached", lambda right: replace(right, zero_share=detached(right.zero_share))),
    Mutant("logits-detached", lambda right: replace(right, round_bits=detached(right.round_bits))),
    Mutant(
        "logits-detached",
        lambda right: replace(right, zero_share=detached(right.zero_share), round_bits=detached(right.round_bits)),
    ),
    Mutant("logits-detached", lambda right: replace(right, step=detached(right.step), shift=detached(right.shift))),
)
"""Mistakes that change gradients alone."""

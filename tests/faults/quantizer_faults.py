"""Faults inside the quantizer. Most are the equations with one mistake in them, put into the real network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from experiments.doctor import Pipeline
from experiments.doctor.causes.explain import Mutant
from experiments.doctor.causes.quantizer_mutants import (
    Kept,
    bound_learned,
    cast,
    decimals,
    detached,
    mutant,
    passing,
    per_filter,
    quantile,
)
from experiments.doctor.reference.quantizer import QuantizerEquations
from experiments.notebook import demonstration
from experiments.notebook.demonstration import Fault, attaching
from src.quantizer import DeadZoneLDZCompander, quantize
from utils_quantization import FakeQuantParametrization, shared_quantized_weights


class MutatedQuantizer(DeadZoneLDZCompander):
    """Computes with a mutant of the equations, in the weights' own type and one layer at a time."""

    def __init__(self, change: Callable[[QuantizerEquations], QuantizerEquations], **settings: Any) -> None:
        super().__init__(**settings)
        fixed = None if self._learns_bits else self.fixed_bit.item()
        self.equations = change(QuantizerEquations(self.max_bits.item(), self.min_bits.item(), fixed))

    def forward(self, w: Tensor) -> Tensor:
        return self.equations(w, self.logit_dz, self.logit_bit, self.training)

    def get_bitwidth(self) -> Tensor:
        return self.equations.bits(self.logit_bit)

    @staticmethod
    def quantize_many(quantizers: Sequence[nn.Module], weights: Sequence[Tensor]) -> list[Tensor]:
        return [quantizer(w) for quantizer, w in zip(quantizers, weights, strict=True)]


def quantizer_fault(name: str, breaks: str, mistake: Mutant[QuantizerEquations], *also: str) -> Fault:
    """The network with quantizers that make `mistake`; also: other keys that name it rightly."""
    return Fault(name, breaks, (mistake.key, *also), parts=attaching(partial(MutatedQuantizer, mistake.change)))


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


class KeptUntilEvaluation(MutatedQuantizer):
    """Keeps a quantized weight that was computed with gradients, until the network is put into eval mode."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(lambda right: right, **settings)

    def forward(self, w: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            self.__dict__.pop("_kept", None)
            return super().forward(w)
        return self.__dict__.setdefault("_kept", super().forward(w).detach()) + (w - w.detach())


class KeptForTwoSteps(DeadZoneLDZCompander):
    """What all layers got together is given a second time before it is computed anew."""

    @staticmethod
    def quantize_many(quantizers: Sequence[DeadZoneLDZCompander], weights: Sequence[Tensor]) -> list[Tensor]:
        kept = quantizers[0].__dict__.pop("_kept", None)
        if kept is not None:
            return [value + (w - w.detach()) for value, w in zip(kept, weights, strict=True)]
        values = DeadZoneLDZCompander.quantize_many(quantizers, weights)
        quantizers[0].__dict__["_kept"] = [value.detach() for value in values]
        return values


def first_for_ever(self: Any, w: Tensor) -> Tensor:
    """The parametrization's forward pass with a memory."""
    return self.__dict__.setdefault("_first", self.quantizer(w).detach()) + (w - w.detach()) if self.enabled else w


def never_given_back(pipeline: Pipeline) -> Pipeline:
    """The quantized weights that a step shares stay behind it."""

    def step(model: nn.Module, *rest: Any) -> Any:
        switches = [module for module in model.modules() if isinstance(module, FakeQuantParametrization)]
        with torch.no_grad(), shared_quantized_weights(model):
            kept = [switch._shared for switch in switches]
        returned = pipeline.step(model, *rest)
        for switch, value in zip(switches, kept, strict=True):
            switch._shared = value
        return returned

    return replace(pipeline, step=step)


FAULTS = (
    demonstration.FAULTS["round stops the gradient"],
    quantizer_fault(
        "relu stops the gradient",
        "The dead zone's relu is not straight-through, so a pruned weight never moves again.",
        mutant("no-ste-relu", relu=torch.relu),
    ),
    quantizer_fault(
        "clip stops the gradient",
        "Clipping is not straight-through, so a saturated weight never moves again.",
        mutant("no-ste-clip", clip=lambda x, bound: x.clamp(-bound.detach(), bound.detach())),
    ),
    quantizer_fault(
        "clip's bound passes the gradient",
        "The bound Q of clip is differentiated, so saturated weights pull at the bit width.",
        mutant("gradient-through-clip-bound", clip=bound_learned),
    ),
    quantizer_fault(
        "sign passes the gradient",
        "sign() hands its gradient on as if it were the identity.",
        mutant("gradient-through-sign", sign=passing(torch.sign)),
    ),
    quantizer_fault(
        "sign of the index passes the gradient",
        "The shift's sign hands its gradient on, so the weights get shift / step too much of it.",
        mutant("gradient-through-sign", value=lambda q, w, s, delta: s * q + delta * passing(torch.sign)(q)),
    ),
    quantizer_fault(
        "gradient through the quantile",
        "The range R is differentiated, so the task pulls at the largest weights.",
        mutant("gradient-through-quantile", range_of=lambda w: w.abs().flatten().quantile(0.99)),
    ),
    quantizer_fault(
        "half of the gradient",
        "The quantizer hands half of its gradient on, to weights and logits alike.",
        mutant("weight-gradient-wrong", result=lambda v, w, training: v.detach() + (v - v.detach()) / 2),
    ),
    quantizer_fault(
        "range is the maximum",
        "R is the largest |w| instead of its 0.99-quantile: one outlier widens every step.",
        mutant("range-wrong", range_of=quantile(1.0)),
    ),
    quantizer_fault(
        "range of signed weights",
        "R is the 0.99-quantile of w instead of |w|, which clips twice as many weights.",
        mutant("range-wrong", range_of=lambda w: w.detach().flatten().quantile(0.99).clamp(min=1e-8)),
    ),
    quantizer_fault(
        "range is another quantile",
        "R is the 0.97-quantile of |w|: three times as many weights are clipped.",
        mutant("range-wrong", range_of=quantile(0.97)),
    ),
    quantizer_fault(
        "range by the mean",
        "R is four times the mean of |w|, which knows nothing of outliers.",
        mutant("range-wrong", range_of=lambda w: 4 * w.detach().abs().mean()),
    ),
    quantizer_fault(
        "a range for every filter",
        "R is the quantile of a filter's weights instead of the layer's.",
        mutant("range-wrong", range_of=per_filter),
    ),
    quantizer_fault(
        "range is a running average",
        "R is an average over all the weights that the quantizer has seen, so it lags behind.",
        Mutant("range-kept", lambda right: replace(right, range_of=Kept(right.range_of, 0.1))),
    ),
    quantizer_fault(
        "range frozen at the first call",
        "R is computed once and kept, however the weights grow or shrink.",
        Mutant("range-kept", lambda right: replace(right, range_of=Kept(right.range_of))),
    ),
    quantizer_fault(
        "dead zone doubled",
        "d = 4 R (1 - |tanh theta|): the half width was taken for the width.",
        mutant("dead-zone-wrong", dead_zone=lambda r, share: 4 * r * share),
    ),
    quantizer_fault(
        "dead zone without the absolute value",
        "d = 2 R (1 - tanh theta): a negative logit opens it beyond the range.",
        mutant("dead-zone-squashed", zero_share=lambda theta: 1 - theta.tanh()),
    ),
    quantizer_fault(
        "dead zone by a sigmoid",
        "d = 2 R (1 - sigmoid(theta)) instead of 1 - |tanh theta|.",
        mutant("dead-zone-squashed", zero_share=lambda theta: 1 - theta.sigmoid()),
    ),
    quantizer_fault(
        "dead zone frozen",
        "The dead zone is computed from the logit's starting point for ever.",
        Mutant("dead-zone-frozen", lambda right: replace(right, zero_share=Kept(right.zero_share))),
    ),
    quantizer_fault(
        "dead zone detached",
        "The dead zone is computed without gradient, so the task never moves its logit.",
        Mutant("logits-detached", lambda right: replace(right, zero_share=detached(right.zero_share))),
        "logit-gradient-wrong",
    ),
    quantizer_fault(
        "grid detached",
        "Step and shift are computed without gradient, so the task moves no logit.",
        Mutant("logits-detached", lambda right: replace(right, step=detached(right.step), shift=detached(right.shift))),
        "logit-gradient-wrong",
    ),
    quantizer_fault(
        "shift on zeros",
        "The shift is added to weights in the dead zone as well, so no weight is ever exactly 0.",
        mutant("grid-wrong", value=lambda q, w, s, delta: s * q + delta * w.sign()),
        "dead-zone-wrong",
    ),
    quantizer_fault(
        "shift half a step too large",
        "The shift is d / 2, so the first level lies a step and a half beyond the dead zone.",
        mutant("grid-wrong", shift=lambda d, step: d / 2),
    ),
    quantizer_fault(
        "index rounded down",
        "The index is floor(|w| / s) instead of the nearest, so every value is too small.",
        mutant("grid-wrong", round=passing(torch.trunc)),
    ),
    quantizer_fault(
        "one bit more than said",
        "2^b - 1 levels on each side where b bits have room for 2^(b-1) - 1.",
        mutant("grid-wrong", levels=lambda bits: torch.exp2(bits) - 1),
    ),
    quantizer_fault(
        "clip forgotten",
        "Weights beyond the range get levels of their own, which b bits cannot number.",
        mutant("clip-missing", clip=lambda x, bound: x),
    ),
    quantizer_fault(
        "weights in half precision first",
        "The latent weights are rounded to half precision before they are quantized.",
        mutant("weights-changed-first", latent=cast(torch.float16)),
    ),
    quantizer_fault(
        "weights to two decimals first",
        "The latent weights are rounded to hundredths before they are quantized.",
        mutant("weights-changed-first", latent=decimals(100)),
    ),
    quantizer_fault(
        "weights centred first",
        "The mean of a layer's weights is taken off before they are quantized.",
        mutant("weights-changed-first", latent=lambda w, *_: w - w.mean()),
    ),
    quantizer_fault(
        "quantized twice",
        "The quantized weights are quantized again, on a grid laid over themselves.",
        Mutant("quantized-twice", lambda right: replace(right, latent=right)),
    ),
    quantizer_fault(
        "quantizer in bfloat16",
        "The quantized weight is rounded to bfloat16, whose steps are as wide as the grid's.",
        mutant("quantizer-precision", result=lambda v, w, training: v.bfloat16().to(v.dtype)),
    ),
    quantizer_fault(
        "bits rounded down",
        "b = floor(...): with 8 bits as the most, 7 are used from the first step on.",
        mutant("bits-floored", round_bits=passing(torch.floor)),
    ),
    quantizer_fault(
        "bits frozen",
        "The bit width is computed without gradient, so the task never moves its logit.",
        Mutant("logits-detached", lambda right: replace(right, round_bits=detached(right.round_bits))),
        "bits-frozen",
    ),
    quantizer_fault(
        "bits not restricted",
        "tanh is missing, so the bit width leaves the range of 2 to 8.",
        mutant("bits-out-of-range", bit_share=torch.abs),
    ),
    quantizer_fault(
        "bits not rounded",
        "The bit width is used as a fraction, which no file can store.",
        mutant("bits-not-rounded", round_bits=lambda x: x),
    ),
    quantizer_fault(
        "bits by a sigmoid",
        "b = round(sigmoid(theta) (b_max - 2) + 2): negative logits mean few bits.",
        mutant("bits-wrong", bit_share=torch.sigmoid),
    ),
    quantizer_fault(
        "first quantized weight kept",
        "A cache that nobody empties: every step computes with the weights of the first.",
        Mutant("weights-stale", lambda right: replace(right, result=Kept(right.result))),
    ),
    quantizer_fault(
        "quantizer off in training mode",
        "The quantizer hands the float weight on while the network trains.",
        mutant("quantizers-off-in-training", result=lambda v, w, training: w if training else v),
    ),
    quantizer_fault(
        "quantizer off in eval mode",
        "The quantizer hands the float weight on while the network is evaluated.",
        mutant("quantizers-off-in-evaluation", result=lambda v, w, training: v if training else w),
    ),
    quantizer_fault(
        "noise in the quantizer",
        "Dithering noise is never switched off, so no two evaluations agree.",
        mutant("evaluation-not-repeatable", round=passing(lambda x: (x + torch.rand_like(x) - 0.5).round())),
    ),
    Fault(
        "bits of the layer before",
        "Where all layers are computed at once, each gets the bits of the layer before it.",
        ("joint-quantization",),
        parts=attaching(BitsOfNeighbour),
    ),
    Fault(
        "pruned weights stop together",
        "Where all layers are computed at once, a pruned weight gets no gradient.",
        ("joint-quantization",),
        parts=attaching(PrunedStopTogether),
    ),
    Fault(
        "quantized weight kept until evaluation",
        "The quantized weight of the first step is used until the network is evaluated.",
        ("weights-stale",),
        parts=attaching(KeptUntilEvaluation),
    ),
    Fault(
        "quantized weights of the step before",
        "The quantized weights are computed anew in every second step only.",
        ("weights-stale",),
        parts=attaching(KeptForTwoSteps),
    ),
    Fault(
        "shared weights never given back",
        "The quantized weights that a step shares stay behind it, for whoever reads them next.",
        ("weights-stale",),
        pipeline=never_given_back,
    ),
    Fault(
        "range of the whole layer by its maximum",
        "The product's own range function gives the largest |w| of every layer.",
        ("range-wrong",),
        edits={"src.quantizer.weight_ranges": lambda weights: torch.stack([w.detach().abs().max() for w in weights])},
    ),
    Fault(
        "values without the shift",
        "The product's own values are s q, without delta sign(q).",
        ("grid-wrong",),
        edits={"src.quantizer.dequantize": lambda q, step, shift: step * q},
    ),
    Fault(
        "epsilon of a hundredth",
        "What keeps a step from being 0 is as large as a step.",
        ("grid-wrong",),
        edits={"src.quantizer.STEP_EPSILON": 1e-2},
    ),
    Fault(
        "clip taken out",
        "The product's own clip gives back what it got.",
        ("clip-missing",),
        edits={"src.quantizer.clip_ste": lambda x, bound: x},
    ),
    Fault(
        "parametrization keeps its first weight",
        "The parametrization quantizes the weight once, and gives the same ever after.",
        ("weights-stale",),
        edits={"utils_quantization.FakeQuantParametrization.forward": first_for_ever},
    ),
)

"""Faults inside the quantizer: gradients, range, grid, bits. Each attaches one class of broken_quantizers.py."""

from __future__ import annotations

from experiments.notebook import demonstration
from experiments.notebook.demonstration import Fault, attaching
from tests.faults import broken_quantizers as broken

FAULTS = (
    demonstration.FAULTS["round stops the gradient"],
    Fault(
        "relu stops the gradient",
        "The dead zone's relu is not straight-through, so a pruned weight never moves again.",
        ("no-ste-relu",),
        parts=attaching(broken.ReluStops),
    ),
    Fault(
        "clip stops the gradient",
        "Clipping is not straight-through, so a saturated weight never moves again.",
        ("no-ste-clip",),
        parts=attaching(broken.ClipStops),
    ),
    Fault(
        "sign passes the gradient",
        "sign() hands its gradient on as if it were the identity.",
        ("gradient-through-sign",),
        parts=attaching(broken.SignPasses),
    ),
    Fault(
        "sign of the index passes the gradient",
        "The shift's sign hands its gradient on, so the weights get shift / step too much of it.",
        ("gradient-through-sign",),
        parts=attaching(broken.IndexSignPasses),
    ),
    Fault(
        "gradient through the quantile",
        "The range R is differentiated, so the task pulls at the largest weights.",
        ("gradient-through-quantile",),
        parts=attaching(broken.QuantilePasses),
    ),
    Fault(
        "range is the maximum",
        "R is the largest |w| instead of its 0.99-quantile: one outlier widens every step.",
        ("range-wrong",),
        parts=attaching(broken.RangeIsMaximum),
    ),
    Fault(
        "range of signed weights",
        "R is the 0.99-quantile of w instead of |w|, which clips twice as many weights.",
        ("range-wrong",),
        parts=attaching(broken.RangeOfSignedWeights),
    ),
    Fault(
        "dead zone doubled",
        "d = 4 R (1 - |tanh theta|): the half width was taken for the width.",
        ("dead-zone-wrong",),
        parts=attaching(broken.DeadZoneDoubled),
    ),
    Fault(
        "dead zone detached",
        "The dead zone is computed without gradient, so the task never moves its logit.",
        ("logits-detached", "logit-gradient-wrong", "dead-zone-frozen"),
        parts=attaching(broken.DeadZoneDetached),
    ),
    Fault(
        "shift on zeros",
        "The shift is added to weights in the dead zone as well, so no weight is ever exactly 0.",
        ("grid-wrong", "dead-zone-wrong"),
        parts=attaching(broken.ShiftOnZeros),
    ),
    Fault(
        "one bit more than said",
        "2^b - 1 levels on each side where b bits have room for 2^(b-1) - 1.",
        ("grid-wrong",),
        parts=attaching(broken.OneBitMore),
    ),
    Fault(
        "quantizer in bfloat16",
        "The quantized weight is rounded to bfloat16, whose steps are as wide as the grid's.",
        ("quantizer-precision", "grid-wrong"),
        parts=attaching(broken.RoundedInBfloat16),
    ),
    Fault(
        "bits rounded down",
        "b = floor(...): with 8 bits as the most, 7 are used from the first step on.",
        ("bits-floored",),
        parts=attaching(broken.BitsRoundedDown),
    ),
    Fault(
        "bits frozen",
        "The bit width is computed without gradient, so the task never moves its logit.",
        ("bits-frozen", "logits-detached", "logit-gradient-wrong"),
        parts=attaching(broken.BitsFrozen),
    ),
    Fault(
        "bits not restricted",
        "tanh is missing, so the bit width leaves the range of 2 to 8.",
        ("bits-out-of-range",),
        parts=attaching(broken.BitsUnlimited),
    ),
    Fault(
        "bits not rounded",
        "The bit width is used as a fraction, which no file can store.",
        ("bits-not-rounded",),
        parts=attaching(broken.BitsNotRounded),
    ),
    Fault(
        "first quantized weight kept",
        "A cache that nobody empties: every step computes with the weights of the first.",
        ("weights-stale",),
        parts=attaching(broken.FirstResultKept),
    ),
    Fault(
        "quantizer off in training mode",
        "The quantizer hands the float weight on while the network trains.",
        ("quantizers-off-in-training",),
        parts=attaching(broken.OffInTraining),
    ),
    Fault(
        "quantizer off in eval mode",
        "The quantizer hands the float weight on while the network is evaluated.",
        ("quantizers-off-in-evaluation",),
        parts=attaching(broken.OffInEvaluation),
    ),
    Fault(
        "noise in the quantizer",
        "Dithering noise is never switched off, so no two evaluations agree.",
        ("evaluation-not-repeatable",),
        parts=attaching(broken.NoisyQuantizer),
    ),
    Fault(
        "a range for every filter",
        "R is the quantile of a filter's weights instead of the layer's.",
        ("range-wrong",),
        parts=attaching(broken.RangeOfFilter),
    ),
    Fault(
        "range is a running average",
        "R is an average over all the weights that the quantizer has seen, so it lags behind.",
        ("weights-stale", "range-wrong"),
        parts=attaching(broken.RangeRemembered),
    ),
    Fault(
        "bits of the layer before",
        "Where all layers are computed at once, each gets the bits of the layer before it.",
        ("joint-quantization",),
        parts=attaching(broken.BitsOfNeighbour),
    ),
    Fault(
        "pruned weights stop together",
        "Where all layers are computed at once, a pruned weight gets no gradient.",
        ("joint-quantization",),
        parts=attaching(broken.PrunedStopTogether),
    ),
)

"""CoDeQ's equations a second time, in numpy and float64, with the ways in which they are usually got wrong.

Forward, for the weights w of one layer: R = 0.99-quantile of |w|; d = 2 R (1 - |tanh theta_dz|); Q = 2^(b-1) - 1;
s = (R - d/2) / (Q - 1/2) + 1e-8; delta = d/2 - s/2; o = sign(w) relu(|w| - delta); q = clip(round(o / s), -Q, Q);
v = s q + delta sign(q).

Backward, for a loss sum(c v): round, relu and clip pass the gradient on, sign and R do not. So
    dv/dw = 1 (0 where w = 0),   dv/ds = q - o / s,   dv/ddelta = sign(q) - sign(w),
    ds/dd = -1 / (2 (Q - 1/2)),  ddelta/dd = (1 - ds/dd) / 2,
    ds/dQ = -(R - d/2) / (Q - 1/2)^2,  ddelta/dQ = -(ds/dQ) / 2,  dQ/db = ln 2 2^(b-1),
    db/dtheta_bit = (b_max - 2) sign(theta) (1 - tanh^2),  dd/dtheta_dz = -2 R sign(theta) (1 - tanh^2).
The clip's bound gets no gradient. Axis letters: T weights of the layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
Rounding = Callable[[float], float]


@dataclass(frozen=True)
class Grid:
    """The grid over one layer's weights, in weight units."""

    range: float
    dead_zone: float
    bits: float
    levels: float
    step: float
    shift: float


@dataclass(frozen=True)
class Gradient:
    """The gradient of sum(c v) for the weights, (T,), and the two logits."""

    weights: Values
    logit_dz: float
    logit_bit: float


def nearest(x: float) -> float:
    """Round to the nearest whole number, halves to even."""
    return float(np.rint(x))


def bit_width(theta: float, max_bits: float, min_bits: float = 2.0, rounding: Rounding = nearest) -> float:
    """b = round(|tanh theta_bit| (b_max - b_min) + b_min)."""
    return rounding(abs(math.tanh(theta)) * (max_bits - min_bits) + min_bits)


def grid(w: Values, theta_dz: float, bits: float, quantile: float = 0.99) -> Grid:
    """The grid for the weights `w`, (T,)."""
    top = float(np.quantile(np.abs(w), quantile))
    dead_zone = 2 * top * (1 - abs(math.tanh(theta_dz)))
    levels = 2.0 ** (bits - 1) - 1
    step = (top - dead_zone / 2) / (levels - 0.5) + 1e-8
    return Grid(top, dead_zone, bits, levels, step, dead_zone / 2 - step / 2)


def quantized(w: Values, g: Grid, clip: bool = True) -> Values:
    """The quantized weights, (T,)."""
    index = np.rint(np.sign(w) * np.maximum(np.abs(w) - g.shift, 0) / g.step)
    if clip:
        index = np.clip(index, -g.levels, g.levels)
    return g.step * index + g.shift * np.sign(index)


def near_a_threshold(w: Values, g: Grid, tolerance: float = 2e-4) -> NDArray[np.bool_]:
    """Weights so close to where the index changes that float32 may fall on the other side, (T,)."""
    place = np.maximum(np.abs(w) - g.shift, 0) / g.step
    return np.abs(place - np.floor(place) - 0.5) < tolerance * np.maximum(1.0, g.range / g.step / 64)


def gradient(
    w: Values,
    c: Values,
    theta_dz: float,
    theta_bit: float,
    g: Grid,
    max_bits: float,
    learns_bits: bool = True,
    wrong: str = "",
) -> Gradient:
    """The gradient of sum(c v); `wrong`: a mistake to make (see MISTAKES), "" for none."""
    sign, place = np.sign(w), np.maximum(np.abs(w) - g.shift, 0) / g.step
    rounded = np.rint(sign * place)
    clipped = np.clip(rounded, -g.levels, g.levels)
    passes = np.ones_like(w)  # what reaches the weights through round, relu and clip
    if wrong == "no-ste-round":
        passes = np.zeros_like(w)
    if wrong == "no-ste-relu":
        passes = passes * (np.abs(w) > g.shift)
    if wrong.startswith("no-ste-clip"):
        passes = passes * (np.abs(rounded) <= g.levels)
    along_w = sign**2 * passes
    along_step = clipped - sign * place * passes
    along_shift = np.sign(clipped) - sign * passes
    along_levels = np.zeros_like(w)
    if wrong == "gradient-through-sign":
        along_w = along_w + np.maximum(np.abs(w) - g.shift, 0)
    if wrong == "gradient-through-sign 2":  # through sign(q), whose value is delta
        along_w = along_w + g.shift / g.step * passes
        along_step = along_step - g.shift / g.step * sign * place * passes
        along_shift = along_shift - g.shift / g.step * sign * passes
    if wrong in ("gradient-through-clip-bound", "no-ste-clip 2"):  # the second: torch.clamp with a learned bound
        along_levels = g.step * np.sign(rounded) * (np.abs(rounded) > g.levels)
    total_step, total_shift = float(c @ along_step), float(c @ along_shift)
    step_of_zone = -0.5 / (g.levels - 0.5)
    zone = total_step * step_of_zone + total_shift * 0.5 * (1 - step_of_zone)
    step_of_levels = -(g.range - g.dead_zone / 2) / (g.levels - 0.5) ** 2
    level = total_step * step_of_levels - total_shift * 0.5 * step_of_levels + float(c @ along_levels)
    weights = c * along_w
    slope_dz, slope_bit = _slope(theta_dz), _slope(theta_bit)
    if wrong == "gradient-through-quantile":
        share = g.dead_zone / (2 * g.range) if g.range else 0.0  # d = 2 R share
        step_of_range = (1 - share) / (g.levels - 0.5)
        shift_of_range = share - step_of_range / 2
        weights = weights + (total_step * step_of_range + total_shift * shift_of_range) * _quantile_weights(w)
    logit_dz = zone * -2 * g.range * slope_dz
    logit_bit = level * math.log(2) * 2.0 ** (g.bits - 1) * (max_bits - 2) * slope_bit if learns_bits else 0.0
    if wrong == "logits-detached":
        logit_dz = logit_bit = 0.0
    if wrong == "bits-frozen":
        logit_bit = 0.0
    if wrong == "dead-zone-frozen":
        logit_dz = 0.0
    return Gradient(weights, logit_dz, logit_bit)


def smooth_surrogate(
    w: Values,
    c: Values,
    theta_dz: float,
    theta_bit: float,
    settings: tuple[float, bool, float],
    at: tuple[float, float],
) -> float:
    """sum(c v) at the logits `at`, with what rounding, clipping and the dead zone did at (theta_dz, theta_bit) frozen.

    o(t) = o + sign(w) (delta - delta(t));  v(t) = o(t) + s(t) (q - o / s) + delta(t) sign(q). Its derivatives at
    (theta_dz, theta_bit) are the straight-through gradients. settings: b_max, whether bits are learned, bits in use.
    """
    max_bits, learns_bits, bits = settings
    g = grid(w, theta_dz, bits)
    moved = bits
    if learns_bits:
        moved += (abs(math.tanh(at[1])) - abs(math.tanh(theta_bit))) * (max_bits - 2)
    h = grid(w, at[0], moved)
    outside = np.sign(w) * np.maximum(np.abs(w) - g.shift, 0)
    q = np.clip(np.rint(outside / g.step), -g.levels, g.levels)
    values = outside + np.sign(w) * (g.shift - h.shift) + h.step * (q - outside / g.step) + h.shift * np.sign(q)
    return float(c @ values)


MISTAKES = (
    "no-ste-round",
    "no-ste-relu",
    "no-ste-clip",
    "no-ste-clip 2",
    "gradient-through-sign",
    "gradient-through-sign 2",
    "gradient-through-quantile",
    "gradient-through-clip-bound",
    "logits-detached",
    "bits-frozen",
    "dead-zone-frozen",
)


def _slope(theta: float) -> float:
    """d|tanh theta| / dtheta."""
    return math.copysign(1.0, theta) * (1 - math.tanh(theta) ** 2) if theta else 0.0


def _quantile_weights(w: Values) -> Values:
    """d quantile(|w|, 0.99) / dw: the two neighbours of the quantile share it, with the signs of the weights."""
    order = np.argsort(np.abs(w), kind="stable")
    position = 0.99 * (len(w) - 1)
    low = math.floor(position)
    high, fraction = min(low + 1, len(w) - 1), position - low
    out = np.zeros_like(w)
    out[order[low]] += (1 - fraction) * np.sign(w[order[low]])
    out[order[high]] += fraction * np.sign(w[order[high]])
    return out

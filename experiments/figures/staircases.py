"""Figures of the quantizer itself: its staircase, alone, in families, and beside the weights it is applied to.

They take arrays that were computed elsewhere (no quantizer is called here) and give a figure with its alt text in
`get_label()`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from experiments.figures import style
from experiments.figures.style import percent

Array = NDArray[np.floating]
Curve = tuple[str, Array, Array]
"""A name, the weights w (ascending) and their quantized values q."""


@style.styled
def staircase(
    curves: Sequence[Curve],
    *,
    dead_zone_half: float | None = None,
    range_: float | None = None,
    title: str = "",
    subtitle: str = "",
) -> Figure:
    """The quantizer's transfer function q(w) with the identity, the dead zone (shaded), R and the levels marked.

    dead_zone_half: d / 2 in weight units, by default read from the first curve. range_: R in weight units.
    """
    half = _zero_half_width(curves[0]) if dead_zone_half is None else dead_zone_half
    levels = np.unique(curves[0][2])
    auto = f"Weights within ±{half:.2g} become exactly 0, the others one of {len(levels) - 1} levels"
    figure = style.canvas(title or auto, subtitle, height=4.0)
    axes = figure.subplots()
    _draw_stairs(axes, curves, half, range_)
    if len(curves) == 1:
        edge = axes.get_xlim()[0]
        axes.plot(np.full(len(levels), edge), levels, ls="", marker=">", ms=5, color=style.INK, clip_on=False, zorder=4)
        axes.annotate(
            f"{len(levels)} levels", (edge, levels[-1]), (8, 5), textcoords="offset points", va="bottom",
            fontsize=style.SMALL, backgroundcolor=style.WHITE,
        )  # fmt: skip
    style.legend_above(axes, columns=4)
    alt = f"Staircase of the quantized value over the weight. {auto}" + (
        f"; the range R is {range_:.3g}" if range_ else ""
    )
    return style.finish(figure, f"{alt}.")


@style.styled
def staircase_family(dead_zone_curves: Sequence[Curve], bit_curves: Sequence[Curve], *, subtitle: str = "") -> Figure:
    """Two panels of staircases: the dead zone varied at the left, the bits varied at the right.

    Their legends list the curves from the first to the last.
    """
    title = "The dead zone decides what becomes\N{NO-BREAK SPACE}0, the bits how fine the rest is"
    figure = style.canvas(title, subtitle, height=4.3)
    panels = figure.subplots(1, 2, sharey=True, sharex=True)
    groups = (("The dead zone", dead_zone_curves), ("The bits", bit_curves))
    for axes, (heading, curves) in zip(panels, groups, strict=True):
        _draw_stairs(axes, curves, None, None, alone=False)
        axes.set_title(heading, pad=8)
        axes.legend(loc="upper left", bbox_to_anchor=(0, 1), borderaxespad=0.2, handlelength=1.5, labelspacing=0.25)
    panels[1].set_ylabel("")
    zeros = ", ".join(f"{name} ±{_zero_half_width((name, w, q)):.2g}" for name, w, q in dead_zone_curves)
    levels = ", ".join(f"{name} {len(np.unique(q))}" for name, _, q in bit_curves)
    return style.finish(figure, f"Two panels of staircases. Weights that become 0: {zeros}. Levels: {levels}.")


@style.styled
def staircase_explorer_figure(
    w: Array,
    quantized_curve: Array,
    weights: Array,
    bits: int,
    dead_zone_half: float,
    range_: float,
    *,
    quantized_weights: Array | None = None,
    subtitle: str = "",
) -> Figure:
    """What the quantizer does to any weight (left: staircase and error) and to these weights (right: before and after).

    w, quantized_curve: the staircase on an ascending grid; weights: any shape. quantized_weights: the same weights
    quantized; without it each weight takes the value of the nearest point of the curve. Error: RMS of q - w over the
    RMS of w.
    """
    values = np.asarray(weights, dtype=float).ravel()
    nearest = np.abs(np.searchsorted((w[1:] + w[:-1]) / 2, values)).clip(0, len(w) - 1)
    quantized = quantized_curve[nearest] if quantized_weights is None else np.asarray(quantized_weights).ravel()
    used, held = np.unique(quantized, return_counts=True)
    zeros = float((quantized == 0).mean())
    error = float(np.sqrt(np.mean((quantized - values) ** 2)) / max(np.sqrt(np.mean(values**2)), 1e-12))
    title = f"Dead zone ±{dead_zone_half:.3g}{' R' if range_ == 1 else ''}, {bits} bits: {percent(zeros)} zeros, "
    title += f"{len(used)} of {2**bits - 1} levels used, error {percent(error)}"
    figure = style.canvas(title, subtitle, height=5.7)
    panels = figure.subplot_mosaic(
        [["keys", "keys"], ["stairs", "before"], ["error", "after"]], height_ratios=[0.12, 1.35, 1]
    )
    limit = max(float(np.abs(w).max()), range_) * 1.02
    _draw_stairs(panels["stairs"], [("quantized", w, quantized_curve)], dead_zone_half, range_)
    _draw_error(panels["error"], w, quantized_curve, dead_zone_half, range_)
    _draw_before(panels["before"], values, dead_zone_half, range_, limit)
    after = panels["after"]
    style.grid(after)
    after.vlines(used, 0, 100 * held / len(quantized), color=style.STAIRS, lw=3 if len(used) < 40 else 1)
    after.set_title("Quantized", pad=5)
    after.set(xlabel="weight / R" if range_ == 1 else "weight", ylabel="share")
    style.percent_axis(after.yaxis)
    after.set_ylim(0, 1.08 * 100 * float(held.max()) / len(quantized))
    panels["stairs"].set(xlabel="", title="Staircase")
    panels["error"].set_xlabel("weight / R" if range_ == 1 else "weight")
    for name in ("stairs", "error", "before", "after"):
        panels[name].set_xlim(-limit, limit)
    keys = [
        Patch(color=style.DEAD_ZONE, label="dead zone d"),
        Line2D([], [], color=style.STAIRS, lw=2.2, label="quantized"),
        Line2D([], [], color=style.GREY, lw=1.2, ls=(0, (5, 3)), label="identity"),
        Line2D([], [], color=style.RANGE, lw=1.6, ls=":", label="±R"),
        Patch(color=style.WEIGHTS, label="weights"),
    ]
    style.legend_row(panels["keys"], keys)
    alt = (
        f"Staircase with its error, beside the weights before and after. {title} (RMS of the error over the RMS of the "
        f"weights); the range R is {range_:.3g}."
    )
    return style.finish(figure, alt)


def _draw_stairs(
    axes: Axes, curves: Sequence[Curve], half: float | None, range_: float | None, *, alone: bool = True
) -> None:
    low, high = float(curves[0][1].min()), float(curves[0][1].max())
    style.grid(axes)
    if half is not None:
        axes.axvspan(-half, half, color=style.DEAD_ZONE, lw=0, label="dead zone, width d")
    label = "identity" if alone else None
    axes.plot([low, high], [low, high], color=style.GREY, lw=1.2, ls=(0, (5, 3)), label=label)
    colors = [style.STAIRS] if len(curves) == 1 else [style.DEPTH(i / (len(curves) - 1)) for i in range(len(curves))]
    for (name, w, q), color in zip(curves, colors, strict=True):
        axes.plot(w, q, color=color, lw=2.2, label=name)
    _draw_range(axes, range_)
    axes.set(xlim=(low, high), xlabel="weight w", ylabel="quantized weight q(w)")


def _draw_error(axes: Axes, w: Array, quantized: Array, half: float, range_: float) -> None:
    style.grid(axes)
    axes.axvspan(-half, half, color=style.DEAD_ZONE, lw=0)
    axes.plot(w, quantized - w, color=style.STAIRS, lw=1.6)
    _draw_range(axes, range_)
    axes.set(ylabel="q(w) − w")
    axes.set_title("Error", pad=5)


def _draw_before(axes: Axes, values: Array, half: float, range_: float, limit: float) -> None:
    axes.axvspan(-half, half, color=style.DEAD_ZONE, lw=0)
    weight = np.full(len(values), 100 / len(values))
    axes.hist(values, bins=np.linspace(-limit, limit, 62).tolist(), weights=weight, color=style.WEIGHTS)
    _draw_range(axes, range_)
    axes.set_ylabel("share")
    style.percent_axis(axes.yaxis)
    axes.set_title("Weights", pad=5)


def _draw_range(axes: Axes, range_: float | None) -> None:
    if range_ is not None:
        for sign in (-1, 1):
            axes.axvline(sign * range_, color=style.RANGE, lw=1.6, ls=":", label="±R" if sign > 0 else None)


def _zero_half_width(curve: Curve) -> float:
    """Half width of the interval in which the curve is exactly 0, as far as its grid shows it."""
    _, w, q = curve
    return float(np.abs(w[q == 0]).max(initial=0.0))

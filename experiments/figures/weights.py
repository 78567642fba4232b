"""Figures of weights and of what the quantizer makes of them: staircases, one layer's weights, and its kernels.

They take arrays that were computed elsewhere; no quantizer is called here. Axis letters: E epochs, O output channels,
I input channels, k kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.markers import TICKDOWN
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from experiments.figures import style
from experiments.figures.layers import draw_cells
from experiments.figures.style import percent
from src.runs import EDGES, REACH, LayerSnapshot

Array = NDArray[np.floating]
Curve = tuple[str, Array, Array]
"""A name, the weights w (ascending) and their quantized values q."""
IDENTITY: dict[str, Any] = {"color": style.GREY, "lw": 1.2, "ls": (0, (5, 3))}


@style.styled
def staircase_family(dead_zone_curves: Sequence[Curve], bit_curves: Sequence[Curve], *, subtitle: str = "") -> Figure:
    """Staircases, each in a panel of its own: the dead zone varied in the upper row, the bits in the lower one."""
    title = "The dead zone decides what becomes\N{NO-BREAK SPACE}0, the bits how fine the rest is"
    zeros = ", ".join(f"{name} ±{np.abs(w[q == 0]).max(initial=0.0):.2g}" for name, w, q in dead_zone_curves)
    levels = ", ".join(f"{name} {len(np.unique(q))}" for name, _, q in bit_curves)
    alt = f"Two rows of staircases. Weights that become 0: {zeros}. Levels: {levels}."
    figure = style.canvas(title, subtitle, alt, height=4.6)
    columns = max(len(dead_zone_curves), len(bit_curves))
    panels = figure.subplots(2, columns, sharey=True, sharex=True, squeeze=False)
    for row, curves in zip(panels, (dead_zone_curves, bit_curves), strict=True):
        for axes in row[len(curves) :]:
            axes.set_visible(False)
        for axes, (name, w, q) in zip(row, curves, strict=False):
            half = float(np.abs(w[q == 0]).max(initial=0.0))
            axes.axvspan(-half, half, color=style.DEAD_ZONE, lw=0)
            axes.axline((0, 0), slope=1, **IDENTITY)
            axes.plot(w, q, color=style.STAIRS)
            axes.margins(x=0)
            axes.set_title(name, pad=5, fontweight="normal")
        row[0].set_ylabel("q(w)")
    for axes in panels[1]:
        axes.set_xlabel("weight w")
    return figure


@style.styled
def staircase_explorer_figure(
    curve: Curve, weights: Array, quantized_weights: Array, bits: int, dead_zone_half: float, *, subtitle: str = ""
) -> Figure:
    """What the quantizer does to any weight (left: staircase and error) and to these weights (right: before and after).

    All in units of the weights' range R. weights, quantized_weights: any shape. Error: RMS of q - w over the RMS of w.
    """
    _, w, q = curve
    values, quantized = np.asarray(weights, dtype=float).ravel(), np.asarray(quantized_weights).ravel()
    used, held = np.unique(quantized, return_counts=True)
    zeros = float((quantized == 0).mean())
    error = float(np.sqrt(np.mean((quantized - values) ** 2)) / max(np.sqrt(np.mean(values**2)), 1e-12))
    title = f"Dead zone ±{dead_zone_half:.3g} R, {bits} bits: {percent(zeros)} zeros, "
    title += f"{len(used)} of {2**bits - 1} levels used, error {percent(error)}"
    alt = f"Staircase with its error, beside the weights before and after. {title} (RMS over the RMS of the weights)."
    figure = style.canvas(title, subtitle, alt, height=5.9)
    panels = figure.subplots(2, 2, height_ratios=[1.35, 1])
    (stairs, before), (difference, after) = panels
    limit = 1.02 * max(float(np.abs(w).max()), 1.0)
    for axes, heading in zip(panels.flat, ("Staircase", "Weights", "Error", "Quantized"), strict=True):
        axes.set_title(heading, pad=5)
        axes.set_xlim(-limit, limit)
    for axes in (stairs, before, difference):
        axes.axvspan(-dead_zone_half, dead_zone_half, color=style.DEAD_ZONE, lw=0, label="dead zone d")
        _mark_range(axes)
    stairs.axline((0, 0), slope=1, label="identity", **IDENTITY)
    stairs.plot(w, q, color=style.STAIRS, label="quantized")
    stairs.set_ylabel("quantized weight q(w)")
    difference.plot(w, q - w, color=style.STAIRS, lw=1.6)
    difference.set_ylabel("q(w) − w")
    bins, pruned = np.linspace(-limit, limit, 62), values[np.abs(values) <= dead_zone_half]
    for some, color in ((values, style.WEIGHTS), (pruned, style.PRUNED)):
        before.stairs(100 * np.histogram(some, bins)[0] / len(values), bins, fill=True, color=color)
    shares = 100 * held / len(quantized)
    colors = np.where(used == 0, style.PRUNED, style.STAIRS).tolist()
    after.vlines(used, 0, shares, color=colors, lw=3 if len(used) < 40 else 1)
    most = float(shares[used != 0].max(initial=0.0)) or 100 * zeros  # a bar of zeros that would dwarf the others is cut
    top = 1.25 * min(float(shares.max()), 2 * most)
    after.set_ylim(0, top)
    if 100 * zeros > top:
        after.annotate(f"↑ {percent(zeros)} are 0", (0.0, top), (6, -2), textcoords="offset points", va="top")
    for axes in (before, after):
        axes.set_ylabel("share")
        axes.yaxis.set_major_formatter(style.PERCENT)
    for axes in (difference, after):
        axes.set_xlabel("weight / R")
    style.legend_below(figure, stairs, columns=4)
    return figure


@style.styled
def layer_figure(now: LayerSnapshot, course: Sequence[LayerSnapshot], *, subtitle: str = "") -> Figure:
    """A layer's weights at one epoch under the quantizer's dead zone and levels; below, its whole course.

    now: the epoch looked at; course: the same layer at every epoch kept, in order.
    """
    gone, total = int(now.dead.sum()), len(now.dead)
    when = f"after epoch {now.epoch}" if now.epoch else "before training"
    numbers = f"{percent(now.sparsity)} zeros, {gone} of {total} filters dead, {now.bits} bits"
    last = course[-1]
    alt = (
        f"Histogram of the weights of {now.name} {when}, with the dead zone and the quantizer's levels, above its "
        f"course through training. {numbers}. At the end, epoch {last.epoch}: {percent(last.sparsity)} zeros, "
        f"{int(last.dead.sum())} filters dead, {last.bits} bits."
    )
    figure = style.canvas(f"{now.name} {when}: {numbers}", subtitle, alt, height=5.9)
    panels = figure.subplot_mosaic([["weights", "weights"], ["dead", "course"]], height_ratios=[1.15, 1])
    _draw_weights(panels["weights"], now)
    epochs = np.array([snapshot.epoch for snapshot in course], dtype=float)
    between = (epochs[1:] + epochs[:-1]) / 2  # borders halfway, so that each epoch kept has its own column
    edges = np.concatenate([[epochs[0] - 0.5], between, [epochs[-1] + 0.5]])
    alive = ~np.stack([snapshot.dead for snapshot in course], axis=1)  # (O, E)
    draw_cells(panels["dead"], alive, style.LIVENESS, edges=edges)
    panels["dead"].set_title("Filters: none dies" if alive.all() else "Filters: black is dead", pad=6)
    panels["dead"].set_ylabel("output channel")
    panels["dead"].yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    _draw_course(panels["course"], course, epochs)
    for axes in (panels["dead"], panels["course"]):
        axes.axvline(now.epoch, color=style.MARK)
        axes.set(xlim=(edges[0], edges[-1]), xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    return figure


@style.styled
def sparsity_map(weight: NDArray[np.floating], name: str, *, subtitle: str = "") -> Figure:
    """Every kernel of a convolution: row o, column i is kernel (o, i). Zero blank, positive blue, negative orange.

    weight: (O, I, k, k). A filter that is all zero is marked at its left.
    """
    values = np.asarray(weight, dtype=float)
    outputs, inputs, high, wide = values.shape
    dead = np.flatnonzero(~values.any(axis=(1, 2, 3)))
    empty = int((~values.any(axis=(2, 3))).sum())
    title = f"{name}: {percent(float((values == 0).mean()))} zeros, {len(dead)} of {outputs} filters dead"
    limit = float(np.abs(values).max()) or 1.0
    mosaic = np.ma.masked_equal(np.full((outputs, high + 1, inputs, wide + 1), 2 * limit), 0)  # gaps: over the limit
    mosaic[:, :high, :, :wide] = np.ma.masked_equal(values, 0).transpose(0, 2, 1, 3)
    flat = mosaic.reshape(outputs * (high + 1), inputs * (wide + 1))[:-1, :-1]
    drawn = min((style.WIDTH - 2.0) * flat.shape[0] / flat.shape[1], 6.6)  # inches; kernels are square
    alt = f"Map of the {outputs} by {inputs} kernels of {title}; {empty} of {outputs * inputs} kernels are all zero."
    figure = style.canvas(title, subtitle, alt, height=max(drawn, 1.7) + 0.9)
    axes = figure.subplots()
    axes.grid(False)
    box = (-0.5, inputs - 0.5, outputs - 0.5, -0.5)
    image = axes.imshow(flat, cmap=style.SIGNED, vmin=-limit, vmax=limit, extent=box, interpolation="nearest")
    axes.set(xlabel="input channel", ylabel="output channel (filter)", xlim=(-0.5 - 0.035 * inputs, inputs - 0.5))
    edge = np.full(len(dead), -0.5 - 0.018 * inputs)
    axes.plot(edge, dead, ls="", marker=">", ms=5, color=style.INK, label="dead filter")
    style.legend_above(axes)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="weight (blank: exactly 0)", shrink=0.7, pad=0.02, aspect=28)
    return figure


def _mark_range(axes: Axes) -> None:
    for place, label in ((-1, "±R"), (1, "_R")):
        axes.axvline(place, color=style.RANGE, lw=1.6, ls=":", label=label)


def _draw_weights(axes: Axes, now: LayerSnapshot) -> None:
    """The histogram with dead zone, range and levels; columns of zeros that would dwarf the others are cut off."""
    share = 100 * now.counts[1:-1] / max(int(now.counts.sum()), 1)
    axes.axvspan(-now.zone_share, now.zone_share, color=style.DEAD_ZONE, lw=0, label="dead zone")
    axes.stairs(share, EDGES, fill=True, color=style.WEIGHTS, label="weights")
    inside = np.abs(EDGES[:-1] + EDGES[1:]) / 2 <= now.zone_share
    axes.stairs(np.where(inside, share, 0.0), EDGES, fill=True, color=style.PRUNED, label="become 0")
    _mark_range(axes)
    most, others = float(share.max(initial=0.0)), float(share[~inside].max(initial=0.0))
    top = 1.2 * (min(most, 5 * others) or most or 1.0)
    axes.set(xlim=(-REACH, REACH), ylim=(0, top), xlabel="weight, in units of the layer's range R", ylabel="share")
    axes.yaxis.set_major_formatter(style.PERCENT)
    if most > top:
        text = f"↑ {percent(now.sparsity)}\nbecome 0"
        axes.annotate(text, (now.zone_share, top), (4, -5), textcoords="offset points", va="top")
    levels, label = now.levels, f"{len(now.levels)} levels"
    axes.plot(levels, 0 * levels, ls="", marker=TICKDOWN, ms=5, mew=1, color=style.INK, clip_on=False, label=label)
    style.legend_above(axes, columns=5, columnspacing=0.8)


def _draw_course(axes: Axes, course: Sequence[LayerSnapshot], epochs: NDArray[np.float64]) -> None:
    axes.plot(epochs, [100 * snapshot.sparsity for snapshot in course], color=style.ZEROS, label="zeros")
    axes.set_ylim(0, style.FULL)
    axes.tick_params(axis="y", colors=style.ZEROS)
    axes.yaxis.set_major_formatter(style.PERCENT)
    right = style.right_axis(axes, "", style.BITS)
    bits = [snapshot.bits for snapshot in course]
    right.step(epochs, bits, where="post", color=style.BITS, ls=style.DASHED, label="bits (right)")
    high = max(8, *bits)
    right.set(ylim=(0, high * 1.06), yticks=range(0, high + 1, 2 if high <= 8 else 4))
    style.legend_above(axes, right, columns=2)

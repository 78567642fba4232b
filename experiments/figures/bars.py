"""Bar charts: a bar, a stack or a pair for each layer; a row for each layer or class. Shares are drawn in per cent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from experiments.figures import style
from experiments.figures.channels import dead_total
from experiments.figures.style import percent
from src.training import LayerRecord

NUMBERED, NUMBERED_ROWS = 24, 48
"""Bars have room for a number above each, and rows for one at the end of each, up to that many."""


@style.styled
def per_layer_channels(layers: Sequence[LayerRecord], *, subtitle: str = "") -> Figure:
    """One bar a layer: alive channels (blue) under dead ones (grey), the learned bit width above the bar."""
    dead, total = dead_total(layers)
    bits = [layer.bits for layer in layers]
    gone = np.array([layer.dead_channels for layer in layers])
    size = np.array([layer.channels for layer in layers])
    title = f"{total - dead} of {total} channels are alive" + (f", stored with {span(bits)} bits" if bits else "")
    worst = max(layers, key=lambda layer: layer.dead_channels, default=None)
    most = f"{worst.name} ({worst.dead_channels} of {worst.channels})" if worst and dead else "no layer"
    alt = f"Stacked bars, one a layer: {title}; {dead} are dead, most of them in {most}."
    figure, axes = _upright(title, subtitle, alt, [layer.name for layer in layers], "output channels", size)
    axes.bar(range(len(layers)), size - gone, color=style.ALIVE, width=0.72, label="alive")
    tops = axes.bar(range(len(layers)), gone, bottom=size - gone, color=style.DEAD, width=0.72, label="dead")
    key = _number(axes, tops, [f"{width:.3g}" for width in bits], "learned bits of a weight")
    style.legend_above(axes, handles=[*axes.containers, *key])
    return figure


@style.styled
def cost_bars(names: Sequence[str], macs: Sequence[int], quantized: Sequence[bool], *, subtitle: str = "") -> Figure:
    """MACs of each layer in millions, blue where its weights are quantized, orange where they stay full precision."""
    cost, mask = np.asarray(macs, dtype=float) / 1e6, np.asarray(quantized, dtype=bool)
    total, share = float(cost.sum()), float(cost[mask].sum() / max(cost.sum(), 1e-6))
    title = f"The {mask.sum()} quantized layers hold {percent(share)} of the {total:.1f} million MACs"
    largest = f"{names[int(cost.argmax())]} with {cost.max():.2f} million" if len(cost) else "none"
    alt = f"Bars, one a layer. {title}; the largest layer is {largest}."
    figure, axes = _upright(title, subtitle, alt, names, "million MACs an image", cost)
    colors = [style.BLUE if blue else style.ORANGE for blue in mask]
    bars = axes.bar(range(len(names)), cost, color=colors, width=0.72)
    _number(axes, bars, [f"{value:.2g}" if value >= 0.1 else "0" if not value else "<.1" for value in cost])
    keys = [
        Patch(color=style.BLUE, label=f"quantized ({mask.sum()} layers)"),
        Patch(color=style.ORANGE, label=f"full precision ({(~mask).sum()} layers)"),
    ]
    style.legend_above(axes, handles=keys)
    return figure


@style.styled
def before_after(
    names: Sequence[str], before: Sequence[int], after: Sequence[int], label: str, *, subtitle: str = ""
) -> Figure:
    """Paired bars of a cost (`label`: 'MACs' or 'BOPs') of each layer, with the share that is left above the pair.

    A layer that kept everything has no number.
    """
    old, new = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    scale, unit = (1e9, "billion") if old.max(initial=0.0) >= 5e8 else (1e6, "million")
    title = f"{label}: {old.sum() / scale:.3g} {unit} before, {new.sum() / scale:.3g} {unit} after"
    title += f", {old.sum() / new.sum():.3g} times fewer" if 0 < new.sum() < old.sum() else ""
    alt = f"Paired bars, one pair a layer. {title}."
    figure, axes = _upright(title, subtitle, alt, names, f"{unit} {label} an image", old / scale)
    x = np.arange(len(names))
    pairs = axes.bar(x - 0.2, old / scale, width=0.4, color=style.PALE, edgecolor=style.GREY, lw=0.6, label="before")
    axes.bar(x + 0.2, new / scale, width=0.4, color=style.BLUE, label="after")
    kept = [f"{100 * part / whole:.0f}" if part < whole else "" for whole, part in zip(old, new, strict=True)]
    key = _number(axes, pairs, kept, "per cent that is left, if not all")
    style.legend_above(axes, handles=[*axes.containers, *key])
    return figure


@style.styled
def layer_sparsity_bars(
    names: Sequence[str], sparsity: Sequence[float], structured: Sequence[float], *, subtitle: str = ""
) -> Figure:
    """Two shares (0 to 1) of each layer, drawn in per cent: zero weights (wide bar) and dead channels (thin bar)."""
    zeros, dead = 100 * np.asarray(sparsity, dtype=float), 100 * np.asarray(structured, dtype=float)
    title, alt = "No layer was measured", "No layer was measured."
    if len(zeros):
        low, high, top = int(zeros.argmin()), int(zeros.argmax()), int(dead.argmax())
        title = f"Zeros: from {zeros[low]:.1f} % in {names[low]} to {zeros[high]:.1f} % in {names[high]}"
        alt = f"{title}. Dead channels: at most {dead[top]:.1f} %, in {names[top]}."
    figure, axes = _rows(title, subtitle, f"Horizontal bars, one layer a row. {alt}", names, "share of the layer")
    wide = axes.barh(range(len(names)), zeros, height=0.74, color=style.ZEROS, alpha=0.45, label="zero weights")
    axes.barh(range(len(names)), dead, height=0.3, color=style.CHANNELS, label="dead channels")
    _number(axes, wide, [f"{value:.0f} %" for value in zeros], most=NUMBERED_ROWS)
    axes.set(xlim=(0, 112), xticks=range(0, 101, 20))
    style.percent_axis(axes.xaxis)
    style.legend_above(axes, handles=axes.containers)
    return figure


@style.styled
def class_balance(labels: Sequence[int], class_names: Sequence[str], *, subtitle: str = "") -> Figure:
    """Bars: the number of images of each class. labels: (N,) class indices."""
    counts = np.bincount(np.asarray(labels, dtype=int), minlength=len(class_names))
    low, high = int(counts.min()), int(counts.max())
    title = f"{counts.sum():,} images in {len(counts)} classes, {low:,} to {high:,} in each"
    figure, axes = _rows(title, subtitle, f"Horizontal bars, one class a row. {title}.", class_names, "images")
    bars = axes.barh(range(len(counts)), counts, color=style.BLUE, height=0.7)
    _number(axes, bars, [f"{count:,}  ({percent(count / counts.sum())})" for count in counts], most=NUMBERED_ROWS)
    axes.set_xlim(0, 1.35 * high)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    return figure


def span(bits: Sequence[float]) -> str:
    """[6.5, 8, 7] -> '6.5 to 8'."""
    low, high = min(bits), max(bits)
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"


def _upright(
    title: str, subtitle: str, alt: str, names: Sequence[str], ylabel: str, values: NDArray[np.floating]
) -> tuple[Figure, Axes]:
    """Axes for bars with one layer each: slanted names that end under their bar, room for a number above the bars."""
    figure = style.canvas(title, subtitle, alt, height=4.0)
    axes = figure.subplots()
    style.name_axis(axes.xaxis, names, NUMBERED, rotation=45, ha="right", rotation_mode="anchor")
    axes.set(xlim=(-0.7, len(names) - 0.3), ylim=(0, 1.12 * max(values.max(initial=0.0), 1e-9)), ylabel=ylabel)
    return figure, axes


def _rows(title: str, subtitle: str, alt: str, names: Sequence[str], xlabel: str) -> tuple[Figure, Axes]:
    """Axes for horizontal bars, the first name at the top."""
    height = style.rows_height(len(names), 0.235)
    figure = style.canvas(title, subtitle, alt, height=height + 0.9)
    axes = figure.subplots()
    axes.grid(False)
    axes.grid(True, axis="x")
    style.row_axis(axes, names, height)
    axes.set_xlabel(xlabel)
    return figure, axes


def _number(
    axes: Axes, bars: BarContainer, texts: Sequence[str], meaning: str = "", most: int = NUMBERED
) -> list[Line2D]:
    """Write a text at the end of each bar, of at most `most`; returns the legend's entry that says what it means."""
    if len(bars) > most:
        return []
    axes.bar_label(bars, texts, padding=3, fontsize=style.SMALL)
    return [Line2D([], [], ls="", marker="$n$", ms=7, color=style.INK, label=meaning)]

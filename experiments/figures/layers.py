"""Charts of a network's layers: a bar, a stack or a pair for each, or a row; also the channels of each, one by one.

Shares are drawn in per cent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import ListedColormap
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from experiments.figures import style
from experiments.figures.style import percent
from src.training import LayerRecord

NUMBERED, NUMBERED_ROWS = 24, 48
"""Bars have room for a number above each, and rows for one at the end of each, up to that many."""
DIGITS = "\N{FIGURE SPACE}>2"  # a count of one digit is as wide as one of two
ABSENT = Patch(facecolor=style.FAINT, edgecolor=style.PALE, hatch="////", label="no such channel")


@style.styled
def per_layer_channels(layers: Sequence[LayerRecord], *, subtitle: str = "") -> Figure:
    """One bar a layer: alive filters (blue) under dead ones (grey), the learned bit width above the bar."""
    dead = np.array([layer.dead_channels for layer in layers])
    channels = np.array([layer.channels for layer in layers])
    alive, bits = channels - dead, [layer.bits for layer in layers]
    title = f"{alive.sum()} of {channels.sum()} filters are alive, with {np.mean(bits):.1f} bits on average"
    alt, names = f"Stacked bars, one a layer: {title}.", [layer.name for layer in layers]
    figure, axes = _upright(title, subtitle, alt, names, "output channels", channels)
    axes.bar(range(len(layers)), alive, color=style.ALIVE, width=0.72, label="alive")
    tops = axes.bar(range(len(layers)), dead, bottom=alive, color=style.DEAD, width=0.72, label="dead")
    key = _number(axes, tops, [f"{width:.3g}" for width in bits], "learned bits of a weight")
    style.legend_above(axes, handles=[*axes.containers, *key])
    return figure


@style.styled
def before_after(names: Sequence[str], before: Sequence[int], after: Sequence[int], *, subtitle: str = "") -> Figure:
    """Paired bars of the MACs of each layer, with the share that is left above a pair that lost something."""
    old, new = np.asarray(before, dtype=float) / 1e6, np.asarray(after, dtype=float) / 1e6
    title = f"MACs: {old.sum():.3g} million before, {new.sum():.3g} million after"
    title += f", {old.sum() / new.sum():.3g} times fewer" if 0 < new.sum() < old.sum() else ""
    alt = f"Paired bars, one pair a layer. {title}."
    figure, axes = _upright(title, subtitle, alt, names, "million MACs per image", old)
    x = np.arange(len(names))
    pairs = axes.bar(x - 0.2, old, width=0.4, color=style.PALE, edgecolor=style.GREY, lw=0.6, label="before")
    axes.bar(x + 0.2, new, width=0.4, color=style.BLUE, label="after")
    kept = [f"{100 * part / whole:.0f}" if part < whole else "" for whole, part in zip(old, new, strict=True)]
    key = _number(axes, pairs, kept, "per cent that is left, if not all")
    style.legend_above(axes, handles=[*axes.containers, *key])
    return figure


@style.styled
def layer_sparsity_bars(
    names: Sequence[str], sparsity: Sequence[float], structured: Sequence[float], *, subtitle: str = ""
) -> Figure:
    """Two shares (0 to 1) of each layer, drawn in per cent: zero weights (wide bar) and dead filters (thin bar)."""
    zeros, dead = 100 * np.asarray(sparsity), 100 * np.asarray(structured)
    low, high = int(zeros.argmin()), int(zeros.argmax())
    title = f"Zeros: from {zeros[low]:.1f} % in {names[low]} to {zeros[high]:.1f} % in {names[high]}"
    alt = f"Horizontal bars, one layer a row. {title}. Dead filters: at most {dead.max():.1f} %."
    figure, axes = _rows(title, subtitle, alt, names, "share of the layer")
    wide = axes.barh(range(len(names)), zeros, height=0.74, color=style.ZEROS, alpha=0.45, label="zero weights")
    axes.barh(range(len(names)), dead, height=0.3, color=style.CHANNELS, label="dead filters")
    _number(axes, wide, [f"{value:.0f} %" for value in zeros], most=NUMBERED_ROWS)
    axes.set(xlim=(0, 112), xticks=range(0, 101, 20))
    axes.xaxis.set_major_formatter(style.PERCENT)
    style.legend_above(axes)
    return figure


@style.styled
def bit_widths(names: Sequence[str], forms: Mapping[str, Sequence[float]], *, subtitle: str = "") -> Figure:
    """The bit width of each layer, one line for each form of the squared logits (at most three)."""
    spans = {form: f"{min(bits):g} to {max(bits):g} bits" for form, bits in forms.items()}
    spans |= {form: f"all {bits[0]:g} bits" for form, bits in forms.items() if len(set(bits)) == 1}
    title = "Other runs: the squares' weight decides whether layers differ"
    alt = f"Steps, one a layer. {'; '.join(f'{form}: {span}' for form, span in spans.items())}."
    widths = np.array(list(forms.values()))
    figure, axes = _upright(title, subtitle, alt, names, "bits of a weight", widths, height=3.4)
    looks = zip((style.GREY, style.BLUE, style.VERMILLION), ("s", "o", "^"), (-0.06, 0.06, 0.0), strict=True)
    for (form, span), bits, (color, marker, shift) in zip(spans.items(), widths, looks, strict=False):
        places = np.arange(len(names))
        axes.step(places, bits + shift, where="mid", color=color, lw=2, marker=marker, ms=6, label=f"{form}: {span}")
    axes.set(ylim=(0, widths.max() + 1), yticks=range(0, int(widths.max()) + 2, 2))
    style.legend_above(axes, columns=1)
    return figure


@style.styled
def channel_liveness(layers: Sequence[LayerRecord], *, subtitle: str = "") -> Figure:
    """Rows are layers, columns output channels: black dead, white alive, hatched where a layer has no such channel."""
    dead, total = sum(layer.dead_channels for layer in layers), sum(layer.channels for layer in layers)
    title = f"{dead} of {total} filters are dead ({percent(dead / max(total, 1))})"
    alt = f"Map of channels, one row a layer, black for dead: {title}."
    names = [f"{layer.name}  {layer.dead_channels:{DIGITS}}/{layer.channels}" for layer in layers]
    figure, axes = _rows(title, subtitle, alt, names, "output channel; beside each layer: dead/all")
    draw_cells(axes, [np.logical_not(layer.dead) for layer in layers], style.LIVENESS)
    states = (("dead", style.BLACK), ("alive", style.WHITE))
    keys = [Patch(facecolor=color, edgecolor=style.GREY, label=state) for state, color in states]
    style.legend_above(axes, handles=[*keys, ABSENT])
    return figure


def channel_group_diagram() -> Any:
    """What must be zero together in a residual network so that one channel can go: `channel_groups.svg`, for IPython.

    Its description is its alternative text.
    """
    from IPython.display import SVG

    drawing = Path(__file__).with_name("channel_groups.svg").read_text(encoding="utf-8")
    (described,) = re.findall("<desc[^>]*>(.*?)</desc>", drawing, re.DOTALL)
    return SVG(drawing, metadata={"alt": " ".join(described.split())})


def draw_cells(
    axes: Axes, rows: Iterable[ArrayLike], colors: ListedColormap, *, edges: NDArray[np.float64] | None = None
) -> None:
    """Rows of coloured cells on a hatched ground, the first row at the top; rows may differ in length.

    rows: of each, (C,) whole numbers, the cells' places among `colors`. edges: (C + 1,), borders of the columns where
    these are not the places 0, 1, ...
    """
    values = [np.asarray(row, dtype=int) for row in rows]
    widest = max((len(row) for row in values), default=1)
    borders = np.arange(widest + 1) - 0.5 if edges is None else edges
    edge = style.PALE if widest <= 128 and len(values) <= 40 else "none"
    look: dict[str, Any] = {"cmap": colors, "vmin": -0.5, "vmax": colors.N - 0.5, "edgecolors": edge, "lw": 0.25}
    axes.grid(False)
    axes.set_facecolor(style.FAINT)
    axes.patch.set(hatch="////", edgecolor=style.PALE)
    top = 0
    for length, alike in groupby(values, key=len):  # rows of one length are one artist, which is soon drawn
        block = np.stack(list(alike))
        axes.pcolormesh(borders[: length + 1], np.arange(top, top + len(block) + 1) - 0.5, block, **look)
        top += len(block)
    axes.set(xlim=(borders[0], borders[-1]), ylim=(max(len(values), 1) - 0.5, -0.5))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, min_n_ticks=1))


def _upright(
    title: str, subtitle: str, alt: str, names: Sequence[str], ylabel: str, values: NDArray[Any], height: float = 4.0
) -> tuple[Figure, Axes]:
    """Axes for bars with one layer each: slanted names that end under their bar, room for a number above the bars."""
    figure = style.canvas(title, subtitle, alt, height=height)
    axes = figure.subplots()
    _name(axes.xaxis, names, NUMBERED, rotation=45, ha="right", rotation_mode="anchor")
    axes.set(xlim=(-0.7, len(names) - 0.3), ylim=(0, 1.12 * values.max()), ylabel=ylabel)
    return figure, axes


def _rows(title: str, subtitle: str, alt: str, names: Sequence[str], xlabel: str) -> tuple[Figure, Axes]:
    """Axes with a row for each name, the first at the top: as high as they need, up to a page."""
    height = min(0.22 * max(len(names), 3), 9.0)
    figure = style.canvas(title, subtitle, alt, height=height + 1.0)
    axes = figure.subplots()
    axes.grid(False)
    axes.grid(True, axis="x")
    _name(axes.yaxis, names, int(height / 0.185))
    axes.set(ylim=(len(names) - 0.4, -0.6), xlabel=xlabel)
    return figure, axes


def _name(axis: Axis, names: Sequence[str], most: int, **look: Any) -> None:
    """A name at each place of an axis, or, of more than `most` names, at every second, third, ... place."""
    places = range(0, len(names), -(-len(names) // most) or 1)
    axis.set_ticks(list(places), [names[i] for i in places], **look)
    axis.set_tick_params(length=0)


def _number(
    axes: Axes, bars: BarContainer, texts: Sequence[str], meaning: str = "", most: int = NUMBERED
) -> list[Line2D]:
    """Write a text at the end of each bar, of at most `most`; returns the legend's entry that says what it means."""
    if len(bars) > most:
        return []
    axes.bar_label(bars, texts, padding=3)
    with rc_context({"text.parse_math": True}):  # matplotlib's only marker that is a letter
        return [Line2D([], [], ls="", marker="$n$", ms=7, color=style.INK, label=meaning)]

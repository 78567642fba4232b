"""The live figure of a run: one page with four panels, drawn again after every epoch.

Two of the panels, `draw_sparsity` and `draw_liveness`, are figures of their own in experiments/figures.py. Nothing is
shown, saved or closed here. Shares (0 to 1) are drawn in per cent. Axis letters: E epochs, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from experiments.figures import style
from experiments.figures.style import LIVENESS, percent
from src.training import History, LayerRecord

SHORT_DASHES = (0, (1.5, 0.8))
"""Dashes of which a legend's short line shows more than one."""


@style.styled
def dashboard(history: History, *, coefficient_plan: Sequence[float] | None = None, subtitle: str = "") -> Figure:
    """The live figure, 2 x 2: loss and accuracy; sparsity and coefficient; bits of every layer; channel liveness.

    coefficient_plan: the coefficient of every planned epoch, drawn faintly ahead of the run. Works from the first
    moment, with no record yet. The layout is fixed, so nothing moves between two frames.
    """
    record = history.last if len(history) else None
    layers = record.layers if record else ()
    title = (
        f"Epoch {len(history)} of {history.epochs}" if record else f"Waiting for the first of {history.epochs} epochs"
    )
    header = style.header_height(title, subtitle)
    body = 5.8  # inches
    figure = Figure(figsize=(style.WIDTH, body + header))
    style.headline(figure, title, subtitle)
    top, bottom = 1 - (header + 0.5) / (body + header), 0.5 / (body + header)
    cells = figure.add_gridspec(2, 2, left=0.085, right=0.905, bottom=bottom, top=top, wspace=0.62, hspace=0.55)
    panels = [figure.add_subplot(cells[i, j]) for i in (0, 1) for j in (0, 1)]
    _draw_loss(panels[0], history)
    draw_sparsity(panels[1], history, plan=coefficient_plan)
    _draw_bits(panels[2], history)
    _legends(panels)
    for axes in figure.axes:
        axes.set_ylabel("")  # the headings and the legends say it, the colours which side is meant
    figure.axes[-1].yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    draw_liveness(panels[3], layers)
    panels[3].set_yticks(*_row_groups(layers))
    panels[3].tick_params(axis="y", length=0)
    panels[3].set_xlabel("output channel")
    dead, total = dead_total(layers)
    headings = ["Loss and accuracy", "Zeros and dead", "Bits of every layer", "Channels: black is dead"]
    alt = f"Four charts of the run. {title}."
    if record:
        zeros, share = percent(record.unstructured_sparsity), percent(record.structured_sparsity)
        headings[0] = f"Loss {record.loss:.2f}, accuracy {percent(record.accuracy)}"
        headings[1] = f"Zeros {zeros}, dead {share}"
        headings[2] = f"Bits: {record.mean_bits:.1f} on average"
        headings[3] = f"Dead (black): {dead} of {total}"
        alt += f" Loss {record.loss:.2f}, test accuracy {percent(record.accuracy)}. Zero weights {zeros}, dead "
        alt += f"channels {share}, {dead} of {total}, at coefficient "
        alt += f"{record.coefficient:.3g}. Bit widths {span([layer.bits for layer in layers])}, mean "
        alt += f"{record.mean_bits:.1f}."
    for panel, heading, pad in zip(panels, headings, (24, 24, 24, 24), strict=True):
        panel.set_title(heading, pad=pad)
    return style.finish(figure, alt)


def draw_sparsity(axes: Axes, history: History, *, plan: Sequence[float] | None) -> Axes:
    """Draw the two sparsities (left) and the coefficient (right); gives back the right axes."""
    x = np.arange(1, len(history) + 1)
    coefficient = history.column("coefficient")
    planned = np.asarray(plan if plan is not None else [], dtype=float)
    dot = style.marker(len(x))
    style.grid(axes)
    right = style.right_axis(axes, "penalty coefficient", style.COEFFICIENT)
    if len(planned) > len(x):
        ahead = np.arange(max(len(x), 1), len(planned) + 1)
        right.plot(ahead, planned[ahead - 1], color=style.COEFFICIENT, lw=1.2, ls=":", label="coefficient, planned")
    right.plot(x, coefficient, color=style.COEFFICIENT, lw=1.8, ls=(0, (4, 2)), label="coefficient (right)")
    for column, color, label in (
        ("unstructured_sparsity", style.ZEROS, "zero weights"),
        ("structured_sparsity", style.CHANNELS, "dead channels"),
    ):
        axes.plot(x, 100 * history.column(column), color=color, lw=2.2 if dot else 1.4, marker=dot, label=label)
    peak = max(coefficient.max(initial=0.0), planned.max(initial=0.0))
    right.set_ylim(0, 1.15 * peak if peak > 0 else 1.0)
    right.yaxis.set_major_formatter("{x:g}")
    axes.set(ylim=(0, style.FULL), ylabel="share")
    style.percent_axis(axes.yaxis)
    style.epoch_axis(axes, history.epochs)
    return right


def draw_liveness(axes: Axes, layers: Sequence[LayerRecord]) -> None:
    """The map itself: an image of 0 (dead), 1 (alive), masked (absent) on a hatched ground."""
    rows, columns = max(len(layers), 1), max((layer.channels for layer in layers), default=1)
    alive = np.ma.masked_array(np.zeros((rows, columns)), mask=True)
    for i, layer in enumerate(layers):
        alive[i, : layer.channels] = 1.0 - np.asarray(layer.dead, dtype=np.float64)
    axes.set_facecolor(style.FAINT)
    axes.patch.set(hatch="////", edgecolor=style.PALE)
    axes.imshow(alive, cmap=LIVENESS, vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    lines = []
    for i, layer in enumerate(layers):
        end = layer.channels - 0.5
        lines.append([(-0.5, i - 0.5), (end, i - 0.5), (end, i + 0.5), (-0.5, i + 0.5)])
        if columns <= 128 and rows <= 40:
            lines += [[(j - 0.5, i - 0.5), (j - 0.5, i + 0.5)] for j in range(1, layer.channels)]
    axes.add_collection(LineCollection(lines, colors=style.PALE, linewidths=0.5), autolim=False)
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    if not layers:
        axes.set(xticks=[], yticks=[])
        axes.text(
            0, 0, "from the first epoch on", ha="center", va="center", color=style.MUTED, backgroundcolor=style.PAPER
        )
        return
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))


def dead_total(layers: Sequence[LayerRecord]) -> tuple[int, int]:
    """Dead output channels, and all output channels, of the layers."""
    return sum(layer.dead_channels for layer in layers), sum(layer.channels for layer in layers)


def span(bits: Sequence[float]) -> str:
    """[6.5, 8, 7] -> '6.5 to 8'."""
    low, high = min(bits), max(bits)
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"


def _draw_loss(axes: Axes, history: History) -> Axes:
    """Draw loss (left) and accuracy (right); gives back the right axes."""
    x, dot = np.arange(1, len(history) + 1), style.marker(len(history))
    style.grid(axes)
    axes.plot(x, history.column("loss"), color=style.LOSS, lw=2.2 if dot else 1.4, marker=dot, label="loss")
    axes.plot(x, history.column("task_loss"), color=style.TASK, lw=1.6, marker=dot, ms=4, label="task loss")
    axes.set_ylim(0, 1.08 * max(history.column("loss").max(initial=0.0), 1e-3) if len(history) else 1.0)
    axes.set_ylabel("loss, mean of the batches")
    style.epoch_axis(axes, history.epochs)
    right = style.right_axis(axes, "test accuracy", style.ACCURACY)
    accuracy = 100 * history.column("accuracy")
    right.plot(x, accuracy, color=style.ACCURACY, lw=2.2 if dot else 1.4, ls="-", marker=dot, label="accuracy (right)")
    right.set_ylim(0, style.FULL)
    style.percent_axis(right.yaxis)
    return right


def _draw_bits(axes: Axes, history: History) -> None:
    """One line a layer, wide and dark to narrow and bright, so that lines that coincide show as nested stripes."""
    x = np.arange(1, len(history) + 1)
    bits = history.layer_column("bits").reshape(len(history), len(history.layer_names))  # (E, L)
    count = bits.shape[1]
    style.grid(axes)
    for i in range(count):
        depth = i / max(count - 1, 1)
        axes.plot(x, bits[:, i], color=style.DEPTH(depth), lw=6.0 - 4.6 * depth, marker="." if len(x) == 1 else "")
    axes.plot(x, history.column("mean_bits"), color=style.INK, lw=2.2, ls=(0, (3, 1.5)), label="mean")
    low, high = min(2.0, bits.min(initial=2.0)), max(8.0, bits.max(initial=8.0))
    axes.set(ylim=(low - 0.35, high + 0.95), ylabel="bits of a weight")
    axes.set_yticks(np.arange(np.floor(low), np.ceil(high) + 1))
    style.epoch_axis(axes, history.epochs)
    if count:
        _name_ends(axes, history)


def _name_ends(axes: Axes, history: History) -> None:
    """At the end of the lines: how many layers are there, or which one.

    Bits fall, so that above the highest end and below the others there are the fewest lines.
    """
    ends = np.round(history.layer_column("bits")[-1] * 4) / 4
    late = len(history) > history.epochs / 2
    for value in np.unique(ends):
        members = [name for name, end in zip(history.layer_names, ends, strict=True) if end == value]
        text = members[0] if len(members) == 1 else f"{len(members)} layers"
        above = value == ends.max() or value < axes.get_ylim()[0] + 1  # or there is no room below
        note = axes.annotate(
            text, (len(history), value), (0, 4 if above else -4), textcoords="offset points", fontsize=style.SMALL,
            va="bottom" if above else "top", ha="right" if late else "left", annotation_clip=False,
        )  # fmt: skip
        note.set_path_effects([withStroke(linewidth=3, foreground=style.WHITE)])


def _legends(panels: Sequence[Axes]) -> None:
    """Above the first three panels, a short name for each line in one row; the planned coefficient needs none."""
    loss: list[tuple[str, str, Any]] = [
        ("loss", style.LOSS, "-"),
        ("task", style.TASK, "-"),
        ("accuracy", style.ACCURACY, "-"),
    ]
    shares: list[tuple[str, str, Any]] = [
        ("zeros", style.ZEROS, "-"),
        ("dead", style.CHANNELS, "-"),
        ("coefficient", style.COEFFICIENT, SHORT_DASHES),
    ]
    for axes, lines in zip(panels, (loss, shares), strict=False):
        keys = [Line2D([], [], color=color, lw=2.2, ls=dash, label=label) for label, color, dash in lines]
        style.legend_above(axes, columns=3, handles=keys, tight=True)
    depths = [
        Line2D([], [], color=style.DEPTH(0.0), lw=5, label="first layer"),
        Line2D([], [], color=style.DEPTH(1.0), lw=2, label="last"),
        Line2D([], [], color=style.INK, lw=2.2, ls=SHORT_DASHES, label="mean"),
    ]
    style.legend_above(panels[2], columns=3, handles=depths, tight=True)


def _row_groups(layers: Sequence[LayerRecord]) -> tuple[list[float], list[str]]:
    """Names of the rows: each where there is room, otherwise the first part of the name once for its rows."""
    if len(layers) <= 12:
        return [float(i) for i in range(len(layers))], [layer.name for layer in layers]
    members: dict[str, list[int]] = {}
    for i, layer in enumerate(layers):
        members.setdefault(layer.name.split(".")[0], []).append(i)
    return [float(np.mean(rows)) for rows in members.values()], list(members)

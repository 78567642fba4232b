"""The live figure of a run: one page with four panels, drawn again after every epoch.

Axis letters: E epochs, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.figures import style
from experiments.figures.curves import draw_sparsity
from experiments.figures.layers import draw_cells
from experiments.figures.style import percent
from src.training import History, LayerRecord


@style.styled
def dashboard(history: History, *, coefficient_plan: Sequence[float] = (), subtitle: str = "") -> Figure:
    """The live figure, 2 x 2: losses and accuracy; sparsity and coefficient; bits of every layer; channel liveness.

    coefficient_plan: the coefficient of every planned epoch, drawn faintly ahead of the run. Works from the first
    moment, with no record yet. The layout is fixed, so nothing moves between two frames.
    """
    record = history.last if len(history) else None
    title = f"Waiting for the first of {history.epochs} epochs"
    headings = ["Task loss and accuracy", "Zeros and dead", "Bits of every layer", "Filters: black is dead"]
    if record:
        title, bits = f"Epoch {len(history)} of {history.epochs}", [layer.bits for layer in record.layers] or [0]
        headings[:3] = [
            f"Task loss {record.task_loss:.2f}, accuracy {percent(record.accuracy)}",
            f"Zeros {percent(record.unstructured_sparsity)}, dead {percent(record.structured_sparsity)}",
            f"Bits: {min(bits):.3g} to {max(bits):.3g}, mean {record.mean_bits:.1f}",
        ]
    alt = f"Four charts of the run. {title}. {'. '.join(headings)}."
    panels_height = 5.8  # inches
    figure = style.canvas(title, subtitle, alt, height=panels_height)
    figure.set_layout_engine("none")
    whole = figure.get_figheight()
    fixed = {"left": 0.085, "right": 0.905, "bottom": 0.5 / whole, "top": (panels_height - 0.5) / whole}
    panels = list(figure.subplots(2, 2, gridspec_kw={**fixed, "wspace": 0.62, "hspace": 0.55}).flat)
    legend: dict[str, Any] = {"columns": 3, "handlelength": 1.0, "columnspacing": 0.7, "handletextpad": 0.4}
    style.legend_above(panels[0], _draw_loss(panels[0], history), **legend)
    coefficient = draw_sparsity(panels[1], history, ("zeros", "dead", "coefficient"), coefficient_plan)
    coefficient.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    style.legend_above(panels[1], coefficient, **legend)
    _draw_bits(panels[2], history)
    style.legend_above(panels[2], **{**legend, "columns": 4})
    _draw_channels(panels[3], record.layers if record else ())
    for axes in figure.axes:
        axes.set_ylabel("")  # the headings and the legends say it, the colours which side is meant
    for panel, heading in zip(panels, headings, strict=True):
        panel.set_title(heading, pad=24)
    return figure


def _draw_loss(axes: Axes, history: History) -> Axes:
    """Draw the losses (left) and accuracy (right axis, returned)."""
    style.epoch_line(axes, history.column("loss"), color=style.LOSS, label="total")
    style.epoch_line(axes, history.column("task_loss"), color=style.TASK, lw=1.6, ms=4, label="task")
    axes.set_ylim(0, 1.08 * history.column("loss").max(initial=0.0) or 1.0)
    style.epoch_axis(axes, history.epochs)
    right = style.right_axis(axes, "test accuracy", style.ACCURACY)
    style.epoch_line(right, 100 * history.column("accuracy"), color=style.ACCURACY, label="accuracy")
    right.set_ylim(0, style.FULL)
    right.yaxis.set_major_formatter(style.PERCENT)
    return right


def _draw_bits(axes: Axes, history: History) -> None:
    """One line a layer, wide and dark to narrow and bright, so that lines that coincide show as nested stripes."""
    bits = history.layer_column("bits").reshape(len(history), len(history.layer_names))  # (E, L)
    count = bits.shape[1]
    dot = "." if len(history) == 1 else ""
    lowest = int(bits[-1].argmin()) if bits.size else 0
    labels = {lowest: f"{lowest + 1} (lowest)", 0: "layer 1", count - 1: f"{count}"}
    for i in range(count):
        depth = i / max(count - 1, 1)
        label = labels.get(i, "_layer")
        style.epoch_line(axes, bits[:, i], color=style.DEPTH(depth), lw=6.0 - 4.6 * depth, marker=dot, label=label)
    style.epoch_line(axes, history.column("mean_bits"), color=style.INK, ls=style.DASHED, marker="", label="mean")
    low, high = min(2.0, bits.min(initial=2.0)), max(8.0, bits.max(initial=8.0))
    axes.set(ylim=(low - 0.35, high + 0.35), yticks=np.arange(np.floor(low), np.ceil(high) + 1))
    style.epoch_axis(axes, history.epochs)


def _draw_channels(axes: Axes, layers: Sequence[LayerRecord]) -> None:
    """The liveness map; its rows are named by the first part of their layers' names, once for all of a part."""
    draw_cells(axes, [np.logical_not(layer.dead) for layer in layers], style.LIVENESS)
    axes.set_xlabel("output channel")
    members: dict[str, list[int]] = {}
    for row, layer in enumerate(layers):
        members.setdefault(layer.name.split(".")[0], []).append(row)
    axes.set_yticks([float(np.mean(rows)) for rows in members.values()], list(members))
    axes.tick_params(axis="y", length=0)

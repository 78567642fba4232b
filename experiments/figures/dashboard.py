"""The live figure of a run: one page with four panels, drawn again after every epoch.

Axis letters: E epochs, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from experiments.figures import style
from experiments.figures.bars import span
from experiments.figures.channels import dead_total, draw_liveness
from experiments.figures.curves import draw_sparsity
from experiments.figures.style import percent
from src.training import History, LayerRecord

BODY = 5.8
"""Height in inches of the panels together."""


@style.styled
def dashboard(history: History, *, coefficient_plan: Sequence[float] = (), subtitle: str = "") -> Figure:
    """The live figure, 2 x 2: loss and accuracy; sparsity and coefficient; bits of every layer; channel liveness.

    coefficient_plan: the coefficient of every planned epoch, drawn faintly ahead of the run. Works from the first
    moment, with no record yet. The layout is fixed, so nothing moves between two frames.
    """
    record = history.last if len(history) else None
    title = f"Waiting for the first of {history.epochs} epochs"
    headings = ["Loss and accuracy", "Zeros and dead", "Bits of every layer", "Channels: black is dead"]
    alt = f"Four charts of the run. {title}."
    if record:
        title = f"Epoch {len(history)} of {history.epochs}"
        zeros, share = percent(record.unstructured_sparsity), percent(record.structured_sparsity)
        dead, total = dead_total(record.layers)
        headings = [
            f"Loss {record.loss:.2f}, accuracy {percent(record.accuracy)}",
            f"Zeros {zeros}, dead {share}",
            f"Bits: {record.mean_bits:.1f} on average",
            f"Dead (black): {dead} of {total}",
        ]
        alt = (
            f"Four charts of the run. {title}. Loss {record.loss:.2f}, test accuracy {percent(record.accuracy)}. "
            f"Zero weights {zeros}, dead channels {share}, {dead} of {total}, at coefficient {record.coefficient:.3g}. "
            f"Bit widths {span([layer.bits for layer in record.layers])}, mean {record.mean_bits:.1f}."
        )
    figure = style.canvas(title, subtitle, alt, height=BODY)
    figure.set_layout_engine("none")
    whole = figure.get_figheight()
    fixed = {"left": 0.085, "right": 0.905, "bottom": 0.5 / whole, "top": (BODY - 0.5) / whole}
    panels = list(figure.subplots(2, 2, gridspec_kw={**fixed, "wspace": 0.62, "hspace": 0.55}).flat)
    legend: dict[str, Any] = {"columns": 3, "handlelength": 1.0, "columnspacing": 0.7, "handletextpad": 0.4}
    style.legend_above(panels[0], _draw_loss(panels[0], history), **legend)
    coefficient = draw_sparsity(panels[1], history, ("zeros", "dead", "coefficient"), coefficient_plan)
    coefficient.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    style.legend_above(panels[1], coefficient, **legend)
    _draw_bits(panels[2], history)
    style.legend_above(panels[2], **legend)
    _draw_channels(panels[3], record.layers if record else ())
    for axes in figure.axes:
        axes.set_ylabel("")  # the headings and the legends say it, the colours which side is meant
    for panel, heading in zip(panels, headings, strict=True):
        panel.set_title(heading, pad=24)
    return figure


def _draw_loss(axes: Axes, history: History) -> Axes:
    """Draw loss (left) and accuracy (right axis, returned)."""
    style.epoch_line(axes, history.column("loss"), color=style.LOSS, label="loss")
    style.epoch_line(axes, history.column("task_loss"), color=style.TASK, lw=1.6, ms=4, label="task")
    axes.set_ylim(0, 1.08 * max(history.column("loss").max(initial=0.0), 1e-3) if len(history) else 1.0)
    style.epoch_axis(axes, history.epochs)
    right = style.right_axis(axes, "test accuracy", style.ACCURACY)
    style.epoch_line(right, 100 * history.column("accuracy"), color=style.ACCURACY, label="accuracy")
    right.set_ylim(0, style.FULL)
    style.percent_axis(right.yaxis)
    return right


def _draw_bits(axes: Axes, history: History) -> None:
    """One line a layer, wide and dark to narrow and bright, so that lines that coincide show as nested stripes."""
    bits = history.layer_column("bits").reshape(len(history), len(history.layer_names))  # (E, L)
    count = bits.shape[1]
    dot = "." if len(history) == 1 else ""
    for i in range(count):
        depth = i / max(count - 1, 1)
        label = "first layer" if i == 0 else "last" if i == count - 1 else "_layer"
        style.epoch_line(axes, bits[:, i], color=style.DEPTH(depth), lw=6.0 - 4.6 * depth, marker=dot, label=label)
    style.epoch_line(axes, history.column("mean_bits"), color=style.INK, ls=style.DASHED, marker="", label="mean")
    low, high = min(2.0, bits.min(initial=2.0)), max(8.0, bits.max(initial=8.0))
    axes.set(ylim=(low - 0.35, high + 0.95), yticks=np.arange(np.floor(low), np.ceil(high) + 1))
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
        above = value == ends.max() or value < axes.get_ylim()[0] + 1  # or there is no room below
        text = members[0] if len(members) == 1 else f"{len(members)} layers"
        note = axes.annotate(text, (len(history), value), (0, 4 if above else -4), textcoords="offset points")
        note.set(fontsize=style.SMALL, va="bottom" if above else "top", ha="right" if late else "left")
        note.set_path_effects([withStroke(linewidth=3, foreground=style.WHITE)])


def _draw_channels(axes: Axes, layers: Sequence[LayerRecord]) -> None:
    """The liveness map; its rows are named by the first part of their layers' names, once for all of a part."""
    draw_liveness(axes, layers)
    axes.set_xlabel("output channel")
    members: dict[str, list[int]] = {}
    for row, layer in enumerate(layers):
        members.setdefault(layer.name.split(".")[0], []).append(row)
    axes.set_yticks([float(np.mean(rows)) for rows in members.values()], list(members))
    axes.tick_params(axis="y", length=0)

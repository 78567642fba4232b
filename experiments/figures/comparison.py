"""Figures of several runs: their curves over each other, and accuracy against cost with every epoch of every run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter
from numpy.typing import NDArray

from experiments.figures import style
from experiments.figures.style import percent

PANELS = (
    ("accuracy", "Test accuracy", 100.0),
    ("unstructured_sparsity", "Zero weights", 100.0),
    ("structured_sparsity", "Dead filters", 100.0),
    ("mean_bits", "Bits, mean of the layers", 1.0),
)
LEAST_DEAD = 5.0
"""Per cent; an axis of shares that are all 0 still says so."""


@dataclass(frozen=True)
class Series:
    """One run. columns: scalars of its history by name, (E,); relative_bops: share of dense FP32's, (E,)."""

    label: str
    epochs: int
    columns: Mapping[str, NDArray[np.float64]]
    relative_bops: NDArray[np.float64]


@style.styled
def run_curves(runs: Sequence[Series], *, subtitle: str = "") -> Figure:
    """Accuracy, zeros, dead filters and bits by epoch, a line a run."""
    _check(runs)
    best = max(runs, key=lambda run: run.columns["accuracy"][-1])
    ends = {percent(run.columns["accuracy"][-1]) for run in runs}
    title = f"{_quoted(best)} ends at {percent(best.columns['accuracy'][-1])} accuracy"
    title += f", the best of {len(runs)} runs" if len(runs) > 1 else f" after {_epochs(best)}"
    if len(runs) > 1 and len(ends) == 1:
        title = f"All {len(runs)} runs end at {ends.pop()} accuracy"
    figure = style.canvas(title, subtitle, height=5.2 + 0.24 * _legend_rows(runs))
    panels = figure.subplot_mosaic(
        [["keys", "keys"], [PANELS[0][0], PANELS[1][0]], [PANELS[2][0], PANELS[3][0]]],
        height_ratios=[0.1 * _legend_rows(runs), 1, 1],
    )
    for name, heading, scale in PANELS:
        axes = panels[name]
        style.grid(axes)
        for number, run in enumerate(runs):
            values = run.columns[name]
            axes.plot(np.arange(1, len(values) + 1), scale * values, marker=style.marker(len(values)), **_look(number))
        axes.set_title(heading, pad=5)
        style.epoch_axis(axes, max(run.epochs for run in runs))
        if scale == 100:
            style.percent_axis(axes.yaxis)
        axes.set_ylim(0, None)
    for name in (PANELS[0][0], PANELS[1][0]):
        panels[name].set_ylim(0, style.FULL)
    dead = panels[PANELS[2][0]]
    dead.set_ylim(0, max(dead.get_ylim()[1], LEAST_DEAD))
    for name in (PANELS[0][0], PANELS[1][0]):
        panels[name].set_xlabel("")
    style.legend_row(panels["keys"], _keys(runs), columns=_columns(runs))
    return style.finish(figure, f"Four line charts by epoch, a line a run. {title}. {_ends(runs)}")


@style.styled
def run_plane(runs: Sequence[Series], *, subtitle: str = "") -> Figure:
    """Accuracy against relative BOPs: every epoch of every run, joined in order, the last one marked large."""
    _check(runs)
    cheapest = min(runs, key=lambda run: run.relative_bops[-1])
    title = (
        f"{_quoted(cheapest)} ends at {percent(cheapest.relative_bops[-1])} of the dense network's bit operations, "
        f"zeros left out, with {percent(cheapest.columns['accuracy'][-1])} accuracy"
    )
    figure = style.canvas(title, subtitle, height=4.5 + 0.24 * _legend_rows(runs))
    panels = figure.subplot_mosaic([["keys"], ["plane"]], height_ratios=[0.05 * _legend_rows(runs), 1])
    axes = panels["plane"]
    style.grid(axes, "both")
    low = min(float(run.relative_bops.min()) for run in runs)
    for number, run in enumerate(runs):
        cost, accuracy = 100 * run.relative_bops, 100 * run.columns["accuracy"]
        look = _look(number)
        axes.plot(cost, accuracy, lw=1.2, color=look["color"], ls=look["ls"], marker=style.marker(len(cost)), ms=3.5)
        axes.plot(
            cost[-1:],
            accuracy[-1:],
            marker="o",
            ms=11,
            mec=style.INK,
            mew=1.2,
            color=look["color"],
            zorder=4,
            clip_on=False,
        )
    axes.set_xscale("log")
    left = 100 * low * 0.85
    axes.set(
        xlim=(max(left, 1e-3), 105 * max(1.0, *(float(r.relative_bops.max()) for r in runs))), ylim=(0, style.FULL)
    )
    axes.set_xticks([tick for tick in (0.1, 0.3, 1, 2, 3, 5, 10, 20, 30, 50, 100) if tick >= left])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(
        xlabel="BOPs relative to dense FP32 (log scale)\ndensity × MACs × bits × 32; unquantized layers at 32 bits"
    )
    axes.set_ylabel("test accuracy")
    style.percent_axis(axes.yaxis)
    last = Line2D([], [], ls="", marker="o", ms=9, mfc=style.PAPER, mec=style.INK, mew=1.2, label="last epoch")
    style.legend_row(panels["keys"], [*_keys(runs), last], columns=_columns(runs))
    return style.finish(
        figure, f"Every epoch of every run, accuracy over relative bit operations. {title}. {_ends(runs)}"
    )


def _look(number: int) -> dict[str, Any]:
    kinds = len(style.RUNS)
    return {"color": style.RUNS[number % kinds], "ls": style.RUN_DASHES[number % kinds], "lw": 2.2}


def _keys(runs: Sequence[Series]) -> list[Line2D]:
    return [Line2D([], [], label=_short(run.label), **_look(number)) for number, run in enumerate(runs)]


def _columns(runs: Sequence[Series]) -> int:
    longest = max(len(_short(run.label)) for run in runs)
    return max(1, min(4, 62 // (longest + 7)))


def _legend_rows(runs: Sequence[Series]) -> int:
    return -(-(len(runs) + 1) // _columns(runs))


def _short(label: str) -> str:
    return label if len(label) <= 40 else f"…{label[-39:]}"


def _quoted(run: Series) -> str:
    return f"“{_short(run.label)}”"


def _epochs(run: Series) -> str:
    count = len(run.relative_bops)
    return "1 epoch" if count == 1 else f"{count} epochs"


def _ends(runs: Sequence[Series]) -> str:
    parts = [
        f"{run.label}: {percent(run.columns['accuracy'][-1])} accuracy, "
        f"{percent(run.columns['unstructured_sparsity'][-1])} zeros, {percent(run.columns['structured_sparsity'][-1])} "
        f"dead filters, {run.columns['mean_bits'][-1]:.1f} bits, {percent(run.relative_bops[-1])} of the BOPs"
        for run in runs[:8]
    ]
    more = f"; and {len(runs) - 8} more runs" if len(runs) > 8 else ""
    return f"At the end: {'; '.join(parts)}{more}."


def _check(runs: Sequence[Series]) -> None:
    if not runs or any(not len(run.relative_bops) for run in runs):
        raise ValueError("there is no finished epoch to draw: give at least one run, each with at least one epoch")

"""Figures of several runs: their curves over each other, and accuracy against cost with every epoch of every run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter
from numpy.typing import NDArray

from experiments.figures import style
from experiments.figures.style import percent

PANELS = (
    ("accuracy", "Test accuracy", 100.0),
    ("unstructured_sparsity", "Zero weights", 100.0),
    ("structured_sparsity", "Dead filters", 100.0),
    ("mean_bits", "Bits, mean of the layers", 1.0),
)


@dataclass(frozen=True)
class Series:
    """One run. columns: scalars of its history by name, (E,); relative_bops: share of dense FP32's, (E,)."""

    label: str
    epochs: int
    columns: Mapping[str, NDArray[np.float64]]
    relative_bops: NDArray[np.float64]

    @property
    def short(self) -> str:
        """The label, of which the end is kept where it is long."""
        return self.label if len(self.label) <= 40 else f"…{self.label[-39:]}"

    def at_the_end(self, name: str) -> str:
        """A share in per cent, as of the last epoch."""
        return percent(self.columns[name][-1])


@style.styled
def run_curves(runs: Sequence[Series], *, subtitle: str = "") -> Figure:
    """Accuracy, zeros, dead filters and bits by epoch, a line a run."""
    _check(runs)
    best = max(runs, key=lambda run: run.columns["accuracy"][-1])
    title = f"“{best.short}” ends at {best.at_the_end('accuracy')} accuracy after epoch {len(best.relative_bops)}"
    title += f"; none of the {len(runs)} runs does better" if len(runs) > 1 else ""
    columns, rows = _legend_shape(runs)
    alt = f"Four line charts by epoch, a line a run. {title}. {_ends(runs)}"
    figure = style.canvas(title, subtitle, alt, height=5.2 + 0.24 * rows)
    for axes, (name, heading, scale) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for number, run in enumerate(runs):
            style.epoch_line(axes, scale * run.columns[name], **_look(number))
        axes.set_title(heading, pad=5)
        style.epoch_axis(axes, max(run.epochs for run in runs))
        if scale == 100:
            style.percent_axis(axes.yaxis)
        whole = name in ("accuracy", "unstructured_sparsity")
        axes.set_ylim(0, style.FULL if whole else max(axes.get_ylim()[1], 5.0))  # also where no filter is dead
    style.legend_below(figure, _keys(runs), columns)
    return figure


@style.styled
def run_plane(runs: Sequence[Series], *, subtitle: str = "") -> Figure:
    """Accuracy against relative BOPs: every epoch of every run, joined in order, the last one marked large."""
    _check(runs)
    cheapest = min(runs, key=lambda run: run.relative_bops[-1])
    title = (
        f"“{cheapest.short}” ends at {percent(cheapest.relative_bops[-1])} of the dense network's bit operations, "
        f"zeros left out, with {cheapest.at_the_end('accuracy')} accuracy"
    )
    columns, rows = _legend_shape(runs)
    alt = f"Every epoch of every run, accuracy over relative bit operations. {title}. {_ends(runs)}"
    figure = style.canvas(title, subtitle, alt, height=4.5 + 0.24 * rows)
    axes = figure.subplots()
    axes.grid(True, axis="both")
    end: dict[str, Any] = {"marker": "o", "ms": 11, "mec": style.INK, "mew": 1.2}
    for number, run in enumerate(runs):
        cost, accuracy, look = 100 * run.relative_bops, 100 * run.columns["accuracy"], _look(number)
        axes.plot(cost, accuracy, **{**look, "lw": 1.2}, marker="." if len(cost) <= 40 else "", ms=3.5)
        axes.plot(cost[-1:], accuracy[-1:], **end, color=look["color"], zorder=4, clip_on=False)
    costs = np.concatenate([100 * run.relative_bops for run in runs])
    left = max(0.85 * costs.min(), 1e-3)
    axes.set_xscale("log")
    axes.set(xlim=(left, 1.05 * max(100.0, costs.max())), ylim=(0, style.FULL), ylabel="test accuracy")
    axes.set_xticks([tick for tick in (0.1, 0.3, 1, 2, 3, 5, 10, 20, 30, 50, 100) if tick >= left])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(
        "BOPs relative to dense FP32 (log scale)\ndensity × MACs × bits × 32; unquantized layers at 32 bits"
    )
    style.percent_axis(axes.xaxis)
    style.percent_axis(axes.yaxis)
    last = Line2D([], [], ls="", **{**end, "ms": 9}, mfc=style.PAPER, label="last epoch")
    style.legend_above(axes, columns=columns, handles=[*_keys(runs), last])
    return figure


def _look(number: int) -> dict[str, Any]:
    kinds = len(style.RUNS)
    return {"color": style.RUNS[number % kinds], "ls": style.RUN_DASHES[number % kinds], "lw": 2.2}


def _keys(runs: Sequence[Series]) -> list[Line2D]:
    return [Line2D([], [], label=run.short, **_look(number)) for number, run in enumerate(runs)]


def _legend_shape(runs: Sequence[Series]) -> tuple[int, int]:
    """Columns and rows of a legend with a name for each run and one entry more."""
    longest = max(len(run.short) for run in runs)
    columns = max(1, min(4, 62 // (longest + 7)))
    return columns, -(-(len(runs) + 1) // columns)


def _ends(runs: Sequence[Series]) -> str:
    parts = [
        f"{run.label}: {run.at_the_end('accuracy')} accuracy, {run.at_the_end('unstructured_sparsity')} zeros, "
        f"{run.at_the_end('structured_sparsity')} dead filters, {run.columns['mean_bits'][-1]:.1f} bits, "
        f"{percent(run.relative_bops[-1])} of the BOPs"
        for run in runs
    ]
    return f"At the end: {'; '.join(parts)}."


def _check(runs: Sequence[Series]) -> None:
    if not runs or any(not len(run.relative_bops) for run in runs):
        raise ValueError("there is no finished epoch to draw: give at least one run, each with at least one epoch")

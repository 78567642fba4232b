"""Line charts: one run by epoch, what is planned for it, and several runs over each other or over what they cost.

Shares (0 to 1) are drawn in per cent. Axis letters: E epochs, S steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from experiments.figures import style
from experiments.figures.style import percent
from src.training import History

Array = NDArray[np.floating]

FORMULA = "density × MACs × bits × 32; unquantized layers at 32 bits"  # of relative BOPs
PANELS = (
    ("accuracy", "Test accuracy", 100.0),
    ("unstructured_sparsity", "Zero weights", 100.0),
    ("structured_sparsity", "Dead filters", 100.0),
    ("mean_bits", "Bits, mean of the layers", 1.0),
)


@style.styled
def accuracy_curve(history: History, *, chance: float, baseline: History | None = None, subtitle: str = "") -> Figure:
    """Test accuracy (thick) and training accuracy (thin) by epoch in per cent; `chance` is a share, drawn dashed.

    Also the test accuracy with BatchNorm recalibrated (dashed), and a band over the epochs with the penalty on.
    baseline: of the run without compression, its test accuracy in grey.
    """
    test, train, last = history.column("accuracy"), history.column("train_accuracy"), history.last
    fresh, penalised = history.column("recalibrated_accuracy"), np.flatnonzero(history.column("coefficient") > 0)
    title = f"Test accuracy: {percent(test[0])} after epoch 1, {percent(last.accuracy)} after epoch {len(test)}"
    alt = f"Line chart by epoch. {title}; the best is {percent(test.max())} in epoch {int(test.argmax()) + 1}. "
    alt += f"Training accuracy ends at {percent(last.train_accuracy)}."
    if len(penalised):
        low = history.lowest
        alt += (
            f" While the penalty is on, from epoch {penalised[0] + 1}, test accuracy is lowest in epoch {low.epoch}: "
        )
        again = low.recalibrated_accuracy
        alt += percent(low.accuracy) + ("." if again is None else f", {percent(again)} with BatchNorm recalibrated.")
    if baseline:
        alt += f" Without compression the test accuracy ends at {percent(baseline.last.accuracy)}."
    figure = style.canvas(title, subtitle, alt, height=3.5)
    axes = figure.subplots()
    if len(penalised):
        axes.axvspan(penalised[0] + 0.5, penalised[-1] + 1.5, color=style.COEFFICIENT, alpha=0.09, lw=0)
        axes.annotate(
            "penalty on", (penalised[0] + 0.5, 0), (4, 4), textcoords="offset points", color=style.COEFFICIENT
        )
    if baseline:
        curve = 100 * baseline.column("accuracy")
        style.epoch_line(axes, curve, color=style.GREY, lw=1.8, marker="", label="without compression")
    style.epoch_line(axes, 100 * train, color=style.TRAIN, lw=1.4, marker="", label="training images")
    style.epoch_line(axes, 100 * test, color=style.ACCURACY, label="test images")
    if not np.isnan(fresh).all():
        thin = {"color": style.ACCURACY, "lw": 1.2, "ls": style.DASHED, "marker": ""}
        style.epoch_line(axes, 100 * fresh, label="test images, BatchNorm recalibrated", **thin)
    axes.axhline(100 * chance, color=style.MUTED, lw=1.2, ls=(0, (4, 3)), label=f"chance, {100 * chance:.3g} %")
    axes.set(ylim=(0, style.FULL), ylabel="accuracy")
    axes.yaxis.set_major_formatter(style.PERCENT)
    style.epoch_axis(axes, history.epochs)
    style.legend_above(axes, columns=2)
    return figure


@style.styled
def sparsity_curves(history: History, *, budget: float | None = None, subtitle: str = "") -> Figure:
    """Zero weights and dead filters by epoch (left, per cent) and the penalty's coefficient (right, dashed).

    budget: the largest share of the dense network's cost, drawn with the path of the cost that the history has.
    """
    zeros, dead = percent(history.last.unstructured_sparsity), percent(history.last.structured_sparsity)
    title = f"{zeros} of the weights are zero and {dead} of the filters dead"
    alt = f"Line chart by epoch, the penalty's coefficient on the right axis. After epoch {len(history)} {title}. "
    alt += f"The coefficient peaks at {history.column('coefficient').max():.3g}."
    figure = style.canvas(title, subtitle, alt, height=3.5)
    axes = figure.subplots()
    right = draw_sparsity(axes, history, ("zero weights", "dead filters", "coefficient (right)"))
    if budget is not None:
        style.epoch_line(axes, 100 * history.column("cost"), color=style.BLUE, label="cost, of dense")
        axes.axhline(100 * budget, color=style.BLUE, lw=1.2, ls=(0, (4, 3)), label=f"budget, {percent(budget)}")
    style.legend_above(axes, right)
    return figure


def draw_sparsity(axes: Axes, history: History, labels: tuple[str, str, str], plan: Sequence[float] = ()) -> Axes:
    """Draw the two sparsities (left) and the coefficient (right axis, returned).

    labels: of zero weights, dead filters and coefficient. plan: the coefficient of every epoch, drawn ahead.
    """
    done, coefficient, planned = len(history), history.column("coefficient"), np.asarray(plan, dtype=float)
    right = style.right_axis(axes, "penalty coefficient", style.COEFFICIENT)
    if len(planned) > done:
        ahead = np.arange(max(done, 1), len(planned) + 1)
        right.plot(ahead, planned[ahead - 1], color=style.COEFFICIENT, lw=1.2, ls=":", label="_planned")
    dashed = {"color": style.COEFFICIENT, "lw": 1.8, "ls": style.DASHED, "marker": ""}
    style.epoch_line(right, coefficient, label=labels[2], **dashed)
    style.epoch_line(axes, 100 * history.column("unstructured_sparsity"), color=style.ZEROS, label=labels[0])
    style.epoch_line(axes, 100 * history.column("structured_sparsity"), color=style.CHANNELS, label=labels[1])
    peak = max(coefficient.max(initial=0.0), planned.max(initial=0.0))
    right.set_ylim(1.15 * coefficient.min(initial=0.0), 1.15 * peak or 1.0)
    right.yaxis.set_major_formatter("{x:g}")
    axes.set(ylim=(0, style.FULL), ylabel="share")
    axes.yaxis.set_major_formatter(style.PERCENT)
    style.epoch_axis(axes, history.epochs)
    return right


@style.styled
def decay_forms(
    steps: Array, trajectories: Mapping[str, Array], share_of_zeros: Mapping[str, Array], *, subtitle: str = ""
) -> Figure:
    """A logit over the training steps for several forms of decay; at the right the share of zeros that follows.

    steps: (S,); every trajectory and every share (0 to 1, drawn in per cent): (S,).
    """
    logits = ", ".join(f"{path[-1]:.2f} ({name})" for name, path in trajectories.items())
    zeros = ", ".join(f"{percent(path[-1])} ({name})" for name, path in share_of_zeros.items())
    alt = f"Line chart over {steps[-1] - steps[0]:g} steps. The logit ends at {logits}. Zeros at the end: {zeros}."
    figure = style.canvas("The form of the decay decides whether the logit moves", subtitle, alt, height=3.6)
    left, right = figure.subplots(1, 2)
    panels = ((left, trajectories, 1.0, "logit"), (right, share_of_zeros, 100.0, "zero weights"))
    for axes, lines, scale, label in panels:
        for (name, path), color in zip(lines.items(), (style.GREY, style.BLUE, style.VERMILLION), strict=False):
            axes.plot(steps, scale * path, color=color, lw=2.6, label=name)
        axes.set(xlabel="training step", ylabel=label, xlim=(steps[0], steps[-1]), ylim=(0, None))
        style.legend_above(axes, columns=1)
    right.yaxis.set_major_formatter(style.PERCENT)
    return figure


@dataclass(frozen=True)
class Series:
    """One run with at least one epoch. relative_bops: after each epoch as a share of dense FP32's, (E,)."""

    name: str
    history: History
    relative_bops: NDArray[np.float64]

    @property
    def label(self) -> str:
        """The name, of which the end is kept where it is long."""
        return self.name if len(self.name) <= 30 else f"…{self.name[-29:]}"


@style.styled
def run_curves(runs: Sequence[Series], *, subtitle: str = "") -> Figure:
    """Accuracy, zeros, dead filters and bits by epoch, a line a run."""
    best = max(runs, key=lambda run: run.history.last.accuracy)
    reached = percent(best.history.last.accuracy)
    title = f"“{best.label}” ends at {reached} accuracy after epoch {len(best.history)}"
    title += f"; none of the {len(runs)} runs does better" if len(runs) > 1 else ""
    alt = f"Four line charts by epoch, a line a run. {title}."
    figure = style.canvas(title, subtitle, alt, height=5.4 + 0.12 * len(runs))
    panels = figure.subplots(2, 2).flat
    for axes, (name, heading, scale) in zip(panels, PANELS, strict=True):
        axes.set_prop_cycle(color=style.RUNS, ls=style.RUN_DASHES)
        for run in runs:
            style.epoch_line(axes, scale * run.history.column(name), label=run.label)
        axes.set_title(heading, pad=5)
        style.epoch_axis(axes, max(run.history.epochs for run in runs))
        if scale == 100:
            axes.yaxis.set_major_formatter(style.PERCENT)
        whole = name in ("accuracy", "unstructured_sparsity")
        axes.set_ylim(0, style.FULL if whole else max(axes.get_ylim()[1], 5.0))  # also where no filter is dead
    style.legend_below(figure, panels[0], columns=2)
    return figure


@style.styled
def run_plane(runs: Sequence[Series], *, subtitle: str = "") -> Figure:
    """Accuracy against relative BOPs: every epoch of every run, joined in order, the last one marked large."""
    cheapest = min(runs, key=lambda run: run.relative_bops[-1])
    cost, reached = percent(cheapest.relative_bops[-1]), percent(cheapest.history.last.accuracy)
    title = f"“{cheapest.label}” ends at {cost} of the dense network's bit operations, zeros left out, "
    title += f"with {reached} accuracy"
    alt = f"Every epoch of every run, accuracy over relative bit operations. {title}."
    figure = style.canvas(title, subtitle, alt, height=4.7 + 0.12 * len(runs))
    axes = figure.subplots()
    axes.grid(True, axis="both")
    axes.set_prop_cycle(color=style.RUNS, ls=style.RUN_DASHES)
    end: dict[str, Any] = {"ls": "", "marker": "o", "ms": 11, "mec": style.INK, "mew": 1.2}
    for run in runs:
        costs, accuracy = 100 * run.relative_bops, 100 * run.history.column("accuracy")
        (line,) = axes.plot(costs, accuracy, lw=1.2, marker="." if len(costs) <= 40 else "", ms=3.5, label=run.label)
        axes.plot(costs[-1], accuracy[-1], **end, color=line.get_color(), zorder=4, clip_on=False)
    axes.plot([], [], **end, color=style.PAPER, label="last epoch")
    left = max(85 * min(run.relative_bops.min() for run in runs), 1e-3)
    axes.set(xscale="log", xlim=(left, 105), ylim=(0, style.FULL), ylabel="test accuracy")
    axes.set_xticks([tick for tick in (0.1, 0.3, 1, 2, 3, 5, 10, 20, 30, 50, 100) if tick >= left])
    axes.minorticks_off()
    axes.set_xlabel(f"BOPs relative to dense FP32 (log scale)\n{FORMULA}")
    axes.xaxis.set_major_formatter(style.PERCENT)
    axes.yaxis.set_major_formatter(style.PERCENT)
    style.legend_above(axes, columns=2)
    return figure


@style.styled
def frontier(
    points: Mapping[str, Sequence[tuple[float, float]]],
    published: Mapping[str, tuple[float, float]],
    *,
    subtitle: str = "",
) -> Figure:
    """Accuracy against relative BOPs, both as shares: every run a dot, of every setting mean and standard deviation.

    points: (accuracy, relative BOPs) of the runs of each setting. published: of others, by name.
    """
    means = {name: np.mean(runs, axis=0) for name, runs in points.items()}
    best = max(means, key=lambda name: means[name][0])
    accuracy, cost = means[best]
    place = f"{percent(accuracy)} at {percent(cost)} of the dense network's bit operations"
    title = f"“{best}” has the highest mean accuracy, {place}"
    alt = f"Test accuracy over relative bit operations, a dot for each run. {title}."
    figure = style.canvas(title, subtitle, alt, height=4.7 + 0.12 * len(points))
    axes = figure.subplots()
    axes.grid(True, axis="both")
    axes.margins(0.08)
    for (name, runs), color, marker in zip(points.items(), itertools.cycle(style.RUNS), itertools.cycle("osD^vP")):
        values = 100 * np.array(runs)  # (N, 2): accuracy, cost
        axes.plot(values[:, 1], values[:, 0], ls="", marker=marker, ms=5, color=color, alpha=0.5, mew=0)
        spread = values.std(axis=0, ddof=1) if len(runs) > 1 else (0, 0)
        center = 100 * means[name]
        axes.errorbar(
            center[1], center[0], yerr=spread[0], xerr=spread[1], color=color, marker=marker, ms=9, mec=style.INK,
            mew=1, capsize=3, lw=1.2, ls="", label=f"{name} (n = {len(runs)})",
        )  # fmt: skip
    for name, (accuracy, cost) in published.items():
        axes.plot(100 * cost, 100 * accuracy, ls="", marker="*", ms=12, color=style.INK, label=f"{name}, published")
    axes.set(ylabel="test accuracy", xlabel=f"BOPs relative to dense FP32\n{FORMULA}")
    axes.xaxis.set_major_formatter(style.PERCENT)
    axes.yaxis.set_major_formatter(style.PERCENT)
    style.legend_above(axes, columns=2)
    return figure

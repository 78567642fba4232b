"""Line charts of one run by epoch, and of what is planned for it. Shares (0 to 1) are drawn in per cent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from experiments.figures import style
from experiments.figures.style import percent
from src.training import History

Array = NDArray[np.floating]


@style.styled
def accuracy_curve(history: History, *, subtitle: str = "", chance: float | None = None) -> Figure:
    """Test accuracy (thick) and training accuracy (thin) by epoch in per cent; `chance` is a share, drawn dashed."""
    test, train = history.column("accuracy"), history.column("train_accuracy")
    title, alt = "No epoch has finished yet", "No epoch has finished yet."
    if len(test):
        best = int(test.argmax())
        title = f"Test accuracy: {percent(test[0])} after epoch 1, {percent(test[-1])} after epoch {len(test)}"
        alt = f"{title}; the best is {percent(test[best])} in epoch {best + 1}. Training accuracy ends at "
        alt += f"{percent(train[-1])}." + (f" Chance is {percent(chance)}." if chance is not None else "")
    figure = style.canvas(title, subtitle, f"Line chart by epoch. {alt}", height=3.5)
    axes = figure.subplots()
    style.epoch_line(axes, 100 * train, color=style.TRAIN, lw=1.4, marker="", label="training images, augmented")
    style.epoch_line(axes, 100 * test, color=style.ACCURACY, label="test images")
    if chance is not None:
        axes.axhline(100 * chance, color=style.MUTED, lw=1.2, ls=(0, (4, 3)), label=f"chance, {100 * chance:.3g} %")
    axes.set(ylim=(0, style.FULL), ylabel="accuracy")
    style.percent_axis(axes.yaxis)
    style.epoch_axis(axes, history.epochs)
    style.legend_above(axes)
    return figure


@style.styled
def sparsity_curves(history: History, *, subtitle: str = "") -> Figure:
    """Zero weights and dead channels by epoch (left, per cent) and the penalty's coefficient (right, dashed)."""
    zeros, dead = history.column("unstructured_sparsity"), history.column("structured_sparsity")
    coefficient = history.column("coefficient")
    title, alt = "No epoch has finished yet", "No epoch has finished yet."
    if len(zeros):
        title = f"{percent(zeros[-1])} of the weights are zero and {percent(dead[-1])} of the channels dead"
        first = f"in epoch {int((dead > 0).argmax()) + 1}" if dead.any() else "in no epoch"
        alt = f"After epoch {len(zeros)} {title}. The coefficient peaks at {coefficient.max():.3g}, first "
        alt += f"reached in epoch {int(coefficient.argmax()) + 1}; the first dead channel appears {first}."
    alt = f"Line chart by epoch, the penalty's coefficient on the right axis. {alt}"
    figure = style.canvas(title, subtitle, alt, height=3.5)
    axes = figure.subplots()
    right = draw_sparsity(axes, history, ("zero weights", "dead channels", "coefficient (right)"))
    style.legend_above(axes, right)
    return figure


def draw_sparsity(axes: Axes, history: History, labels: tuple[str, str, str], plan: Sequence[float] = ()) -> Axes:
    """Draw the two sparsities (left) and the coefficient (right axis, returned).

    labels: of zero weights, dead channels and coefficient. plan: the coefficient of every epoch, drawn ahead of the
    run.
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
    right.set_ylim(0, 1.15 * peak if peak > 0 else 1.0)
    right.yaxis.set_major_formatter("{x:g}")
    axes.set(ylim=(0, style.FULL), ylabel="share")
    style.percent_axis(axes.yaxis)
    style.epoch_axis(axes, history.epochs)
    return right


@style.styled
def schedule_curve(coefficients: Sequence[float], learning_rates: Sequence[float], *, subtitle: str = "") -> Figure:
    """The penalty's coefficient (dashed) and the weights' learning rate (right axis) of every epoch, from 1."""
    plan, rates = np.asarray(coefficients, dtype=float), np.asarray(learning_rates, dtype=float)
    top = float(plan.max(initial=0.0))
    title = (
        f"The penalty's coefficient starts at {plan[0]:.3g}; its peak is {top:.3g}, in epoch {int(plan.argmax()) + 1}"
    )
    alt = f"Line chart by epoch. {title}. The learning rate goes from {rates[0]:.3g} to {rates[-1]:.3g}."
    figure = style.canvas(title, subtitle, alt, height=3.1)
    axes = figure.subplots()
    style.epoch_line(axes, plan, color=style.COEFFICIENT, ls=style.DASHED, label="penalty coefficient")
    axes.set_ylim(0, 1.12 * top or 1.0)
    axes.set_ylabel("penalty coefficient", color=style.COEFFICIENT)
    axes.tick_params(axis="y", colors=style.COEFFICIENT)
    right = style.right_axis(axes, "learning rate of the weights", style.BLUE)
    style.epoch_line(right, rates, color=style.BLUE, label="learning rate (right)")
    right.set_ylim(0, 1.12 * rates.max(initial=0.0) or 1.0)
    style.epoch_axis(axes, len(plan))
    style.legend_above(axes, right)
    return figure


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
    panels = figure.subplots(1, 2)
    for axes, lines, scale, label in (
        (panels[0], trajectories, 1.0, "logit"),
        (panels[1], share_of_zeros, 100.0, "zero weights"),
    ):
        for (name, path), color in zip(lines.items(), (style.GREY, style.BLUE, style.VERMILLION), strict=False):
            axes.plot(steps, scale * np.asarray(path), color=color, lw=2.6, label=name)
        axes.set(xlabel="training step", ylabel=label, xlim=(float(steps[0]), float(steps[-1])))
        axes.set_ylim(0, None)
        style.legend_above(axes, columns=1)
    style.percent_axis(panels[1].yaxis)
    return figure

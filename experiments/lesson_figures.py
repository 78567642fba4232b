"""Figures that explain: the data, the quantizer's staircase, the schedules; diagram.py draws the channel groups.

They take arrays that were computed elsewhere (no quantizer or model is called here) and give a figure with its alt
text in `get_label()`. Axis letters: N images, H W space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from experiments import style
from experiments.diagram import channel_group_diagram as channel_group_diagram
from experiments.style import percent

Array = NDArray[np.floating]
Curve = tuple[str, Array, Array]
"""A name, the weights w (ascending) and their quantized values q."""


@style.styled
def image_grid(
    images: NDArray[np.uint8],
    labels: Sequence[int],
    class_names: Sequence[str],
    *,
    rows: int = 2,
    title: str = "Images and their labels",
    subtitle: str = "",
) -> Figure:
    """Images with their class names. images: (N, 3, H, W) uint8; labels: (N,)."""
    _check_images(images)
    columns = -(-len(images) // rows)
    names = [class_names[int(label)] for label in labels]
    room = int(8.6 / columns / 0.073)  # characters of a name that fit over an image
    figure = style.canvas(title, subtitle, height=0.75 + rows * (0.3 + 8.6 / columns))
    for i, axes in enumerate(np.atleast_1d(figure.subplots(rows, columns)).flat):
        axes.axis("off")
        if i < len(images):
            axes.imshow(np.moveaxis(images[i], 0, -1), interpolation="nearest")
            text = names[i] if len(names[i]) <= room else names[i][: max(room - 1, 1)] + "…"
            axes.set_title(text, fontsize=9, fontweight="normal", loc="center", pad=3)
    return style.finish(figure, f"{len(images)} images in {rows} rows: {', '.join(names)}.")


@style.styled
def augmentation_grid(
    originals: NDArray[np.uint8],
    augmented: Sequence[NDArray[np.uint8]],
    *,
    title: str = "Every epoch sees each image differently",
    subtitle: str = "",
) -> Figure:
    """One image a row: the original at the left, then one column for each of the draws in `augmented`.

    originals and every draw: (N, 3, H, W) uint8. Raises ValueError where the shapes differ.
    """
    for array in (originals, *augmented):
        _check_images(array)
        if array.shape != originals.shape:
            raise ValueError(f"a draw of shape {array.shape}: need {originals.shape}, the shape of the originals")
    rows, columns = len(originals), 1 + len(augmented)
    side = min(1.1, 8.4 / columns)
    figure = style.canvas(title, subtitle, height=1.0 + rows * (side + 0.08), width=max(1.1 * columns + 0.3, 6.0))
    grid = figure.subplots(rows, columns, squeeze=False)
    for j, batch in enumerate((originals, *augmented)):
        for i, axes in enumerate(grid[:, j]):
            axes.set(xticks=[], yticks=[])
            axes.imshow(np.moveaxis(batch[i], 0, -1), interpolation="nearest")
            for spine in axes.spines.values():
                spine.set(visible=j == 0, color=style.VERMILLION, linewidth=2.5)
        grid[0, j].set_title("original" if j == 0 else f"draw {j}", fontsize=9.5, fontweight="normal", loc="center")
    return style.finish(
        figure, f"{rows} images, one a row: the original, then {columns - 1} random augmentations of it."
    )


@style.styled
def class_balance(labels: Sequence[int], class_names: Sequence[str], *, subtitle: str = "") -> Figure:
    """Bars: the number of images of each class. labels: (N,) class indices."""
    counts = np.bincount(np.asarray(labels, dtype=int), minlength=len(class_names))
    low, high = int(counts.min()), int(counts.max())
    title = f"{counts.sum():,} images: from {low:,} to {high:,} in a class"
    if low == high:
        title = f"{counts.sum():,} images: {low:,} in each of the {len(counts)} classes"
    figure = style.canvas(title, subtitle, height=1.3 + 0.25 * max(len(counts), 3))
    axes = figure.subplots()
    style.grid(axes, "x")
    bars = axes.barh(np.arange(len(counts)), counts, color=style.BLUE, height=0.7)
    axes.bar_label(
        bars, labels=[f"{count:,}  ({percent(count / counts.sum())})" for count in counts], padding=4, size=9
    )
    axes.set_yticks(np.arange(len(counts)), list(class_names))
    axes.tick_params(axis="y", length=0)
    axes.set(ylim=(len(counts) - 0.4, -0.6), xlim=(0, 1.2 * high), xlabel="images")
    return style.finish(figure, f"Horizontal bars, one class a row. {title}.")


@style.styled
def staircase(
    curves: Sequence[Curve],
    *,
    dead_zone_half: float | None = None,
    range_: float | None = None,
    title: str = "",
    subtitle: str = "",
) -> Figure:
    """The quantizer's transfer function q(w) with the identity, the dead zone (shaded), R and the levels marked.

    dead_zone_half: d / 2 in weight units, by default read from the first curve. range_: R in weight units.
    """
    half = _zero_half_width(curves[0]) if dead_zone_half is None else dead_zone_half
    levels = np.unique(curves[0][2])
    auto = f"Weights within ±{half:.2g} become exactly 0, the others one of {len(levels) - 1} levels"
    figure = style.canvas(title or auto, subtitle, height=4.9)
    axes = figure.subplots()
    _draw_stairs(axes, curves, half, range_)
    if len(curves) == 1:
        edge = axes.get_xlim()[0]
        axes.plot(np.full(len(levels), edge), levels, ls="", marker=">", ms=5, color=style.INK, clip_on=False, zorder=4)
        axes.annotate(
            f"{len(levels)} levels", (edge, levels[-1]), (8, 5), textcoords="offset points", fontsize=9, va="bottom"
        )
    style.legend_above(axes, columns=5)
    alt = f"Staircase of the quantized value over the weight. {auto}" + (
        f"; the range R is {range_:.3g}" if range_ else ""
    )
    return style.finish(figure, f"{alt}.")


@style.styled
def staircase_family(dead_zone_curves: Sequence[Curve], bit_curves: Sequence[Curve], *, subtitle: str = "") -> Figure:
    """Two panels of staircases: the dead zone varied at the left, the bits varied at the right."""
    title = "The dead zone decides what becomes 0, the bits how fine the rest is"
    figure = style.canvas(title, subtitle, height=4.6)
    panels = figure.subplots(1, 2, sharey=True, sharex=True)
    groups = (("the dead zone grows", dead_zone_curves), ("the bits fall", bit_curves))
    for axes, (heading, curves) in zip(panels, groups, strict=True):
        _draw_stairs(axes, curves, None, None)
        axes.set_title(heading, pad=22 + 11 * ((len(curves)) // 3))
        style.legend_above(axes, columns=3)
    panels[1].set_ylabel("")
    zeros = ", ".join(f"{name} ±{_zero_half_width((name, w, q)):.2g}" for name, w, q in dead_zone_curves)
    levels = ", ".join(f"{name} {len(np.unique(q))}" for name, _, q in bit_curves)
    return style.finish(figure, f"Two panels of staircases. Weights that become 0: {zeros}. Levels: {levels}.")


@style.styled
def staircase_explorer_figure(
    w: Array,
    quantized_curve: Array,
    weights: Array,
    bits: int,
    dead_zone_half: float,
    range_: float,
    *,
    quantized_weights: Array | None = None,
    subtitle: str = "",
) -> Figure:
    """Staircase (left) beside the histogram of a layer's weights (right), with what the quantizer does to them.

    w, quantized_curve: the staircase on an ascending grid; weights: any shape. quantized_weights: the same weights
    quantized; without it each weight takes the value of the nearest point of the curve. Error: RMS of q - w over the
    RMS of w.
    """
    values = np.asarray(weights, dtype=float).ravel()
    nearest = np.abs(np.searchsorted((w[1:] + w[:-1]) / 2, values)).clip(0, len(w) - 1)
    quantized = quantized_curve[nearest] if quantized_weights is None else np.asarray(quantized_weights).ravel()
    zeros, used = float((quantized == 0).mean()), len(np.unique(quantized))
    error = float(np.sqrt(np.mean((quantized - values) ** 2)) / max(np.sqrt(np.mean(values**2)), 1e-12))
    title = f"{bits} bits: {percent(zeros)} zeros, {used} of {2**bits - 1} levels used, error {percent(error)}"
    figure = style.canvas(title, subtitle or "error: RMS of (quantized − weight) over RMS of the weights", height=4.5)
    left, right = figure.subplots(1, 2)
    _draw_stairs(left, [("quantized", w, quantized_curve)], dead_zone_half, range_)
    style.legend_above(left, columns=2)
    limit = max(float(np.abs(values).max(initial=0.0)), range_) * 1.02
    edges = np.linspace(-limit, limit, 92)
    right.axvspan(-dead_zone_half, dead_zone_half, color=style.YELLOW, alpha=0.35, lw=0, label="dead zone")
    right.hist(values, bins=edges, color=style.SKY, label="weights")
    for sign in (-1, 1):
        right.axvline(sign * range_, color=style.VERMILLION, lw=1.2, ls=":", label="±R" if sign > 0 else None)
    used_levels = np.unique(quantized)
    right.plot(
        used_levels,
        np.zeros(used),
        ls="",
        marker="|",
        ms=11,
        mew=1.4,
        color=style.INK,
        clip_on=False,
        label="levels used",
    )
    right.set(xlabel="weight", ylabel="number of weights", xlim=(-limit, limit))
    style.legend_above(right, columns=2)
    alt = f"Staircase and weight histogram. {title}; the dead zone is ±{dead_zone_half:.3g}, the range R {range_:.3g}."
    return style.finish(figure, alt)


@style.styled
def schedule_curve(
    coefficients: Sequence[float], learning_rates: Sequence[float] | None = None, *, subtitle: str = ""
) -> Figure:
    """The penalty's coefficient (dashed) and the weights' learning rate (right axis) of every epoch, from 1."""
    plan = np.asarray(coefficients, dtype=float)
    epochs, top = np.arange(1, len(plan) + 1), float(plan.max(initial=0.0))
    start = int((plan > 0).argmax()) + 1 if top else 0
    reached = int(plan.argmax()) + 1
    title = f"The penalty is on from epoch {start} and reaches {top:.3g} in epoch {reached}"
    if reached == start:
        title = f"The penalty is on, at {top:.3g}, from epoch {start}"
    if not top:
        title = "The penalty's coefficient is 0 throughout"
    figure = style.canvas(title, subtitle, height=3.7)
    axes = figure.subplots()
    style.grid(axes)
    axes.plot(epochs, plan, color=style.COEFFICIENT, lw=2.2, ls=(0, (4, 2)), marker=".", label="penalty coefficient")
    axes.set(ylim=(0, 1.12 * top if top else 1.0))
    axes.set_ylabel("penalty coefficient", color=style.COEFFICIENT)
    axes.tick_params(axis="y", colors=style.COEFFICIENT)
    style.epoch_axis(axes, len(plan))
    alt = f"Line chart by epoch. {title}."
    if learning_rates is None:
        return style.finish(figure, alt)
    rates = np.asarray(learning_rates, dtype=float)
    right = style.right_axis(axes, "learning rate of the weights", style.BLUE)
    right.plot(np.arange(1, len(rates) + 1), rates, color=style.BLUE, lw=2.2, marker=".", label="learning rate (right)")
    right.set_ylim(0, 1.12 * float(rates.max(initial=0.0)) or 1.0)
    style.legend_above(axes, right)
    return style.finish(figure, f"{alt} The learning rate goes from {rates[0]:.3g} to {rates[-1]:.3g}.")


@style.styled
def decay_forms(
    steps: Array,
    trajectories: Mapping[str, Array],
    share_of_zeros: Mapping[str, Array] | None = None,
    *,
    subtitle: str = "",
) -> Figure:
    """A logit over the training steps for several forms of decay; at the right the share of zeros that follows.

    steps: (S,); every trajectory and every share (0 to 1, drawn in per cent): (S,).
    """
    ends = {name: float(path[-1]) for name, path in trajectories.items()}
    title = "The logit ends at " + ", ".join(f"{end:.2f} ({name})" for name, end in ends.items())
    figure = style.canvas("The form of the decay decides whether the logit moves at all", subtitle or title, height=4.2)
    panels = figure.subplots(1, 2 if share_of_zeros else 1, squeeze=False)[0]
    colors = (style.GREY, style.BLUE, style.VERMILLION, style.GREEN)
    groups = [(trajectories, 1.0, "logit")]
    if share_of_zeros:
        groups.append((share_of_zeros, 100.0, "zero weights"))
    for axes, (lines, scale, label) in zip(panels, groups, strict=True):
        style.grid(axes)
        for (name, path), color in zip(lines.items(), colors, strict=False):
            axes.plot(steps, scale * np.asarray(path), color=color, lw=2.6, label=name)
        axes.set(xlabel="training step", ylabel=label, xlim=(float(steps[0]), float(steps[-1])))
        axes.set_ylim(0, None)
        style.legend_above(axes, columns=1 if share_of_zeros else 4)
    alt = f"Line chart over {len(steps)} steps. {title}."
    if share_of_zeros:
        style.percent_axis(panels[1].yaxis)
        alt += (
            " Zeros at the end: " + ", ".join(f"{percent(float(s[-1]))} ({n})" for n, s in share_of_zeros.items()) + "."
        )
    return style.finish(figure, alt)


def _check_images(images: NDArray[np.uint8]) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != np.uint8 or not len(images):
        raise ValueError(f"images {images.dtype} of shape {images.shape}: need uint8 of shape (N, 3, H, W) with N >= 1")


def _zero_half_width(curve: Curve) -> float:
    """Half width of the interval in which the curve is exactly 0, as far as its grid shows it."""
    _, w, q = curve
    return float(np.abs(w[q == 0]).max(initial=0.0))


def _draw_stairs(axes: Axes, curves: Sequence[Curve], half: float | None, range_: float | None) -> None:
    low, high = float(curves[0][1].min()), float(curves[0][1].max())
    style.grid(axes)
    if half is not None:
        axes.axvspan(-half, half, color=style.YELLOW, alpha=0.35, lw=0, label="dead zone, width d")
    axes.plot([low, high], [low, high], color=style.GREY, lw=1.2, ls=(0, (5, 3)), label="identity")
    colors = [style.BLUE] if len(curves) == 1 else [style.DEPTH(i / (len(curves) - 1)) for i in range(len(curves))]
    for (name, w, q), color in zip(curves, colors, strict=True):
        axes.plot(w, q, color=color, lw=2.2 if len(curves) == 1 else 1.8, label=name)
    if range_ is not None:
        for sign in (-1, 1):
            axes.axvline(sign * range_, color=style.VERMILLION, lw=1.4, ls=":", label="±R" if sign > 0 else None)
    axes.set(xlim=(low, high), xlabel="weight w", ylabel="quantized weight q(w)")

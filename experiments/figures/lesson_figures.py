"""Figures that explain: the data and the schedules; the staircases and the channel groups have modules of their own.

They take arrays that were computed elsewhere (no quantizer or model is called here) and give a figure with its alt
text in `get_label()`. Axis letters: N images, H W space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from experiments.figures import style
from experiments.figures.style import percent

Array = NDArray[np.floating]


@style.styled
def image_grid(
    images: NDArray[np.uint8],
    labels: Sequence[int],
    class_names: Sequence[str],
    *,
    rows: int | None = None,
    title: str = "Images and their labels",
    subtitle: str = "",
) -> Figure:
    """Images with their class names, six in a row or in `rows` rows. images: (N, 3, H, W) uint8; labels: (N,)."""
    _check_images(images)
    rows = rows or -(-len(images) // 6)  # six in a row: there is room for a name, also on a phone
    columns = -(-len(images) // rows)
    names = [class_names[int(label)] for label in labels]
    side = (style.WIDTH - 0.3) / columns  # inches
    room = int(side / 0.088)  # characters of a name that fit over an image
    figure = style.canvas(title, subtitle, height=0.1 + rows * (0.24 + side))
    style.tighten(figure)
    for i, axes in enumerate(np.atleast_1d(figure.subplots(rows, columns)).flat):
        axes.axis("off")
        if i < len(images):
            axes.imshow(np.moveaxis(images[i], 0, -1), interpolation="nearest")
            text = names[i] if len(names[i]) <= room else names[i][: max(room - 1, 1)] + "…"
            axes.set_title(text, fontsize=style.SMALL, fontweight="normal", loc="center", pad=3)
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
    side = (style.WIDTH - 0.3) / columns  # inches
    figure = style.canvas(title, subtitle, height=0.35 + rows * (side + 0.02))
    style.tighten(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    for j, batch in enumerate((originals, *augmented)):
        for i, axes in enumerate(grid[:, j]):
            axes.set(xticks=[], yticks=[])
            axes.imshow(np.moveaxis(batch[i], 0, -1), interpolation="nearest")
            for spine in axes.spines.values():
                spine.set(visible=j == 0, color=style.VERMILLION, linewidth=2.5)
        grid[0, j].set_title(
            "original" if j == 0 else f"draw {j}", fontsize=style.SMALL, fontweight="normal", loc="center"
        )
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
    figure = style.canvas(title, subtitle, height=0.7 + style.rows_height(len(counts), 0.25))
    axes = figure.subplots()
    style.grid(axes, "x")
    bars = axes.barh(np.arange(len(counts)), counts, color=style.BLUE, height=0.7)
    axes.bar_label(
        bars, labels=[f"{count:,}  ({percent(count / counts.sum())})" for count in counts], padding=4, size=style.SMALL
    )
    style.row_axis(axes, class_names, style.rows_height(len(counts), 0.25))
    axes.set(ylim=(len(counts) - 0.4, -0.6), xlim=(0, 1.35 * high), xlabel="images")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    return style.finish(figure, f"Horizontal bars, one class a row. {title}.")


@style.styled
def schedule_curve(
    coefficients: Sequence[float], learning_rates: Sequence[float] | None = None, *, subtitle: str = ""
) -> Figure:
    """The penalty's coefficient (dashed) and the weights' learning rate (right axis) of every epoch, from 1."""
    plan = np.asarray(coefficients, dtype=float)
    dot = style.marker(len(plan))
    epochs, top = np.arange(1, len(plan) + 1), float(plan.max(initial=0.0))
    start = int((plan > 0).argmax()) + 1 if top else 0
    reached = int(plan.argmax()) + 1
    title = f"The penalty is on from epoch {start} and reaches {top:.3g} in epoch {reached}"
    if reached == start:
        title = f"The penalty is on, at {top:.3g}, from epoch {start}"
    if not top:
        title = "The penalty's coefficient is 0 throughout"
    figure = style.canvas(title, subtitle, height=3.1)
    axes = figure.subplots()
    style.grid(axes)
    axes.plot(epochs, plan, color=style.COEFFICIENT, lw=2.2, ls=(0, (4, 2)), marker=dot, label="penalty coefficient")
    axes.set(ylim=(0, 1.12 * top if top else 1.0))
    axes.set_ylabel("penalty coefficient", color=style.COEFFICIENT)
    axes.tick_params(axis="y", colors=style.COEFFICIENT)
    style.epoch_axis(axes, len(plan))
    alt = f"Line chart by epoch. {title}."
    if learning_rates is None:
        return style.finish(figure, alt)
    rates = np.asarray(learning_rates, dtype=float)
    right = style.right_axis(axes, "learning rate of the weights", style.BLUE)
    right.plot(np.arange(1, len(rates) + 1), rates, color=style.BLUE, lw=2.2, marker=dot, label="learning rate (right)")
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
    figure = style.canvas("The form of the decay decides whether the logit moves", subtitle or title, height=3.6)
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
    alt = f"Line chart over {steps[-1] - steps[0]:g} steps. {title}."
    if share_of_zeros:
        style.percent_axis(panels[1].yaxis)
        alt += (
            " Zeros at the end: " + ", ".join(f"{percent(float(s[-1]))} ({n})" for n, s in share_of_zeros.items()) + "."
        )
    return style.finish(figure, alt)


def _check_images(images: NDArray[np.uint8]) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != np.uint8 or not len(images):
        raise ValueError(f"images {images.dtype} of shape {images.shape}: need uint8 of shape (N, 3, H, W) with N >= 1")

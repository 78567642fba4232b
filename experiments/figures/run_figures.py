"""Figures of a run: from records and counts to `matplotlib.figure.Figure`; the live one comes from dashboard.py.

Every function takes plain data and gives a figure with its alt text in `get_label()`; nothing is shown, saved or
closed here. Shares (0 to 1) are drawn in per cent. Axis letters: O output channels, I input channels, k kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from experiments.figures import style
from experiments.figures.overview import dead_total, draw_liveness, draw_sparsity, span
from experiments.figures.style import SIGNED, AwayFromZero, percent
from src.training import History, LayerRecord

NUMBERED = 24
"""Bars have room for a number above each up to so many layers."""


@style.styled
def accuracy_curve(history: History, *, subtitle: str = "", chance: float | None = None) -> Figure:
    """Test accuracy (thick) and training accuracy (thin) by epoch in per cent; `chance` is a share, drawn dashed."""
    test, train = history.column("accuracy"), history.column("train_accuracy")
    title = alt = "No epoch has finished yet"
    if len(test):
        last, best = percent(test[-1]), int(test.argmax())
        title = f"Test accuracy {_course(test, chance)}"
        if len(test) == 1:
            title = f"Test accuracy is {last} after the first epoch"
        alt = f"{title}; the best is {percent(test[best])} in epoch {best + 1}. Training accuracy ends at "
        alt += f"{percent(train[-1])}." + (f" Chance is {percent(chance)}." if chance is not None else "")
    figure = style.canvas(title, subtitle, height=3.5)
    axes = figure.subplots()
    style.grid(axes)
    x, dot = np.arange(1, len(test) + 1), style.marker(len(test))
    axes.plot(x, 100 * train, color=style.TRAIN, lw=1.4, label="training images, augmented")
    axes.plot(x, 100 * test, color=style.ACCURACY, lw=2.6 if dot else 1.4, marker=dot, ms=9, label="test images")
    if chance is not None:
        axes.axhline(100 * chance, color=style.MUTED, lw=1.2, ls=(0, (4, 3)), label=f"chance, {100 * chance:.3g} %")
    axes.set(ylim=(0, style.FULL), ylabel="accuracy")
    style.percent_axis(axes.yaxis)
    style.epoch_axis(axes, history.epochs)
    style.legend_above(axes)
    return style.finish(figure, f"Line chart by epoch. {alt}")


@style.styled
def sparsity_curves(history: History, *, subtitle: str = "") -> Figure:
    """Zero weights and dead channels by epoch (left, per cent) and the penalty's coefficient (right, dashed)."""
    zeros, dead = history.column("unstructured_sparsity"), history.column("structured_sparsity")
    coefficient = history.column("coefficient")
    title = alt = "No epoch has finished yet"
    if len(zeros):
        title = f"{percent(zeros[-1])} of the weights are zero and {percent(dead[-1])} of the channels dead"
        alt = (
            f"After {_epochs(len(zeros))} {title}. The coefficient peaks at {coefficient.max():.3g}, first reached in "
        )
        alt += f"epoch {int(coefficient.argmax()) + 1}; the first dead channel appears {_first_dead(dead)}."
    figure = style.canvas(title, subtitle, height=3.5)
    axes = figure.subplots()
    style.legend_above(axes, draw_sparsity(axes, history, plan=None))
    return style.finish(figure, f"Line chart by epoch, the penalty's coefficient on the right axis. {alt}")


@style.styled
def channel_liveness(layers: Sequence[LayerRecord], *, subtitle: str = "") -> Figure:
    """Rows are layers, columns output channels: black dead, white alive, hatched where a layer has no such channel."""
    dead, total = dead_total(layers)
    worst = max(layers, key=lambda layer: layer.dead_channels / max(layer.channels, 1), default=None)
    title = f"{dead} of {total} output channels are dead ({percent(dead / max(total, 1))})"
    alt = f"Map of channels, one row a layer, black for dead: {title}"
    if worst is not None and dead:
        alt += f"; the largest share is in {worst.name}, {worst.dead_channels} of {worst.channels}"
    height = style.rows_height(len(layers))
    figure = style.canvas(title, subtitle, height=height + 0.95)
    axes = figure.subplots()
    draw_liveness(axes, layers)
    counts = [f"{layer.dead_channels}/{layer.channels}" for layer in layers]
    widest = max(map(len, counts), default=0)
    figure_space = "\N{FIGURE SPACE}"  # as wide as a digit: the counts stand in columns
    labels = [f"{layer.name}  {text.rjust(widest, figure_space)}" for layer, text in zip(layers, counts, strict=True)]
    style.row_axis(axes, labels, height)
    axes.set_xlabel("output channel; beside each layer: dead/all")
    keys = [
        Patch(facecolor=style.BLACK, edgecolor=style.GREY, label="dead"),
        Patch(facecolor=style.WHITE, edgecolor=style.GREY, label="alive"),
        Patch(facecolor=style.FAINT, edgecolor=style.GREY, hatch="////", label="no such channel"),
    ]
    style.legend_above(axes, handles=keys)
    return style.finish(figure, f"{alt}.")


@style.styled
def per_layer_channels(layers: Sequence[LayerRecord], *, subtitle: str = "") -> Figure:
    """One bar a layer: alive channels (blue) under dead ones (grey), the learned bit width above the bar."""
    dead, total = dead_total(layers)
    bits = [layer.bits for layer in layers]
    title = f"{total - dead} of {total} channels are alive" + (f", stored with {span(bits)} bits" if bits else "")
    figure = style.canvas(title, subtitle, height=4.0)
    axes = figure.subplots()
    style.grid(axes)
    x = np.arange(len(layers))
    gone = np.array([layer.dead_channels for layer in layers])
    size = np.array([layer.channels for layer in layers])
    axes.bar(x, size - gone, color=style.ALIVE, width=0.72, label="alive")
    axes.bar(x, gone, bottom=size - gone, color=style.DEAD, width=0.72, label="dead")
    numbered = len(layers) <= NUMBERED
    for at, height, width in zip(x, size, bits, strict=True):
        if numbered:
            _note(axes, f"{width:.3g}", (at, height))
    axes.set(ylabel="output channels", ylim=(0, 1.12 * max(size, default=1)))
    style.layer_axis(axes, [layer.name for layer in layers])
    keys = [Patch(color=style.ALIVE, label="alive"), Patch(color=style.DEAD, label="dead")]
    style.legend_above(axes, handles=[*keys, *_number_key("learned bits of a weight", numbered)])
    alt = f"Stacked bars, one a layer: {title}; {dead} are dead, most of them in {_most_dead(layers)}."
    return style.finish(figure, alt)


@style.styled
def layer_sparsity_bars(
    names: Sequence[str], sparsity: Sequence[float], structured: Sequence[float], *, subtitle: str = ""
) -> Figure:
    """Two shares (0 to 1) of each layer, drawn in per cent: zero weights (wide bar) and dead channels (thin bar)."""
    zeros, dead = 100 * np.asarray(sparsity, dtype=float), 100 * np.asarray(structured, dtype=float)
    title = alt = "No layer was measured"
    if len(zeros):
        low, high = int(zeros.argmin()), int(zeros.argmax())
        title = f"Zeros: from {zeros[low]:.1f} % in {names[low]} to {zeros[high]:.1f} % in {names[high]}"
        top = int(dead.argmax())
        alt = f"{title}. Dead channels: at most {dead[top]:.1f} %, in {names[top]}."
    height = style.rows_height(len(names), 0.235)
    figure = style.canvas(title, subtitle, height=height + 0.9)
    axes = figure.subplots()
    style.grid(axes, "x")
    y = np.arange(len(names))
    axes.barh(y, zeros, height=0.74, color=style.ZEROS, alpha=0.45, label="zero weights")
    axes.barh(y, dead, height=0.3, color=style.CHANNELS, label="dead channels")
    for at, value, other in zip(y, zeros, dead, strict=True):
        if height > 0.18 * len(names):
            place = (max(value, other), at)
            axes.annotate(
                f"{value:.0f} %", place, (4, 0), textcoords="offset points", va="center", fontsize=style.SMALL
            )
    style.row_axis(axes, names, height)
    axes.set(xlim=(0, 112), ylim=(len(names) - 0.4, -0.6), xlabel="share of the layer")
    axes.set_xticks(range(0, 101, 20))
    style.percent_axis(axes.xaxis)
    style.legend_above(axes)
    return style.finish(figure, f"Horizontal bars, one layer a row. {alt}")


@style.styled
def sparsity_map(weight: NDArray[np.floating], name: str, *, subtitle: str = "") -> Figure:
    """Every kernel of a convolution: row o, column i is kernel (o, i). Zero white, positive blue, negative orange.

    weight: (O, I, k, k). A filter that is all zero is marked at its left. Raises ValueError for another shape.
    """
    values = np.asarray(weight, dtype=float)
    if values.ndim != 4 or not values.size:
        raise ValueError(f"weight of shape {values.shape}: need (O, I, k, k); pass one convolution's weight")
    outputs, inputs, high, wide = values.shape
    dead = np.flatnonzero(~values.any(axis=(1, 2, 3)))
    empty = int((~values.any(axis=(2, 3))).sum())
    zeros = float((values == 0).mean())
    title = f"{name}: {percent(zeros)} zeros, {len(dead)} of {outputs} filters dead"
    mosaic = np.full((outputs, high + 1, inputs, wide + 1), np.nan)
    mosaic[:, :high, :, :wide] = values.transpose(0, 2, 1, 3)
    limit = float(np.abs(values).max()) or 1.0
    ratio = outputs * (high + 1) / (inputs * (wide + 1))
    drawn = min((style.WIDTH - 2.0) * ratio, 6.6)  # inches; kernels are square
    figure = style.canvas(title, subtitle, height=max(drawn, 1.7) + 0.9)
    axes = figure.subplots()
    box = (-0.5, inputs - 0.5, outputs - 0.5, -0.5)
    flat = mosaic.reshape(outputs * (high + 1), inputs * (wide + 1))[:-1, :-1]
    image = axes.imshow(
        flat, cmap=SIGNED, norm=AwayFromZero(limit), extent=box, interpolation="nearest", aspect="equal"
    )
    axes.set(xlabel="input channel", ylabel="output channel (filter)", xlim=(-0.5 - 0.035 * inputs, inputs - 0.5))
    axes.set_facecolor(style.PAPER)
    axes.plot(
        np.full(len(dead), -0.5 - 0.018 * inputs), dead, ls="", marker=">", ms=5, color=style.BLACK, label="dead filter"
    )
    if len(dead):
        style.legend_above(axes)
    for locator in (axes.xaxis, axes.yaxis):
        locator.set_major_locator(MaxNLocator(nbins=9, integer=True))
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.colorbar(image, ax=axes, label="weight (white: exactly 0)", shrink=0.7, pad=0.02, aspect=28)
    alt = f"Map of the {outputs} by {inputs} kernels of {title}; {empty} of {outputs * inputs} kernels are all zero."
    return style.finish(figure, alt)


@style.styled
def cost_bars(names: Sequence[str], macs: Sequence[int], quantized: Sequence[bool], *, subtitle: str = "") -> Figure:
    """MACs of each layer in millions, blue where its weights are quantized, orange where they stay full precision."""
    cost, mask = np.asarray(macs, dtype=float), np.asarray(quantized, dtype=bool)
    total, share = float(cost.sum()), float(cost[mask].sum() / max(cost.sum(), 1.0))
    title = f"The {int(mask.sum())} quantized layers hold {percent(share)} of the {total / 1e6:.1f} million MACs"
    figure = style.canvas(title, subtitle, height=3.9)
    axes = figure.subplots()
    style.grid(axes)
    x = np.arange(len(names))
    groups = (
        (mask, style.BLUE, f"quantized ({int(mask.sum())} layers)"),
        (~mask, style.ORANGE, f"full precision ({int((~mask).sum())} layers)"),
    )
    for chosen, color, label in groups:
        axes.bar(x[chosen], cost[chosen] / 1e6, color=color, width=0.72, label=label)
    for at, value in zip(x, cost / 1e6, strict=True):
        if len(names) <= NUMBERED:
            _note(axes, f"{value:.2g}" if value >= 0.1 else "0" if not value else "<.1", (at, value))
    axes.set(ylabel="million MACs an image", ylim=(0, 1.1 * max(cost.max(initial=0.0) / 1e6, 1e-3)))
    style.layer_axis(axes, names)
    style.legend_above(axes)
    alt = f"Bars, one a layer. {title}; the largest layer is {_largest(names, cost)}."
    return style.finish(figure, alt)


@style.styled
def before_after(
    names: Sequence[str], before: Sequence[int], after: Sequence[int], label: str, *, subtitle: str = ""
) -> Figure:
    """Paired bars of a cost (`label`: 'MACs' or 'BOPs') of each layer, with the share that is left above the pair.

    A layer that kept everything has no number.
    """
    old, new = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    scale, unit = (1e9, "billion") if old.max(initial=0.0) >= 5e8 else (1e6, "million")
    left, right = f"{old.sum() / scale:.3g}", f"{new.sum() / scale:.3g}"
    ratio = f"{old.sum() / new.sum():.3g} times fewer" if new.sum() else "nothing is left"
    title = f"{label}: {left} {unit} before, {right} {unit} after, {ratio}"
    if (new == old).all():
        title = f"{label}: {left} {unit} before and after, nothing was removed"
    figure = style.canvas(title, subtitle, height=4.0)
    axes = figure.subplots()
    style.grid(axes)
    x = np.arange(len(names))
    axes.bar(x - 0.2, old / scale, width=0.4, color=style.PALE, edgecolor=style.GREY, lw=0.6, label="before")
    axes.bar(x + 0.2, new / scale, width=0.4, color=style.BLUE, label="after")
    for at, value, kept in zip(x, old, new, strict=True):
        if len(names) <= NUMBERED and kept < value:
            _note(axes, f"{100 * kept / value:.0f}", (at, max(value, kept) / scale))
    axes.set(ylabel=f"{unit} {label} an image", ylim=(0, 1.12 * max(old.max(initial=0.0) / scale, 1e-9)))
    style.layer_axis(axes, names)
    keys = axes.get_legend_handles_labels()[0]
    style.legend_above(axes, handles=[*keys, *_number_key("per cent that is left, if not all", len(names) <= NUMBERED)])
    return style.finish(figure, f"Paired bars, one pair a layer. {title}.")


def _course(test: NDArray[np.float64], chance: float | None) -> str:
    """From where to where accuracy went, in the words that fit."""
    first, last, epochs = percent(test[0]), percent(test[-1]), _epochs(len(test))
    if chance is not None and test[-1] < 1.5 * chance:
        return f"is {last} after {epochs}, about chance ({percent(chance)})"
    if first == last:
        return f"is {last} in the first and the last of {epochs}"
    return f"{'climbs' if test[-1] > test[0] else 'falls'} from {first} to {last} in {epochs}"


def _note(axes: Axes, text: str, place: tuple[Any, Any]) -> None:
    axes.annotate(text, place, (0, 3), textcoords="offset points", ha="center", fontsize=style.SMALL)


def _number_key(meaning: str, shown: bool) -> list[Line2D]:
    return [Line2D([], [], ls="", marker="$n$", ms=7, color=style.INK, label=meaning)] if shown else []


def _epochs(number: int) -> str:
    return "1 epoch" if number == 1 else f"{number} epochs"


def _first_dead(dead: NDArray[np.float64]) -> str:
    return f"in epoch {int((dead > 0).argmax()) + 1}" if (dead > 0).any() else "in no epoch"


def _most_dead(layers: Sequence[LayerRecord]) -> str:
    worst = max(layers, key=lambda layer: layer.dead_channels, default=None)
    return f"{worst.name} ({worst.dead_channels} of {worst.channels})" if worst and worst.dead_channels else "no layer"


def _largest(names: Sequence[str], cost: NDArray[np.float64]) -> str:
    return f"{names[int(cost.argmax())]} with {cost.max() / 1e6:.2f} million" if len(cost) else "none"


FATES = {
    "kept": (style.BLUE, "kept"),
    "zero": (style.BLACK, "gone: always 0"),
    "constant": (style.ORANGE, "gone: a constant, folded in"),
    "unread": (style.GREY, "gone: nothing reads it"),
    "absent": (style.FAINT, "no such channel"),
}


@style.styled
def removal_map(names: Sequence[str], fates: Sequence[NDArray[np.str_]], *, subtitle: str = "") -> Figure:
    """What removal did with every channel. fates[l]: one of kept, zero, constant, unread per output channel of layer l.

    Rows are layers, columns output channels; beside each row how many channels are left of how many.
    """
    kinds = list(FATES)
    widest = max(len(fate) for fate in fates)
    grid = np.full((len(names), widest), kinds.index("absent"))
    for row, fate in enumerate(fates):
        grid[row, : len(fate)] = [kinds.index(str(kind)) for kind in fate]
    counts = {kind: int((grid == number).sum()) for number, kind in enumerate(kinds) if kind != "absent"}
    before, after = sum(counts.values()), counts["kept"]
    title = f"{before - after} of {before} output channels are gone, {after} are left"
    height = style.rows_height(len(names))
    figure = style.canvas(title, subtitle, height=height + 1.2)
    axes = figure.subplots()
    colors = ListedColormap([color for color, _ in FATES.values()])
    axes.imshow(grid, cmap=colors, vmin=-0.5, vmax=len(kinds) - 0.5, aspect="auto", interpolation="nearest")
    axes.set_xticks(np.arange(widest + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(names) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color=style.PAPER, linewidth=0.8)
    axes.tick_params(which="both", length=0)
    left = [int((fate == "kept").sum()) for fate in fates]
    counted = [f"{kept}/{len(fate)}" for kept, fate in zip(left, fates, strict=True)]
    wide = max(map(len, counted))
    space = "\N{FIGURE SPACE}"  # as wide as a digit: the counts stand in columns
    style.row_axis(axes, [f"{name}  {n.rjust(wide, space)}" for name, n in zip(names, counted, strict=True)], height)
    axes.set_xticks(range(0, widest, 8))
    axes.set_xlabel("output channel; beside each layer: left/before")
    shown = [kind for kind in kinds if kind in ("kept", "absent") or counts.get(kind)]
    style.legend_above(axes, columns=2, handles=[Patch(facecolor=FATES[k][0], label=FATES[k][1]) for k in shown])
    parts = ", ".join(f"{counts[kind]} {FATES[kind][1]}" for kind in counts)
    return style.finish(figure, f"Map of output channels, one row a layer: {parts}.")

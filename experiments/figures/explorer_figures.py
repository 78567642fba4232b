"""The figures behind the explorers: one layer at one epoch of its training, and one image on its way through.

They take data that was computed elsewhere (src/snapshots.py, experiments/image_trace.py) and give a figure with its alt
text in `get_label()`. Axis letters: E epochs, O output channels, K shown channels, H W space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from experiments.figures import style
from experiments.figures.style import BALANCED, LIVENESS, percent
from src.runs import EDGES, REACH, LayerSnapshot

FLOAT, QUANTIZED, COMPACTED = "float", "quantized", "compacted"
SHOWN = 8

MARKS = {
    FLOAT: {"marker": "D", "color": style.SKY, "ms": 9, "mec": style.INK, "mew": 0.8},
    QUANTIZED: {"marker": "o", "color": style.BLUE, "ms": 9},
    COMPACTED: {"marker": "x", "color": style.BLACK, "ms": 6, "mew": 1.8},
}


@dataclass(frozen=True)
class Stage:
    """What one layer passes on: the BatchNorm behind it, and its output channels that exact removal keeps."""

    layer: str
    norm: str
    channels: int
    kept: NDArray[np.int64]

    def shown(self, most: int = SHOWN) -> NDArray[np.int64]:
        """Channels to look at, ascending: up to three that are gone, the rest kept (all of one kind where need be)."""
        gone = np.setdiff1d(np.arange(self.channels), self.kept)
        few = min(len(gone), max(3, most - len(self.kept)))
        return np.sort(np.concatenate([gone[:few], self.kept[: most - few]]))


@dataclass(frozen=True)
class ImageTrace:
    """One image on its way. By network: scores, the logits (C,); maps, BatchNorm outputs (K, H, W), NaN where gone."""

    number: int
    image: NDArray[np.uint8]
    label: int
    class_names: tuple[str, ...]
    stage: Stage
    channels: NDArray[np.int64]
    scores: dict[str, NDArray[np.float64]]
    maps: dict[str, NDArray[np.float64]]

    def said(self, network: str) -> tuple[str, float]:
        """The class a network answers, and its probability."""
        scores = self.scores[network]
        shares = np.exp(scores - scores.max())
        best = int(scores.argmax())
        return self.class_names[best], float(shares[best] / shares.sum())


@style.styled
def layer_figure(now: LayerSnapshot, course: Sequence[LayerSnapshot], *, subtitle: str = "") -> Figure:
    """A layer's weights at one epoch under the quantizer's dead zone and levels; below, its whole course.

    now: the epoch looked at; course: the same layer at every epoch kept, in order.
    """
    gone, total = int(now.dead.sum()), len(now.dead)
    when = f"after epoch {now.epoch}" if now.epoch else "before training"
    numbers = f"{percent(now.sparsity)} zeros, {gone} of {total} filters dead, {now.bits} bits"
    figure = style.canvas(f"{now.name} {when}: {numbers}", subtitle, height=5.9)
    panels = figure.subplot_mosaic([["weights", "weights"], ["dead", "course"]], height_ratios=[1.15, 1])
    _draw_weights(panels["weights"], now)
    _draw_dead(panels["dead"], now, course)
    _draw_course(panels["course"], now, course)
    last = course[-1]
    alt = (
        f"Histogram of the weights of {now.name} {when}, with the dead zone and the quantizer's levels, above its "
        f"course through training. {numbers}; the dead zone's half width is {percent(now.zone_share)} of the range "
        f"R = {now.range:.3g}. At the end, epoch {last.epoch}: {percent(last.sparsity)} zeros, {int(last.dead.sum())} "
        f"filters dead, {last.bits} bits."
    )
    return style.finish(figure, alt)


@style.styled
def image_figure(trace: ImageTrace, *, subtitle: str = "") -> Figure:
    """An image, what three networks answer, and what one layer of each passes on.

    Maps are BatchNorm outputs, one colour scale a channel; a channel that exact removal took out is hatched.
    """
    truth = trace.class_names[trace.label]
    answers = {name: trace.said(name) for name in trace.scores}
    title = f"Test image {trace.number} is “{truth}”: {_said(answers)}"
    networks = list(trace.maps)
    figure = style.canvas(title, subtitle, height=3.1 + 0.78 * len(networks))
    columns = len(trace.channels)
    outer = figure.add_gridspec(3, 1, height_ratios=[2.3, 0.1, 0.78 * len(networks)])
    upper, lower = outer[0].subgridspec(1, 2, width_ratios=[1, 2.3]), outer[2].subgridspec(len(networks), columns)
    heading = figure.add_subplot(outer[1])
    heading.axis("off")
    heading.text(0.01, 0, _caption(trace), fontsize=style.SMALL, color=style.MUTED)
    _draw_image(figure.add_subplot(upper[0]), trace)
    _draw_scores(figure.add_subplot(upper[1]), trace)
    limits = np.max([np.abs(trace.maps[name]).max(axis=(1, 2)) for name in (FLOAT, QUANTIZED)], axis=0)  # (K,)
    for row, name in enumerate(networks):
        for column, channel in enumerate(trace.channels):
            axes = figure.add_subplot(lower[row, column])
            _draw_map(axes, trace.maps[name][column], float(limits[column]) or 1.0)
            if row == 0:
                axes.set_title(f"{channel}", fontsize=style.SMALL, fontweight="normal", loc="center", pad=3)
            if column == 0:
                axes.set_ylabel(name, fontsize=style.SMALL, rotation=0, ha="right", va="center")
    kept = len(trace.stage.kept)
    style.tighten(figure)
    alt = f"{title}. Below, {columns} channels behind {trace.stage.layer} in {len(networks)} networks; removal keeps "
    alt += f"{kept} of its {trace.stage.channels} channels. {_agreement(trace)}"
    return style.finish(figure, alt)


def _draw_weights(axes: Axes, now: LayerSnapshot) -> None:
    share = 100 * now.counts / max(int(now.counts.sum()), 1)
    inner, middle = share[1:-1], len(share[1:-1]) // 2
    style.grid(axes)
    axes.axvspan(-now.zone_share, now.zone_share, color=style.DEAD_ZONE, lw=0, label="dead zone")
    axes.stairs(inner, EDGES, fill=True, color=style.WEIGHTS, label="weights")
    for sign in (-1, 1):
        axes.axvline(sign, color=style.RANGE, lw=1.6, ls=":", label="±R" if sign > 0 else None)
    around = np.delete(inner, slice(middle - 1, middle + 2)).max(initial=0.0)
    top = max(1.2 * min(float(inner.max()), 3 * around), 1e-9) if around else 1.2 * float(inner.max(initial=1.0))
    axes.set(xlim=(-REACH, REACH), ylim=(0, top), xlabel="weight, in units of the layer's range R", ylabel="share")
    style.percent_axis(axes.yaxis)
    if inner[middle] > top:
        text = f"↑ {inner[middle]:.0f} % of the weights\nare within {EDGES[middle + 1]:.2f} R of 0"
        axes.annotate(text, (0.03, top), (10, -5), textcoords="offset points", va="top", fontsize=style.SMALL)
    levels = now.levels
    if len(levels) <= 63:
        axes.plot(
            levels, np.zeros(len(levels)), ls="", marker="|", ms=13, mew=1.6, color=style.INK, clip_on=False,
            label=f"{len(levels)} levels",
        )  # fmt: skip
    else:
        axes.plot([-1, 1], [0, 0], lw=4, color=style.INK, clip_on=False, label=f"{len(levels)} levels")
    style.legend_above(axes, columns=4)


def _draw_dead(axes: Axes, now: LayerSnapshot, course: Sequence[LayerSnapshot]) -> None:
    alive = 1.0 - np.stack([snapshot.dead for snapshot in course], axis=1)  # (O, E)
    edges = _epoch_edges(course)
    rows = np.arange(len(now.dead) + 1) - 0.5
    axes.pcolormesh(edges, rows, alive, cmap=LIVENESS, vmin=0, vmax=1, rasterized=True)
    _mark_epoch(axes, now)
    axes.set(xlim=(edges[0], edges[-1]), ylim=(rows[-1], rows[0]), xlabel="epoch", ylabel="output channel")
    axes.set_title("Filters: black is dead", pad=6)
    if alive.all():
        middle = ((edges[0] + edges[-1]) / 2, len(now.dead) / 2)
        axes.text(*middle, "none dies", ha="center", va="center", color=style.MUTED, backgroundcolor=style.WHITE)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))


def _draw_course(axes: Axes, now: LayerSnapshot, course: Sequence[LayerSnapshot]) -> None:
    epochs = [snapshot.epoch for snapshot in course]
    style.grid(axes)
    axes.plot(epochs, [100 * snapshot.sparsity for snapshot in course], color=style.ZEROS, lw=2.4, label="zeros")
    axes.set(ylim=(0, style.FULL), xlabel="epoch")
    axes.tick_params(axis="y", colors=style.ZEROS)
    style.percent_axis(axes.yaxis)
    right = style.right_axis(axes, "", style.BITS)
    bits = [snapshot.bits for snapshot in course]
    right.step(epochs, bits, where="post", color=style.BITS, lw=2.4, ls=(0, (4, 1.5)), label="bits (right)")
    high = max(8, *bits)
    right.set(ylim=(0, high * 1.06))
    right.set_yticks(range(0, high + 1, 2 if high <= 8 else 4))
    _mark_epoch(axes, now)
    edges = _epoch_edges(course)
    axes.set_xlim(edges[0], edges[-1])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    style.legend_above(axes, right, columns=2)


def _epoch_edges(course: Sequence[LayerSnapshot]) -> np.ndarray:
    """Borders between the epochs kept, halfway, so that each has its own column."""
    epochs = np.array([snapshot.epoch for snapshot in course], dtype=float)
    inner = (epochs[1:] + epochs[:-1]) / 2
    return np.concatenate([[epochs[0] - 0.5], inner, [epochs[-1] + 0.5]])


def _mark_epoch(axes: Axes, now: LayerSnapshot) -> None:
    axes.axvline(now.epoch, color=style.MARK, lw=2.2)


def _draw_image(axes: Axes, trace: ImageTrace) -> None:
    axes.imshow(np.moveaxis(trace.image, 0, -1), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(f"label: {trace.class_names[trace.label]}", fontsize=style.SMALL)


def _draw_scores(axes: Axes, trace: ImageTrace) -> None:
    names = list(trace.class_names)
    shown = np.sort(np.argsort(-trace.scores[QUANTIZED], kind="stable")[:10])  # ten rows are readable
    style.grid(axes, "both")
    for name, scores in trace.scores.items():
        axes.plot(scores[shown], np.arange(len(shown)), ls="", label=name, zorder=3, **MARKS[name])  # type: ignore[arg-type]
    axes.set_yticks(range(len(shown)), [names[i] if len(names[i]) <= 12 else names[i][:11] + "…" for i in shown])
    axes.set(ylim=(len(shown) - 0.4, -0.6), xlabel="logit of each class")
    axes.tick_params(axis="y", length=0)
    style.legend_above(axes, columns=3)


def _draw_map(axes: Axes, values: np.ndarray, limit: float) -> None:
    axes.set(xticks=[], yticks=[])
    axes.set_box_aspect(1)
    if np.isnan(values).all():
        axes.set_facecolor(style.FAINT)
        axes.patch.set(hatch="////", edgecolor=style.GREY)
        return
    axes.imshow(values, cmap=BALANCED, vmin=-limit, vmax=limit, interpolation="nearest")


def _said(answers: Mapping[str, tuple[str, float]]) -> str:
    """{"float": ("cat", 0.9), "quantized": ("cat", 0.8)} -> 'all say “cat” (float 90 %, quantized 80 %)'.

    A network stays in one line with its share.
    """
    space = "\N{NO-BREAK SPACE}"
    classes = {answer for answer, _ in answers.values()}
    if len(classes) == 1:
        shares = ", ".join(f"{name}{space}{percent(share, 0)}" for name, (_, share) in answers.items())
        return f"all say “{classes.pop()}” ({shares})"
    return ", ".join(f"{name} says “{answer}” ({percent(share, 0)})" for name, (answer, share) in answers.items())


def _caption(trace: ImageTrace) -> str:
    return f"Channels behind {trace.stage.layer}: blue positive, orange negative, hatched removed"


def _agreement(trace: ImageTrace) -> str:
    if COMPACTED not in trace.scores:
        return "There is no compacted network to compare with."
    difference = np.abs(trace.scores[COMPACTED] - trace.scores[QUANTIZED]).max()
    return f"Quantized and compacted logits differ by at most {difference:.1e}."

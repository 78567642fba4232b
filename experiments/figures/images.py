"""Images: of the data, of their augmentation, and one image on its way through three networks.

Axis letters: N images, C classes, K shown channels, H W space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from experiments.figures import style
from experiments.figures.style import percent

Images = NDArray[np.uint8]
FLOAT, QUANTIZED, COMPACTED = "float", "quantized", "compacted"
SHOWN = 8
TIGHT = {"h_pad": 0.03, "w_pad": 0.06, "hspace": 0.02, "wspace": 0.02}

MARKS = {
    FLOAT: {"marker": "D", "color": style.SKY, "ms": 9, "mec": style.INK, "mew": 0.8},
    QUANTIZED: {"marker": "o", "color": style.BLUE, "ms": 9},
    COMPACTED: {"marker": "x", "color": style.INK, "ms": 6, "mew": 1.8},
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
def image_grid(
    images: Images, labels: Sequence[int], class_names: Sequence[str], *, title: str, subtitle: str = ""
) -> Figure:
    """Images with their class names, six in a row. images: (N, 3, H, W) uint8; labels: (N,)."""
    names = [class_names[int(label)] for label in labels]
    alt = f"{len(images)} images: {', '.join(names)}."
    return _picture_grid(title, subtitle, alt, images, [_short(name) for name in names], columns=6)


@style.styled
def augmentation_grid(originals: Images, augmented: Sequence[Images], *, subtitle: str = "") -> Figure:
    """One image a row: the original, then a column for each draw in `augmented`; all are (N, 3, H, W) uint8."""
    columns = 1 + len(augmented)
    rows = np.stack([originals, *augmented], axis=1).reshape(-1, *originals.shape[1:])  # an image, then its draws
    captions = ["original", *(f"draw {number}" for number in range(1, columns))]
    alt = f"{len(originals)} images, one a row: the original, then {columns - 1} random augmentations of it."
    title = "Every epoch sees each image differently"
    figure = _picture_grid(title, subtitle, alt, rows, captions, columns)
    for axes in figure.axes[::columns]:
        axes.axis("on")
        axes.spines[:].set(visible=True, color=style.VERMILLION, linewidth=2.5)
    return figure


@style.styled
def image_figure(trace: ImageTrace, *, subtitle: str = "") -> Figure:
    """An image, what three networks answer, and what one layer of each passes on.

    Maps are BatchNorm outputs, one colour scale a channel; a channel that exact removal took out is hatched.
    """
    truth = trace.class_names[trace.label]
    said = ((name, *trace.said(name)) for name in trace.scores)
    answers = ", ".join(f"{name} “{answer}” {percent(share, 0)}" for name, answer, share in said)
    title = f"Test image {trace.number} is “{truth}”: {answers}"
    networks, columns = list(trace.maps), len(trace.channels)
    alt = f"{title}. Below, {columns} channels behind {trace.stage.layer} in {len(networks)} networks; removal keeps "
    alt += f"{len(trace.stage.kept)} of its {trace.stage.channels} channels."
    figure = style.canvas(title, subtitle, alt, height=3.1 + 0.78 * len(networks), **TIGHT)
    outer = figure.add_gridspec(2, 1, height_ratios=[2.3, 0.78 * len(networks)])
    upper, lower = outer[0].subgridspec(1, 2, width_ratios=[1, 2.3]), outer[1].subgridspec(len(networks), columns)
    text = f"channels behind {trace.stage.layer}: blue positive, orange negative, hatched removed"
    figure.supxlabel(text, color=style.MUTED)
    picture = figure.add_subplot(upper[0])
    _draw_image(picture, trace.image)
    picture.set_xlabel(f"label: {truth}")
    _draw_scores(figure.add_subplot(upper[1]), trace)
    limits = np.max([np.abs(trace.maps[name]).max(axis=(1, 2)) for name in (FLOAT, QUANTIZED)], axis=0)  # (K,)
    for row, name in enumerate(networks):
        for column, channel in enumerate(trace.channels):
            axes, values, limit = (
                figure.add_subplot(lower[row, column]),
                trace.maps[name][column],
                limits[column] or 1.0,
            )
            axes.set(xticks=[], yticks=[], box_aspect=1)
            if np.isnan(values).all():
                axes.set_facecolor(style.FAINT)
                axes.patch.set(hatch="////", edgecolor=style.GREY)
            else:
                axes.imshow(values, cmap=style.BALANCED, vmin=-limit, vmax=limit, interpolation="nearest")
            if row == 0:
                _caption(axes, str(channel))
            if column == 0:
                axes.set_ylabel(name, rotation=0, ha="right", va="center")
    return figure


def _picture_grid(title: str, subtitle: str, alt: str, images: Images, captions: Sequence[str], columns: int) -> Figure:
    """Images row by row, of which the first ones have captions."""
    rows, side = -(-len(images) // columns), (style.WIDTH - 0.3) / columns  # inches
    lines = -(-len(captions) // columns)
    figure = style.canvas(title, subtitle, alt, height=0.1 + rows * (side + 0.02) + 0.22 * lines, **TIGHT)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.axis("off")
    for axes, image in zip(panels, images, strict=False):
        _draw_image(axes, image)
    for axes, caption in zip(panels, captions, strict=False):
        _caption(axes, caption)
    return figure


def _draw_image(axes: Axes, image: Images) -> None:
    """image: (3, H, W)."""
    axes.imshow(np.moveaxis(image, 0, -1), interpolation="nearest")
    axes.set(xticks=[], yticks=[])


def _caption(axes: Axes, text: str) -> None:
    axes.set_title(text, fontweight="normal", loc="center", pad=3)


def _short(name: str) -> str:
    return name if len(name) <= 12 else f"{name[:11]}…"


def _draw_scores(axes: Axes, trace: ImageTrace) -> None:
    """The logits of the ten classes that the quantized network scores highest, a mark for each network."""
    shown = np.sort(np.argsort(-trace.scores[QUANTIZED], kind="stable")[:10])
    axes.grid(True, axis="both")
    for name, scores in trace.scores.items():
        axes.plot(scores[shown], np.arange(len(shown)), ls="", label=name, zorder=3, **MARKS[name])  # type: ignore[arg-type]
    axes.set_yticks(range(len(shown)), [_short(trace.class_names[i]) for i in shown])
    axes.tick_params(axis="y", length=0)
    axes.set(ylim=(len(shown) - 0.4, -0.6), xlabel="logit of each class")
    style.legend_above(axes)

"""Images: of the data, of their augmentation, and one image on its way through three networks.

Axis letters: N images, C classes, K shown channels, H W space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
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
    networks = list(trace.maps)
    alt = f"{title}. Below, {len(trace.channels)} channels behind {trace.stage.layer} in {len(networks)} networks; "
    alt += f"removal keeps {len(trace.stage.kept)} of its {trace.stage.channels} channels."
    figure = style.canvas(title, subtitle, alt, height=3.1 + 0.72 * len(networks), **TIGHT)
    outer = figure.add_gridspec(2, 1, height_ratios=[2.3, 0.72 * len(networks)])
    upper = outer[0].subgridspec(1, 2, width_ratios=[1, 2.3])
    text = f"channels behind {trace.stage.layer}: blue positive, orange negative, hatched removed"
    figure.supxlabel(text, color=style.MUTED)
    picture = figure.add_subplot(upper[0])
    _draw_image(picture, trace.image)
    picture.set_xlabel(f"label: {_short(truth)}")
    _draw_scores(figure.add_subplot(upper[1]), trace)
    _draw_maps(figure.add_subplot(outer[1]), trace)
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
    """At most 12 characters; what no font can draw, a byte that is not UTF-8, is written as \\udce9."""
    name = name.encode("utf-8", "backslashreplace").decode()
    return name if len(name) <= 12 else f"{name[:11]}…"


def _draw_maps(axes: Axes, trace: ImageTrace) -> None:
    """A row a network, a column a channel with its own scale; all in one axes, of which each takes its time."""
    maps = np.stack(list(trace.maps.values()))  # (N, K, H, W)
    limits = np.abs(maps[:2]).max(axis=(0, 2, 3))  # of float and quantized
    gap = 1 + maps.shape[3] // 6
    padded = np.pad(maps, ((0, 0), (0, 0), (0, gap), (0, gap)), constant_values=np.nan)
    rows, columns, high, wide = padded.shape
    flat = (padded / np.where(limits, limits, 1.0)[:, None, None]).swapaxes(1, 2).reshape(rows * high, columns * wide)
    look: dict[str, Any] = {"cmap": style.BALANCED, "vmin": -1, "vmax": 1, "interpolation": "nearest"}
    axes.imshow(flat, extent=(0, columns, rows, 0), aspect=high / wide, **look)
    side = 1 - gap / wide
    for (row, column), gone in np.ndenumerate(np.isnan(maps).all(axis=(2, 3))):
        ground, hatch = (style.FAINT, "////") if gone else ("none", None)
        axes.add_patch(
            Rectangle((column, row), side, side, facecolor=ground, hatch=hatch, edgecolor=style.GREY, lw=0.8)
        )
    axes.set_xticks(np.arange(columns) + side / 2, trace.channels.tolist())
    axes.set_yticks(np.arange(rows) + side / 2, list(trace.maps))
    axes.tick_params(length=0, bottom=False, labelbottom=False, labeltop=True)
    axes.spines[:].set_visible(False)
    axes.grid(False)


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

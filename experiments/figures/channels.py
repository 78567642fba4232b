"""Maps of output channels, one row a layer: alive or dead, kept or removed; and what a channel group is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from experiments.figures import style
from experiments.figures.style import percent
from src.training import LayerRecord

FATES = {
    "kept": (style.BLUE, "kept"),
    "zero": (style.BLACK, "gone: always 0"),
    "constant": (style.ORANGE, "gone: a constant, folded in"),
    "unread": (style.GREY, "gone: nothing reads it"),
}
ABSENT = Patch(facecolor=style.FAINT, edgecolor=style.PALE, hatch="////", label="no such channel")


@style.styled
def channel_liveness(layers: Sequence[LayerRecord], *, subtitle: str = "") -> Figure:
    """Rows are layers, columns output channels: black dead, white alive, hatched where a layer has no such channel."""
    dead, total = dead_total(layers)
    worst = max(layers, key=lambda layer: layer.dead_channels / max(layer.channels, 1), default=None)
    title = f"{dead} of {total} output channels are dead ({percent(dead / max(total, 1))})"
    alt = f"Map of channels, one row a layer, black for dead: {title}"
    if worst is not None and dead:
        alt += f"; the largest share is in {worst.name}, {worst.dead_channels} of {worst.channels}"
    counts = [f"{layer.dead_channels}/{layer.channels}" for layer in layers]
    figure, axes = _map_figure(title, subtitle, f"{alt}.", [layer.name for layer in layers], counts, "dead/all")
    draw_liveness(axes, layers)
    states = (("dead", style.BLACK), ("alive", style.WHITE))
    keys = [Patch(facecolor=color, edgecolor=style.GREY, label=state) for state, color in states]
    style.legend_above(axes, handles=[*keys, ABSENT])
    return figure


@style.styled
def removal_map(names: Sequence[str], fates: Sequence[NDArray[np.str_]], *, subtitle: str = "") -> Figure:
    """What removal did with every channel. fates[l]: one of kept, zero, constant, unread per output channel of layer l.

    Rows are layers, columns output channels; beside each row how many channels are left of how many.
    """
    kinds = list(FATES)
    rows = [[kinds.index(str(kind)) for kind in fate] for fate in fates]
    totals = {kind: sum(row.count(number) for row in rows) for number, kind in enumerate(kinds)}
    before, after = sum(totals.values()), totals["kept"]
    title = f"{before - after} of {before} output channels are gone, {after} are left"
    counts = [f"{row.count(0)}/{len(row)}" for row in rows]
    parts = ", ".join(f"{number} {FATES[kind][1]}" for kind, number in totals.items())
    alt = f"Map of output channels, one row a layer: {parts}."
    figure, axes = _map_figure(title, subtitle, alt, names, counts, "left/before")
    draw_cells(axes, rows, ListedColormap([color for color, _ in FATES.values()]))
    keys = [Patch(facecolor=color, label=label) for kind, (color, label) in FATES.items() if totals[kind]]
    style.legend_above(axes, columns=2, handles=[*keys, ABSENT])
    return figure


def draw_liveness(axes: Axes, layers: Sequence[LayerRecord]) -> None:
    """The map itself, a row a layer: black dead, white alive, hatched where there is no such channel."""
    draw_cells(axes, [~np.asarray(layer.dead, dtype=bool) for layer in layers], style.LIVENESS)


def draw_cells(
    axes: Axes, rows: Iterable[ArrayLike], colors: ListedColormap, *, edges: NDArray[np.float64] | None = None
) -> None:
    """Rows of coloured cells on a hatched ground, the first row at the top; rows may differ in length.

    rows: of each, (C,) whole numbers, the cells' places among `colors`. edges: (C + 1,), borders of the columns where
    these are not the places 0, 1, ...
    """
    values = [np.asarray(row, dtype=int) for row in rows]
    widest = max((len(row) for row in values), default=1)
    borders = np.arange(widest + 1) - 0.5 if edges is None else edges
    lines = widest <= 128 and len(values) <= 40
    axes.grid(False)
    axes.set_facecolor(style.FAINT)
    axes.patch.set(hatch="////", edgecolor=style.PALE)
    for at, row in enumerate(values):
        axes.pcolormesh(
            borders[: len(row) + 1], [at - 0.5, at + 0.5], row[None], cmap=colors, vmin=-0.5, vmax=colors.N - 0.5,
            edgecolors=style.PALE if lines else "none", linewidth=0.25,
        )  # fmt: skip
    axes.set(xlim=(borders[0], borders[-1]), ylim=(max(len(values), 1) - 0.5, -0.5))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, min_n_ticks=1))


def dead_total(layers: Sequence[LayerRecord]) -> tuple[int, int]:
    """Dead output channels, and all output channels, of the layers."""
    return sum(layer.dead_channels for layer in layers), sum(layer.channels for layer in layers)


def _map_figure(
    title: str, subtitle: str, alt: str, names: Sequence[str], counts: Sequence[str], meaning: str
) -> tuple[Figure, Axes]:
    """A figure for a map with a row a layer; beside each name its count, whose `meaning` the x-axis says."""
    height = style.rows_height(len(names))
    figure = style.canvas(title, subtitle, alt, height=height + 1.1)
    axes = figure.subplots()
    wide, space = max(map(len, counts), default=0), "\N{FIGURE SPACE}"  # as wide as a digit: counts stand in columns
    labels = [f"{name}  {count.rjust(wide, space)}" for name, count in zip(names, counts, strict=True)]
    style.row_axis(axes, labels, height)
    axes.set_xlabel(f"output channel; beside each layer: {meaning}")
    return figure, axes


@dataclass(frozen=True)
class Diagram:
    """A drawing as SVG that a notebook shows with `alt`, its description, as alternative text."""

    svg: str
    alt: str

    def _repr_mimebundle_(self, **_: object) -> tuple[dict[str, str], dict[str, Any]]:
        """Data and metadata by MIME type, as IPython asks for them."""
        return {"image/svg+xml": self.svg, "text/plain": self.alt}, {"image/svg+xml": {"alt": self.alt}}


def channel_group_diagram() -> Diagram:
    """What must be zero together in a residual network so that one channel can go: `channel_groups.svg`."""
    svg = Path(__file__).with_name("channel_groups.svg").read_text(encoding="utf-8")
    described = re.search("<desc[^>]*>(.*?)</desc>", svg, re.DOTALL)
    return Diagram(svg, " ".join(described[1].split()) if described else "")

"""One visual language for all figures: colours, sizes and the few helpers that apply them.

Importing this changes nothing global. `styled` wraps a function that builds a figure: it runs under these settings and
leaves matplotlib as it was. The colours are Okabe and Ito's colour-blind safe set (https://jfly.uni-koeln.de/color/),
one colour for one meaning in every figure. Sizes are inches, for a notebook page about 9 inches wide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec

import matplotlib.style
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter

P = ParamSpec("P")

WIDTH = 9.0

BLUE, SKY, GREEN, ORANGE = "#0072B2", "#56B4E9", "#009E73", "#E69F00"
VERMILLION, PURPLE, YELLOW = "#D55E00", "#A8437F", "#F0E442"
INK, MUTED, GREY, PALE, FAINT = "#222222", "#5F5F5F", "#A3A3A3", "#DDDDDA", "#EDEDEA"
PAPER, WHITE, BLACK = "#FBFBF8", "#FFFFFF", "#111111"

ACCURACY, TRAIN, LOSS, TASK = BLUE, SKY, INK, GREY
ZEROS, CHANNELS, COEFFICIENT = GREEN, PURPLE, VERMILLION
ALIVE, DEAD = BLUE, GREY

DEPTH = LinearSegmentedColormap.from_list("depth", ["#16325C", "#0072B2", "#56B4E9", "#8FD3B6", "#E6C229"])
"""Colours of layers from the first (dark) to the last (bright); lightness rises throughout."""

SMALL, TEXT, TITLE = 9.0, 10.0, 12.5

_SETTINGS: dict[str, Any] = {
    "figure.facecolor": PAPER,
    "savefig.facecolor": "auto",
    "axes.facecolor": WHITE,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.labelsize": TEXT,
    "axes.titlesize": TEXT,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "font.size": TEXT,
    "text.color": INK,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
    "hatch.color": PALE,
    "hatch.linewidth": 0.7,
}


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Run `draw` under this style and give back its figure; matplotlib's settings are then as they were before."""

    @wraps(draw)
    def run(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.style.context(["default", _SETTINGS]):
            figure = draw(*args, **kwargs)
            for axes in figure.axes:  # ticks are made late, outside this style: tell each axes its size now
                axes.tick_params(labelsize=SMALL, width=0.8)
        return figure

    return run


def canvas(title: str, subtitle: str = "", *, height: float, width: float = WIDTH) -> Figure:
    """An empty figure with its takeaway at the top left, the subtitle in grey below, and the rest for the axes."""
    header = header_height(subtitle)
    engine = ConstrainedLayoutEngine(rect=(0.0, 0.0, 1.0, 1.0 - header / height), w_pad=0.09, h_pad=0.08)
    figure = Figure(figsize=(width, height), layout=engine)
    headline(figure, title, subtitle)
    return figure


def header_height(subtitle: str) -> float:
    """Height in inches that `headline` needs."""
    return 0.62 if subtitle else 0.4


def headline(figure: Figure, title: str, subtitle: str = "") -> None:
    """Write title and subtitle at the top left of the figure."""
    width, height = figure.get_size_inches()
    figure.text(0.12 / width, 1 - 0.11 / height, title, fontsize=TITLE, fontweight="bold", va="top", ha="left")
    if subtitle:
        figure.text(0.12 / width, 1 - 0.37 / height, subtitle, fontsize=SMALL + 0.5, color=MUTED, va="top", ha="left")


def finish(figure: Figure, alt: str) -> Figure:
    """Store the alt text: one or two sentences that say what the figure shows, with its numbers."""
    figure.set_label(alt)
    return figure


def percent(share: float, digits: int = 1) -> str:
    """0.527 -> '52.7 %'."""
    return f"{100 * share:.{digits}f} %"


def percent_axis(axis: Axis) -> None:
    """Ticks of an axis whose data are per cent (0 to 100)."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))


def epoch_axis(axes: Axes, epochs: int) -> None:
    """The x-axis of a run: all planned epochs from the start, so that nothing jumps while it fills."""
    last = max(epochs, 2)
    step = next((size for size in (1, 2, 5, 10, 20, 50, 100, 200, 500) if last / size <= 8), last)
    axes.set_xlim(0.5, last + 0.5)
    axes.set_xticks(sorted({1, *range(step, last + 1, step)}))
    axes.set_xlabel("epoch")


def right_axis(axes: Axes, label: str, color: str) -> Axes:
    """A second y-axis at the right whose label, ticks and spine have the colour of its line."""
    twin = axes.twinx()
    twin.set_ylabel(label, color=color)
    twin.tick_params(axis="y", colors=color)
    twin.spines["right"].set_visible(True)
    twin.spines["right"].set_color(color)
    twin.spines["left"].set_visible(False)
    return twin


def layer_axis(axes: Axes, names: Sequence[str]) -> None:
    """The x-axis of a bar chart with one bar a layer: slanted names that end under their bar."""
    axes.set_xticks(range(len(names)), list(names), rotation=45, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.7, len(names) - 0.3)
    axes.tick_params(axis="x", length=0)


def legend_above(axes: Axes, *others: Axes, columns: int = 4, handles: Sequence[Artist] | None = None) -> None:
    """The legend in a row above the axes, where it can hide no data; `others` are twins whose lines it names too."""
    items = (
        list(handles) if handles is not None else [h for a in (axes, *others) for h in a.get_legend_handles_labels()[0]]
    )
    axes.legend(
        handles=items, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.25, borderpad=0.1,
        handlelength=1.7, columnspacing=1.3, labelspacing=0.25,
    )  # fmt: skip


def grid(axes: Axes, axis: str = "y") -> None:
    """Quiet lines behind the data."""
    axes.grid(True, axis="both" if axis == "both" else "x" if axis == "x" else "y")

"""One visual language for all figures: colours, sizes and the few helpers that apply them.

Importing this changes nothing global. `styled` wraps a function that builds a figure: it runs under these settings and
leaves matplotlib as it was. The colours are Okabe and Ito's colour-blind safe set (https://jfly.uni-koeln.de/color/)
with a darker purple and a paler yellow, one colour for one meaning in every figure. Sizes are inches and points: a
figure is 6.6 inches wide, 634 pixels on a page; shrunk to a phone's 390 its smallest text, 11 points, has 9 pixels.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec

import matplotlib.style
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap, ListedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FuncFormatter
from PIL import Image

P = ParamSpec("P")

WIDTH = 6.6

BLUE, SKY, GREEN, ORANGE = "#0072B2", "#56B4E9", "#009E73", "#E69F00"
VERMILLION, PURPLE, YELLOW = "#D55E00", "#7A1E5E", "#F9F3B0"
INK, MUTED, GREY, PALE, FAINT = "#222222", "#5F5F5F", "#A3A3A3", "#DDDDDA", "#EDEDEA"
PAPER, WHITE, BLACK = "#FBFBF8", "#FFFFFF", "#111111"

ACCURACY, TRAIN, LOSS, TASK = BLUE, SKY, INK, GREY
ZEROS, CHANNELS, COEFFICIENT, BITS = GREEN, PURPLE, VERMILLION, INK
ALIVE, DEAD = BLUE, GREY
STAIRS, WEIGHTS, DEAD_ZONE, RANGE, MARK = BLUE, SKY, YELLOW, VERMILLION, ORANGE
RUNS = (BLUE, ORANGE, PURPLE, SKY, INK, GREY)
RUN_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1)), "-")
"""Colour and line of the first six runs in a comparison; they repeat after that."""

TOGETHER = {
    "accuracy": (ACCURACY, TRAIN, MUTED),
    "loss": (LOSS, TASK, ACCURACY),
    "sparsity": (ZEROS, CHANNELS, COEFFICIENT),
    "channels": (ALIVE, DEAD),
    "fates of channels": (BLUE, BLACK, ORANGE, GREY, FAINT),
    "staircase and weights": (STAIRS, WEIGHTS, DEAD_ZONE, RANGE, INK),
    "course of a layer": (ZEROS, BITS, MARK),
    "liveness and the marked epoch": (BLACK, WHITE, MARK),
    "quantized or not": (BLUE, ORANGE),
    "networks": (SKY, BLUE, BLACK),
    "runs": RUNS,
}
"""Colours that must be told apart because one figure uses them side by side."""

DEPTH = LinearSegmentedColormap.from_list("depth", ["#16325C", "#0072B2", "#56B4E9", "#7CCBA8", "#EBC83A"])
"""Colours of layers from the first (dark) to the last (bright); lightness rises throughout."""

SMALL, TEXT, TITLE = 11.0, 11.5, 13.5
FULL = 103.0  # upper end of an axis of per cents: a mark at 100 % is whole
LINE = 1.25  # height of a line of text in units of its size

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
    """An empty figure: its takeaway at the top left, the subtitle in grey below, and `height` inches for the rest."""
    header = header_height(title, subtitle, width)
    total = height + header
    engine = ConstrainedLayoutEngine(rect=(0.0, 0.0, 1.0, 1.0 - header / total), w_pad=0.1, h_pad=0.08)
    figure = Figure(figsize=(width, total), layout=engine)
    headline(figure, title, subtitle)
    return figure


def tighten(figure: Figure) -> None:
    """Little room between the panels of a figure from `canvas`: for grids of images."""
    engine = figure.get_layout_engine()
    if isinstance(engine, ConstrainedLayoutEngine):
        engine.set(h_pad=0.03, w_pad=0.06, hspace=0.02, wspace=0.02)


def header_height(title: str, subtitle: str = "", width: float = WIDTH) -> float:
    """Height in inches that `headline` needs in a figure `width` inches wide."""
    lines = len(wrapped(title, width, TITLE, "bold")) * TITLE + len(wrapped(subtitle, width, SMALL)) * SMALL
    return 0.17 + LINE * lines / 72


def headline(figure: Figure, title: str, subtitle: str = "") -> None:
    """Write title and subtitle at the top left of the figure, in as many lines as they need."""
    width, height = (float(side) for side in figure.get_size_inches())
    y = height - 0.11
    parts = [(line, TITLE, "bold", INK) for line in wrapped(title, width, TITLE, "bold")]
    parts += [(line, SMALL, "normal", MUTED) for line in wrapped(subtitle, width, SMALL)]
    for line, size, weight, color in parts:
        figure.text(0.12 / width, y / height, line, fontsize=size, fontweight=weight, color=color, va="top", ha="left")
        y -= LINE * size / 72


def wrapped(text: str, width: float, size: float, weight: str = "normal") -> list[str]:
    """`text` in lines that fit into a figure `width` inches wide: as few as it takes, broken between words, even.

    A number stays with its unit ("92.8 %", "14.6 million"), and words joined by a no-break space stay together.
    """
    font, room = FontProperties(size=size, weight=weight), 72 * (width - 0.24)
    words = re.split(r"(?<!\d) +|(?<=\d) +(?!%|million|billion)", text.strip(" ")) if text.strip() else []
    widths = [text_to_path.get_text_width_height_descent(f"{word} ", font, False)[0] for word in words]
    lines = _filled(words, widths, room)
    while len(lines) > 1 and len(evener := _filled(words, widths, 0.95 * room)) == len(lines) and room > max(widths):
        lines, room = evener, 0.95 * room
    return lines


def _filled(words: Sequence[str], widths: Sequence[float], room: float) -> list[str]:
    lines: list[str] = []
    left = 0.0
    for word, wide in zip(words, widths, strict=True):
        if lines and wide <= left:
            lines[-1] += f" {word}"
            left -= wide
        else:
            lines.append(word)
            left = room - wide
    return lines


def finish(figure: Figure, alt: str) -> Figure:
    """Store the alt text: one or two sentences that say what the figure shows, with its numbers."""
    figure.set_label(alt)
    return figure


def percent(share: float, digits: int = 1) -> str:
    """0.527 -> '52.7 %'."""
    return f"{100 * share:.{digits}f} %"


def wash(color: str, share: float = 0.28) -> str:
    """A thin coat of a colour, in CSS: text of the theme's own colour is readable on it, light or dark."""
    red, green, blue = (round(255 * part) for part in to_rgb(color))
    return f"rgba({red}, {green}, {blue}, {share:g})"


def percent_axis(axis: Axis) -> None:
    """Ticks of an axis whose data are per cent (0 to 100)."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))


def epoch_axis(axes: Axes, epochs: int) -> None:
    """The x-axis of a run: all planned epochs from the start, so that nothing jumps while it fills."""
    last = max(epochs, 2)
    sizes = [digit * 10**power for power in range(5) for digit in (1, 2, 5)]
    most = 6 if last < 100 else 4 if last < 1000 else 3  # labels, which grow longer
    step = next((size for size in sizes if last / size <= most), last)
    axes.set_xlim(0.5, last + 0.5)
    axes.set_xticks(sorted({1, *range(step, last + 1, step)}))
    axes.set_xlabel("epoch")


def marker(points: int) -> str:
    """A dot for every point of a line while they can be told apart."""
    return "." if points <= 40 else ""


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
    """The x-axis of a bar chart with one bar a layer: slanted names that end under their bar, 24 at most."""
    places = range(0, len(names), -(-len(names) // 24) or 1)
    axes.set_xticks(list(places), [names[i] for i in places], rotation=45, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.7, len(names) - 0.3)
    axes.tick_params(axis="x", length=0)


def row_axis(axes: Axes, names: Sequence[str], height: float) -> None:
    """The y-axis of a chart with one row a layer in `height` inches: a name a row, or as many as there is room for."""
    places = range(0, len(names), max(1, math.ceil(len(names) * 0.185 / height)))
    axes.set_yticks(list(places), [names[i] for i in places])
    axes.tick_params(axis="y", length=0)


def rows_height(rows: int, inches: float = 0.21) -> float:
    """Height in inches of a chart with so many rows: as much as they need, up to a page."""
    return min(inches * max(rows, 3), 9.0)


def legend_above(
    axes: Axes,
    *others: Axes,
    columns: int | None = None,
    handles: Sequence[Artist] | None = None,
    tight: bool = False,
) -> None:
    """The legend above the axes, where it can hide no data; `others` are twins whose lines it names too.

    It reads row by row, in `columns` columns or as many as fit over a figure. tight: for a panel of half the width.
    """
    items = (
        list(handles) if handles is not None else [h for a in (axes, *others) for h in a.get_legend_handles_labels()[0]]
    )
    count = columns or _fitting_columns([str(item.get_label()) for item in items], WIDTH - 1.0)
    axes.legend(
        handles=_by_rows(items, count), loc="lower left", bbox_to_anchor=(0, 1), ncols=count, borderaxespad=0.25,
        borderpad=0.1, handlelength=1.0 if tight else 1.6, columnspacing=0.7 if tight else 1.1, labelspacing=0.2,
        handletextpad=0.4 if tight else 0.5,
    )  # fmt: skip


def legend_row(axes: Axes, handles: Sequence[Artist], columns: int | None = None) -> None:
    """The legend of several panels in a row of its own, which `axes` gives up its place for."""
    axes.axis("off")
    count = columns or _fitting_columns([str(handle.get_label()) for handle in handles], WIDTH - 0.4)
    axes.legend(
        handles=_by_rows(handles, count), loc="center left", ncols=count, borderaxespad=0, borderpad=0,
        handlelength=1.4, columnspacing=1.0, handletextpad=0.5,
    )  # fmt: skip


def _by_rows(items: Sequence[Artist], columns: int) -> list[Artist]:
    """Matplotlib fills a legend column by column; in this order it reads row by row."""
    return [item for first in range(columns) for item in items[first::columns]]


def _fitting_columns(labels: Sequence[str], inches: float) -> int:
    """The most columns that fit into so many inches, with a line and its gaps beside each label."""
    font, room = FontProperties(size=SMALL), 72 * inches
    widths = [text_to_path.get_text_width_height_descent(label, font, False)[0] + 36 for label in labels]
    for columns in range(min(len(labels), 5), 1, -1):
        if sum(max(widths[first::columns]) for first in range(columns)) <= room:
            return columns
    return 1


def grid(axes: Axes, axis: str = "y") -> None:
    """Quiet lines behind the data."""
    axes.grid(True, axis="both" if axis == "both" else "x" if axis == "x" else "y")


MAX_PNG_BYTES = 150_000
SCREEN_DPI = 96

LIVENESS = ListedColormap([BLACK, WHITE], name="liveness").with_extremes(bad=(0.0, 0.0, 0.0, 0.0))
"""0 dead is black, 1 alive is white, absent (masked) is transparent: the hatched ground shows through."""


BALANCED = LinearSegmentedColormap.from_list("balanced", ["#B34500", "#FFFFFF", "#004D94"])
"""Activations: negative orange, 0 white, positive blue."""


class AwayFromZero(Normalize):
    """-limit..limit to 0..1 with a gap around 0.5: however small, a weight that is not 0 never looks like one."""

    GAP = 0.004

    def __init__(self, limit: float) -> None:
        super().__init__(-limit, limit)
        self.limit = limit

    def __call__(self, value: Any, clip: bool | None = None) -> Any:
        share = np.ma.masked_invalid(value) / self.limit
        return 0.5 + np.ma.asarray(np.sign(share)) * (self.GAP + (0.5 - self.GAP) * np.ma.abs(share))

    def inverse(self, value: Any) -> Any:
        side = np.asarray(value) - 0.5
        return np.sign(side) * np.maximum(np.abs(side) - self.GAP, 0) / (0.5 - self.GAP) * self.limit


def _signed_colors(steps: int = 512) -> Colormap:
    """Negative orange, positive blue, white for exactly 0 only: the smallest other weight is clearly coloured."""
    strength = np.linspace(0.25, 1.0, steps)[:, None]
    sides = [1 - strength * (1 - np.array(rgb)) for rgb in ((0.70, 0.27, 0.0), (0.0, 0.30, 0.58))]
    middle = np.ones((1, 3))
    return ListedColormap(np.concatenate([sides[0][::-1], middle, sides[1]]), name="signed").with_extremes(bad=PALE)


SIGNED = _signed_colors()


def png_bytes(figure: Figure, *, limit: int = MAX_PNG_BYTES) -> bytes:
    """A figure as PNG at twice the screen's resolution, or at less where it would exceed `limit` bytes.

    A chart has few colours: it is stored with a palette, at about a third of the size. Photographs keep all theirs.
    """
    data = b""
    for scale in (2.0, 1.75, 1.5, 1.25, 1.0, 0.75):
        figure.set_dpi(scale * SCREEN_DPI)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        buffer = io.BytesIO()
        _with_palette(canvas).save(buffer, "PNG")
        data = buffer.getvalue()
        if len(data) <= limit:
            break
    return data


def _with_palette(canvas: FigureCanvasAgg) -> Image.Image:
    """What was drawn, in its 256 commonest colours, or in all of 64 x 64 x 64 where those are under 95 % of it."""
    pixels = np.asarray(canvas.buffer_rgba())  # (H, W, 4)
    red, green, blue = (pixels[:, :, i].astype(np.intp) >> 2 for i in range(3))  # 64 shades: white and paper differ
    keys = (red << 12) | (green << 6) | blue
    counts = np.bincount(keys.ravel(), minlength=1 << 18)
    present = np.flatnonzero(counts)
    common = present[np.argsort(-counts[present], kind="stable")[:256]]
    if counts[common].sum() < 0.95 * keys.size:
        return Image.fromarray((np.stack([red, green, blue], axis=2) << 2 | 3).astype(np.uint8))
    shades = np.stack([present >> 12, present >> 6 & 63, present & 63], axis=1)
    palette = shades[np.searchsorted(present, common)]
    index = np.zeros(1 << 18, dtype=np.uint8)
    index[present] = ((shades[:, None] - palette) ** 2).sum(axis=2).argmin(axis=1)
    image = Image.fromarray(index[keys])
    image.putpalette((palette << 2 | 3).astype(np.uint8).tobytes())
    return image

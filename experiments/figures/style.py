"""One visual language for all figures: the palette, the canvas, epochs on an axis, legends, the PNG; and for tables.

Importing this changes nothing global. `styled` wraps a function that builds a figure: it runs under `codeq.mplstyle`
and leaves matplotlib as it was. The colours are Okabe and Ito's colour-blind safe set (https://jfly.uni-koeln.de/color/)
with a darker purple and a paler yellow, one colour for one meaning in every figure. Sizes are inches and points: a
figure is 6.6 inches wide, 634 pixels on a page; shrunk to a phone's 390 its smallest text, 11 points, has 9 pixels.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike
from pandas.io.formats.style import Styler
from PIL import Image, ImageChops, ImageStat

P = ParamSpec("P")

WIDTH = 6.6
SCREEN_DPI = 96
MAX_PNG_BYTES = 150_000

BLUE, SKY, GREEN, ORANGE = "#0072B2", "#56B4E9", "#009E73", "#E69F00"
VERMILLION, PURPLE, YELLOW = "#D55E00", "#7A1E5E", "#F9F3B0"
INK, MUTED, GREY, PALE, FAINT = "#222222", "#5F5F5F", "#A3A3A3", "#DDDDDA", "#EDEDEA"
PAPER, WHITE, BLACK = "#FBFBF8", "#FFFFFF", "#111111"

ACCURACY, TRAIN, LOSS, TASK = BLUE, SKY, INK, GREY
ZEROS, CHANNELS, COEFFICIENT, BITS = GREEN, PURPLE, VERMILLION, INK
ALIVE, DEAD = BLUE, GREY
STAIRS, WEIGHTS, DEAD_ZONE, RANGE, MARK = BLUE, SKY, YELLOW, PURPLE, ORANGE
PRUNED = ORANGE
RUNS = (BLUE, ORANGE, PURPLE, SKY, INK, GREY)
RUN_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1)), "-")
"""Colour and line of the first six runs in a comparison; they repeat after that."""
DASHED = (0, (2.5, 1.2))
"""Dashes of which the short line in a legend shows more than one."""

DEPTH = LinearSegmentedColormap.from_list("depth", ["#16325C", "#0072B2", "#56B4E9", "#7CCBA8", "#EBC83A"])
"""Colours of layers from the first (dark) to the last (bright); lightness rises throughout."""
LIVENESS = ListedColormap([BLACK, WHITE], name="liveness")
"""0 dead is black, 1 alive is white."""
BALANCED = LinearSegmentedColormap.from_list(
    "balanced", [(0.0, VERMILLION), (0.5, f"{VERMILLION}00"), (0.5, f"{BLUE}00"), (1.0, BLUE)]
)
"""Activations: negative orange, 0 the ground, light or dark, positive blue."""
SIGNED = LinearSegmentedColormap.from_list(
    "signed", [(0.0, VERMILLION), (0.5, f"{VERMILLION}59"), (0.5, f"{BLUE}59"), (1.0, BLUE)]
).with_extremes(bad="none", over=f"{GREY}57")
"""Weights: negative orange, positive blue, and clearly coloured however small; zeros are masked, hence blank."""

TEXT, TITLE = 11.0, 13.5
PERCENT = "{x:g} %"  # ticks of an axis whose data are per cent (0 to 100)
FULL = 103.0  # upper end of an axis of per cents: a mark at 100 % is whole

LOOK = Path(__file__).with_name("codeq.mplstyle")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Run `draw` under this style and return its figure; matplotlib's settings are then as they were before."""

    @wraps(draw)
    def run(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.style.context(["default", LOOK]):
            figure = draw(*args, **kwargs)
            for axes in figure.axes:  # ticks are made late, outside this style: tell each axes its size now
                axes.tick_params(labelsize=TEXT, width=0.8)
        return figure

    return run


def canvas(title: str, subtitle: str, alt: str, *, height: float, **pads: float) -> Figure:
    """An empty figure: its takeaway at the top left, the subtitle in grey below, and `height` inches for the rest.

    Both are wrapped at the figure's edge; a number stays with its unit ("92.8 %"), and a last line has three words.
    alt: what the figure shows, with its numbers, in sentences; kept as its label. pads: of the constrained layout.
    """
    space = "\N{NO-BREAK SPACE}"
    title, subtitle = (
        space.join(re.sub(r"(?<=\d) (?=%|million|billion)", space, text).rsplit(" ", 2)).replace("$", r"\$")
        for text in (title, subtitle)
    )
    engine = ConstrainedLayoutEngine()
    figure = Figure(figsize=(WIDTH, height), dpi=2 * SCREEN_DPI, layout=engine)  # lines break as in the PNG
    figure.set_label(alt)
    look: dict[str, Any] = {"wrap": True, "va": "top", "parse_math": True}  # wrapping knows only escaped dollar signs
    parts = [
        figure.text(0.018, 0.5, title, fontsize=TITLE, fontweight="bold", **look),
        figure.text(0.018, 0.5, subtitle, color=MUTED, **look),
    ]
    heights = [part.get_window_extent().height / figure.dpi for part in parts]
    total = height + 0.2 + sum(heights)
    figure.set_figheight(total)
    for part, above in zip(parts, (0.11, 0.15 + heights[0]), strict=True):
        part.set_y(1 - above / total)
    engine.set(rect=(0.0, 0.0, 1.0, height / total), **pads)
    return figure


def percent(share: float, digits: int = 1) -> str:
    """0.527 -> '52.7 %'."""
    return f"{100 * share:.{digits}f} %"


def epoch_axis(axes: Axes, epochs: int) -> None:
    """The x-axis of a run: all planned epochs from the start, so that nothing jumps while it fills."""
    last = max(epochs, 2)
    ticks = MaxNLocator(nbins=6 if last < 100 else 4, steps=[1, 2, 5, 10], integer=True).tick_values(0, last)
    axes.set_xticks([max(int(tick), 1) for tick in ticks if tick <= last])
    axes.set(xlim=(0.5, last + 0.5), xlabel="epoch")


def epoch_line(axes: Axes, values: ArrayLike, **look: Any) -> None:
    """A line over the epochs from 1 on, with a dot for each while the dots can be told apart. values: (E,)."""
    values = np.asarray(values)
    few = len(values) <= 40
    look = {"lw": 2.2 if few else 1.4, "marker": "." if few else "", **look}
    axes.plot(np.arange(1, len(values) + 1), values, **look)


def right_axis(axes: Axes, label: str, color: str) -> Axes:
    """A second y-axis at the right whose label, ticks and spine have the colour of its line."""
    twin = axes.twinx()
    twin.grid(False)
    twin.set_ylabel(label, color=color)
    twin.tick_params(axis="y", colors=color)
    twin.spines["right"].set(visible=True, color=color)
    twin.spines["left"].set_visible(False)
    return twin


def legend_above(
    axes: Axes, *others: Axes, columns: int = 3, handles: Sequence[Any] | None = None, **look: Any
) -> None:
    """The legend in `columns` columns above the axes, where it can hide no data.

    others: twins whose lines it names too. handles: what it names instead of the lines.
    """
    items = handles or [handle for each in (axes, *others) for handle in each.get_legend_handles_labels()[0]]
    axes.legend(handles=items, ncols=columns, loc="lower left", bbox_to_anchor=(0, 1), **look)


def legend_below(figure: Figure, *panels: Axes, columns: int) -> None:
    """The legend of several panels, in `columns` columns below them: what `panels` have labelled."""
    items = [handle for axes in panels for handle in axes.get_legend_handles_labels()[0]]
    figure.legend(handles=items, ncols=columns, loc="outside lower left", borderaxespad=0.8)


def png_bytes(figure: Figure, *, limit: int = MAX_PNG_BYTES, quick: bool = False) -> bytes:
    """A figure as PNG at twice the screen's resolution, or at less where it would exceed `limit` bytes.

    A chart is stored with a palette of 256 colours, which halves its size; photographs, which need more, keep all.
    quick: at the screen's own, in all colours, hardly compressed and without a limit, in a fraction of the time.
    """
    data = b""
    for scale in (1.0,) if quick else (2.0, 1.75, 1.5, 1.25, 1.0, 0.75):
        figure.set_dpi(scale * SCREEN_DPI)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        buffer = io.BytesIO()
        image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        (image if quick else _with_palette(image)).save(buffer, "PNG", compress_level=1 if quick else 6)
        data = buffer.getvalue()
        if quick or len(data) <= limit:
            break
    return data


def _with_palette(image: Image.Image) -> Image.Image:
    """In 256 colours where these differ from all by less than 0.7 of 255 on average: large areas stay as they are.

    The first method keeps rare colours apart, the second one common colours that are alike, such as white and paper.
    """
    for method in (Image.Quantize.MAXCOVERAGE, Image.Quantize.MEDIANCUT):
        reduced = image.quantize(256, method=method, dither=Image.Dither.NONE)
        difference = ImageChops.difference(image, reduced.convert("RGB"))
        if max(ImageStat.Stat(difference).mean) < 0.7:
            return reduced
    return image


def wash(color: str, share: float = 0.28) -> str:
    """A thin coat of a colour, in CSS: text of the theme's own colour is readable on it, light or dark."""
    red, green, blue = (round(255 * part) for part in to_rgb(color))
    return f"rgba({red}, {green}, {blue}, {share:g})"


def result_css(status: str) -> str:
    """How a table shows what passed and what failed, in both themes."""
    failed = f"background-color: {wash(VERMILLION)}; font-weight: bold"
    washes = {"passed": GREEN, "unusual": ORANGE}
    return failed if status == "FAILED" else f"background-color: {wash(washes[status])}" if status in washes else ""


def plain_table(rows: Iterable[Mapping[str, object]]) -> Styler:
    """A small table of texts, a mapping from column to text for each row; no row numbers."""
    styled = pd.DataFrame(list(rows)).style.hide(axis="index").set_properties(**{"text-align": "left"})
    return styled.set_table_styles([{"selector": "th", "props": "text-align: left"}])


def names_left(styled: Styler) -> Styler:
    """The first column of a table of numbers, which says what they are numbers of, starts at the left."""
    styled = styled.set_properties(subset=[styled.columns[0]], **{"text-align": "left"})
    return styled.set_table_styles([{"selector": "th.col0", "props": "text-align: left"}], overwrite=False)

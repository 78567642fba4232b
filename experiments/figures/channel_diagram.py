"""The diagram of a channel group: what must be zero together in a residual network so that one channel can go.

Coordinates are tenths of an inch, y upwards. A weight is drawn as a matrix with one row a filter (output channel) and
one column an input channel; a cell is a k x k kernel. One colour is one group: INNER, STREAM; the rest is IDLE.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from experiments.figures import style

WIDE, HIGH = 64.0, 96.0
INNER, STREAM, IDLE = style.ORANGE, style.BLUE, "#E4E4E0"


@style.styled
def channel_group_diagram() -> Figure:
    """What must be zero together in a residual network so that one channel can go: an inner and a stream channel.

    A weight is drawn as a matrix with one row a filter (output channel) and one column an input channel; a cell is
    a k x k kernel. The numbers of channels are made small: 4 in stage 1, 8 in stage 2.
    """
    key = "weights: a row is a filter, a column an input channel, a cell a k × k kernel; in colour: one channel's group"
    figure = style.canvas(
        "A channel is removed as one group: all that writes it and all that reads it", key, height=HIGH / 10
    )
    axes = figure.subplots()
    axes.set(xlim=(0, WIDE), ylim=(0, HIGH), aspect="equal")
    axes.axis("off")
    _inner_group(axes)
    _stream_in_stage_1(axes)
    _stream_into_stage_2(axes)
    alt = (
        "Diagram of two channel groups in a residual network; weights are matrices with a row for each filter and a "
        "column for each input channel. 1: an inner channel of a block is row c of conv1, scale and shift c of its "
        "BatchNorm and column c of conv2. 2: a channel of the residual stream is row c of the stem and of conv2 in "
        "every block of the stage, with their BatchNorm scales and shifts, and column c of every convolution that "
        "reads the stream; the option-A shortcut carries it on as channel c + planes/4 of the next stage."
    )
    return style.finish(figure, alt)


def _inner_group(axes: Axes) -> None:
    """Panel 1: conv1 row c, its BatchNorm, conv2 column c."""
    note = "conv1 writes it, conv2 alone reads it: in stage 1 of ResNet-20 the group is 144 + 2 + 144 = 290 numbers"
    top = _heading(axes, HIGH - 0.5, "1  A channel inside a block", note) - 2.6
    cell = 2.2
    row, bottom, middle = top - 1.5 * cell, top - 4 * cell, top - 2 * cell
    _arrow(axes, (0.5, middle), (6.4, middle), style.GREY)
    _text(axes, (0.3, middle + 0.8), "stream", color=style.MUTED)
    _matrix(axes, (7, top), 4, 4, cell, INNER, row=1, label="conv1")
    _arrow(axes, (16.1, row), (19, row), INNER)
    _batch_norm(axes, (19.4, top), 4, cell, INNER, 1, "bn1")
    _arrow(axes, (24.8, row), (28, row), INNER)
    _pill(axes, (31.3, row), "ReLU")
    column = 40 + 1.5 * cell
    _path(axes, [(34.3, row), (37.4, row), (37.4, bottom - 2), (column, bottom - 2), (column, bottom - 0.3)], INNER)
    _matrix(axes, (40, top), 4, 4, cell, INNER, column=1, label="conv2")
    _arrow(axes, (49.1, middle), (52, middle), style.GREY)
    _batch_norm(axes, (52.3, top), 4, cell, IDLE, None, "bn2")
    _arrow(axes, (57.6, middle), (59.6, middle), style.GREY, head=6)
    _plus(axes, (60.9, middle), style.GREY)
    _arrow(axes, (62.3, middle), (WIDE, middle), style.GREY, head=6)
    low = bottom - 8.4
    _path(axes, [(3.2, middle), (3.2, low), (60.9, low), (60.9, middle - 1.5)], style.GREY)
    _text(axes, (32, low + 0.6), "identity shortcut", color=style.MUTED, ha="center")
    _text(axes, (7, bottom - 4.1), "row c: the filter\nthat writes channel c", va="center")
    _text(axes, (WIDE - 6, bottom - 4.6), "column c: the slices\nthat read channel c", va="center", ha="right")


def _stream_in_stage_1(axes: Axes) -> None:
    """Panel 2, above: a channel of the residual stream is written by the stem and through a block of stage 1."""
    note = "the stem and every block write it, every block reads it, and the shortcut carries it on to the next stage"
    y = _heading(axes, 67.5, "2  A channel of the residual stream", note)
    cell, road = 1.7, 40.5
    top = y - 5.8
    _frame(axes, (21.5, top - 4 * cell - 2.6, 37, 4 * cell + 5.6), "each block of stage 1")
    _matrix(axes, (0.5, road + 1.5 * cell), 4, 3, cell, STREAM, row=1, label="stem")
    _arrow(axes, (5.8, road), (8.4, road), STREAM, head=6)
    _batch_norm(axes, (8.8, road + 1.5 * cell), 4, cell, STREAM, 1, "bn1")
    axes.plot([13, 58.4], [road, road], color=STREAM, lw=3.2, solid_capstyle="butt")
    _matrix(axes, (23.5, top), 4, 4, cell, STREAM, column=1, label="conv1")
    _arrow(axes, (23.5 + 1.5 * cell, road), (23.5 + 1.5 * cell, top - 4 * cell - 0.2), STREAM)
    _batch_norm(axes, (33, top), 4, cell, IDLE, None, "bn1")
    _matrix(axes, (40.5, top), 4, 4, cell, STREAM, row=1, label="conv2")
    _batch_norm(axes, (50.5, top), 4, cell, STREAM, 1, "bn2")
    _between(axes, ((30.6, 32.8), (37.3, 40.3)), top - 2 * cell)
    row = top - 1.5 * cell
    _arrow(axes, (47.6, row), (50.2, row), STREAM, head=6)
    _path(axes, [(54.7, row), (59.8, row), (59.8, road + 1.4)], STREAM)
    _plus(axes, (59.8, road), STREAM)
    _arrow(axes, (61.2, road), (WIDE, road), STREAM, width=3.2, head=7)
    _text(axes, (36, road - 2.6), "stream channel c", color=STREAM, weight="bold", ha="center")


def _stream_into_stage_2(axes: Axes) -> None:
    """Panel 2, below: through the first block of stage 2, with twice the channels, and the shortcut beside it."""
    cell, road, top = 1.45, 8.0, 27.5
    _frame(axes, (7.5, top - 8 * cell - 2.6, 44, 8 * cell + 5.6), "first block of stage 2")
    axes.plot([0.5, 16.5], [road, road], color=STREAM, lw=3.2, solid_capstyle="butt")
    _matrix(axes, (9.5, top), 8, 4, cell, STREAM, column=1, label="conv1")
    _arrow(axes, (9.5 + 1.5 * cell, road), (9.5 + 1.5 * cell, top - 8 * cell - 0.2), STREAM)
    _batch_norm(axes, (18.5, top), 8, cell, IDLE, None, "bn1")
    _matrix(axes, (26.5, top), 8, 8, cell, STREAM, row=3, label="conv2")
    _batch_norm(axes, (42.5, top), 8, cell, STREAM, 3, "bn2")
    _between(axes, ((15.6, 18.2), (22.2, 26.2)), top - 4 * cell)
    row = top - 3.5 * cell
    _arrow(axes, (38.4, row), (42.2, row), STREAM)
    _path(axes, [(46.2, row), (55.5, row), (55.5, road + 1.4)], STREAM)
    _plus(axes, (55.5, road), STREAM)
    _shortcut(axes, 17, road)
    axes.plot([32.2, 54.1], [road, road], color=STREAM, lw=3.2, solid_capstyle="butt")
    _arrow(axes, (56.9, road), (WIDE, road), STREAM, width=3.2, head=7)
    _text(axes, (35, road - 2.7), "channel c + planes/4,", color=STREAM, weight="bold")
    _text(axes, (35, road - 4.9), "on to stage 3 and linear", color=style.MUTED)


def _heading(axes: Axes, y: float, title: str, note: str) -> float:
    """A panel's title with the note below it; gives back where they end."""
    _text(axes, (0, y), title, weight="bold", va="top")
    for line in style.wrapped(note, style.WIDTH, style.SMALL):
        y -= 2.2
        _text(axes, (0, y), line, color=style.MUTED, va="top")
    return y - 2.2


def _text(axes: Axes, place: tuple[float, float], text: str, **look: Any) -> None:
    axes.text(*place, text, **{"fontsize": style.SMALL, "color": style.INK, **look})


def _shortcut(axes: Axes, x: float, y: float) -> None:
    """Option A: four channels become eight, two zeros on each side, so that channel 1 becomes channel 3."""
    cell = 1.15
    for i in range(4):
        _cell(axes, x, y + (1 - i) * cell + cell / 2, cell, STREAM if i == 1 else IDLE)
    for i in range(8):
        color = STREAM if i == 3 else IDLE if i in (2, 4, 5) else style.PAPER
        _cell(axes, x + 13.8, y + (3 - i) * cell + cell / 2, cell, color, style.GREY if color == style.PAPER else None)
    for i in range(4):
        ends = [x + cell + 0.2, x + 13.6]
        color, width = (STREAM, 3.2) if i == 1 else (style.GREY, 1.0)
        axes.plot(ends, [y + (1 - i) * cell] * 2, color=color, lw=width, solid_capstyle="butt")
    _text(axes, (x - 3.5, y - 5.0), "shortcut, option A:\nzeros on both sides", ha="left", va="center")


def _matrix(
    axes: Axes, corner: tuple[float, float], rows: int, columns: int, cell: float, color: str, *,
    row: int | None = None, column: int | None = None, label: str = "",
) -> None:  # fmt: skip
    """A weight from its top left corner: one cell a kernel, one row and/or one column in colour and marked."""
    x, y = corner
    for i in range(rows):
        for j in range(columns):
            _cell(axes, x + j * cell, y - i * cell, cell, color if i == row or j == column else IDLE)
    axes.text(x + columns * cell / 2, y + 0.6, label, fontsize=style.SMALL, ha="center", fontweight="bold")


def _batch_norm(
    axes: Axes, corner: tuple[float, float], rows: int, cell: float, color: str, row: int | None, label: str
) -> None:
    """Scale and shift, one cell a channel."""
    x, y = corner
    for j, sign in enumerate("γβ"):
        left = x + j * 1.3 * cell
        for i in range(rows):
            _cell(axes, left, y - i * cell, cell, color if i == row else IDLE)
        axes.text(
            left + cell / 2,
            y - rows * cell - 0.35,
            sign,
            fontsize=style.SMALL,
            ha="center",
            va="top",
            color=style.MUTED,
        )
    axes.text(x + 1.15 * cell, y + 0.6, label, fontsize=style.SMALL, ha="center", fontweight="bold")


def _cell(axes: Axes, x: float, y: float, size: float, color: str, edge: str | None = None) -> None:
    box = Rectangle((x, y - size), size, size, facecolor=color, edgecolor=edge or style.PAPER, lw=0.8 if edge else 1.3)
    axes.add_patch(box)


def _pill(axes: Axes, center: tuple[float, float], text: str) -> None:
    x, y = center
    box = FancyBboxPatch((x - 2.8, y - 1.1), 5.6, 2.2, boxstyle="round,pad=0.2,rounding_size=1", fc=IDLE, ec="none")
    axes.add_patch(box)
    axes.text(x, y, text, fontsize=style.SMALL, ha="center", va="center")


def _frame(axes: Axes, box: tuple[float, float, float, float], label: str) -> None:
    x, y, width, height = box
    patch = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=1.2", fc=style.WHITE, ec=style.PALE
    )
    axes.add_patch(patch)
    axes.text(x + 0.6, y + height + 0.5, label, fontsize=style.SMALL, color=style.MUTED)


def _plus(axes: Axes, center: tuple[float, float], color: str) -> None:
    axes.plot(*center, marker="o", ms=14, mfc=style.PAPER, mec=color, mew=2, zorder=3)
    axes.plot(*center, marker="+", ms=8, color=color, mew=2, zorder=4)


def _between(axes: Axes, spans: Sequence[tuple[float, float]], y: float) -> None:
    for left, right in spans:
        _arrow(axes, (left, y), (right, y), style.GREY, head=5)


def _arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str, *, width: float = 1.8, head: float = 9
) -> None:
    arrow = FancyArrowPatch(
        start, end, arrowstyle="-|>", mutation_scale=head, color=color, lw=width, shrinkA=0, shrinkB=0
    )
    axes.add_patch(arrow)


def _path(axes: Axes, points: Sequence[tuple[float, float]], color: str) -> None:
    """A line with corners that ends in an arrow."""
    x, y = zip(*points[:-1], strict=True)
    axes.plot(x, y, color=color, lw=1.8, solid_joinstyle="round")
    _arrow(axes, points[-2], points[-1], color)

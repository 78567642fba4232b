"""The diagram of a channel group: what must be zero together in a residual network so that one channel can go.

Coordinates are tenths of an inch, y upwards. A weight is drawn as a matrix with one row a filter (output channel) and
one column an input channel; a cell is a k x k kernel. One colour is one group: INNER, STREAM; the rest is IDLE.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from experiments import style

INNER, STREAM, IDLE = style.ORANGE, style.BLUE, "#E4E4E0"


@style.styled
def channel_group_diagram() -> Figure:
    """What must be zero together in a residual network so that one channel can go: an inner and a stream channel.

    A weight is drawn as a matrix with one row a filter (output channel) and one column an input channel; a cell is
    a k x k kernel. The numbers of channels are made small: 4 in stage 1, 8 in stage 2.
    """
    key = "weights: a row is a filter, a column an input channel, a cell a k × k kernel; in colour: one channel's group"
    figure = style.canvas(
        "A channel is removed as one group: all that writes it and all that reads it", key, height=7.0
    )
    axes = figure.subplots()
    axes.set(xlim=(0, 90), ylim=(0, 64), aspect="equal")
    axes.axis("off")
    _inner_group(axes)
    _stream_group(axes)
    alt = (
        "Diagram of two channel groups in a residual network; weights are matrices with a row for each filter and a "
        "column for each input channel. 1: an inner channel of a block is row c of conv1, scale and shift c of its "
        "BatchNorm and column c of conv2. 2: a channel of the residual stream is row c of the stem and of conv2 in "
        "every block of the stage, with their BatchNorm scales and shifts, and column c of every convolution that "
        "reads the stream; the option-A shortcut carries it on as channel c + planes/4 of the next stage."
    )
    return style.finish(figure, alt)


def _inner_group(axes: Axes) -> None:
    """Panel 1: conv1 row c, its BatchNorm, conv2 column c. Coordinates are tenths of an inch, y upwards."""
    note = "conv1 writes it, conv2 alone reads it: in stage 1 of ResNet-20 the group is 144 + 2 + 144 = 290 numbers"
    axes.text(0, 63, "1  A channel inside a block", fontsize=11, fontweight="bold", color=style.INK)
    axes.text(0, 60.6, note, fontsize=9.5, color=style.MUTED)
    cell, top = 2.5, 55.0
    row, bottom, middle = top - 1.5 * cell, top - 4 * cell, top - 2 * cell
    _arrow(axes, (1, middle), (9.4, middle), style.GREY)
    axes.text(1, middle + 0.7, "stream", fontsize=9, color=style.MUTED)
    _matrix(axes, (10, top), 4, 4, cell, INNER, row=1, label="conv1")
    _arrow(axes, (20.4, row), (25.4, row), INNER)
    _batch_norm(axes, (26, top), 4, cell, INNER, 1, "bn1")
    _arrow(axes, (32.2, row), (37.4, row), INNER)
    _pill(axes, (40.6, row), "ReLU")
    column = 56 + 1.5 * cell
    _path(axes, [(43.5, row), (52, row), (52, bottom - 2.2), (column, bottom - 2.2), (column, bottom - 0.3)], INNER)
    _matrix(axes, (56, top), 4, 4, cell, INNER, column=1, label="conv2")
    _arrow(axes, (66.4, middle), (69.8, middle), style.GREY)
    _batch_norm(axes, (70.4, top), 4, cell, IDLE, None, "bn2")
    _arrow(axes, (76.6, middle), (80, middle), style.GREY)
    _plus(axes, (81.6, middle), style.GREY)
    _arrow(axes, (83.2, middle), (89, middle), style.GREY)
    _path(axes, [(4.5, middle), (4.5, bottom - 5.4), (81.6, bottom - 5.4), (81.6, middle - 1.6)], style.GREY)
    axes.text(80.6, bottom - 4.7, "identity shortcut", fontsize=9, color=style.MUTED, ha="right")
    axes.text(10, bottom - 2.0, "row c: the filter\nthat writes channel c", fontsize=9, va="center")
    axes.text(51.2, bottom + 0.2, "column c: the slices\nthat read channel c", fontsize=9, va="center", ha="right")


def _stream_group(axes: Axes) -> None:
    """Panel 2: a channel of the residual stream, through one block of stage 1 and into stage 2."""
    axes.text(0, 36.4, "2  A channel of the residual stream", fontsize=11, fontweight="bold", color=style.INK)
    note = "the stem and every block write it, every block reads it, and the shortcut carries it on"
    axes.text(0, 34.0, note, fontsize=9.5, color=style.MUTED)
    cell, road, middle = 1.45, 8.0, 21.5
    _frame(axes, (14.3, 13.6, 25.6, 16.6), "each block of stage 1")
    _frame(axes, (43.4, 13.6, 36.2, 16.6), "first block of stage 2")
    _matrix(axes, (1, road + 1.5 * cell), 4, 3, cell, STREAM, row=1, label="stem")
    _arrow(axes, (5.6, road), (7.6, road), STREAM)
    _batch_norm(axes, (8, road + 1.5 * cell), 4, cell, STREAM, 1, "bn1")
    axes.plot([11.6, 52.5], [road, road], color=STREAM, lw=3.2, solid_capstyle="butt")
    # a block of stage 1
    top = middle + 2 * cell
    _matrix(axes, (16, top), 4, 4, cell, STREAM, column=1, label="conv1")
    _arrow(axes, (16 + 1.5 * cell, road), (16 + 1.5 * cell, top - 4 * cell - 0.2), STREAM)
    _batch_norm(axes, (23.3, top), 4, cell, IDLE, None, "bn1")
    _matrix(axes, (28, top), 4, 4, cell, STREAM, row=1, label="conv2")
    _batch_norm(axes, (35.3, top), 4, cell, STREAM, 1, "bn2")
    _between(axes, ((22, 23.1), (26.7, 27.8)), middle)
    _arrow(axes, (33.9, top - 1.5 * cell), (35.1, top - 1.5 * cell), STREAM, head=5)
    _path(axes, [(38.7, top - 1.5 * cell), (41.6, top - 1.5 * cell), (41.6, road + 1.5)], STREAM)
    _plus(axes, (41.6, road), STREAM)
    # the first block of stage 2: twice the channels
    top = middle + 4 * cell
    _matrix(axes, (45, top), 8, 4, cell, STREAM, column=1, label="conv1")
    _arrow(axes, (45 + 1.5 * cell, road), (45 + 1.5 * cell, top - 8 * cell - 0.2), STREAM)
    _batch_norm(axes, (52.3, top), 8, cell, IDLE, None, "bn1")
    _matrix(axes, (57.4, top), 8, 8, cell, STREAM, row=3, label="conv2")
    _batch_norm(axes, (70.6, top), 8, cell, STREAM, 3, "bn2")
    _between(axes, ((51, 52.1), (55.8, 57.2)), middle)
    _arrow(axes, (69.2, top - 3.5 * cell), (70.4, top - 3.5 * cell), STREAM, head=5)
    _path(axes, [(74, top - 3.5 * cell), (81.4, top - 3.5 * cell), (81.4, road + 1.5)], STREAM)
    _plus(axes, (81.4, road), STREAM)
    _shortcut(axes, 53, road)
    axes.plot([68, 79.9], [road, road], color=STREAM, lw=3.2, solid_capstyle="butt")
    _arrow(axes, (82.9, road), (89, road), STREAM, width=3.2)
    axes.text(27, road - 2.4, "stream channel c", fontsize=9.5, color=STREAM, fontweight="bold", ha="center")
    axes.text(69.5, road - 2.4, "channel c + planes/4", fontsize=9.5, color=STREAM, fontweight="bold")
    axes.text(69.5, road - 4.6, "on to stage 3 and linear", fontsize=9, color=style.MUTED)


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
    axes.text(x + 6.7, y - 4.7, "shortcut, option A:\nzeros on both sides", fontsize=9, ha="center", va="center")


def _matrix(
    axes: Axes, corner: tuple[float, float], rows: int, columns: int, cell: float, color: str, *,
    row: int | None = None, column: int | None = None, label: str = "",
) -> None:  # fmt: skip
    """A weight from its top left corner: one cell a kernel, one row and/or one column in colour and marked."""
    x, y = corner
    for i in range(rows):
        for j in range(columns):
            _cell(axes, x + j * cell, y - i * cell, cell, color if i == row or j == column else IDLE)
    axes.text(x + columns * cell / 2, y + 0.6, label, fontsize=9.5, ha="center", fontweight="bold")


def _batch_norm(
    axes: Axes, corner: tuple[float, float], rows: int, cell: float, color: str, row: int | None, label: str
) -> None:
    """Scale and shift, one cell a channel."""
    x, y = corner
    for j, sign in enumerate("γβ"):
        left = x + j * 1.3 * cell
        for i in range(rows):
            _cell(axes, left, y - i * cell, cell, color if i == row else IDLE)
        axes.text(left + cell / 2, y - rows * cell - 0.35, sign, fontsize=9, ha="center", va="top", color=style.MUTED)
    axes.text(x + 1.15 * cell, y + 0.6, label, fontsize=9.5, ha="center", fontweight="bold")


def _cell(axes: Axes, x: float, y: float, size: float, color: str, edge: str | None = None) -> None:
    box = Rectangle((x, y - size), size, size, facecolor=color, edgecolor=edge or style.PAPER, lw=0.8 if edge else 1.3)
    axes.add_patch(box)


def _pill(axes: Axes, center: tuple[float, float], text: str) -> None:
    x, y = center
    box = FancyBboxPatch((x - 2.6, y - 1.1), 5.2, 2.2, boxstyle="round,pad=0.2,rounding_size=1", fc=IDLE, ec="none")
    axes.add_patch(box)
    axes.text(x, y, text, fontsize=9, ha="center", va="center")


def _frame(axes: Axes, box: tuple[float, float, float, float], label: str) -> None:
    x, y, width, height = box
    patch = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=1.2", fc=style.WHITE, ec=style.PALE
    )
    axes.add_patch(patch)
    axes.text(x + 0.6, y + height + 0.5, label, fontsize=9, color=style.MUTED)


def _plus(axes: Axes, center: tuple[float, float], color: str) -> None:
    axes.plot(*center, marker="o", ms=15, mfc=style.PAPER, mec=color, mew=2, zorder=3)
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

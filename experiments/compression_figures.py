"""The picture of a network before and after removal, channel by channel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from experiments import style

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

"""A figure as an SVG for a page: real text, no paper, colours for light and for dark screens, and its lines as numbers.

The dark colours are a style sheet inside the SVG, which a browser also follows where the SVG is an image.
"""

from __future__ import annotations

import colorsys
import io
import re
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from experiments.figures import style

FONTS = "system-ui, 'Segoe UI', Roboto, 'Noto Sans', 'DejaVu Sans', 'Liberation Sans', Arial, sans-serif"
LOOK = {"svg.fonttype": "none", "svg.hashsalt": "codeq", "savefig.facecolor": "none"}
MOST_VALUES = 300  # of a line
CELLS = {style.BLACK: "#000000", style.WHITE: "#98a2b0"}
"""Black cells stay black, and white ones the brighter of the two."""


def svg_text(figure: Figure) -> str:
    """The figure as an SVG file."""
    buffer = io.StringIO()
    with matplotlib.style.context(LOOK):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawn = buffer.getvalue()
    drawn = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path.group()), drawn)
    drawn = re.sub(r"'DejaVu Sans'[^;\"]*", FONTS, drawn[drawn.index("<svg") :])
    return drawn.replace("</defs>", f"{_dark_rules(drawn)}</defs>", 1)


def dark(color: str) -> str:
    """The colour of a dark screen for a colour on white: greys and tints turned over, deep colours made brighter."""
    if color.upper() in CELLS:
        return CELLS[color.upper()]
    red, green, blue = to_rgb(color)
    hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
    grey, tint = max(red, green, blue) - min(red, green, blue) < 0.1, lightness > 0.8
    if grey or tint:
        return to_hex(colorsys.hls_to_rgb(hue, 1 - 0.88 * lightness, 0.0 if grey else 0.5 * saturation))
    return to_hex(colorsys.hls_to_rgb(hue, max(lightness, 0.55), saturation))


def hover_values(figure: Figure) -> list[dict[str, Any]]:
    """The labelled lines of every chart by epoch, for a page that shows the values under the pointer.

    Of each chart: box, its left, top, width and height as shares of the figure's; limits of the x-axis; lines, each a
    name, its unit, its x and its y. Twins are one chart. The figure must have been drawn, which places its charts.
    """
    charts: dict[tuple[float, ...], dict[str, Any]] = {}
    for axes in figure.axes:
        lines = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
        lines = [line for line in lines if np.size(line.get_xdata()) > 1]
        if not lines or not _by_epoch(axes):
            continue
        place = axes.get_position()
        box = tuple(round(float(part), 4) for part in (place.x0, 1 - place.y1, place.width, place.height))
        chart = charts.setdefault(box, {"box": box, "limits": axes.get_xlim(), "lines": []})
        unit = " %" if getattr(axes.yaxis.get_major_formatter(), "fmt", "") == style.PERCENT else ""
        for line in lines:
            every = -(-np.size(line.get_xdata()) // MOST_VALUES)
            values = [float(f"{value:.4g}") for value in np.asarray(line.get_ydata(), dtype=float)[::every]]
            epochs = np.asarray(line.get_xdata())[::every].tolist()
            name = str(line.get_label()).removesuffix(" (right)")
            chart["lines"].append({"name": name, "unit": unit, "x": epochs, "y": values})
    return list(charts.values())


def _by_epoch(axes: Axes) -> bool:
    twins = axes.get_shared_x_axes().get_siblings(axes)
    return any(twin.get_xlabel() == "epoch" for twin in twins)


def _dark_rules(drawn: str) -> str:
    """A style sheet; matplotlib leaves out the colour of what is black."""
    rules = [f"text{{fill:{dark(style.INK)}}}"]
    for color in sorted(set(re.findall("#[0-9a-f]{6}", drawn))):
        for part in ("fill", "stroke"):
            rules.append(f'[style*="{part}: {color}"],[{part}="{color}"]{{{part}:{dark(color)}!important}}')
    return f"<style>@media (prefers-color-scheme: dark){{{''.join(rules)}}}</style>"

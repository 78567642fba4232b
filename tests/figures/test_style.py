"""The visual language: colours that everyone can tell apart, text that a phone can show, sizes that stay bounded.

Colour vision is simulated with the matrices of Machado, Oliveira and Fernandes (2009) for severity 1.0, on linear RGB;
distances are CIELAB delta E 1976 under D65. About 2.3 is a just noticeable difference between large patches side by
side; lines and small cells that are not adjacent need far more, and 20 is asked of every pair here.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

import matplotlib
import numpy as np
import pytest
from matplotlib import colors as mcolors
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from experiments import figures
from experiments.figures import ImageTrace, Stage, style
from src.runs import EDGES, LayerSnapshot
from src.training import History, LayerRecord
from tests.histories import NAMES, make_history

LEAST_DIFFERENCE = 20.0
PHONE = 390  # CSS pixels
LEAST_TEXT = 9.0  # CSS pixels

TOGETHER = {
    "accuracy": (style.ACCURACY, style.TRAIN, style.MUTED),
    "loss": (style.LOSS, style.TASK, style.ACCURACY),
    "sparsity": (style.ZEROS, style.CHANNELS, style.COEFFICIENT),
    "channels": (style.ALIVE, style.DEAD),
    "fates of channels": (style.BLUE, style.BLACK, style.ORANGE, style.GREY, style.FAINT),
    "staircase and weights": (style.STAIRS, style.WEIGHTS, style.DEAD_ZONE, style.RANGE, style.PRUNED, style.INK),
    "course of a layer": (style.ZEROS, style.BITS, style.MARK),
    "liveness and the marked epoch": (style.BLACK, style.WHITE, style.MARK),
    "quantized or not": (style.BLUE, style.ORANGE),
    "networks": (style.SKY, style.BLUE, style.BLACK),
    "runs": style.RUNS,
}
"""Colours that must be told apart because one figure uses them side by side."""

VISION = {
    "full": np.eye(3).ravel(),
    "no red cones": [0.152286, 1.052583, -0.204868, 0.114503, 0.786281, 0.099216, -0.003882, -0.048116, 1.051998],
    "no green cones": [0.367322, 0.860646, -0.227968, 0.280085, 0.672501, 0.047413, -0.011820, 0.042940, 0.968881],
    "no blue cones": [1.255528, -0.076749, -0.178779, -0.078411, 0.930809, 0.147602, 0.004733, 0.691367, 0.303900],
}
TO_XYZ = [0.4124564, 0.3575761, 0.1804375, 0.2126729, 0.7151522, 0.0721750, 0.0193339, 0.1191920, 0.9503041]
"""Matrices on linear RGB, row by row."""


def linear(color: object) -> np.ndarray:
    rgb = np.array(mcolors.to_rgb(color))  # type: ignore[arg-type]
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(color: object, vision: str = "full") -> np.ndarray:
    """CIELAB of a colour as `vision` has it, D65 white."""
    rgb = np.reshape(VISION[vision], (3, 3)) @ linear(color)
    ratio = np.reshape(TO_XYZ, (3, 3)) @ np.clip(rgb, 0, 1) / np.array([0.95047, 1.0, 1.08883])
    f = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("use", TOGETHER)
def test_colours_of_one_figure_can_be_told_apart(use: str, vision: str) -> None:
    for one, other in combinations(TOGETHER[use], 2):
        found = np.linalg.norm(lab(one, vision) - lab(other, vision))
        assert found >= LEAST_DIFFERENCE, f"{use}: {one} and {other} differ by {found:.1f} with {vision}"


def series(count: int, history: History) -> list[figures.Series]:
    costs = 1 / (1 + 20 * np.linspace(0.1, 0.9, len(history)))
    return [figures.Series(f"debug_output/previous/{number}", history, costs) for number in range(count)]


W = np.linspace(-1.2, 1.2, 501)
Q = np.where(np.abs(W) <= 0.25, 0.0, np.sign(W) * 0.5)
SHORT, LONG, DEEP = make_history(20), make_history(3000, 3000), make_history(30, 30)
MANY = tuple(LayerRecord(f"{NAMES[i // 6]}{i % 6}", 8.0 - i % 3, 0.1, 0.5, (i % 4 == 0,) * 16) for i in range(108))
DEEP.records = [replace(record, layers=MANY) for record in DEEP]
SUBTITLE = "resnet20 on handwritten digits (stand-in for CIFAR-10), 512 training images; preset smoke, seed 0"
IMAGES = np.random.default_rng(0).integers(0, 255, (16, 3, 32, 32), dtype=np.uint8)


def snapshot(epoch: int) -> LayerSnapshot:
    counts = np.full(len(EDGES) + 1, 7)
    return LayerSnapshot("layer3.2.conv2", epoch, counts, 0.03, 0.015, 6, 0.928, np.arange(64) < 53)


def trace() -> ImageTrace:
    """Three networks of which the first answers another class; three of eight channels are gone."""
    classes = ("automobile", "airplane", *(f"class {i}" for i in range(8)))
    scores = {"float": np.eye(10)[1], "quantized": np.eye(10)[0], "compacted": np.eye(10)[0]}
    maps = {name: np.zeros((8, 8, 8)) for name in scores}
    maps["compacted"][:3] = np.nan
    stage = Stage("layer3.2.conv1", "layer3.2.bn1", 64, np.arange(3, 64))
    return ImageTrace(9999, IMAGES[0], 0, classes, stage, np.arange(8), scores, maps)


FIGURES: dict[str, Callable[[], Figure]] = {
    "dashboard": lambda: figures.dashboard(SHORT, coefficient_plan=[0.0] * 20, subtitle=SUBTITLE),
    "dashboard, long": lambda: figures.dashboard(LONG, coefficient_plan=[0.1] * 3000, subtitle=SUBTITLE),
    "accuracy": lambda: figures.accuracy_curve(SHORT, subtitle=SUBTITLE, chance=0.1),
    "sparsity, long": lambda: figures.sparsity_curves(LONG),
    "liveness": lambda: figures.channel_liveness(SHORT.last.layers, subtitle=SUBTITLE),
    "liveness, deep": lambda: figures.channel_liveness(DEEP.last.layers),
    "channels": lambda: figures.per_layer_channels(SHORT.last.layers),
    "channels, deep": lambda: figures.per_layer_channels(DEEP.last.layers),
    "sparsity bars": lambda: figures.layer_sparsity_bars(NAMES, [0.5] * 18, [0.1] * 18),
    "sparsity bars, deep": lambda: figures.layer_sparsity_bars([f"l{i}" for i in range(108)], [0.5] * 108, [0.1] * 108),
    "kernel map": lambda: figures.sparsity_map(np.random.default_rng(0).normal(size=(64, 64, 3, 3)), "layer3.2.conv2"),
    "wide kernel map": lambda: figures.sparsity_map(np.ones((8, 64, 3, 3)), "layer3.2.conv2"),
    "before and after": lambda: figures.before_after(NAMES, [2_000_000] * 18, [1_000_000] * 18),
    "images": lambda: figures.image_grid(IMAGES, [0] * 16, ["automobile"], title="CIFAR-10", subtitle=SUBTITLE),
    "augmentation": lambda: figures.augmentation_grid(IMAGES[:3], [IMAGES[:3]] * 5),
    "family": lambda: figures.staircase_family([("d/2 = 50% of R", W, Q)] * 3, [("2 bits", W, Q)] * 3),
    "explorer": lambda: figures.staircase_explorer_figure(("", W, Q), W, Q, 2, 0.25, subtitle=SUBTITLE),
    "decay": lambda: figures.decay_forms(W, {"decoupled decay": W, "squares in the loss": W}, {"squares": Q}),
    "layer": lambda: figures.layer_figure(snapshot(8), [snapshot(i) for i in range(20)], subtitle=SUBTITLE),
    "image": lambda: figures.image_figure(trace()),
    "runs": lambda: figures.run_curves(series(3, SHORT)),
    "plane, long": lambda: figures.run_plane(series(12, LONG)),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_fits_a_phone_a_page_and_its_own_edges(name: str) -> None:
    figure = FIGURES[name]()
    width, height = (float(side) for side in figure.get_size_inches())
    assert width == style.WIDTH, "one width for all: nothing jumps"
    assert height < 12, "inches"
    data = figures.png_bytes(figure)
    assert len(data) <= style.MAX_PNG_BYTES
    assert Image.open(io.BytesIO(data)).width >= 1.2 * width * style.SCREEN_DPI, "crisp, not shrunk to fit the limit"
    texts = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text() and text.get_visible()]
    smallest = min(texts, key=lambda text: text.get_fontsize())
    pixels = smallest.get_fontsize() / 72 * PHONE / width
    assert pixels >= LEAST_TEXT, f"{smallest.get_text()!r} has {pixels:.1f} pixels on a phone"
    ticks = {label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for label in axis.get_ticklabels()}
    for part in set(texts) - ticks:
        box = part.get_window_extent()
        inside = box.x0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y0 >= -1 and box.y1 <= figure.bbox.y1 + 1
        assert inside, f"{part.get_text()!r} is cut off"
    assert figure.get_label().endswith("."), "alt text in sentences"
    assert len(figure.get_label()) > 40
    long = [line for line in figure.findobj(Line2D) if len(line.get_xdata()) > 1000]
    assert all(line.get_marker() in ("", "None") for line in long), "no mark for each epoch of a long run"


def test_png_of_photographs_keeps_its_colours_and_stays_under_the_limit() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    figure = Figure(figsize=(3, 3))
    figure.add_axes((0, 0, 1, 1)).imshow(noise, interpolation="nearest", aspect="auto")
    large = figures.png_bytes(figure, limit=10**9)
    assert Image.open(io.BytesIO(large)).mode == "RGB"
    small = figures.png_bytes(figure, limit=len(large) - 1)
    assert len(small) < len(large)
    assert Image.open(io.BytesIO(small)).width < Image.open(io.BytesIO(large)).width


def test_a_long_title_gets_its_lines_and_numbers_keep_their_units() -> None:
    text = "93.9 % of the weights are zero and 51 of the 14.6 million filters in this layer are dead"
    short, long = (style.canvas(title, "subtitle", "alt", height=3) for title in ("short", text))
    line = 1.2 * style.TITLE / 72  # inches
    assert long.get_figheight() - short.get_figheight() == pytest.approx(line, rel=0.2)
    axes = long.subplots()
    figures.png_bytes(long)
    title, subtitle = (part.get_window_extent() for part in long.texts)
    assert title.y0 > subtitle.y1 > subtitle.y0 > axes.bbox.y1, "nothing is written over anything"
    assert title.x1 <= long.bbox.x1
    for whole in ("93.9 %", "14.6 million", "layer are dead"):
        assert whole.replace(" ", "\N{NO-BREAK SPACE}") in long.texts[0].get_text()


@pytest.mark.parametrize("name", ["a$b_$c", "Ba$$in", r"$\frac$", r"US\$ 5_0 to US$ 10 and $\frac$ more"])
def test_names_are_drawn_as_they_are_written(name: str) -> None:
    """Not as formulas: everywhere as wide as with digits for the dollars, which are of one width in this font."""

    def widths(name: str) -> list[float]:
        figure = figures.image_grid(np.zeros((2, 3, 8, 8), np.uint8), [0, 1], [name, "b"], title=name, subtitle=name)
        figures.png_bytes(figure)
        return [text.get_window_extent().width for text in figure.findobj(matplotlib.text.Text)]

    np.testing.assert_allclose(widths(name), widths(name.replace("$", "0")), atol=1.5)


def test_no_word_of_a_subtitle_is_left_alone_on_its_line() -> None:
    figure = style.canvas("title", SUBTITLE, "alt", height=3)
    assert figure.texts[1].get_text().endswith("smoke, seed 0".replace(" ", "\N{NO-BREAK SPACE}"))


def test_a_chart_has_few_colours_and_the_right_ones() -> None:
    chart = Image.open(io.BytesIO(figures.png_bytes(FIGURES["dashboard"]())))
    assert chart.mode == "P"
    common = {
        mcolors.to_hex(np.array(color) / 255).upper() for _, color in sorted(chart.convert("RGB").getcolors())[-2:]
    }
    assert style.PAPER in common, "most pixels are paper"


@pytest.mark.parametrize("name", ["dashboard", "liveness", "layer", "image"])
def test_an_svg_has_words_no_paper_and_can_be_read_in_the_dark(name: str) -> None:
    drawn = figures.svg_text(FIGURES[name]())
    root = ElementTree.fromstring(drawn)
    words = " ".join("".join(text.itertext()) for text in root.iter("{http://www.w3.org/2000/svg}text"))
    assert "epoch" in words or "channel" in words
    assert style.PAPER.lower() not in drawn.partition("</style>")[2]
    turned = dict(re.findall(r"stroke: (#\w{6})\"\][^{]*\{stroke:(#\w{6})", drawn))
    assert turned
    ink, background = style.INK.lower(), "#15181e"
    assert lab(turned[ink])[0] - lab(background)[0] > 70, "ink, in CIELAB lightness"
    lines = [color for color in turned if color in (style.BLUE.lower(), style.PURPLE.lower(), style.GREEN.lower())]
    assert all(lab(turned[color])[0] - lab(background)[0] > 35 for color in lines)


def test_hover_values_are_those_of_the_history_and_lie_where_its_charts_are() -> None:
    figure = figures.accuracy_curve(SHORT, chance=0.1)
    size = Image.open(io.BytesIO(figures.png_bytes(figure))).size
    (chart,) = figures.hover_values(figure)
    lines = {line["name"]: line for line in chart["lines"]}
    assert lines["test images"]["x"] == list(range(1, 21))
    np.testing.assert_allclose(lines["test images"]["y"], 100 * SHORT.column("accuracy"), rtol=1e-3)
    assert lines["test images"]["unit"] == " %"
    box = figure.axes[0].get_window_extent()
    placed = [box.x0 / size[0], 1 - box.y1 / size[1], box.width / size[0], box.height / size[1]]
    np.testing.assert_allclose(chart["box"], placed, atol=0.01)
    panels = figures.hover_values(figures.dashboard(SHORT))
    assert [
        {line["name"] for line in one["lines"]} >= names
        for one, names in zip(panels, ({"total", "accuracy"}, {"zeros", "coefficient"}, {"mean"}), strict=True)
    ] == [True] * 3
    assert max(len(line["x"]) for one in figures.hover_values(figures.dashboard(LONG)) for line in one["lines"]) <= 300

"""The figures draw the data they are given: read back from lines, bars and images, not from the code that drew them."""

from __future__ import annotations

import re
import subprocess
import sys
from xml.etree import ElementTree

import matplotlib
import matplotlib.text
import numpy as np
import pytest
from matplotlib import colors as mcolors
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.patches import StepPatch

from experiments import figures
from experiments.figures import style
from src.training import History
from tests.histories import NAMES, WIDTHS, make_history


@pytest.fixture(scope="module")
def history() -> History:
    return make_history()


def lines_of(axes: Axes) -> dict[str, np.ndarray]:
    return {str(line.get_label()): np.asarray(line.get_ydata(), dtype=float) for line in axes.get_lines()}


def cells_of(axes: Axes) -> list[np.ndarray]:
    """The rows of a map of channels, (C,) each."""
    return [row for block in axes.collections for row in np.asarray(block.get_array())]


def colours_of(axes: Axes) -> list[str]:
    """The colours of all cells of a map of channels, row by row."""
    blocks = [block.to_rgba(block.get_array()).reshape(-1, 4) for block in axes.collections]
    return [mcolors.to_hex(cell).upper() for block in blocks for cell in block]


def bars_of(axes: Axes) -> list[list[float]]:
    """The heights of the upright bars, by series."""
    return [[bar.get_height() for bar in bars] for bars in axes.containers if isinstance(bars, BarContainer)]


def test_accuracy_curve_draws_the_history_in_per_cent(history: History) -> None:
    figure = figures.accuracy_curve(history, chance=0.1, subtitle="resnet20, seed 0")
    (axes,) = figure.axes
    lines = lines_of(axes)
    np.testing.assert_allclose(lines["test images"], [30 + 2.5 * e for e in range(1, 21)])
    np.testing.assert_allclose(lines["training images"], [33 + 2.5 * e for e in range(1, 21)])
    np.testing.assert_allclose(
        lines["test images, BatchNorm recalibrated"], [min(50 + 2.5 * e, 97) for e in range(1, 21)]
    )
    np.testing.assert_allclose(lines["chance, 10 %"], 10)
    (band,) = axes.patches
    assert (band.get_x(), band.get_x() + band.get_width()) == (5.5, 20.5), "the coefficient is above 0 from epoch 6 on"
    assert "is lowest in epoch 6: 45.0 %, 65.0 % with BatchNorm recalibrated." in figure.get_label()
    assert (axes.get_xlabel(), axes.get_ylim()) == ("epoch", (0, style.FULL))
    assert axes.yaxis.get_major_formatter()(40, 0) == "40 %"
    assert "32.5 % after epoch 1, 80.0 % after epoch 20; the best is 80.0 % in epoch 20." in figure.get_label()
    assert "resnet20, seed 0" in [text.get_text().replace("\N{NO-BREAK SPACE}", " ") for text in figure.texts]


def test_sparsity_curves_have_the_coefficient_on_a_coloured_dashed_right_axis(history: History) -> None:
    figure = figures.sparsity_curves(history)
    left, right = figure.axes
    lines = lines_of(left)
    np.testing.assert_allclose(lines["zero weights"], [2.0 * e for e in range(1, 21)])
    np.testing.assert_allclose(lines["dead filters"], 100 * history.column("structured_sparsity"))
    (line,) = right.get_lines()
    np.testing.assert_allclose(line.get_ydata(), [0] * 5 + [0.001, 0.002, 0.003, 0.004] + [0.005] * 11)
    assert line.is_dashed()
    assert mcolors.same_color(right.yaxis.label.get_color(), line.get_color())
    # layers 0..17 lose 0..17 channels, but layer1 (16 wide, layers 0..5) and the rest are all wide enough: 153 of 672
    assert "40.0 % of the weights are zero and 22.8 % of the filters dead" in figure.get_label()


def test_liveness_is_black_for_dead_white_for_alive_and_empty_for_absent(history: History) -> None:
    figure = figures.channel_liveness(history.last.layers)
    (axes,) = figure.axes
    for i, (name, row) in enumerate(zip(NAMES, cells_of(axes), strict=True)):
        np.testing.assert_array_equal(row, np.arange(WIDTHS[name.split(".")[0]]) >= i)
    assert colours_of(axes)[16:18] == [style.BLACK, style.WHITE], "layer 1 has one dead channel"
    assert axes.patch.get_hatch()
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[3] == "layer1.1.conv2  \N{FIGURE SPACE}3/16"
    assert labels[17] == "layer3.2.conv2  17/64"
    assert "153 of 672 filters are dead (22.8 %)" in figure.get_label()


def test_per_layer_channels_stack_alive_under_dead_with_bits_above(history: History) -> None:
    figure = figures.per_layer_channels(history.last.layers)
    (axes,) = figure.axes
    alive, dead = bars_of(axes)
    assert dead == list(range(18))
    assert alive == [16 * 2 ** (i // 6) - i for i in range(18)]
    assert [bar.get_y() for bar in axes.patches[18:]] == alive
    assert [note.get_text() for note in axes.texts] == ["7"] * 15 + ["5"] * 3
    assert axes.texts[17].xy == (pytest.approx(17), 64)
    assert "519 of 672 filters are alive, with 6.7 bits on average" in figure.get_label()


def test_bit_widths_are_drawn_for_each_form_and_named_in_the_legend() -> None:
    figure = figures.bit_widths(["a", "b", "c"], {"heavy": [7, 7, 7], "light": [5, 4, 3]})
    lines = lines_of(figure.axes[0])
    np.testing.assert_allclose(lines["heavy: all 7 bits"], 7, atol=0.1)  # lines of the same width lie side by side
    np.testing.assert_allclose(lines["light: 3 to 5 bits"], [5, 4, 3], atol=0.1)


@pytest.mark.parametrize("done", [0, 1, 9, 20])
def test_dashboard_at_every_moment_of_a_run(done: int) -> None:
    history = make_history(done)
    plan = [0.005 * min(max(e - 5, 0) / 5, 1) for e in range(1, 21)]
    figure = figures.dashboard(history, coefficient_plan=plan)
    loss, sparsity, bits, liveness, accuracy, coefficient = figure.axes
    assert loss.get_xlim() == (0.5, 20.5), "all planned epochs, from the start"
    epochs = np.arange(1, done + 1)
    np.testing.assert_allclose(lines_of(loss)["total"], 5 - 0.1 * epochs)
    np.testing.assert_allclose(lines_of(accuracy)["accuracy"], 30 + 2.5 * epochs)
    np.testing.assert_allclose(lines_of(sparsity)["zeros"], 2.0 * epochs)
    np.testing.assert_allclose(lines_of(coefficient)["coefficient"], plan[:done])
    ahead = lines_of(coefficient).get("_planned", [])
    np.testing.assert_allclose(ahead, plan[max(done - 1, 0) :] if done < 20 else [], err_msg="never over what was done")
    if not done:
        assert "Waiting for the first of 20 epochs" in figure.get_label()
        return
    np.testing.assert_allclose([line.get_ydata() for line in bits.get_lines()[:18]], history.layer_column("bits").T)
    np.testing.assert_allclose(lines_of(bits)["mean"], history.column("mean_bits"))
    assert [len(row) for row in cells_of(liveness)] == [16] * 6 + [32] * 6 + [64] * 6
    assert f"Epoch {done} of 20" in figure.get_label()
    assert f"accuracy {30 + 2.5 * done:.1f} %" in figure.get_label()


def test_layer_sparsity_bars_hold_both_shares() -> None:
    figure = figures.layer_sparsity_bars(["a", "b"], [0.5, 0.25], [0.125, 0.0])
    zeros, dead = figure.axes[0].containers
    assert [bar.get_width() for bar in zeros] == [50.0, 25.0]
    assert [bar.get_width() for bar in dead] == [12.5, 0.0]
    assert "from 25.0 % in b to 50.0 % in a" in figure.get_label()


def test_sparsity_map_puts_every_kernel_in_its_place() -> None:
    weight = np.zeros((3, 2, 2, 2))
    weight[0, 1] = [[1.0, -2.0], [0.0, 0.5]]
    weight[2, 0, 1, 1] = 1e-3
    figure = figures.sparsity_map(weight, "block.conv1")
    axes = figure.axes[0]
    (image,) = axes.get_images()
    gap = 4  # above the largest weight, which makes it grey
    expected = [
        [0, 0, gap, 1, -2], [0, 0, gap, 0, 0.5], [gap] * 5,
        [0, 0, gap, 0, 0], [0, 0, gap, 0, 0], [gap] * 5,
        [0, 0, gap, 0, 0], [0, 1e-3, gap, 0, 0],
    ]  # fmt: skip
    drawn = np.ma.asarray(image.get_array())
    np.testing.assert_array_equal(np.ma.filled(drawn, 0), np.array(expected))
    rgb = image.to_rgba(drawn)
    assert rgb[0, 0, 3] == 0, "zero is blank"
    assert 0 < rgb[0, 2, 3] < 0.5, "grey through which the ground is seen, light or dark"
    assert rgb[0, 3, 2] > rgb[0, 3, 0], "positive is blue"
    assert rgb[0, 4, 0] > rgb[0, 4, 2], "negative is orange"
    assert rgb[7, 1, 3] > 0.3, "the smallest weight has a colour"
    assert list(axes.get_lines()[0].get_ydata()) == [1], "filter 1 is marked dead"
    assert "83.3 % zeros, 1 of 3 filters dead; 4 of 6 kernels are all zero" in figure.get_label()


def test_before_and_after_stand_in_pairs_and_a_layer_that_kept_everything_has_no_number() -> None:
    figure = figures.before_after(["a", "b"], [3_000_000, 1_000_000], [3_000_000, 500_000])
    assert bars_of(figure.axes[0]) == [[3.0, 1.0], [3.0, 0.5]]
    assert [note.get_text() for note in figure.axes[0].texts] == ["", "50"]
    assert "MACs: 4 million before, 3.5 million after, 1.14 times fewer" in figure.get_label()


W = np.linspace(-1, 1, 401)
Q = np.where(np.abs(W) <= 0.25, 0.0, np.sign(W) * 0.5)


def test_staircase_family_and_explorer_read_the_curves() -> None:
    family = figures.staircase_family([("d", W, Q), ("none", W, W)], [("2 bits", W, Q)])
    assert [axes.get_title(loc="left") for axes in family.axes if axes.get_visible()] == ["d", "none", "2 bits"]
    assert "become 0: d ±0.25, none ±0. Levels: 2 bits 3." in family.get_label()
    weights = np.array([0.1, -0.2, 0.5, -0.5])  # two zeros, two exact: error sqrt(.05 / .55) = 0.302
    figure = figures.staircase_explorer_figure(("", W, Q), weights, np.array([0, 0, 0.5, -0.5]), 2, 0.25)
    assert "50.0 % zeros, 3 of 3 levels used, error 30.2 %" in figure.get_label()
    stairs, before, error, after = figure.axes
    np.testing.assert_array_equal(stairs.get_lines()[-1].get_ydata(), Q)
    np.testing.assert_allclose(error.get_lines()[-1].get_ydata(), Q - W)
    bars = [part for part in before.patches if isinstance(part, StepPatch)]
    shares = {mcolors.to_hex(one.get_facecolor()).upper(): one.get_data().values.sum() for one in bars}
    assert shares == {style.WEIGHTS: pytest.approx(100), style.PRUNED: pytest.approx(50)}
    (held,) = after.collections
    tops = {round(float(segment[1][0]), 3): segment[1][1] for segment in held.get_segments()}
    assert tops == {-0.5: 25.0, 0.0: 50.0, 0.5: 25.0}


def test_decay_draws_what_it_is_given() -> None:
    steps = np.arange(3.0)
    decay = figures.decay_forms(steps, {"a": 3 - steps, "b": steps * 0 + 3}, {"a": steps / 10})
    np.testing.assert_array_equal(lines_of(decay.axes[0])["a"], [3, 2, 1])
    np.testing.assert_allclose(lines_of(decay.axes[1])["a"], [0, 10, 20])
    assert "1.00 (a), 3.00 (b)" in decay.get_label()
    assert "20.0 % (a)" in decay.get_label()
    assert "over 2 steps" in decay.get_label()


def test_images_are_shown_unchanged() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    figure = figures.image_grid(images, [0, 1, 0], ["cat", "dog"], title="data")
    shown = [axes.get_images()[0].get_array() for axes in figure.axes[:3]]
    np.testing.assert_array_equal(np.stack(shown), images.transpose(0, 2, 3, 1))
    assert [axes.get_title() for axes in figure.axes[:3]] == ["cat", "dog", "cat"]
    flipped = images[..., ::-1]
    grid = figures.augmentation_grid(images, [flipped])
    np.testing.assert_array_equal(grid.axes[1].get_images()[0].get_array(), flipped[0].transpose(1, 2, 0))
    assert [axes.get_title(loc="center") for axes in grid.axes[:2]] == ["original", "draw 1"]


def test_the_channel_group_diagram_colours_rows_and_columns() -> None:
    """A cell is 10 x 10 units of its matrix; the diagram uses the palette, and its description is its alt text."""
    drawing, metadata = figures.channel_group_diagram()._repr_svg_()
    cells = {"inner": 0.0, "stream": 0.0}
    for box in ElementTree.fromstring(drawing).iter("{http://www.w3.org/2000/svg}rect"):
        if box.get("class") in cells:
            cells[str(box.get("class"))] += float(box.attrib["width"]) * float(box.attrib["height"]) / 100
    assert cells["inner"] == 4 + 2 + 4  # row of conv1, scale and shift, column of conv2
    # stem row 3 + its norm 2; block: column 4, row 4, norm 2; stage 2: column 8, row 8, norm 2; shortcut 1 -> 1
    assert cells["stream"] == 3 + 2 + (4 + 4 + 2) + (8 + 8 + 2) + 2
    palette = {value for value in vars(style).values() if isinstance(value, str)}
    assert set(re.findall("#[0-9A-F]{6}", drawing)) <= palette
    assert metadata["alt"].startswith("Diagram of two channel groups")
    assert metadata["alt"].endswith("channel c + planes/4 of the next stage.")


def test_figures_leave_no_state_behind(history: History) -> None:
    """No pyplot figure, no changed setting; a user's own settings do not reach the figures."""
    code = "import matplotlib as m; a = dict(m.rcParams); import experiments.figures, sys; "
    code += "assert dict(m.rcParams) == a; print('matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30, "axes.linewidth": 9}):
        before = dict(matplotlib.rcParams)
        figure = figures.accuracy_curve(history, chance=0.1)
        assert dict(matplotlib.rcParams) == before
    assert figure.axes[0].get_facecolor()[3] == 0, "paper comes from the figure alone, which a page leaves out"
    assert mcolors.same_color(figure.get_facecolor(), style.PAPER)
    assert mcolors.same_color(figure.get_facecolor(), style.PAPER)
    assert figure.axes[0].xaxis.label.get_fontsize() == style.TEXT
    assert figure.axes[0].spines["left"].get_linewidth() < 2, "also where this style names no value"
    assert min(text.get_fontsize() for text in figure.findobj(matplotlib.text.Text) if text.get_text()) >= 11

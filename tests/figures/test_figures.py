"""The figures draw the data they are given: read back from lines, bars and images, not from the code that drew them."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib import colors as mcolors
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments import figures
from experiments.figures import style
from src.training import History, LayerRecord
from tests.histories import NAMES, WIDTHS, make_history


@pytest.fixture(scope="module")
def history() -> History:
    return make_history()


def lines_of(axes: Axes) -> dict[str, np.ndarray]:
    return {str(line.get_label()): np.asarray(line.get_ydata(), dtype=float) for line in axes.get_lines()}


def texts_of(figure: Figure) -> str:
    return " | ".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def cells_of(axes: Axes) -> list[np.ndarray]:
    """The rows of a map of channels, (C,) each."""
    return [np.asarray(row.get_array()).ravel() for row in axes.collections]


def render(figure: Figure) -> np.ndarray:
    """Pixels (H, W, 4); raises where the figure cannot be drawn."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def test_accuracy_curve_draws_the_history_in_per_cent(history: History) -> None:
    figure = figures.accuracy_curve(history, chance=0.1, subtitle="resnet20, seed 0")
    (axes,) = figure.axes
    lines = lines_of(axes)
    np.testing.assert_allclose(lines["test images"], [30 + 2.5 * e for e in range(1, 21)])
    np.testing.assert_allclose(lines["training images, augmented"], [33 + 2.5 * e for e in range(1, 21)])
    np.testing.assert_allclose(lines["chance, 10 %"], 10)
    assert axes.get_xlabel() == "epoch"
    assert axes.get_ylim() == (0, style.FULL)
    assert axes.yaxis.get_major_formatter()(40, 0) == "40 %"
    assert list(axes.get_xticks()) == [1, 5, 10, 15, 20]
    assert "32.5 % after epoch 1, 80.0 % after epoch 20; the best is 80.0 % in epoch 20." in figure.get_label()
    assert "Chance is 10.0 %." in figure.get_label()
    assert "resnet20, seed 0" in texts_of(figure)


def test_sparsity_curves_have_the_coefficient_on_a_coloured_dashed_right_axis(history: History) -> None:
    figure = figures.sparsity_curves(history)
    left, right = figure.axes
    lines = lines_of(left)
    np.testing.assert_allclose(lines["zero weights"], [2.0 * e for e in range(1, 21)])
    np.testing.assert_allclose(lines["dead channels"], 100 * history.column("structured_sparsity"))
    (line,) = right.get_lines()
    np.testing.assert_allclose(line.get_ydata(), [0] * 5 + [0.001, 0.002, 0.003, 0.004] + [0.005] * 11)
    assert line.is_dashed()
    assert right.yaxis.get_label_position() == "right"
    assert mcolors.same_color(right.yaxis.label.get_color(), line.get_color())
    assert not mcolors.same_color(line.get_color(), left.get_lines()[0].get_color())
    # layers 0..17 lose 0..17 channels, but layer1 (16 wide, layers 0..5) and the rest are all wide enough: 153 of 672
    assert "40.0 % of the weights are zero and 22.8 % of the channels dead" in figure.get_label()
    assert "first dead channel appears in epoch 10" in figure.get_label()


def test_liveness_is_black_for_dead_white_for_alive_and_empty_for_absent(history: History) -> None:
    figure = figures.channel_liveness(history.last.layers)
    (axes,) = figure.axes
    rows = cells_of(axes)
    assert len(rows) == 18
    for i, (name, row) in enumerate(zip(NAMES, rows, strict=True)):
        np.testing.assert_array_equal(row, np.arange(WIDTHS[name.split(".")[0]]) >= i)
    assert axes.patch.get_hatch()
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[0].startswith("layer1.0.conv1")
    assert labels[17].startswith("layer3.2.conv2")
    assert labels[17].endswith("17/64")
    assert labels[3].endswith("3/16")
    assert "153 of 672 output channels are dead (22.8 %)" in figure.get_label()


def test_liveness_pixels_on_paper() -> None:
    """Not what is stored, but the middle of a dead, a living and an absent cell as it is seen."""
    layers = [LayerRecord("a", 8.0, 0.0, 0.0, (True, False)), LayerRecord("b", 8.0, 0.0, 0.0, (False,))]
    figure = figures.channel_liveness(layers)
    pixels = render(figure)
    (axes,) = figure.axes
    seen = {}
    for name, cell in (("dead", (0, 0)), ("alive", (1, 0)), ("absent", (1, 1))):
        x, y = axes.transData.transform(cell)
        seen[name] = pixels[
            pixels.shape[0] - 1 - int(y) - 2 : pixels.shape[0] + 1 - int(y), int(x) - 2 : int(x) + 2, :3
        ]
    assert seen["dead"].max() < 40
    assert seen["alive"].min() == 255
    assert 150 < seen["absent"].mean() < 250


def test_the_removal_map_draws_the_fates() -> None:
    fates = [np.array(["kept", "zero"]), np.array(["constant", "unread", "kept"])]
    figure = figures.removal_map(["first", "second"], fates, subtitle="a run")
    (axes,) = figure.axes
    drawn = [mcolors.to_hex(cell).upper() for row in axes.collections for cell in row.to_rgba(row.get_array()[0])]
    assert drawn == [style.BLUE, style.BLACK, style.ORANGE, style.GREY, style.BLUE]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["first  1/2", "second  1/3"]
    assert axes.get_xlabel() == "output channel; beside each layer: left/before"
    assert "2 kept, 1 gone: always 0, 1 gone: a constant" in figure.get_label()


def test_per_layer_channels_stack_alive_under_dead_with_bits_above(history: History) -> None:
    figure = figures.per_layer_channels(history.last.layers)
    (axes,) = figure.axes
    alive, dead = axes.containers
    np.testing.assert_array_equal([bar.get_height() for bar in dead], np.arange(18))
    np.testing.assert_array_equal(
        [bar.get_height() for bar in alive],
        [16 - i for i in range(6)] + [32 - i for i in range(6, 12)] + [64 - i for i in range(12, 18)],
    )
    assert all(bar.get_y() == under.get_height() for bar, under in zip(dead, alive, strict=True))
    assert mcolors.same_color(alive[0].get_facecolor(), style.BLUE)
    assert mcolors.same_color(dead[0].get_facecolor(), style.GREY)
    notes = [(note.get_text(), *note.xy) for note in axes.texts]
    assert notes[0] == ("7", pytest.approx(0), 16)
    assert notes[17] == ("5", pytest.approx(17), 64)
    assert [label.get_text() for label in axes.get_xticklabels()] == NAMES
    assert "519 of 672 channels are alive" in figure.get_label()


@pytest.mark.parametrize("done", [0, 1, 9, 20])
def test_dashboard_at_every_moment_of_a_run(done: int) -> None:
    history = make_history(done)
    plan = [0.005 * min(max(e - 5, 0) / 5, 1) for e in range(1, 21)]
    figure = figures.dashboard(history, coefficient_plan=plan)
    render(figure)
    loss, sparsity, bits, liveness, accuracy, coefficient = figure.axes
    for axes in (loss, sparsity, bits):
        assert axes.get_xlim() == (0.5, 20.5), "all planned epochs, from the start"
    keys = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in (loss, sparsity)]
    assert keys == [["loss", "task", "accuracy"], ["zeros", "dead", "coefficient"]]
    for axes, line in ((accuracy, loss), (coefficient, sparsity)):
        colour = line.get_legend().get_lines()[2].get_color()
        assert mcolors.same_color(axes.yaxis.get_tick_params()["color"], colour), "the axis has its line's colour"
    np.testing.assert_allclose(lines_of(loss)["loss"], [5 - 0.1 * e for e in range(1, done + 1)])
    np.testing.assert_allclose(lines_of(loss)["task"], [2 - 0.08 * e for e in range(1, done + 1)])
    np.testing.assert_allclose(lines_of(accuracy)["accuracy"], [30 + 2.5 * e for e in range(1, done + 1)])
    ahead = lines_of(coefficient).get("_planned", [])
    np.testing.assert_allclose(ahead, plan[max(done - 1, 0) :] if done < 20 else [], err_msg="never over what was done")
    np.testing.assert_allclose(lines_of(coefficient)["coefficient"], plan[:done])
    np.testing.assert_allclose(lines_of(sparsity)["zeros"], [2.0 * e for e in range(1, done + 1)])
    if done:
        drawn = np.array([line.get_ydata() for line in bits.get_lines()[:18]])
        np.testing.assert_allclose(drawn, history.layer_column("bits").T)
        np.testing.assert_allclose(lines_of(bits)["mean"], history.column("mean_bits"))
        widths = [line.get_linewidth() for line in bits.get_lines()[:18]]
        assert widths == sorted(widths, reverse=True), "coinciding lines show as nested stripes"
        expected = {"15 layers", "3 layers"} if done >= 10 else {"18 layers"}
        assert {note.get_text() for note in bits.texts} == expected
        assert max(bits.texts, key=lambda note: note.xy[1]).get_va() == "bottom", "the highest end is named above it"
        assert [len(row) for row in cells_of(liveness)] == [16] * 6 + [32] * 6 + [64] * 6
        assert f"Epoch {done} of 20" in figure.get_label()
        assert f"test accuracy {30 + 2.5 * done:.1f} %" in figure.get_label()
    else:
        assert "Waiting for the first of 20 epochs" in figure.get_label()


@pytest.mark.parametrize("draw", [figures.accuracy_curve, figures.sparsity_curves, figures.dashboard])
def test_an_empty_history_and_a_single_epoch_can_be_drawn(draw: object) -> None:
    for history in (History(1), make_history(1, 1)):
        figure = draw(history)  # type: ignore[operator]
        assert render(figure).size
        assert figure.get_label()


def test_layer_sparsity_bars_hold_both_shares() -> None:
    figure = figures.layer_sparsity_bars(["a", "b"], [0.5, 0.25], [0.125, 0.0])
    (axes,) = figure.axes
    zeros, dead = axes.containers
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
    rgb = image.to_rgba(drawn)[..., :3]
    assert (rgb[0, 0] == 1).all(), "zero is white"
    assert mcolors.same_color(rgb[0, 2], style.PALE)
    red, _, blue = rgb[0, 3]
    assert blue > red, "positive is blue"
    red, _, blue = rgb[0, 4]
    assert red > blue, "negative is orange"
    assert rgb[7, 1].min() < 0.9, "the smallest weight is not white"
    assert list(axes.get_lines()[0].get_ydata()) == [1], "filter 1 is marked dead"
    assert "83.3 % zeros, 1 of 3 filters dead; 4 of 6 kernels are all zero" in figure.get_label()
    with pytest.raises(ValueError, match=r"\(3, 2\).*O, I, k, k"):
        figures.sparsity_map(np.zeros((3, 2)), "linear")


def test_cost_bars_colour_quantized_and_full_precision_layers() -> None:
    macs = [442_368, 2_359_296, 640]  # stem, a block convolution of stage 1, linear
    figure = figures.cost_bars(["conv1", "layer1.0.conv1", "linear"], macs, [False, True, False])
    (axes,) = figure.axes
    (bars,) = axes.containers
    assert [bar.get_height() for bar in bars] == [0.442368, 2.359296, 0.00064]
    assert [mcolors.to_hex(bar.get_facecolor()).upper() for bar in bars] == [style.ORANGE, style.BLUE, style.ORANGE]
    assert axes.get_ylabel() == "million MACs an image"
    assert "The 1 quantized layers hold 84.2 % of the 2.8 million MACs" in figure.get_label()


def test_before_after_pairs() -> None:
    figure = figures.before_after(["a", "b"], [3_000_000, 1_000_000], [1_500_000, 500_000], "MACs")
    (axes,) = figure.axes
    before, after = axes.containers
    assert [bar.get_height() for bar in before] == [3.0, 1.0]
    assert [bar.get_height() for bar in after] == [1.5, 0.5]
    assert [note.get_text() for note in axes.texts] == ["50", "50"]
    assert "MACs: 4 million before, 2 million after, 2 times fewer" in figure.get_label()


def test_layers_that_kept_everything_have_no_number() -> None:
    """Three digits above each pair would run into each other."""
    figure = figures.before_after(["a", "b"], [3_000_000, 1_000_000], [3_000_000, 500_000], "MACs")
    assert [note.get_text() for note in figure.axes[0].texts] == ["", "50"]


def test_the_ends_of_the_bits_are_named_where_no_other_line_runs() -> None:
    """Names over the lines were unreadable: bits fall, so the highest is named above its end and the others below."""
    history = make_history(20)
    ends = {"layer1.0.conv1": 5.0, "layer1.0.conv2": 7.0}
    layers = tuple(replace(layer, bits=ends.get(layer.name, 6.0)) for layer in history.last.layers)
    history.records[-1] = replace(history.last, layers=layers)
    bits = figures.dashboard(history).axes[2]
    sides = {note.get_text(): (note.xy[1], note.get_va()) for note in bits.texts}
    assert sides == {"layer1.0.conv2": (7, "bottom"), "16 layers": (6, "top"), "layer1.0.conv1": (5, "top")}


W = np.linspace(-1, 1, 401)
Q = np.where(np.abs(W) <= 0.25, 0.0, np.sign(W) * 0.5)


def test_staircase_family_and_explorer_read_the_curves() -> None:
    family = figures.staircase_family([("d", W, Q), ("none", W, W)], [("2 bits", W, Q)])
    assert [axes.get_title(loc="left") for axes in family.axes] == ["The dead zone", "The bits"]
    assert "d ±0.25" in family.get_label()
    assert "2 bits 3" in family.get_label()
    weights = np.array([0.1, -0.2, 0.5, -0.5])  # two zeros, two exact: error sqrt(.05 / .55) of the RMS
    figure = figures.staircase_explorer_figure(("", W, Q), weights, np.array([0, 0, 0.5, -0.5]), 2, 0.25)
    assert "Dead zone ±0.25 R, 2 bits" in figure.get_label()
    assert f"2 bits: 50.0 % zeros, 3 of 3 levels used, error {100 * np.sqrt(0.05 / 0.55):.1f} %" in figure.get_label()
    stairs, before, error, after = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()][:2] == ["dead zone d", "quantized"]
    np.testing.assert_array_equal(stairs.get_lines()[-1].get_ydata(), Q)
    np.testing.assert_allclose(error.get_lines()[-1].get_ydata(), Q - W)
    assert sum(bar.get_height() for bar in before.patches if bar.get_width() < 0.1) == pytest.approx(100)
    (held,) = after.collections
    tops = {round(float(segment[1][0]), 3): segment[1][1] for segment in held.get_segments()}
    assert tops == {-0.5: 25.0, 0.0: 50.0, 0.5: 25.0}


def test_schedule_and_decay_draw_what_they_are_given() -> None:
    figure = figures.schedule_curve([0, 0, 0.5, 1, 1], [0.1, 0.1, 0.1, 0.05, 0.01])
    left, right = figure.axes
    np.testing.assert_array_equal(left.get_lines()[0].get_ydata(), [0, 0, 0.5, 1, 1])
    np.testing.assert_array_equal(right.get_lines()[0].get_ydata(), [0.1, 0.1, 0.1, 0.05, 0.01])
    assert "starts at 0; its peak is 1, in epoch 4" in figure.get_label()
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
    with pytest.raises(ValueError, match=r"\(3, 32, 32\).*uint8"):
        figures.image_grid(images[0], [0], ["cat"], title="data")
    with pytest.raises(ValueError, match="shape of the originals"):
        figures.augmentation_grid(images, [images[:2]])
    balance = figures.class_balance([0, 1, 0, 0], ["cat", "dog"])
    assert [bar.get_width() for bar in balance.axes[0].containers[0]] == [3, 1]
    assert "4 images in 2 classes, 1 to 3 in each" in balance.get_label()


def test_the_channel_group_diagram_colours_rows_and_columns() -> None:
    """A cell is 10 x 10 units of its matrix; the diagram uses the palette, and its description is its alt text."""
    data, metadata = figures.channel_group_diagram()._repr_mimebundle_()
    drawing = data["image/svg+xml"]
    cells = {"inner": 0.0, "stream": 0.0}
    for box in ElementTree.fromstring(drawing).iter("{http://www.w3.org/2000/svg}rect"):
        if box.get("class") in cells:
            cells[str(box.get("class"))] += float(box.attrib["width"]) * float(box.attrib["height"]) / 100
    assert cells["inner"] == 4 + 2 + 4  # row of conv1, scale and shift, column of conv2
    # stem row 3 + its norm 2; block: column 4, row 4, norm 2; stage 2: column 8, row 8, norm 2; shortcut 1 -> 1
    assert cells["stream"] == 3 + 2 + (4 + 4 + 2) + (8 + 8 + 2) + 2
    assert set(re.findall("#[0-9A-F]{6}", drawing)) <= {
        value for value in vars(style).values() if isinstance(value, str)
    }
    assert metadata["image/svg+xml"]["alt"] == data["text/plain"]
    assert data["text/plain"].startswith("Diagram of two channel groups")
    assert "channel c + planes/4 of the next stage." in data["text/plain"]


def test_figures_leave_no_state_behind(history: History) -> None:
    """No pyplot figure, no changed setting; a user's own settings do not reach the figures."""
    code = "import matplotlib as m; a = dict(m.rcParams); import experiments.figures, "
    code += "experiments.notebook.live, sys; assert dict(m.rcParams) == a; print('matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    with matplotlib.rc_context(
        {"axes.facecolor": "black", "font.size": 30, "axes.linewidth": 9, "lines.markersize": 40}
    ):
        before = dict(matplotlib.rcParams)
        figure = figures.accuracy_curve(history)
        assert dict(matplotlib.rcParams) == before
    assert mcolors.same_color(figure.axes[0].get_facecolor(), "white")
    assert mcolors.same_color(figure.get_facecolor(), style.PAPER)
    assert figure.axes[0].xaxis.label.get_fontsize() == style.TEXT
    assert figure.axes[0].spines["left"].get_linewidth() < 2, "also where this style names no value"
    assert min(text.get_fontsize() for text in figure.findobj(matplotlib.text.Text) if text.get_text()) >= 11

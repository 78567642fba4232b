"""Live display: throttled, never the end of a training, and whole in a notebook that nobody watched."""

from __future__ import annotations

import base64
import io
from types import SimpleNamespace
from typing import Any

import ipywidgets
import nbformat
import pytest
from matplotlib.figure import Figure
from nbclient import NotebookClient
from PIL import Image

from experiments import figures
from experiments.notebook import ProgressBar, live
from src.training import EpochRecord
from tests.histories import make_history
from tests.notebook.conftest import Screen


class Clock:
    """Time that passes only where the test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that asks whether it runs in a notebook is told that it does."""
    monkeypatch.setattr(live, "in_notebook", lambda: True)


def tiny_figure(alt: str) -> Figure:
    figure = Figure(figsize=(2, 1), facecolor="white")
    figure.add_axes((0.2, 0.2, 0.7, 0.7)).plot([0, 1], [0, 1], color="#0072B2")
    figure.set_label(alt)
    return figure


def record(epoch: int, accuracy: float = 0.5) -> EpochRecord:
    return EpochRecord(epoch, 1, 1, 0, 0, 0, 1e-3, accuracy, 1, accuracy, 0, 0, 8, 1, ())


def test_bundle_is_a_crisp_png_with_alt_text_and_size() -> None:
    data, metadata = live.figure_bundle(tiny_figure("accuracy 82.0 %"))
    image = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
    assert metadata == {"image/png": {"alt": "accuracy 82.0 %", "width": 192, "height": 96}}
    assert image.size == (384, 192), "two pixels for each pixel of the page"
    assert data["text/plain"] == "accuracy 82.0 %"
    assert image.convert("RGB").getpixel((2, 2)) == (255, 255, 255)


@pytest.mark.usefixtures("notebook")
def test_live_figure_is_throttled_and_draws_the_last_frame(screen: Screen) -> None:
    clock, steps = Clock(), [0]
    with live.LiveFigure(lambda: tiny_figure(f"frame {steps[-1]}"), min_interval=1.0, clock=clock) as figure:
        for step in range(1, 41):
            steps.append(step)
            clock.now += 0.125
            figure.update()
    assert screen.alts == ["frame 0", "frame 8", "frame 16", "frame 24", "frame 32", "frame 40", "frame 40"]
    assert len(screen.displays) == 1


@pytest.mark.usefixtures("notebook")
def test_a_drawing_failure_is_told_and_ends_nothing(screen: Screen) -> None:
    frames = iter([tiny_figure("good")])
    figure = live.LiveFigure(lambda: next(frames))
    with pytest.warns(RuntimeWarning, match="could not be drawn and keeps its last frame: StopIteration"), figure:
        figure.update(force=True)
    assert screen.alts == ["good"]


def test_outside_a_notebook_nothing_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    def draw() -> Figure:
        raise AssertionError("drawn for nobody")

    live.LiveFigure(draw).update(force=True)
    live.show(tiny_figure("nobody sees this"))
    live.publish({}, "a line")
    assert capsys.readouterr() == ("", "")


def test_an_explorer_draws_every_view_again_and_says_what_failed(screen: Screen) -> None:
    slider = ipywidgets.IntSlider(4, 2, 8)
    drawn = []

    def text(bits: int) -> live.Bundle:
        drawn.append(bits)
        return {"text/plain": f"{6 // (bits - 5)}"}, {}

    live.explorer(lambda bits: tiny_figure(f"{bits} bits"), text, bits=slider)
    assert slider.continuous_update
    slider.value = 7
    assert (screen.alt(0), screen.displays[1][0]["text/plain"]) == ("7 bits", "3")
    slider.value = 5  # a view that fails says so beside the controls; the next choice is drawn all the same
    slider.value = 8
    assert (screen.alt(0), screen.displays[1][0]["text/plain"]) == ("8 bits", "2")
    assert drawn == [4, 7, 5, 8]


def test_a_quick_figure_keeps_its_charts_in_their_places() -> None:
    quick, places = live.QuickFigure(live.figure_bundle), []
    for _ in range(2):
        figure = figures.accuracy_curve(make_history(4), chance=0.1)
        _, metadata = quick(figure)
        places.append([axes.get_position().bounds for axes in figure.axes])
    assert metadata == live.figure_bundle(figure)[1]
    assert places[0] == places[1]


@pytest.mark.usefixtures("notebook")
def test_progress_is_throttled_reads_the_loss_rarely_and_estimates_the_end(screen: Screen) -> None:
    clock, reads = Clock(), []

    def loss() -> float:
        reads.append(clock.now)
        return 1.5

    with ProgressBar(2, 10, clock=clock) as progress:
        for epoch in (1, 2):
            for step in range(1, 11):
                clock.now += 0.25
                progress.step(epoch, step, loss)
            progress.epoch_done(record(epoch, 0.25 * epoch))
    assert len(reads) <= 6, "5 seconds at 1 Hz, and the first"
    frames = [data["text/html"] for data, _ in screen.frames]
    assert 'aria-label="Training progress"' in frames[0]
    assert 'value="5.0"' in frames[0]
    assert "Epoch 1/2 · step 1/10 · loss 1.500" in frames[0]
    assert "about 5 s left" in frames[0]  # 19 steps of 0.25 s
    assert 'value="100.0"' in frames[-1]
    assert "2 epochs in 5 s · test accuracy 50.0 %" in frames[-1]
    assert not any("widget" in frame.lower() or "script" in frame.lower() for frame in frames)
    assert [data["text/plain"] != "" for data, _ in screen.displays] == [False, True]


def test_the_estimate_counts_the_tests_and_only_the_steps_of_this_run() -> None:
    clock = Clock()
    progress = ProgressBar(9, 10, first_epoch=5, stream=io.StringIO(), clock=clock)
    for step in range(1, 11):
        clock.now += 1.0
        progress.step(6, step, lambda: 0.0)
    clock.now += 10.0  # the test
    progress.epoch_done(record(6))
    assert progress.seconds_left == pytest.approx(30 * 2.0)  # 3 epochs of 10 steps and a test: 20 s


@pytest.mark.parametrize(
    ("done", "told"),
    [
        ((1, 0, True), " 33 % · Stopped after 1 of 3 epochs, 1 min 15 s · test accuracy 50.0 %"),
        ((2, 0, False), " 67 % · Stopped after 0 of 3 epochs, 1 min 15 s"),  # an epoch counts when it was tested
        ((0, 3, False), "100 % · All 3 epochs were trained before"),
        ((3, 2, True), "100 % · 1 epoch in 1 min 15 s · test accuracy 50.0 %"),
    ],
)
def test_the_last_line_says_how_far_the_run_came(done: tuple[int, int, bool], told: str) -> None:
    epoch, first, tested = done
    clock, log = Clock(), io.StringIO()
    with ProgressBar(3, 2, first, stream=log, clock=clock) as progress:
        if epoch:
            progress.step(epoch, 2, lambda: 0.0)
        if tested:
            progress.epoch_done(record(epoch))
        clock.now += 75
    assert log.getvalue() == f"{told}\n"


def test_a_log_gets_a_line_every_thirty_seconds_and_a_terminal_one_line() -> None:
    clock, log, terminal = Clock(), io.StringIO(), io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    both = [ProgressBar(1, 100, stream=stream, clock=clock) for stream in (log, terminal)]
    for step in range(1, 101):
        clock.now += 1
        for progress in both:
            progress.step(1, step, lambda: 2.0)
    for progress in both:
        progress.epoch_done(record(1))
    assert log.getvalue().count("\n") == 3, "100 seconds"
    assert "\r" not in log.getvalue()
    assert terminal.getvalue().count("\r") >= 100
    assert "\n" not in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\x1b[K"), "the line is clear for the caller's own"
    with both[1]:
        pass
    assert terminal.getvalue().endswith("\n")


def test_a_closed_terminal_ends_nothing() -> None:
    tried = []

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            tried.append(text)
            raise BrokenPipeError

    with ProgressBar(1, 1, stream=Gone(), clock=Clock()):
        pass
    assert tried


NOTEBOOK = [
    """
from types import SimpleNamespace
from matplotlib.figure import Figure
from experiments.notebook import LiveFigure, ProgressBar, live
def draw():
    if count == 3:
        raise ValueError("frame 3 cannot be drawn")
    figure = Figure(figsize=(2, 1)); figure.set_label(f"frame {count}")
    return figure
count = 0
with LiveFigure(draw, min_interval=0.0) as figure:
    for count in (1, 2, 3, 3, 4, 5):
        figure.update()
""",
    """
with ProgressBar(2, 3) as bar:
    for epoch in (1, 2):
        for step in (1, 2, 3):
            bar.step(epoch, step, lambda: 0.5)
        bar.epoch_done(SimpleNamespace(epoch=epoch, accuracy=0.25 * epoch))
""",
    """
import ipywidgets
def build(bits):
    figure = Figure(figsize=(2, 1)); figure.set_label(f"{bits} bits")
    return figure
slider = ipywidgets.IntSlider(4, 2, 8)
live.explorer(build, bits=slider)
slider.value = 6
""",
]


@pytest.mark.slow
def test_a_notebook_that_was_run_without_a_browser_holds_the_last_state() -> None:
    """Slow: a kernel of its own, which loads torch."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in NOTEBOOK])
    NotebookClient(book, timeout=240, kernel_name="python3").execute()
    live_figure, progress, explorer = ([SimpleNamespace(**one) for one in cell.outputs] for cell in book.cells)
    assert alts(live_figure) == ["frame 5"]
    assert [live.FIGURE in output.data for output in live_figure if output.output_type == "display_data"] == [True]
    told = "".join(output.text for output in live_figure if output.output_type == "stream")
    assert told.count("frame 3 cannot be drawn") == 1
    *_, bar = progress  # below an emptied one
    assert 'value="100.0"' in bar.data["text/html"]
    assert "2 epochs in 0 s · test accuracy 50.0 %" in bar.data["text/plain"]
    assert alts(explorer) == ["6 bits"], "the figure followed the slider"
    assert "application/vnd.jupyter.widget-view+json" in explorer[0].data
    assert explorer[0].data["text/plain"].startswith("Run → Run All Cells"), "where no kernel has the controls"


def alts(outputs: list[Any]) -> list[str]:
    """The alt texts of the figures among the outputs of a cell."""
    return [output.metadata["image/png"]["alt"] for output in outputs if "image/png" in getattr(output, "data", {})]

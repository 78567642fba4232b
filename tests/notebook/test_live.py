"""Live display: throttled, never the end of a training, and whole in a notebook that nobody watched."""

from __future__ import annotations

import base64
import io
import warnings
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
from matplotlib.figure import Figure
from nbclient import NotebookClient
from PIL import Image

from experiments.notebook import display, live
from src.training import EpochRecord


class Clock:
    """Time that passes only where the test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Screen:
    """Stands in for the notebook: keeps what each display shows and how often it was drawn."""

    def __init__(self) -> None:
        self.frames: list[tuple[dict, dict]] = []

    def display(self, data: dict, metadata: dict, *, handle: object = None) -> object:
        self.frames.append((data, metadata))
        return handle or object()


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    screen = Screen()
    monkeypatch.setattr(display, "put", screen.display)
    monkeypatch.setattr(display, "in_notebook", lambda: True)
    return screen


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


def test_png_of_photographs_keeps_its_colours_and_stays_under_the_limit() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    figure = Figure(figsize=(3, 3))
    figure.add_axes((0, 0, 1, 1)).imshow(noise, interpolation="nearest", aspect="auto")
    large = live.png_bytes(figure, limit=10**9)
    assert Image.open(io.BytesIO(large)).mode == "RGB"
    small = live.png_bytes(figure, limit=len(large) - 1)
    assert len(small) < len(large)
    assert Image.open(io.BytesIO(small)).width < Image.open(io.BytesIO(large)).width


def test_live_figure_is_throttled_and_draws_the_last_frame(screen: Screen) -> None:
    clock, steps = Clock(), [0]

    def draw() -> Figure:
        return tiny_figure(f"frame {steps[-1]}")

    with live.LiveFigure(draw, min_interval=1.0, clock=clock) as figure:
        for step in range(1, 41):
            steps.append(step)
            clock.now += 0.125
            figure.update()
    alts = [metadata["image/png"]["alt"] for _, metadata in screen.frames]
    assert alts == ["frame 0", "frame 8", "frame 16", "frame 24", "frame 32", "frame 40", "frame 40"]


def test_a_drawing_failure_is_told_once_and_ends_nothing(screen: Screen) -> None:
    broken = False

    def draw() -> Figure:
        if broken:
            raise ZeroDivisionError("no epochs")
        return tiny_figure("good")

    figure = live.LiveFigure(draw)
    broken = True
    with pytest.warns(RuntimeWarning, match="ZeroDivisionError: no epochs"):
        figure.update(force=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.update(force=True)
        figure.close()
    broken = False
    figure.update(force=True)
    assert len(screen.frames) == 2, "the frames before and after the failure"


def test_outside_a_notebook_nothing_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    def draw() -> Figure:
        raise AssertionError("drawn for nobody")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        live.LiveFigure(draw).close()
        live.show(tiny_figure("nobody sees this"))
        progress = live.Progress()
        progress.start(1, 2)
        progress.step(1, 1)
        progress.close()
    assert capsys.readouterr() == ("", "")


def test_progress_is_throttled_reads_the_loss_rarely_and_estimates_the_end(screen: Screen) -> None:
    clock, reads = Clock(), []
    progress = live.Progress(clock=clock)
    progress.start(2, 10)
    for epoch in (1, 2):
        for step in range(1, 11):
            clock.now += 0.25
            progress.step(epoch, step, lambda: reads.append(1) or 1.5)
        progress.epoch_done(record(epoch, 0.25 * epoch))
    progress.close("healthy")
    assert len(reads) <= 6, "5 seconds at 1 Hz, and the first"
    frames = [data["text/html"] for data, _ in screen.frames]
    assert 'aria-label="Training progress"' in frames[0]
    assert 'value="5.0"' in frames[0]
    assert "Epoch 1/2 · step 1/10 · loss 1.500" in frames[0]
    assert "about 5 s left" in frames[0]  # 19 steps of 0.25 s
    assert 'value="100.0"' in frames[-1]
    assert "2 epochs in 5 s · test accuracy 50.0 % · healthy" in frames[-1]
    assert not any("widget" in frame.lower() or "script" in frame.lower() for frame in frames)


def test_the_estimate_follows_a_change_of_speed_and_a_resumed_run_starts_late() -> None:
    clock = Clock()
    progress = live.TerminalProgress(io.StringIO(), clock=clock)
    progress.start(10, 20, first_epoch=5)
    assert progress.share == 0.5
    assert progress.seconds_left is None
    for step in range(1, 21):
        clock.now += 1.0
        progress.step(6, step)
    assert progress.seconds_left == pytest.approx(80.0)  # 4 epochs of 20 steps, 1 s each
    for step in range(1, 61):
        clock.now += 2.0
        progress.step(7 + (step - 1) // 20, (step - 1) % 20 + 1)
    assert 38 < progress.seconds_left < 40, "20 steps, now 2 s each"


def test_text_from_outside_cannot_become_markup(screen: Screen) -> None:
    progress = live.Progress()
    progress.start(1, 1)
    progress.close("<script>alert(1)</script>")
    assert "<script" not in screen.frames[-1][0]["text/html"]
    assert "&lt;script&gt;" in screen.frames[-1][0]["text/html"]


def test_a_stopped_run_says_how_far_it_came() -> None:
    clock, log = Clock(), io.StringIO()
    progress = live.TerminalProgress(log, clock=clock)
    progress.start(20, 5)
    for step in range(1, 6):
        clock.now += 3
        progress.step(1, step)
    progress.epoch_done(record(1))
    clock.now += 60
    progress.close("interrupted")
    assert log.getvalue().endswith("Stopped after 1 of 20 epochs, 1 min 15 s · test accuracy 50.0 % · interrupted\n")


def test_an_epoch_counts_when_it_was_tested() -> None:
    """Stopped between the last step of epoch 2 and its test: one epoch is done, as in the history."""
    log = io.StringIO()
    progress = live.TerminalProgress(log, clock=Clock())
    progress.start(3, 2)
    progress.step(1, 2)
    progress.epoch_done(record(1))
    progress.step(2, 2)
    progress.close()
    assert "Stopped after 1 of 3 epochs" in log.getvalue()


def test_a_finished_run_that_is_taken_up_is_said_to_be_finished() -> None:
    log = io.StringIO()
    progress = live.TerminalProgress(log, clock=Clock())
    progress.start(24, 30, first_epoch=24)
    progress.close()
    assert log.getvalue() == "100 % · All 24 epochs were trained before\n"


def test_a_log_gets_a_line_every_thirty_seconds_and_a_terminal_one_line() -> None:
    clock, log, terminal = Clock(), io.StringIO(), io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    both = [live.TerminalProgress(stream, clock=clock) for stream in (log, terminal)]
    for progress in both:
        progress.start(1, 100)
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
    for progress in both:
        progress.close()
    assert terminal.getvalue().endswith("\n")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.7, "1 min 00 s"), (75.2, "1 min 15 s"), (3725, "1 h 02 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert live.duration(seconds) == text


NOTEBOOK = [
    """
from types import SimpleNamespace
from matplotlib.figure import Figure
from experiments import live
def draw():
    if count == 3:
        raise ValueError("frame 3 cannot be drawn")
    figure = Figure(figsize=(2, 1)); figure.set_label(f"frame {count}")
    return figure
count = 0
with live.LiveFigure(draw, min_interval=0.0) as figure:
    for count in range(1, 6):
        figure.update()
""",
    """
bar = live.Progress(min_interval=0.0)
bar.start(2, 3)
for epoch in (1, 2):
    for step in (1, 2, 3):
        bar.step(epoch, step, lambda: 0.5)
    bar.epoch_done(SimpleNamespace(epoch=epoch, accuracy=0.25 * epoch))
bar.close()
""",
    "live.show(draw())",
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


@pytest.fixture(scope="module")
def outputs() -> list[list[SimpleNamespace]]:
    """Outputs of each cell of a notebook that was run without a browser."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in NOTEBOOK])
    NotebookClient(notebook, timeout=240, kernel_name="python3").execute()
    return [cell.outputs for cell in notebook.cells]


def test_headless_notebook_holds_the_last_frame_only(outputs: list[list[SimpleNamespace]]) -> None:
    shown = [output for output in outputs[0] if output.output_type == "display_data"]
    assert len(shown) == 1
    assert shown[0].metadata["image/png"]["alt"] == "frame 5"
    told = "".join(output.text for output in outputs[0] if output.output_type == "stream")
    assert told.count("frame 3 cannot be drawn") == 1


def test_headless_progress_is_one_finished_bar(outputs: list[list[SimpleNamespace]]) -> None:
    (bar,) = outputs[1]
    assert 'value="100.0"' in bar.data["text/html"]
    assert "2 epochs in 0 s · test accuracy 50.0 %" in bar.data["text/plain"]


def test_headless_show_and_explorer(outputs: list[list[SimpleNamespace]]) -> None:
    (shown,) = outputs[2]
    assert shown.metadata["image/png"]["alt"] == "frame 5"
    controls, figure = outputs[3]
    assert figure.metadata["image/png"]["alt"] == "6 bits", "the figure followed the slider"
    assert "image/png" in figure.data
    assert "application/vnd.jupyter.widget-view+json" in controls.data

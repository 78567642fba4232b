"""What a notebook shows: figures that are displayed once or follow a run, progress, explorers, facts for the page.

A figure is a PNG with its alt text under a display id that is then updated, so the saved notebook holds the last state
and nothing else, also when no browser is open. Beside what a notebook shows, under types of their own that only the
page reads, are the figure as an SVG with its values, and what an explorer needs where no kernel answers. Nothing here
knows a model or a file. Outside a notebook nothing is displayed, and progress is a line on stderr. Times are seconds.
"""

from __future__ import annotations

import base64
import datetime
import functools
import html
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Self, TextIO

from IPython.display import DisplayHandle, display
from ipywidgets import HTML, HBox, VBox, Widget
from matplotlib.figure import Figure

from experiments.figures import hover_values, png_bytes, style, svg_text
from src.storage import duration
from src.training import EpochRecord, in_notebook

FACTS = "application/vnd.codeq.run+json"
FIGURE = "application/vnd.codeq.figure+json"
EXPLORER = "application/vnd.codeq.explorer+json"
Bundle = tuple[dict[str, Any], dict[str, Any]]
View = Callable[..., Bundle | Figure]
Clock = Callable[[], float]


def show(figure: Figure) -> None:
    """Display a figure once, crisp and with its alt text."""
    put(*page_bundle(figure))


def put(data: dict[str, Any], metadata: dict[str, Any], *, handle: Any = None) -> Any:
    """Display under a new id, or update the display of `handle`. Returns the handle (None outside a notebook)."""
    if not in_notebook():
        return None
    if handle is None:
        handle = DisplayHandle()
        handle.display(data, metadata=metadata, raw=True)
    else:
        handle.update(data, metadata=metadata, raw=True)
    return handle


def figure_bundle(figure: Figure, *, quick: bool = False) -> Bundle:
    """Data and metadata of a figure for a notebook: a PNG in base64, its alt text and its size in CSS pixels.

    quick: a PNG that is larger and sooner there.
    """
    alt = str(figure.get_label()) or "Figure"
    width, height = (round(float(side) * style.SCREEN_DPI) for side in figure.get_size_inches())
    png = base64.b64encode(png_bytes(figure, quick=quick)).decode("ascii")
    return {"image/png": png, "text/plain": alt}, {"image/png": {"alt": alt, "width": width, "height": height}}


def page_bundle(figure: Figure) -> Bundle:
    """As `figure_bundle`, and for the page an SVG and the values of its curves (FIGURE); takes twice as long."""
    data, metadata = figure_bundle(figure)
    return {**data, FIGURE: {"svg": svg_text(figure), "hover": hover_values(figure)}}, metadata


def publish(facts: Mapping[str, Any], line: str) -> None:
    """Show `line` in the notebook and keep `facts` (JSON) with it. A later call replaces the keys that it repeats.

    The keys that a page reads are those of run.json: config, data, machine, versions, results, verdict; the time is
    added.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    put({"text/plain": line, FACTS: {**facts, "recorded": now}}, {})


class LiveFigure:
    """A figure that is drawn again while something runs, in one place of the notebook, at most once a second.

    draw: builds the figure from the current data. A drawing that fails is a warning and never ends what runs
    around it. Use it as a context manager: it draws the last frame.
    """

    def __init__(self, draw: Callable[[], Figure], min_interval: float = 1.0, *, clock: Clock = time.monotonic) -> None:
        self._draw, self._clock, self._interval = draw, clock, min_interval
        self._handle: Any = None
        self._next = float("-inf")
        self.update()

    def update(self, force: bool = False) -> None:
        """Draw again, unless the last drawing is less than `min_interval` seconds ago."""
        if not in_notebook() or (not force and self._clock() < self._next):
            return
        try:
            bundle = page_bundle if force else figure_bundle  # the last frame is what a page shows
            self._handle = put(*bundle(self._draw()), handle=self._handle)
        except Exception as error:
            text = f"the live figure could not be drawn and keeps its last frame: {type(error).__name__}: {error}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        self._next = self._clock() + self._interval

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.update(force=True)


class ProgressBar:
    """How far a run has come and how long the rest will take: a bar in a notebook, elsewhere a line on stderr.

    A terminal's line is written over at most once a second, a log gets one every 30 seconds. epochs: planned in total;
    first_epoch, and first_step of the next: how many were done before (resumed). Call step after every training step
    and epoch_done after every epoch; they count from 1. As a context manager it says at the end how far the run came.
    """

    def __init__(
        self,
        epochs: int,
        steps_per_epoch: int,
        first_epoch: int = 0,
        first_step: int = 0,
        *,
        stream: TextIO | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.epochs, self.steps_per_epoch, self.first_epoch = epochs, steps_per_epoch, first_epoch
        self._stream, self._clock, self._handle = stream or sys.stderr, clock, None
        self._terminal = self._stream.isatty() and not in_notebook()
        self._log = not self._terminal and not in_notebook()
        self._interval = 30.0 if self._log else 1.0
        self._begin = clock()
        self._next = self._begin + (self._interval if self._log else 0.0)
        self._first = self._done = first_epoch * steps_per_epoch + first_step
        self._tested, self._note = first_epoch, ""

    def step(self, epoch: int, step: int, loss: Callable[[], float]) -> None:
        """`step` steps of `epoch` are done. loss is called only where the line is really drawn."""
        self._done = (epoch - 1) * self.steps_per_epoch + step
        if self._clock() >= self._next:
            at = f"Epoch {epoch}/{self.epochs} · step {step}/{self.steps_per_epoch} · loss {loss():.3f}"
            spent = self._clock() - self._begin
            self._show(f"{at} · {duration(spent)} spent · about {duration(self.seconds_left)} left")
            self._next = self._clock() + self._interval

    def epoch_done(self, record: EpochRecord) -> None:
        """An epoch was trained and tested; clears a terminal's line, so that the caller can print its own."""
        self._tested, self._note = record.epoch, f" · test accuracy {100 * record.accuracy:.1f} %"
        if self._terminal:
            self._write("\r\x1b[K")
            self._next = float("-inf")

    @property
    def seconds_left(self) -> float:
        """Estimate for the steps that are left, at the mean speed of this run, its tests included."""
        left = self.epochs * self.steps_per_epoch - self._done
        return left * (self._clock() - self._begin) / max(self._done - self._first, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """The last state, also where an interrupt or an error ended the run."""
        done, spent = self._tested - self.first_epoch, duration(self._clock() - self._begin)
        text = f"{done} epoch{'s' if done != 1 else ''} in {spent}"
        if self.first_epoch >= self.epochs:
            text = f"All {self.epochs} epochs were trained before"
        elif self._tested < self.epochs:
            text = f"Stopped after {self._tested} of {self.epochs} epochs, {spent}"
        if self._handle is not None:  # the last state is below what was printed meanwhile
            put({"text/html": "", "text/plain": ""}, {}, handle=self._handle)
            self._handle = None
        self._show(text + self._note)
        if self._terminal:
            self._write("\n")

    def _show(self, text: str) -> None:
        percent = 100 * self._done / (self.epochs * self.steps_per_epoch)
        line = f"{percent:3.0f} % · {text}"
        if self._terminal:
            self._write(f"\r\x1b[K{line[: shutil.get_terminal_size().columns - 1]}")
        elif self._log:
            self._write(f"{line}\n")
        else:
            bar = (
                '<div style="max-width:54em;font-size:0.92em;line-height:1.5;font-variant-numeric:tabular-nums">'
                f'<progress aria-label="Training progress" max="100" value="{percent:.1f}" style="width:100%">'
                f"{percent:.0f} %</progress><div>{line.strip()}</div></div>"
            )
            self._handle = put({"text/html": bar, "text/plain": line.strip()}, {}, handle=self._handle)

    def _write(self, text: str) -> None:
        with suppress(OSError):  # a terminal that is gone ends no training
            self._stream.write(text)
            self._stream.flush()


def explorer(
    *views: View,
    busy: str = "drawing ...",
    page: Mapping[str, Any] | None = None,
    pictures: tuple[str, Iterable[Any]] | None = None,
    helpers: Sequence[Widget] = (),
    **controls: Any,
) -> None:
    """Controls above the displays that follow them. A view gets the value of each control under its name.

    controls: ipywidgets with a `value`; they act while they are moved, and ipywidgets waits for each answer. helpers:
    buttons that move them. busy: shown while the views are drawn again. page: with `kind`, the numbers with which
    template/explorers.js of the page answers the same controls; pictures: instead of it, the one control that the
    page has, and the values for which it holds the figure of the only view. What a view returns is an ordinary display
    that starts with the controls' present values, so a saved notebook or page holds it also where no kernel answers
    the controls. It is below them, so that they do not move when it changes its height.
    """
    note = HTML(layout={"min_height": "2em"})  # its place is kept, so that nothing jumps
    if in_notebook():
        if pictures:
            page = _pictures(views[0], controls, *pictures)
        shown = VBox([*controls.values(), HBox(list(helpers)), note])._repr_mimebundle_()
        shown["text/plain"] = "Run → Run All Cells shows the controls of this explorer."  # where no kernel has them
        display({**shown, **({EXPLORER: page} if page else {})}, raw=True)

    def draw(view: View, bundle: Callable[[Figure], Any]) -> Bundle:
        shown = view(**{name: control.value for name, control in controls.items()})
        return bundle(shown) if isinstance(shown, Figure) else shown

    handles = [put(*draw(view, page_bundle)) for view in views]
    quick = [QuickFigure(functools.partial(figure_bundle, quick=True)) for _ in views]

    def redraw(_: object) -> None:
        note.value = busy
        try:
            for view, handle, bundle in zip(views, handles, quick, strict=True):
                put(*draw(view, bundle), handle=handle)
            note.value = ""
        except Exception as error:  # a callback's traceback would be lost in the kernel's log
            note.value = html.escape(f"{type(error).__name__}: {error}")

    for control in controls.values():
        control.observe(redraw, names="value")


def _pictures(
    view: Callable[..., Any], controls: Mapping[str, Any], name: str, values: Iterable[Any]
) -> dict[str, Any]:
    """What a page shows for each value of the control `name`; the others are as they are."""
    svg, found = QuickFigure(svg_text), {}
    for value in values:
        figure = view(**{other: one.value for other, one in controls.items()} | {name: value})
        found[str(value)] = {"svg": svg(figure), "alt": figure.get_label()}
    control = controls[name]
    return {"kind": "pictures", "control": control.description, "start": str(control.value), "pictures": found}


class QuickFigure:
    """`render` for figures that follow each other: where the charts are is worked out once for each size."""

    def __init__(self, render: Callable[[Figure], Any]) -> None:
        self._render = render
        self._places: dict[tuple[Any, ...], list[Any]] = {}

    def __call__(self, figure: Figure) -> Any:
        """What `render` makes of `figure`."""
        key = (*figure.get_size_inches(), len(figure.axes))
        if key in self._places:
            figure.set_layout_engine("none")
            for axes, place in zip(figure.axes, self._places[key], strict=True):
                axes.set_position(place)
        rendered = self._render(figure)
        self._places[key] = [axes.get_position() for axes in figure.axes]
        return rendered

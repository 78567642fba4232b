"""What moves while a notebook or a terminal waits: one live figure, one progress line, one explorer.

A figure or a bar is displayed once under its own id and that display is updated, so the saved notebook holds the last
frame and nothing else, also when no browser is open. Both are drawn at most once a second. Nothing here knows a model
or a file; outside a notebook the figure stays silent and `TerminalProgress` takes the place of `Progress`.
"""

from __future__ import annotations

import base64
import html
import io
import shutil
import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self, TextIO

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from src.records import EpochRecord

MAX_PNG_BYTES = 150_000
SCREEN_DPI = 96
Clock = Callable[[], float]


def show(figure: Figure) -> None:
    """Display a figure once, crisp and with its alt text. Outside IPython nothing is displayed."""
    _display(*figure_bundle(figure))


def figure_bundle(figure: Figure) -> tuple[dict[str, str], dict[str, Any]]:
    """Data and metadata of a figure for a notebook: a PNG in base64, its alt text and its size in CSS pixels."""
    alt = str(figure.get_label()) or "Figure"
    width, height = (round(float(side) * SCREEN_DPI) for side in figure.get_size_inches())
    png = base64.b64encode(png_bytes(figure)).decode("ascii")
    return {"image/png": png, "text/plain": alt}, {"image/png": {"alt": alt, "width": width, "height": height}}


def png_bytes(figure: Figure, *, limit: int = MAX_PNG_BYTES) -> bytes:
    """A figure as PNG at twice the screen's resolution, or at less where it would exceed `limit` bytes.

    A chart has few colours: it is stored with a palette, at about a third of the size. Photographs keep all theirs.
    """
    data = b""
    for scale in (2.0, 1.75, 1.5, 1.25, 1.0, 0.75):
        figure.set_dpi(scale * SCREEN_DPI)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        buffer = io.BytesIO()
        _with_palette(canvas).save(buffer, "PNG")
        data = buffer.getvalue()
        if len(data) <= limit:
            break
    return data


class LiveFigure:
    """A figure that is drawn again while something runs, in one place of the notebook.

    draw: builds the figure from the present data. min_interval: seconds between two drawings. A drawing that fails is
    reported once as a warning and never ends what runs around it. Use it as a context manager or call `close`.
    """

    def __init__(self, draw: Callable[[], Figure], min_interval: float = 1.0, *, clock: Clock = time.monotonic) -> None:
        self._draw, self._clock, self._interval = draw, clock, min_interval
        self._handle: Any = None
        self._next = float("-inf")
        self._warned = False
        self.update(force=True)

    def update(self, force: bool = False) -> None:
        """Draw again, unless the last drawing is less than `min_interval` seconds ago."""
        if not force and self._clock() < self._next:
            return
        try:
            if in_notebook():
                self._handle = _display(*figure_bundle(self._draw()), handle=self._handle)
        except Exception as error:
            if not self._warned:
                self._warned = True
                text = f"the live figure could not be drawn and keeps its last frame: {type(error).__name__}: {error}"
                warnings.warn(text, RuntimeWarning, stacklevel=2)
        self._next = self._clock() + self._interval

    def close(self) -> None:
        """Draw the last frame."""
        self.update(force=True)

    def __enter__(self) -> LiveFigure:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Reporter(ABC):
    """Progress through epochs and steps with a smoothed ETA; subclasses say where it is shown.

    start, then step after every training step and epoch_done after every epoch, then close. Epochs and steps count
    from 1. The rate is an average over about one epoch of steps, so that the time of the tests is part of it.
    """

    def __init__(self, min_interval: float = 1.0, *, clock: Clock = time.monotonic) -> None:
        self._clock, self._interval = clock, min_interval
        self.start(1, 1)

    def start(self, epochs: int, steps_per_epoch: int, first_epoch: int = 0) -> None:
        """epochs: planned in total; first_epoch: how many of them were done before (a resumed run)."""
        self.epochs, self.steps_per_epoch, self.first_epoch = epochs, max(steps_per_epoch, 1), first_epoch
        self._done = first_epoch * self.steps_per_epoch
        self._begin = self._last = self._clock()
        self._seconds_per_step = self._weight = 0.0
        self._next = float("-inf")
        self._note = ""

    def step(self, epoch: int, step: int, loss: Callable[[], float] | None = None) -> None:
        """`step` steps of `epoch` are done. loss is called only where the line is really drawn."""
        self._advance((epoch - 1) * self.steps_per_epoch + step)
        if self._clock() < self._next:
            return
        parts = [f"Epoch {epoch}/{self.epochs}", f"step {step}/{self.steps_per_epoch}"]
        if loss is not None:
            parts.append(f"loss {loss():.3f}")
        self._draw(" · ".join([*parts, *self._times()]))

    def epoch_done(self, record: EpochRecord) -> None:
        """An epoch was trained and tested; call it before printing a line of one's own."""
        self._advance(record.epoch * self.steps_per_epoch)
        self._note = f"test accuracy {100 * record.accuracy:.1f} %"
        if self._clock() >= self._next:
            self._draw(" · ".join([f"Epoch {record.epoch}/{self.epochs} done", self._note, *self._times()]))

    def close(self, message: str = "") -> None:
        """The last state: how many epochs were done in how long, and `message`."""
        done = self._done // self.steps_per_epoch - self.first_epoch
        spent = duration(self._clock() - self._begin)
        finished = self._done >= self.epochs * self.steps_per_epoch
        text = f"{done} epoch{'s' if done != 1 else ''} in {spent}"
        if not finished:
            text = f"Stopped after {self._done // self.steps_per_epoch} of {self.epochs} epochs, {spent}"
        self._show(" · ".join(part for part in (text, self._note, message) if part), final=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """An interrupt or an error shows how far it came, too."""
        self.close()

    @property
    def share(self) -> float:
        """Share of all planned steps that is done, 0 to 1."""
        return min(self._done / (self.epochs * self.steps_per_epoch), 1.0)

    @property
    def seconds_left(self) -> float | None:
        """Estimate for the steps that are left; None before the first step."""
        if not self._weight:
            return None
        left = max(self.epochs * self.steps_per_epoch - self._done, 0)
        return left * self._seconds_per_step / self._weight

    @abstractmethod
    def _show(self, text: str, *, final: bool) -> None:
        """Put the line where it is seen."""

    def _advance(self, done: int) -> None:
        now, steps = self._clock(), done - self._done
        if steps > 0:
            keep = (1 - 1 / max(self.steps_per_epoch, 10)) ** steps
            self._seconds_per_step = keep * self._seconds_per_step + (1 - keep) * (now - self._last) / steps
            self._weight = keep * self._weight + (1 - keep)
            self._done, self._last = done, now

    def _times(self) -> list[str]:
        parts = [f"{duration(self._clock() - self._begin)} spent"]
        left = self.seconds_left
        return parts if left is None else [*parts, f"about {duration(left)} left"]

    def _draw(self, text: str) -> None:
        self._show(text, final=False)
        self._next = self._clock() + self._interval


class Progress(Reporter):
    """Progress in a notebook: a plain HTML bar, readable without any script, in one place."""

    def start(self, epochs: int, steps_per_epoch: int, first_epoch: int = 0) -> None:
        super().start(epochs, steps_per_epoch, first_epoch)
        self._handle: Any = None

    def _show(self, text: str, *, final: bool) -> None:
        percent = 100 * self.share
        line = html.escape(text)
        bar = (
            '<div style="max-width:54em;font-size:0.92em;line-height:1.5;font-variant-numeric:tabular-nums">'
            f'<progress aria-label="Training progress" max="100" value="{percent:.1f}" style="width:100%">'
            f"{percent:.0f} %</progress><div>{percent:.0f} % · {line}</div></div>"
        )
        self._handle = _display({"text/html": bar, "text/plain": f"{percent:.0f} % · {text}"}, {}, handle=self._handle)


class TerminalProgress(Reporter):
    """Progress on stderr: one line that overwrites itself on a terminal, a line every 30 seconds in a log."""

    def __init__(self, stream: TextIO | None = None, *, clock: Clock = time.monotonic) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._tty = self._stream.isatty()
        super().__init__(1.0 if self._tty else 30.0, clock=clock)

    def start(self, epochs: int, steps_per_epoch: int, first_epoch: int = 0) -> None:
        super().start(epochs, steps_per_epoch, first_epoch)
        if not self._tty:
            self._next = self._clock() + self._interval

    def epoch_done(self, record: EpochRecord) -> None:
        """Clear the line, so that the caller can print its own."""
        super().epoch_done(record)
        if self._tty:
            self._write("\r\x1b[K")
            self._next = float("-inf")

    def _show(self, text: str, *, final: bool) -> None:
        line = f"{100 * self.share:3.0f} % · {text}"
        if not self._tty:
            self._write(f"{line}\n")
            return
        width = shutil.get_terminal_size().columns
        self._write(f"\r\x1b[K{line[: max(width - 1, 20)]}" + ("\n" if final else ""))

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def explorer(build: Callable[..., Figure], **controls: Any) -> None:
    """Sliders and a figure that follows them. `build` gets the value of each control under its name.

    controls: ipywidgets with a `value`; they act when let go. The figure is an ordinary display that starts with the
    controls' present values, so a saved notebook or HTML holds it also where no kernel answers the controls.
    """
    import ipywidgets

    handle = _display(*figure_bundle(build(**{name: control.value for name, control in controls.items()})))
    note = ipywidgets.HTML()

    def redraw(_: object = None) -> None:
        try:
            figure = build(**{name: control.value for name, control in controls.items()})
            _display(*figure_bundle(figure), handle=handle)
            note.value = ""
        except Exception as error:  # a callback's traceback would be lost in the kernel's log
            note.value = html.escape(f"{type(error).__name__}: {error}")

    for control in controls.values():
        if control.has_trait("continuous_update"):
            control.continuous_update = False
        control.observe(redraw, names="value")
    if in_notebook():
        from IPython.display import display

        display(ipywidgets.VBox([*controls.values(), note]))


def in_notebook() -> bool:
    """True inside a Jupyter kernel, also a headless one."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module else None
    return shell is not None and hasattr(shell, "kernel")


def duration(seconds: float) -> str:
    """75.2 -> '1 min 15 s'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _display(data: dict[str, str], metadata: dict[str, Any], *, handle: Any = None) -> Any:
    """Display under a new id, or update the display that `handle` names; gives back the handle (None: no notebook)."""
    if not in_notebook():
        return None
    from IPython.display import DisplayHandle

    if handle is None:
        handle = DisplayHandle()
        handle.display(data, metadata=metadata, raw=True)
    else:
        handle.update(data, metadata=metadata, raw=True)
    return handle


def _with_palette(canvas: FigureCanvasAgg) -> Image.Image:
    """What was drawn, in its 256 commonest colours, or in all of 64 x 64 x 64 where those are under 95 % of it."""
    pixels = np.asarray(canvas.buffer_rgba())  # (H, W, 4)
    red, green, blue = (pixels[:, :, i].astype(np.intp) >> 2 for i in range(3))  # 64 shades: white and paper differ
    keys = (red << 12) | (green << 6) | blue
    counts = np.bincount(keys.ravel(), minlength=1 << 18)
    present = np.flatnonzero(counts)
    common = present[np.argsort(-counts[present], kind="stable")[:256]]
    if counts[common].sum() < 0.95 * keys.size:
        return Image.fromarray((np.stack([red, green, blue], axis=2) << 2 | 3).astype(np.uint8))
    shades = np.stack([present >> 12, present >> 6 & 63, present & 63], axis=1)
    palette = shades[np.searchsorted(present, common)]
    index = np.zeros(1 << 18, dtype=np.uint8)
    index[present] = ((shades[:, None] - palette) ** 2).sum(axis=2).argmin(axis=1)
    image = Image.fromarray(index[keys])
    image.putpalette((palette << 2 | 3).astype(np.uint8).tobytes())
    return image

"""What moves while a notebook waits: one live figure and one explorer, beside the progress line of progress.py.

A figure is displayed once under its own id and that display is updated, so the saved notebook holds the last frame and
nothing else, also when no browser is open. It is drawn at most once a second. Nothing here knows a model or a file;
outside a notebook the figure stays silent and `TerminalProgress` takes the place of `Progress`.
"""

from __future__ import annotations

import html
import time
import warnings
from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure

from experiments.figures import png_bytes
from experiments.notebook import display
from experiments.notebook.controls import widgets
from experiments.notebook.display import figure_bundle, show
from experiments.notebook.progress import Clock, Progress, TerminalProgress, duration
from src.training import in_notebook

__all__ = [
    "LiveFigure",
    "Progress",
    "TerminalProgress",
    "duration",
    "explorer",
    "figure_bundle",
    "follow",
    "png_bytes",
    "show",
]


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
                self._handle = display.put(*figure_bundle(self._draw()), handle=self._handle)
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


def explorer(build: Callable[..., Figure], **controls: Any) -> None:
    """Controls above a figure that follows them. `build` gets the value of each control under its name.

    controls: ipywidgets with a `value`; they act when let go. The figure is an ordinary display that starts with the
    controls' present values, so a saved notebook or HTML holds it also where no kernel answers the controls. It stands
    below them so that they stay where they are when it changes its height.
    """
    ipywidgets = widgets()

    for control in controls.values():
        if control.has_trait("continuous_update"):
            control.continuous_update = False
    note = ipywidgets.HTML()
    if in_notebook():
        import IPython.display

        IPython.display.display(ipywidgets.VBox([*controls.values(), note]))
    follow(build, note, **controls)


def follow(build: Callable[..., Figure], note: Any = None, **controls: Any) -> None:
    """A further figure for controls that are shown already. note: an ipywidgets.HTML that tells what went wrong."""

    def draw() -> Figure:
        return build(**{name: control.value for name, control in controls.items()})

    handle = display.put(*figure_bundle(draw()))

    def redraw(_: object = None) -> None:
        message = ""
        try:
            display.put(*figure_bundle(draw()), handle=handle)
        except Exception as error:  # a callback's traceback would be lost in the kernel's log
            message = html.escape(f"{type(error).__name__}: {error}")
        if note is not None:
            note.value = message

    for control in controls.values():
        control.observe(redraw, names="value")

"""What a notebook shows: figures that are displayed once or follow a run, explorers with controls, facts for the page.

A figure is a PNG with its alt text under a display id that is then updated, so the saved notebook holds the last state
and nothing else, also when no browser is open. Nothing here knows a model or a file. Outside a notebook nothing is
displayed.
"""

from __future__ import annotations

import base64
import datetime
import html
import time
import warnings
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from matplotlib.figure import Figure

from experiments.figures import SCREEN_DPI, png_bytes
from src.training import in_notebook

FACTS = "application/vnd.codeq.run+json"
Bundle = tuple[dict[str, str], dict[str, Any]]
View = Callable[..., Bundle | Figure]
Clock = Callable[[], float]  # seconds


def show(figure: Figure) -> None:
    """Display a figure once, crisp and with its alt text."""
    put(*figure_bundle(figure))


def put(data: dict[str, str], metadata: dict[str, Any], *, handle: Any = None) -> Any:
    """Display under a new id, or update the display of `handle`. Returns the handle (None outside a notebook)."""
    if not in_notebook():
        return None
    from IPython.display import DisplayHandle

    if handle is None:
        handle = DisplayHandle()
        handle.display(data, metadata=metadata, raw=True)
    else:
        handle.update(data, metadata=metadata, raw=True)
    return handle


def figure_bundle(figure: Figure) -> Bundle:
    """Data and metadata of a figure for a notebook: a PNG in base64, its alt text and its size in CSS pixels."""
    alt = str(figure.get_label()) or "Figure"
    width, height = (round(float(side) * SCREEN_DPI) for side in figure.get_size_inches())
    png = base64.b64encode(png_bytes(figure)).decode("ascii")
    return {"image/png": png, "text/plain": alt}, {"image/png": {"alt": alt, "width": width, "height": height}}


def publish(facts: Mapping[str, Any], line: str) -> None:
    """Show `line` in the notebook and keep `facts` (JSON) with it. A later call replaces the keys that it repeats.

    The keys that a page reads are those of run.json: config, data, machine, versions, results, verdict; the time is
    added.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    put({"text/plain": line, FACTS: {**facts, "recorded": now}}, {})  # type: ignore[dict-item]


class LiveFigure:
    """A figure that is drawn again while something runs, in one place of the notebook.

    draw: builds the figure from the current data. min_interval: seconds between two drawings. A drawing that fails is
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
                self._handle = put(*figure_bundle(self._draw()), handle=self._handle)
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


class FixedControl:
    """Stands in for a control where ipywidgets is missing: it keeps its value. Shown, it says what is missing."""

    def __init__(self, *_: Any, value: Any = None, **__: Any) -> None:
        self.value = value

    def has_trait(self, name: str) -> bool:
        """It has a value and nothing else."""
        return name == "value"

    def observe(self, *_: Any, **__: Any) -> None:
        """Nothing ever changes."""

    def __repr__(self) -> str:
        return "(the controls of this figure need the package ipywidgets: %pip install ipywidgets, then restart)"


def widgets() -> Any:
    """The module ipywidgets, or where it is missing stand-ins for its controls: figures are shown all the same."""
    try:
        import ipywidgets
    except ImportError:
        used = ("Dropdown", "FloatSlider", "HTML", "IntSlider", "SelectMultiple", "SelectionSlider", "VBox")
        return SimpleNamespace(**dict.fromkeys(used, FixedControl))
    return ipywidgets


def explorer(*views: View, busy: str = "", **controls: Any) -> None:
    """Controls above the displays that follow them. A view gets the value of each control under its name.

    controls: ipywidgets with a `value`; they act when let go. busy: shown while the views are drawn again. What a view
    returns is an ordinary display that starts with the controls' present values, so a saved notebook or page holds it
    also where no kernel answers the controls. It is below them, so that they do not move when it changes its height.
    """
    note = widgets().HTML()  # says what went wrong
    for control in controls.values():
        if control.has_trait("continuous_update"):
            control.continuous_update = False
    if in_notebook():
        import IPython.display

        IPython.display.display(widgets().VBox([*controls.values(), note]))

    def draw(view: View) -> Bundle:
        shown = view(**{name: control.value for name, control in controls.items()})
        return figure_bundle(shown) if isinstance(shown, Figure) else shown

    handles = [put(*draw(view)) for view in views]

    def redraw(_: object) -> None:
        note.value = busy
        try:
            for view, handle in zip(views, handles, strict=True):
                put(*draw(view), handle=handle)
            note.value = ""
        except Exception as error:  # a callback's traceback would be lost in the kernel's log
            note.value = html.escape(f"{type(error).__name__}: {error}")

    for control in controls.values():
        control.observe(redraw, names="value")

"""What a notebook is shown: figures as PNG with their alt text, under a display id that can be updated.

A display is made once and then updated, so the saved notebook holds the last state and nothing else, also when no
browser is open. Outside a notebook nothing is displayed.
"""

from __future__ import annotations

import base64
import datetime
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from experiments.figures import SCREEN_DPI, png_bytes
from src.training import in_notebook


def show(figure: Figure) -> None:
    """Display a figure once, crisp and with its alt text. Outside IPython nothing is displayed."""
    put(*figure_bundle(figure))


def put(data: dict[str, str], metadata: dict[str, Any], *, handle: Any = None) -> Any:
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


def figure_bundle(figure: Figure) -> tuple[dict[str, str], dict[str, Any]]:
    """Data and metadata of a figure for a notebook: a PNG in base64, its alt text and its size in CSS pixels."""
    alt = str(figure.get_label()) or "Figure"
    width, height = (round(float(side) * SCREEN_DPI) for side in figure.get_size_inches())
    png = base64.b64encode(png_bytes(figure)).decode("ascii")
    return {"image/png": png, "text/plain": alt}, {"image/png": {"alt": alt, "width": width, "height": height}}


FACTS = "application/vnd.codeq.run+json"


def publish(facts: Mapping[str, Any], line: str) -> None:
    """Show `line` in the notebook and keep `facts` (JSON) with it. A later call replaces the keys that it repeats.

    The keys that a page reads are those of run.json: config, data, machine, versions, results, verdict; the time is
    added. Outside a notebook nothing happens.
    """

    if in_notebook():
        from IPython.display import display as show

        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        show({"text/plain": line, FACTS: {**facts, "recorded": now}}, raw=True)

"""What a notebook is shown: figures as PNG with their alt text, under a display id that can be updated.

A display is made once and then updated, so the saved notebook holds the last state and nothing else, also when no
browser is open. Outside a notebook nothing is displayed.
"""

from __future__ import annotations

import base64
import io
import sys
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

MAX_PNG_BYTES = 150_000
SCREEN_DPI = 96


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


def in_notebook() -> bool:
    """True inside a Jupyter kernel, also a headless one."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module else None
    return shell is not None and hasattr(shell, "kernel")


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

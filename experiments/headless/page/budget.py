"""What keeps a page small however long the run: pictures share one budget of bytes, long text is cut in the middle.

Nothing is lost by it: the executed notebook beside the page holds every picture and every line as it was.
"""

from __future__ import annotations

import base64
import binascii
import io
from typing import Any

from nbformat import NotebookNode
from PIL import Image

PICTURE_BYTES = 3_200_000  # all pictures of a page together; base64 makes 4/3 of it
TEXT_CHARACTERS = 20_000  # of one text output
SMALLEST_WIDTH = 240  # pixels; a picture is not made narrower than this


def fit(notebook: NotebookNode, picture_bytes: int = PICTURE_BYTES, text_characters: int = TEXT_CHARACTERS) -> None:
    """Cut long text outputs and scale PNG outputs down until they keep within the limits. Changes `notebook`.

    Pictures are taken the largest first, so that a page within its budget is left as it is.
    """
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    for output in outputs:
        if output.output_type == "stream":
            output.text = _cut("".join(output.text), text_characters)
        elif "text/plain" in output.get("data", {}):
            output.data["text/plain"] = _cut("".join(output.data["text/plain"]), text_characters)
    pictures = [output.data for output in outputs if "image/png" in output.get("data", {})]
    sizes = [_bytes(data) for data in pictures]
    final: set[int] = set()
    while sum(sizes) > picture_bytes and len(final) < len(pictures):
        largest = max((i for i in range(len(pictures)) if i not in final), key=lambda i: sizes[i])
        smaller = _scaled(pictures[largest]["image/png"])
        if smaller is None or len(smaller) * 3 // 4 >= sizes[largest]:
            final.add(largest)
        else:
            pictures[largest]["image/png"] = smaller
            sizes[largest] = _bytes(pictures[largest])


def _bytes(data: dict[str, Any]) -> int:
    return len("".join(data["image/png"])) * 3 // 4


def _scaled(picture: str) -> str | None:
    """The PNG (base64) at 3/4 of its width and height, with its palette; None where it is small or no PNG."""
    try:
        image = Image.open(io.BytesIO(base64.b64decode("".join(picture))))
        width, height = (round(side * 0.75) for side in image.size)
        if width < SMALLEST_WIDTH:
            return None
        smaller = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    except (binascii.Error, OSError):
        return None
    buffer = io.BytesIO()
    (smaller.quantize(256) if image.mode == "P" else smaller).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _cut(text: str, limit: int) -> str:
    """The first and the last lines of a text of more than `limit` characters, and how many are between them."""
    if len(text) <= limit:
        return text
    first, last = text[: limit // 2], text[-limit // 2 :]
    first, last = first[: first.rfind("\n") + 1] or first, last[last.find("\n") + 1 :] or last
    lines = text.count("\n") - first.count("\n") - last.count("\n")
    return (
        f"{first}[... {lines:,} lines, {len(text) - len(first) - len(last):,} characters are left out here ...]\n{last}"
    )

"""The walkthrough, run once in JupyterLab as by a reader who changes their mind: run all, stop, continue to the end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat

from experiments.headless.parameters import inject
from tests.browser.lab_page import WATCH, Complaints, Notebook

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks/codeq_walkthrough.ipynb"
SETTINGS = {"DATA": "digits", "EPOCHS": 16, "LIMIT": 200}
TRAINING = "training"  # the tag of the cell that trains
FRAMES_BEFORE_STOP = 4


@dataclass(frozen=True)
class Watched:
    """What was seen. frames: one sample per frame of the screen while it trained (see lab_page.WATCH).

    at_stop, after: history.csv after the stop and at the end, a line per epoch below the header. stopped_errors: what
    the training cell said when it was stopped. errors: of all cells at the end.
    """

    notebook: Notebook
    complaints: Complaints
    training: int
    frames: list[dict[str, Any]]
    at_stop: list[str]
    after: list[str]
    stopped_errors: list[str]
    errors: list[str]


def write_copy(path: Path, output: Path) -> None:
    """A copy of the notebook with the parameters of a very short run."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.write(inject(notebook, {**SETTINGS, "OUTPUT_DIR": str(output)}), path)


def run(notebook: Notebook, complaints: Complaints, output: Path, screenshots: Path) -> Watched:
    """Run all cells, watch the live figure, stop while it trains, run the rest. The notebook is open and new."""
    page, training = notebook.page, notebook.tagged(TRAINING)
    notebook.run_all()
    cell = notebook.show_cell(training)

    def figure_stands() -> bool:
        failed = [error for one in notebook.cells for error in one["errors"]]
        assert failed == [], "a cell before the training failed"
        return cell.locator(".jp-OutputArea-output img").count() > 0

    notebook.wait(figure_stands, 240, "the live figure to appear")
    cell.locator(".jp-OutputArea-output img").first.scroll_into_view_if_needed()
    cell.evaluate(WATCH)

    def seen() -> int:
        return int(page.evaluate("() => new Set(window.frames_seen.map((frame) => frame.source)).size"))

    notebook.wait(lambda: seen() >= FRAMES_BEFORE_STOP, 120, f"{FRAMES_BEFORE_STOP} different live figures")
    page.screenshot(path=screenshots / "lab_training.png")
    notebook.interrupt()
    notebook.wait_until_done(120)
    frames = page.evaluate("() => { window.watching = false; return window.frames_seen; }")
    at_stop = _rows(output)
    stopped_errors = notebook.cells[training]["errors"]
    page.screenshot(path=screenshots / "lab_stopped.png")
    notebook.run_from(training)
    page.wait_for_timeout(500)  # until the cells are marked as waiting
    notebook.wait_until_done(400)
    errors = [f"cell {one['index']}: {error}" for one in notebook.cells for error in one["errors"]]
    return Watched(notebook, complaints, training, frames, at_stop, _rows(output), stopped_errors, errors)


def _rows(output: Path) -> list[str]:
    return (output / "history.csv").read_text().splitlines()[1:]

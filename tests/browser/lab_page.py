"""A notebook open in JupyterLab, driven as a person would: its buttons, its cells, its controls, what they show.

JupyterLab is started with its application object in reach (`window.jupyterapp`), which tells the state of the kernel
and of every cell without guessing from the look of the page.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from playwright.sync_api import Locator, Page

PANEL = "window.jupyterapp.shell.currentWidget"
KERNEL = "window.jupyterapp?.shell.currentWidget?.context?.sessionContext?.session?.kernel"
LOCAL = ("http://127.0.0.1:", "ws://127.0.0.1:", "file:", "data:", "blob:", "about:")
CONTROLS = ".widget-slider, .widget-dropdown, .widget-select, .widget-select-multiple"

# What every output of a cell shows besides its controls; a long picture is identified by its length and its end.
SHOWN = """(cell) => [...cell.querySelectorAll('.jp-OutputArea-output')]
    .filter((output) => !output.querySelector('.jupyter-widgets'))
    .map((output) => [...output.querySelectorAll('img')].map((i) => i.src.length + i.src.slice(-80)).join()
        + '|' + output.textContent).join('\\n')"""

# One sample per frame of the screen while something is going on, kept in window.frames_seen.
WATCH = """(cell) => {
    window.frames_seen = [];
    window.watching = true;
    const scroller = cell.closest('.jp-WindowedPanel-outer');
    const look = () => {
        if (!window.watching) return;
        const images = [...cell.querySelectorAll('.jp-OutputArea-output img')];
        const box = images.length ? images[0].getBoundingClientRect() : null;
        const own = cell.getBoundingClientRect();
        window.frames_seen.push({
            images: images.length, source: images.length ? images[0].src.length + images[0].src.slice(-80) : '',
            top: box ? box.top - own.top : null, width: box ? box.width : null, height: box ? box.height : null,
            scrolled: scroller ? scroller.scrollTop : 0,
        });
        requestAnimationFrame(look);
    };
    look();
}"""


def complaints(page: Page) -> list[str]:
    """What the browser will have to say against the page: errors, failed requests, requests that leave."""
    found: list[str] = []

    def note(bad: bool, text: str) -> None:
        if bad:
            found.append(text)

    page.on("console", lambda said: note(said.type == "error", f"{said.text} ({said.location.get('url', '')})"))
    page.on("pageerror", lambda error: note(True, f"uncaught: {error}"))
    # ERR_ABORTED: given up by the page itself, as when it polls
    page.on("requestfailed", lambda one: note("ERR_ABORTED" not in str(one.failure), f"{one.url}: {one.failure}"))
    page.on("response", lambda answer: note(answer.status >= 400, f"{answer.url}: {answer.status}"))
    page.on("request", lambda asked: note(not asked.url.startswith(LOCAL), f"asks for {asked.url}"))
    return found


class Notebook:
    """The notebook that is open in `page`. Cells count from 0; times are seconds."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.wait(lambda: self.kernel == "idle", 120, "the kernel to start")

    @property
    def kernel(self) -> str:
        return str(self.page.evaluate(f"() => {KERNEL}?.status ?? 'none'"))

    @property
    def cells(self) -> list[dict[str, Any]]:
        """index, type, source, tags, whether it waits or runs, execution count, and its errors."""
        return list(
            self.page.evaluate(
                f"""() => {PANEL}.content.widgets.map((cell, index) => {{
                    const model = cell.model;
                    const outputs = model.type === 'code' ? model.outputs.toJSON() : [];
                    return {{
                        index, type: model.type, source: model.sharedModel.source,
                        tags: model.getMetadata('tags') ?? [],
                        busy: model.type === 'code' && model.executionState !== 'idle' || cell.prompt === '*',
                        count: model.executionCount ?? null,
                        errors: outputs.filter((o) => o.output_type === 'error').map((o) => o.ename + ': ' + o.evalue),
                    }};
                }})"""
            )
        )

    @property
    def errors(self) -> list[str]:
        return [f"cell {cell['index']}: {error}" for cell in self.cells for error in cell["errors"]]

    def tagged(self, tag: str) -> int:
        """The one cell with this tag."""
        (index,) = [cell["index"] for cell in self.cells if tag in cell["tags"]]
        return int(index)

    def run(self, command: str, index: int = 0) -> None:
        """A command of the menu Run, with a cell selected."""
        self.page.evaluate(f"() => {{ {PANEL}.content.activeCellIndex = {index}; }}")
        self.page.locator(".lm-MenuBar-item", has_text="Run").first.click()
        self.page.locator(f".lm-Menu-item[data-command='{command}']").click()

    def press(self, command: str) -> None:
        """A button of the toolbar."""
        self.page.locator(f".jp-NotebookPanel-toolbar [data-command='{command}']").click()

    def save(self) -> None:
        """Wait until nothing is left to save."""
        self.press("docmanager:save")
        self.wait(lambda: not self.page.evaluate(f"() => {PANEL}.context.model.dirty"), 30, "the notebook to be saved")

    def wait_until_done(self, timeout: float) -> None:
        """Until no cell runs or waits and the kernel is idle."""
        self.page.wait_for_timeout(500)  # until the cells are marked as waiting
        self.wait(
            lambda: self.kernel == "idle" and not any(cell["busy"] for cell in self.cells), timeout, "all cells to end"
        )

    def wait(self, condition: Callable[[], bool], timeout: float, what: str) -> None:
        """Look a few times a second, letting the browser work in between. Raises TimeoutError."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {timeout:g} s for {what}; the kernel is {self.kernel}")
            self.page.wait_for_timeout(200)

    def cell(self, index: int) -> Locator:
        return self.page.locator(".jp-Notebook .jp-Cell").nth(index)

    def shown(self, index: int) -> str:
        """What the outputs of a cell show besides its controls; equal only if nothing has changed."""
        return str(self.cell(index).evaluate(SHOWN))


def moves(control: Locator) -> list[Callable[[], object]]:
    """What a person could do with a control that should change something, the likeliest first.

    Nothing where there is one value: a run alone leaves nothing to compare it with.
    """
    if control.locator("select").count():
        box = control.locator("select").first
        number, chosen = box.evaluate("(box) => [box.options.length, box.selectedIndex]")
        return [lambda i=i: box.select_option(index=i) for i in range(number) if i != chosen]  # type: ignore[misc]
    handle = control.locator(".noUi-handle").first
    if handle.get_attribute("aria-valuemin") == handle.get_attribute("aria-valuemax"):
        return []
    return [lambda key=key: handle.press(key) for key in ("ArrowRight", "ArrowLeft", "End", "Home")]  # type: ignore[misc]

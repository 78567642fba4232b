"""A notebook open in JupyterLab, driven as a person would: its buttons, its cells, its controls, what they show.

JupyterLab is started with its application object in reach (`window.jupyterapp`), which tells the state of the kernel
and of every cell without guessing from the look of the page.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from playwright.sync_api import ConsoleMessage, Locator, Page, Request, Response

PANEL = "window.jupyterapp.shell.currentWidget"
KERNEL = "window.jupyterapp?.shell.currentWidget?.context?.sessionContext?.session?.kernel"
LOOPBACK = ("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:", "about:")
CONTROLS = ".widget-slider, .widget-dropdown, .widget-select, .widget-select-multiple, .widget-toggle-buttons"

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


@dataclass
class Complaints:
    """What a browser has to say against a page: errors in its console, failed requests, requests that leave."""

    console: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)

    def listen(self, page: Page) -> None:
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.console.append(f"uncaught: {error}"))
        page.on("requestfailed", self._on_failed)
        page.on("response", self._on_response)
        page.on("request", self._on_request)

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.console.append(f"{message.text} ({message.location.get('url', '')})")

    def _on_failed(self, request: Request) -> None:
        if "ERR_ABORTED" not in str(request.failure):  # given up by the page itself, as when it polls
            self.failed.append(f"{request.method} {request.url}: {request.failure}")

    def _on_response(self, response: Response) -> None:
        if response.status >= 400:
            self.failed.append(f"{response.request.method} {response.url}: {response.status}")

    def _on_request(self, request: Request) -> None:
        if not request.url.startswith(LOOPBACK):
            self.outside.append(request.url)


class Notebook:
    """The notebook that is open in `page`. Cells count from 0; times are seconds."""

    def __init__(self, page: Page) -> None:
        self.page = page

    def open(self, address: str, token: str, path: str) -> None:
        """Open the notebook at `path` (below the server's root) and wait for its kernel."""
        self.page.goto(f"{address}lab/tree/{path}?token={token}")
        self.wait(lambda: self.kernel == "idle", 120, "the kernel to start")

    @property
    def kernel(self) -> str:
        return str(self.page.evaluate(f"() => {KERNEL}?.status ?? 'none'"))

    @property
    def cells(self) -> list[dict[str, Any]]:
        """index, type, tags, whether it waits or runs, execution count, and its errors."""
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

    def tagged(self, tag: str) -> int:
        """The one cell with this tag."""
        (index,) = [cell["index"] for cell in self.cells if tag in cell["tags"]]
        return int(index)

    def run_all(self) -> None:
        """Run > Run All Cells, in the menu."""
        self.page.locator(".lm-MenuBar-item", has_text="Run").first.click()
        self.page.locator(".lm-Menu-item[data-command='runmenu:run-all']").click()

    def run_from(self, index: int) -> None:
        """Run > Run Selected Cell and All Below."""
        self.page.evaluate(f"() => {{ {PANEL}.content.activeCellIndex = {index}; }}")
        self.page.locator(".lm-MenuBar-item", has_text="Run").first.click()
        self.page.locator(".lm-Menu-item[data-command='notebook:run-all-below']").click()

    def run_to(self, index: int) -> None:
        """Select the cell below and Run > Run All Above Selected Cell."""
        self.page.evaluate(f"() => {{ {PANEL}.content.activeCellIndex = {index + 1}; }}")
        self.page.locator(".lm-MenuBar-item", has_text="Run").first.click()
        self.page.locator(".lm-Menu-item[data-command='notebook:run-all-above']").click()

    def interrupt(self) -> None:
        """The stop button of the toolbar."""
        self.page.locator(".jp-NotebookPanel-toolbar [data-command='notebook:interrupt-kernel']").click()

    def save(self) -> None:
        """The save button of the toolbar; waits until nothing is left to save."""
        self.page.locator(".jp-NotebookPanel-toolbar [data-command='docmanager:save']").click()
        self.wait(lambda: not self.page.evaluate(f"() => {PANEL}.context.model.dirty"), 30, "the notebook to be saved")

    def wait_until_done(self, timeout: float) -> None:
        """Until no cell runs or waits and the kernel is idle."""
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

    def show_cell(self, index: int) -> Locator:
        """Scroll a cell into view."""
        cell = self.cell(index)
        cell.scroll_into_view_if_needed()
        return cell

    def shown(self, index: int) -> str:
        """What the outputs of a cell show besides its controls; equal only if nothing has changed."""
        return str(self.cell(index).evaluate(SHOWN))

    def with_controls(self) -> list[int]:
        """The cells in whose outputs there are controls."""
        return [cell["index"] for cell in self.cells if self.cell(cell["index"]).locator(CONTROLS).count()]


def has_choice(control: Locator) -> bool:
    """Whether there is more than one value to choose: a run alone leaves nothing to compare it with."""
    if control.locator("select").count():
        return control.locator("option").count() > 1
    handle = control.locator(".noUi-handle")
    if handle.count():
        low, high = (handle.first.get_attribute(f"aria-value{end}") for end in ("min", "max"))
        return low != high
    return control.locator("button").count() > 1


def moves(control: Locator) -> list[tuple[str, Callable[[], None]]]:
    """What a person could do with a control that should change something, as (what, how), the likeliest first."""
    selects = control.locator("select")
    if selects.count():
        box = selects.first
        number, chosen = box.evaluate("(box) => [box.options.length, box.selectedIndex]")
        others = [i for i in range(number) if i != chosen]
        return [(f"choose option {i}", lambda i=i: box.select_option(index=i)) for i in others]  # type: ignore[misc]
    buttons = control.locator("button:not(.mod-active)")
    if buttons.count():
        return [(f"press {i}", lambda i=i: buttons.nth(i).click()) for i in range(buttons.count())]  # type: ignore[misc]
    handle = control.locator(".noUi-handle").first
    keys = ("ArrowRight", "ArrowLeft", "End", "Home")
    return [(f"key {key}", lambda key=key: handle.press(key)) for key in keys]  # type: ignore[misc]

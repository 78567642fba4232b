"""The notebook in a real JupyterLab in a real browser, and the page that is made of what was run there.

One run serves all tests of this module: see walkthrough.py. Controls are found by their kind in the outputs of
whatever cells have them, so a new explorer is tested as soon as the notebook has it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import nbformat
import pytest
from axe_playwright_python.sync_playwright import Axe

from experiments import debug_run
from experiments.headless import to_html
from tests.browser import lab_server, walkthrough
from tests.browser.conftest import ROOT
from tests.browser.lab_page import CONTROLS, Complaints, Notebook, has_choice, moves
from tests.browser.walkthrough import SETTINGS, Watched

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # the first test waits for the whole run
ANSWER_SECONDS = 60  # a fault is diagnosed on a real pipeline, on a machine that may be busy
WIDTHS = (1440, 768, 390)


@pytest.fixture(scope="module")
def watched(
    browser: Browser, workplace: Path, screenshots: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Watched]:
    private, output = tmp_path_factory.mktemp("jupyter"), tmp_path_factory.mktemp("run") / "output"
    walkthrough.write_copy(workplace / "walkthrough.ipynb", output)
    with lab_server.serving(workplace, private) as server:
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        complaints = Complaints()
        complaints.listen(page)
        notebook = Notebook(page)
        notebook.open(server.address, server.token, "walkthrough.ipynb")
        yield walkthrough.run(notebook, complaints, output, screenshots)
        page.close()


def test_live_figure_changes_while_it_trains(watched: Watched) -> None:
    assert len({frame["source"] for frame in watched.frames}) >= walkthrough.FRAMES_BEFORE_STOP


def test_live_figure_is_one_that_neither_flickers_nor_moves(watched: Watched) -> None:
    assert len(watched.frames) > 20
    assert {frame["images"] for frame in watched.frames} == {1}
    for side in ("top", "width", "height", "scrolled"):
        values = [frame[side] for frame in watched.frames]
        assert max(values) - min(values) <= 1, f"{side} of the live figure changes, in pixels"
    assert min(frame["height"] for frame in watched.frames) > 100


def test_stop_keeps_what_was_trained_and_the_next_run_continues(watched: Watched) -> None:
    assert 0 < len(watched.at_stop) < SETTINGS["EPOCHS"], "stopped while it trained"
    assert all(re.match(r"(KeyboardInterrupt|Interrupted)\b", error) for error in watched.stopped_errors)
    assert len(watched.after) == SETTINGS["EPOCHS"]
    assert watched.after[: len(watched.at_stop)] == watched.at_stop


def test_no_cell_failed_in_the_end(watched: Watched) -> None:
    assert watched.errors == []
    assert all(cell["count"] for cell in watched.notebook.cells if cell["type"] == "code" and cell["source"].strip())


def test_every_control_is_answered_by_what_its_cell_shows(watched: Watched, screenshots: Path) -> None:
    notebook = watched.notebook
    cells = notebook.with_controls()
    assert cells, "no cell with sliders or menus"
    silent = []
    for index in cells:
        notebook.show_cell(index)
        controls = notebook.cell(index).locator(CONTROLS)
        for number in range(controls.count()):
            if has_choice(controls.nth(number)) and not answered(notebook, index, number):
                silent.append(f"cell {index}: {controls.nth(number).inner_text()!r}")
        notebook.page.screenshot(path=screenshots / f"lab_controls_{index}.png")
        said = " ".join(notebook.cell(index).locator(".widget-html-content").all_inner_texts())
        assert not re.search(r"\w+(Error|Exception)\b", said), f"cell {index} says: {said}"
    assert silent == []


def answered(notebook: Notebook, index: int, number: int) -> bool:
    """Whether something that can be done with the control changes what the cell shows."""
    control = notebook.cell(index).locator(CONTROLS).nth(number)
    for what, move in moves(control):
        before = notebook.shown(index)
        move()
        try:
            notebook.wait(lambda before=before: notebook.shown(index) != before, ANSWER_SECONDS, what)  # type: ignore[misc]
        except TimeoutError:
            continue
        notebook.wait(lambda: notebook.kernel == "idle", ANSWER_SECONDS, "the answer to end")
        return True
    return False


def test_browser_has_nothing_to_complain_of(watched: Watched) -> None:
    assert watched.complaints.console == []
    assert watched.complaints.failed == []
    assert watched.complaints.outside == []


@pytest.fixture(scope="module")
def page_file(watched: Watched, workplace: Path) -> Path:
    """The page of the notebook as JupyterLab has saved it."""
    watched.notebook.save()
    executed = nbformat.read(workplace / "walkthrough.ipynb", as_version=4)
    nbformat.validate(executed)
    file = workplace / "walkthrough.html"
    file.write_text(to_html(executed, walkthrough.NOTEBOOK.parent), encoding="utf-8")
    return file


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_page_of_the_run_is_accessible_and_fits(
    browser: Browser, page_file: Path, screenshots: Path, width: int, scheme: str
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)  # type: ignore[arg-type]
    complaints = Complaints()
    complaints.listen(page)
    page.goto(page_file.as_uri())
    page.screenshot(path=screenshots / f"page_{width}_{scheme}.png", full_page=True)
    assert sideways(page) <= 0, "the page is wider than the screen"
    page.locator("details").evaluate_all("(all) => all.forEach((one) => { one.open = true; })")
    assert sideways(page) <= 0, "with the code shown, the page is wider than the screen"
    violations = Axe().run(page).response["violations"]
    assert [(v["id"], v["impact"], v["nodes"][0]["html"][:200]) for v in violations] == []
    assert complaints.console == []
    assert [url for url in complaints.outside if url != page_file.as_uri()] == []
    page.close()


def sideways(page: Page) -> int:
    return int(page.evaluate("() => document.documentElement.scrollWidth - window.innerWidth"))


def test_page_of_the_run_is_small_and_has_no_figure_without_words(page_file: Path, browser: Browser) -> None:
    assert page_file.stat().st_size < 5_000_000
    page = browser.new_page()
    page.goto(page_file.as_uri())
    texts = page.locator("figure img").evaluate_all("(all) => all.map((image) => image.alt)")
    assert len(texts) > 10
    assert [text for text in texts if len(text) < 30 or text.startswith("No description")] == []
    broken = page.locator("img").evaluate_all("(all) => all.filter((i) => !(i.complete && i.naturalWidth)).length")
    assert broken == 0
    page.close()


def test_make_lab_opens_a_trained_run_that_is_not_trained_again(
    browser: Browser, workplace: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    few = ["--data", "digits", "--epochs", "3", "--limit", "60", "--batch-size", "20", "--output", str(run)]
    assert debug_run.main(few) in (0, 1)
    trained = (run / "history.csv").read_text()
    copy = (workplace / "lab.ipynb").relative_to(ROOT)
    code = f"from experiments import lab; lab.COPY = lab.Path({str(copy)!r}); raise SystemExit(lab.main())"
    arguments = ["--output", str(run), "--port", "0", "--no-browser"]
    with lab_server.serving(ROOT, tmp_path / "jupyter", [sys.executable, "-c", code, *arguments]) as server:
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.goto(f"{server.address}?token={server.token}")  # the address that is printed leads to the copy
        page.wait_for_url(f"**/lab/tree/{copy.as_posix()}**", timeout=60_000)
        notebook = Notebook(page)
        notebook.wait(lambda: notebook.kernel == "idle", 120, "the kernel to start")
        training = notebook.tagged(walkthrough.TRAINING)
        notebook.run_to(training)
        notebook.wait(lambda: bool(notebook.cells[training]["count"]), 240, "the training cell to end")
        notebook.wait_until_done(60)
        assert notebook.cell(training).locator(".jp-OutputArea-output img").count() == 1
        assert [cell["errors"] for cell in notebook.cells if cell["errors"]] == []
        assert (run / "history.csv").read_text() == trained
        page.close()
    assert not (run / "previous").exists()

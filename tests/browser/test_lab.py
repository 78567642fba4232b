"""The notebook in a real JupyterLab in a real browser, and the page that is made of what was run there.

One run serves all tests but the last: run all, stop while it trains, continue to the end, as a reader who changes their
mind. Controls are found by their kind in the outputs of whatever cells have them, so a new explorer is tested as soon
as the notebook has it.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
import pytest
from axe_playwright_python.sync_playwright import Axe

from experiments import debug_run
from experiments.doctor.examine import QUICK
from experiments.headless import inject, read_notebook, to_html
from tests.browser import lab_server
from tests.browser.conftest import ROOT
from tests.browser.lab_page import CONTROLS, PANEL, WATCH, Notebook, complaints, moves

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # the first test waits for the whole run
NOTEBOOK = ROOT / "notebooks/codeq_walkthrough.ipynb"
EPOCHS = 16
FRAMES_BEFORE_STOP = 4
ANSWER_SECONDS = 60  # a fault is diagnosed on a real pipeline, on a machine that may be busy
PICTURE = ".jp-OutputArea-output img"
JUPYTERLAB = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.port=0"]


@dataclass(frozen=True)
class Watched:
    """What was seen. frames: one sample per frame of the screen while it trained (see lab_page.WATCH).

    at_stop, after: history.csv after the stop and at the end, a line per epoch below the header. stopped_errors: of all
    cells when the training was stopped. complaints: of the browser, until now.
    """

    notebook: Notebook
    complaints: list[str]
    frames: list[dict[str, Any]]
    at_stop: list[str]
    after: list[str]
    stopped_errors: list[str]


@pytest.fixture(scope="module")
def workplace() -> Iterator[Path]:
    """A folder inside the project, where a notebook finds its modules, that is gone afterwards."""
    (ROOT / "build").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="browser-", dir=ROOT / "build"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def watched(
    browser: Browser, workplace: Path, screenshots: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Watched]:
    home, history = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("run") / "output/history.csv"
    settings = {"DATA": "digits", "EPOCHS": EPOCHS, "LIMIT": 200, "OUTPUT_DIR": str(history.parent)}
    nbformat.write(inject(read_notebook(NOTEBOOK), settings), workplace / "walkthrough.ipynb")
    command = [*JUPYTERLAB, f"--ServerApp.root_dir={workplace}"]
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    found = complaints(page)
    with lab_server.serving(command, workplace, home) as address:
        page.goto(address.format("lab/tree/walkthrough.ipynb"))
        notebook = Notebook(page)
        training = notebook.tagged("training")
        cell = notebook.cell(training)
        notebook.run("runmenu:run-all")
        notebook.wait(lambda: cell.locator(PICTURE).count() > 0 or bool(notebook.errors), 240, "the live figure")
        assert notebook.errors == [], "a cell before the training failed"
        cell.locator(PICTURE).first.scroll_into_view_if_needed()
        cell.evaluate(WATCH)
        different = "(least) => new Set(window.frames_seen.map((frame) => frame.source)).size >= least"
        page.wait_for_function(different, arg=FRAMES_BEFORE_STOP, timeout=120_000)
        page.screenshot(path=screenshots / "lab_training.png")
        notebook.press("notebook:interrupt-kernel")
        notebook.wait_until_done(120)
        frames = page.evaluate("() => { window.watching = false; return window.frames_seen; }")
        at_stop, stopped_errors = rows(history), notebook.errors
        page.screenshot(path=screenshots / "lab_stopped.png")
        notebook.run("notebook:run-all-below", training)
        notebook.wait_until_done(400)
        yield Watched(notebook, found, frames, at_stop, rows(history), stopped_errors)
        page.close()


def rows(history: Path) -> list[str]:
    return history.read_text().splitlines()[1:]


def test_live_figure_changes_and_neither_flickers_nor_moves(watched: Watched) -> None:
    assert len(watched.frames) > 20
    assert len({frame["source"] for frame in watched.frames}) >= FRAMES_BEFORE_STOP
    assert {frame["images"] for frame in watched.frames} == {1}
    for side in ("top", "width", "height", "scrolled"):
        values = [frame[side] for frame in watched.frames]
        assert max(values) - min(values) <= 1, f"{side} of the live figure changes, in pixels"
    assert min(frame["height"] for frame in watched.frames) > 100


def test_stop_keeps_what_was_trained_and_the_next_run_continues(watched: Watched) -> None:
    assert 0 < len(watched.at_stop) < EPOCHS, "stopped while it trained"
    assert all(re.match(r"cell \d+: (KeyboardInterrupt|Interrupted)\b", error) for error in watched.stopped_errors)
    assert len(watched.after) == EPOCHS
    assert watched.after[: len(watched.at_stop)] == watched.at_stop


def test_no_cell_failed_in_the_end(watched: Watched) -> None:
    assert watched.notebook.errors == []
    assert all(cell["count"] for cell in watched.notebook.cells if cell["type"] == "code" and cell["source"].strip())


def test_every_control_is_answered_by_what_its_cell_shows(watched: Watched, screenshots: Path) -> None:
    notebook = watched.notebook
    cells = [index for index in range(len(notebook.cells)) if notebook.cell(index).locator(CONTROLS).count()]
    assert cells, "no cell with sliders or menus"
    silent = []
    for index in cells:
        cell = notebook.cell(index)
        cell.scroll_into_view_if_needed()
        controls = cell.locator(CONTROLS)
        for number in range(controls.count()):
            if not answered(notebook, index, number):
                silent.append(f"cell {index}: {controls.nth(number).inner_text()!r}")
        notebook.page.screenshot(path=screenshots / f"lab_controls_{index}.png")
        said = " ".join(cell.locator(".widget-html-content").all_inner_texts())
        assert not re.search(r"\w+(Error|Exception)\b", said), f"cell {index} says: {said}"
    assert silent == []
    assert watched.complaints == []


def answered(notebook: Notebook, index: int, number: int) -> bool:
    """Whether something that can be done with the control changes what the cell shows, or nothing can be done."""
    possible = moves(notebook.cell(index).locator(CONTROLS).nth(number))
    for move in possible:
        before = notebook.shown(index)
        move()
        try:
            notebook.wait(lambda before=before: notebook.shown(index) != before, ANSWER_SECONDS, "an answer")  # type: ignore[misc]
        except TimeoutError:
            continue
        notebook.wait(lambda: notebook.kernel == "idle", ANSWER_SECONDS, "the answer to end")
        return True
    return not possible


@pytest.fixture(scope="module")
def page_file(watched: Watched, workplace: Path) -> Path:
    """The page of the notebook as JupyterLab has saved it."""
    watched.notebook.save()
    file = workplace / "walkthrough.html"
    file.write_text(to_html(read_notebook(workplace / "walkthrough.ipynb"), NOTEBOOK.parent), encoding="utf-8")
    return file


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 768, 390])
def test_page_of_the_run_is_accessible_and_fits(
    browser: Browser, page_file: Path, screenshots: Path, width: int, scheme: str
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)  # type: ignore[arg-type]
    found = complaints(page)
    page.goto(page_file.as_uri())
    page.screenshot(path=screenshots / f"page_{width}_{scheme}.png", full_page=True)
    assert sideways(page) <= 0, "the page is wider than the screen"
    page.locator("details").evaluate_all("(all) => all.forEach((one) => { one.open = true; })")
    assert sideways(page) <= 0, "with the code shown, the page is wider than the screen"
    violations = Axe().run(page).response["violations"]
    assert [(v["id"], v["impact"], v["nodes"][0]["html"][:200]) for v in violations] == []
    assert found == []
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
    page.locator("svg, option").evaluate_all("(all) => all.forEach((one) => one.remove())")  # no running text
    words = page.evaluate(
        "() => document.body.innerText.split(/\\s+/).filter((one) => /[\\p{L}\\p{N}]/u.test(one)).length"
    )
    assert words <= 4000
    page.close()


def test_make_lab_opens_a_trained_run_in_which_run_all_finds_nothing(
    browser: Browser, workplace: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    short = [f"--set={name}={value}" for name, value in QUICK.items()]
    assert debug_run.main(["--preset=smoke", *short, f"--output={run}"]) == 0
    trained = rows(run / "history.csv")
    copy = (workplace / "lab.ipynb").relative_to(ROOT)
    code = f"from experiments import lab; lab.COPY = lab.Path({str(copy)!r}); raise SystemExit(lab.main())"
    command = [sys.executable, "-c", code, "--output", str(run), "--port", "0", "--no-browser"]
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    with lab_server.serving(command, ROOT, tmp_path / "home") as address:
        page.goto(address.format(""))  # the address that is printed leads to the copy
        page.wait_for_url(f"**/lab/tree/{copy.as_posix()}**", timeout=60_000)
        notebook = Notebook(page)
        training = notebook.tagged("training")
        (summary,) = [cell["index"] for cell in notebook.cells if "findings.headline" in cell["source"]]
        notebook.run("runmenu:run-all")
        notebook.wait_until_done(400)
        assert notebook.cell(training).locator(PICTURE).count() == 1
        assert notebook.errors == []
        said = page.evaluate(f"() => JSON.stringify({PANEL}.content.widgets[{summary}].model.outputs.toJSON())")
        assert "DOCTOR: no fault found" in said
        assert "FAULTY" not in said
        assert rows(run / "history.csv") == trained
        page.close()
    assert not (run / "previous").exists()

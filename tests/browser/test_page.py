"""The page in a browser without a network: what it may fetch, how it folds, how it is read on narrow and dark screens.

The pages are made from small notebooks; the page of a whole run is tested in test_lab.py.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from matplotlib.figure import Figure
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from experiments import figures
from experiments.headless import to_html
from experiments.notebook import FACTS, explorers, lessons, live
from src.runs import Snapshots
from src.training import History
from tests.browser.lab_page import complaints
from tests.headless.test_page import FACTS_OF_A_RUN
from tests.histories import make_history
from tests.quantized_networks import small_resnet
from utils_quantization import latent_weight, quantized_layers

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.slow  # a browser
WIDE_TABLE = f"<table><tr>{''.join(f'<th>a long heading {i}</th>' for i in range(12))}</tr></table>"
CODE = 'def twice(x: float) -> float:  # a comment\n    """Text."""\n    return 2 * x + 0.5 if x else print("no, no")'
REMOTE = '<script src="https://example.org/x.js"></script><img src="https://example.org/x.png" alt="away">'


def picture(width: int = 1800, height: int = 900) -> NotebookNode:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "white").save(buffer, "PNG")
    facts = {"image/png": {"alt": "Accuracy climbs from 10 % to 80 %.", "width": width // 2, "height": height // 2}}
    data = {"image/png": base64.b64encode(buffer.getvalue()).decode()}
    return new_output("display_data", data=data, metadata=facts)


def lesson(**run: Any) -> NotebookNode:
    """A notebook with every kind of cell and output that the walkthrough has."""
    equation = "$$" + "a_1 + " * 40 + "b = c$$"
    columns = "\n".join(f"Epoch {i}/9 | Loss: 2.3{i} | " + "a wide column  " * 8 for i in range(9))
    cells = [
        new_markdown_cell("# A lesson with a title\n\nProse with `code`, a [link](https://example.org) and $x^2$."),
        new_code_cell(CODE, outputs=[new_output("stream", text=columns)]),
    ]
    for number in range(1, 8):
        cells.append(new_markdown_cell(f"## {number}. Chapter `{number}`\n\n" + "Some prose. " * 120))
        cells.append(new_code_cell(CODE, outputs=[picture()]))
    cells += [
        new_markdown_cell(f"{equation}\n\n| a | b |\n| --- | --- |\n| {'wide ' * 9} | {'unbreakable' * 9} |"),
        new_code_cell("1", outputs=[new_output("display_data", data={"text/html": WIDE_TABLE})]),
        new_code_cell("3", outputs=[new_output("stream", name="stderr", text="be warned")]),
        new_code_cell(
            "4", outputs=[new_output("display_data", data={"text/plain": "recorded", FACTS: FACTS_OF_A_RUN})]
        ),
        new_code_cell("5", outputs=[new_output("error", ename="E", evalue="v", traceback=["\x1b[31mE\x1b[0m: v"])]),
    ]
    return new_notebook(cells=cells, metadata={"run": {"started": "2026-01-02T03:04:05+00:00", "seconds": 75, **run}})


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(to_html(lesson(status="complete")), encoding="utf-8")
    return path


@pytest.fixture
def opened(browser: Browser, file: Path) -> Iterator[Callable[..., Page]]:
    """Opens the page without a network, with any option of a browser's page. The browser must have no complaint."""
    pages: list[tuple[Page, list[str]]] = []

    def open_page(width: int = 1440, address: Path = file, **options: Any) -> Page:
        page = browser.new_page(viewport={"width": width, "height": 900}, offline=True, **options)
        pages.append((page, complaints(page)))
        page.goto(address.as_uri())
        return page

    yield open_page
    for page, found in pages:
        page.close()
        assert found == []


def violations(page: Page) -> list[tuple[str, str, str]]:
    found = Axe().run(page).response["violations"]
    return [(one["id"], one["impact"], one["nodes"][0]["html"][:200]) for one in found]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 768, 390])
def test_page_is_accessible_and_no_wider_than_the_screen(opened: Callable[..., Page], width: int, scheme: str) -> None:
    page = opened(width, color_scheme=scheme)
    for opened in (False, True):
        page.locator("details").evaluate_all(f"(all) => all.forEach((one) => {{ one.open = {str(opened).lower()}; }})")
        assert violations(page) == []
        assert page.evaluate("() => document.documentElement.scrollWidth - window.innerWidth") <= 0


def test_page_of_a_stopped_run_says_where_and_is_accessible(opened: Callable[..., Page], tmp_path: Path) -> None:
    message = "failed at cell 6 (code cell 3), line 3: broken()\n  ValueError: two is not three"
    file = tmp_path / "failed.html"
    file.write_text(to_html(lesson(status="failed", message=message)), encoding="utf-8")
    page = opened(address=file)
    assert "failed at cell 6" in page.get_by_role("alert").inner_text()
    assert "Stopped before the end" in page.get_by_role("region", name="This run").inner_text()
    assert "Fault found" not in page.get_by_role("region", name="This run").inner_text()
    assert violations(page) == []


def test_no_request_leaves_even_where_an_output_asks_for_one(browser: Browser, tmp_path: Path) -> None:
    book = lesson()
    book.cells.append(new_code_cell("6", outputs=[new_output("display_data", data={"text/html": REMOTE})]))
    file = tmp_path / "page.html"
    file.write_text(to_html(book), encoding="utf-8")
    page = browser.new_page()
    asked: list[str] = []
    page.route("**/*", lambda route: (asked.append(route.request.url), route.continue_()))
    page.goto(file.as_uri())
    page.wait_for_timeout(300)
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
    page.close()


def test_code_is_folded_and_unfolds_by_keyboard_alone(opened: Callable[..., Page]) -> None:
    page = opened()
    fold = page.locator("details.code").first
    assert not fold.locator("pre").is_visible()
    fold.locator("summary").focus()
    page.keyboard.press("Enter")
    assert fold.locator("pre").is_visible()
    assert not page.locator("details.code pre").nth(1).is_visible()
    page.keyboard.press("Space")
    assert not fold.locator("pre").is_visible()


def test_one_button_unfolds_all_code_and_folds_it_again(opened: Callable[..., Page]) -> None:
    page = opened()
    button, code = page.locator("button.all-code:visible"), page.locator("details.code pre")
    assert button.count() == 1
    assert [code.nth(i).is_visible() for i in range(code.count())] == [False] * code.count()
    button.focus()
    page.keyboard.press("Enter")
    assert [code.nth(i).is_visible() for i in range(code.count())] == [True] * code.count()
    assert (button.inner_text(), button.get_attribute("aria-pressed")) == ("Hide all code", "true")
    button.click()
    assert not code.first.is_visible()


def test_without_scripts_every_cell_still_unfolds(opened: Callable[..., Page]) -> None:
    page = opened(java_script_enabled=False)
    assert page.locator("button.all-code:visible").count() == 0
    page.locator("details.code summary").first.click()
    assert page.locator("details.code pre").first.is_visible()


def test_contents_lead_to_every_chapter_beside_the_text(opened: Callable[..., Page]) -> None:
    page = opened()
    links = page.get_by_role("navigation", name="Contents").get_by_role("link")
    assert links.all_inner_texts() == [f"{i}. Chapter {i}" for i in range(1, 8)]
    links.nth(4).click()
    page.wait_for_function("() => document.querySelector('nav.side a[aria-current]')?.textContent === '5. Chapter 5'")
    heading = page.get_by_role("heading", name="5. Chapter 5")
    page.wait_for_function("() => Math.abs(document.getElementById('5.-Chapter-5').getBoundingClientRect().top) < 60")
    assert heading.is_visible()


def test_contents_unfold_on_a_narrow_screen(opened: Callable[..., Page]) -> None:
    page = opened(390)
    contents = page.get_by_role("navigation", name="Contents")
    link = contents.get_by_role("link", name="7. Chapter 7")
    assert link.count() == 0 or not link.is_visible()
    contents.get_by_text("Contents", exact=True).click()
    link.click()
    page.wait_for_function("() => Math.abs(document.getElementById('7.-Chapter-7').getBoundingClientRect().top) < 60")


def test_wide_things_scroll_by_themselves_and_can_be_reached_by_keyboard(opened: Callable[..., Page]) -> None:
    page = opened(390)
    for kind in (".output.html", ".scroll", ".equation", "pre.columns", "figure.output"):
        box = page.locator(kind).first
        assert box.evaluate("(box) => box.scrollWidth > box.clientWidth"), kind
        assert "more-right" in str(box.get_attribute("class")), "a hint that there is more"
        box.focus()
        page.keyboard.press("ArrowRight")
        page.wait_for_function("() => document.activeElement.scrollLeft > 0")
        page.wait_for_function("() => document.activeElement.classList.contains('more-left')")
        box.evaluate("(box) => { box.scrollLeft = box.scrollWidth; }")
        page.wait_for_function("() => !document.activeElement.classList.contains('more-right')")


def test_only_what_scrolls_is_a_stop_of_the_tab_key(opened: Callable[..., Page]) -> None:
    """A page has a hundred outputs; most of them fit a wide screen, and all of them were stops."""
    page = opened()
    for width in (390, 2400):
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_function(
            "(few) => (document.querySelectorAll(\"figure[tabindex='0']\").length === 0) === few", arg=width > 390
        )
        stops = page.locator("[tabindex='0']:visible")
        assert all(stops.evaluate_all("(all) => all.map((box) => box.scrollWidth > box.clientWidth)"))
        assert page.locator("pre.columns[tabindex='0']").count() == 1, "wider than any screen"


@pytest.fixture
def explorers_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Three explorers and a curve as a notebook saves them, in a page."""
    outputs: list[NotebookNode] = []
    monkeypatch.setattr(live, "in_notebook", lambda: True)
    monkeypatch.setattr(live, "put", lambda data, meta, handle=None: outputs.append(shown(data, meta)))
    monkeypatch.setattr(live, "display", lambda data, raw: outputs.append(shown(data, {})))
    explorers.quantizer(explorers.weight_samples(0))
    explorers.layers(small_snapshots())
    explorers.kernels(small_resnet((8, 4, 2)))
    live.show(figures.accuracy_curve(make_history(12), chance=0.1))
    cells = [new_code_cell("quantizer()", outputs=outputs[:2]), new_code_cell("layers()", outputs=outputs[2:6])]
    file = tmp_path / "explorers.html"
    book = new_notebook(cells=[new_markdown_cell("# Lesson"), *cells, new_code_cell("curve()", outputs=outputs[6:])])
    file.write_text(to_html(book), encoding="utf-8")
    return file


def shown(data: dict[str, Any], metadata: dict[str, Any]) -> NotebookNode:
    return new_output("display_data", data=data, metadata=metadata)


def small_snapshots() -> Snapshots:
    model = small_resnet((8, 4, 2))
    snapshots = Snapshots(list(quantized_layers(model)))
    for epoch in range(4):
        snapshots.add(model, epoch)
        with torch.no_grad():
            latent_weight(next(iter(quantized_layers(model).values())))[epoch] = 0
    return snapshots


def test_the_quantizer_explorer_of_a_page_agrees_with_the_quantizer(
    opened: Callable[..., Page], explorers_page: Path
) -> None:
    page = opened(address=explorers_page)
    box = page.locator(".explorer").first
    samples = explorers.weight_samples(0)
    for name, share, bits in (
        ("a fresh layer (Kaiming)", 0.25, 4),
        ("Laplace (long tails)", 0.4, 2),
        ("normal", 0.1, 6),
    ):
        box.locator("select").select_option(name)
        for slider, value in zip(box.locator("input").all(), (share, bits), strict=True):
            slider.fill(str(value))
        page.wait_for_function(
            "(want) => document.querySelector('.said').textContent.includes(want)", arg=f"{bits} bits"
        )
        zeros, used, error = re.search(  # type: ignore[union-attr]
            r"([\d.]+) % zeros, (\d+) of \d+ levels used, error ([\d.]+) %", box.locator(".said").inner_text()
        ).groups()
        quantized = lessons.fixed_quantizer(share, bits)(samples[name]).detach()
        assert float(zeros) == pytest.approx(100 * float((quantized == 0).float().mean()), abs=0.15)
        assert int(used) == len(quantized.unique())
        true_error = float((quantized - samples[name]).norm() / samples[name].norm())
        assert float(error) == pytest.approx(100 * true_error, rel=0.03)
    assert not box.locator("xpath=..").locator("figure.output").is_visible(), "the saved figure made room"
    assert violations(page) == []


def test_the_epoch_slider_of_a_page_shows_every_snapshot_and_plays(
    opened: Callable[..., Page], explorers_page: Path
) -> None:
    page = opened(390, address=explorers_page)
    box, snapshots = page.locator(".explorer").nth(1), small_snapshots()
    layer = snapshots.layer_names[0]
    box.locator("select").select_option(layer)
    for one in snapshots.through(layer):
        box.locator("input").fill(str(one.epoch))
        expected = (
            f"{one.sparsity:.1%}".replace("%", " %") + f" zeros, {one.dead.sum()} of {len(one.dead)} filters dead"
        )
        page.wait_for_function(
            "(want) => document.querySelectorAll('.said')[1].textContent.includes(want)", arg=expected
        )
    press = "(button) => { button.click(); return document.querySelectorAll('.said')[1].textContent; }"
    assert "before training" in box.get_by_role("button", name="Play").evaluate(press), "from the beginning"
    page.wait_for_function("() => document.querySelectorAll('.said')[1].textContent.includes('after epoch 3')")
    assert box.get_by_role("button", name="Play").is_visible()
    assert violations(page) == []
    assert page.evaluate("() => document.documentElement.scrollWidth - window.innerWidth") <= 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 768, 390])
def test_the_kernels_of_a_page_follow_their_menu_and_the_layers(
    opened: Callable[..., Page], explorers_page: Path, width: int, scheme: str
) -> None:
    page = opened(width, address=explorers_page, color_scheme=scheme)
    box, layers = page.locator(".explorer").nth(2), page.locator(".explorer").nth(1)
    names = box.locator("option").all_inner_texts()
    for name in names:
        box.locator("select").select_option(name)
        picture = box.get_by_role("img", name=f"kernels of {name}: ")
        picture.wait_for()
        assert picture.evaluate("(one) => one.decode().then(() => one.naturalWidth)") > 0
        assert layers.locator("select").input_value() == name
    layers.locator("select").select_option(names[0])
    box.get_by_role("img", name=f"kernels of {names[0]}: ").wait_for()
    assert page.locator("figure img:visible").count() == 1, "the curve; the saved figures made room"
    assert violations(page) == []
    assert page.evaluate("() => document.documentElement.scrollWidth - window.innerWidth") <= 0


def test_without_scripts_the_saved_figures_stay(opened: Callable[..., Page], explorers_page: Path) -> None:
    page = opened(address=explorers_page, java_script_enabled=False)
    assert page.locator("figure img:visible").count() == 4
    assert page.locator(".explorer:visible").count() == 0


def test_the_values_of_a_curve_show_under_the_pointer(opened: Callable[..., Page], explorers_page: Path) -> None:
    page = opened(address=explorers_page, color_scheme="dark")
    image, history = page.locator("figure[data-hover] img").last, make_history(12)
    image.scroll_into_view_if_needed()
    area = image.bounding_box()
    ((box, limits),) = [(one["box"], one["limits"]) for one in figures.hover_values(drawn_curve(history))]
    x = area["x"] + area["width"] * (box[0] + box[2] * (5 - limits[0]) / (limits[1] - limits[0]))  # type: ignore[index]
    page.mouse.move(x, area["y"] + area["height"] * (box[1] + box[3] / 2))  # type: ignore[index]
    tip = page.locator(".tip")
    assert "epoch 5" in tip.inner_text()
    assert f"{100 * history.column('accuracy')[4]:.4g} %" in tip.inner_text()
    page.mouse.move(x, area["y"] + 2)  # type: ignore[index]
    assert not tip.is_visible()


def drawn_curve(history: History) -> Figure:
    figure = figures.accuracy_curve(history, chance=0.1)
    figures.png_bytes(figure)
    return figure


def test_code_can_be_copied(opened: Callable[..., Page]) -> None:
    page = opened(permissions=["clipboard-read", "clipboard-write"])
    page.locator("details.code summary").first.click()
    page.get_by_role("button", name="Copy").first.click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("() => navigator.clipboard.readText()") == f"{CODE}\n"


def test_the_contents_stay_in_reach_on_a_phone(opened: Callable[..., Page]) -> None:
    page = opened(390)
    page.evaluate("() => window.scrollTo({ top: document.body.scrollHeight / 2, behavior: 'instant' })")
    box = page.get_by_role("navigation", name="Contents").bounding_box()
    assert box is not None
    assert 0 <= box["y"] < 20


def test_dark_screens_get_dark_paper_but_figures_keep_theirs(opened: Callable[..., Page]) -> None:
    page = opened(color_scheme="dark")

    def ground(selector: str) -> int:
        colour = page.locator(selector).first.evaluate("(one) => getComputedStyle(one).backgroundColor")
        red, green, blue = (int(part) for part in colour.strip("rgba()").split(",")[:3])
        return red + green + blue

    assert ground("body") < 150
    assert ground("figure img") == 3 * 255


def test_print_leaves_out_what_is_folded_and_the_contents(opened: Callable[..., Page]) -> None:
    page = opened()
    page.locator("details.code summary").first.click()
    page.emulate_media(media="print")
    assert not page.get_by_role("navigation", name="Contents").is_visible()
    assert page.locator("details.code pre").first.is_visible()
    assert not page.locator("details.code").nth(1).is_visible()
    assert not page.locator("details.code summary").first.is_visible()

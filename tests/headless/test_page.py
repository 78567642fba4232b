"""The page of an executed notebook: what it shows, embeds, leaves out and says about its run. No kernel, no browser.

Oracles: html.parser for what a page would fetch, Pillow for the pictures in it. What only a browser can tell is in
tests/browser/test_page.py.
"""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from experiments.headless import page as page_module
from experiments.headless import to_html
from experiments.headless.page import header, tex_to_mathml
from experiments.notebook import FACTS
from experiments.notebook.live import EXPLORER, FIGURE

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def page_of(*outputs: NotebookNode) -> str:
    return to_html(new_notebook(cells=[new_code_cell("show()", outputs=list(outputs))]))


def display(data: dict[str, str], metadata: dict[str, object] | None = None) -> NotebookNode:
    return new_output("display_data", data=data, metadata=metadata or {})


class Elements(HTMLParser):
    """Every start tag of a page with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]

    def fetched(self) -> list[str]:
        """Addresses that a browser would load by itself: not those of links."""
        wanted = [value or "" for tag, attrs in self.found for name, value in attrs.items() if name == "src"]
        wanted += [attrs.get("href") or "" for attrs in self.attributes("link")]
        return [address for address in wanted if not address.startswith("data:")]


def test_picture_keeps_its_alt_text_width_and_bytes() -> None:
    facts = {"image/png": {"alt": 'accuracy > 80 % & "rising"', "width": 640}}
    (image,) = Elements(page_of(display({"image/png": PNG + "\n", "text/plain": "<Figure>"}, facts))).attributes("img")
    assert image["alt"] == 'accuracy > 80 % & "rising"'
    assert image["width"] == "640"
    assert base64.b64decode(str(image["src"]).removeprefix("data:image/png;base64,")) == base64.b64decode(PNG)
    (image,) = Elements(page_of(display({"image/png": PNG}))).attributes("img")
    assert image["alt"] == "No description of this figure was given"


def test_a_figure_with_an_svg_is_shown_as_that_with_its_alt_text_and_values() -> None:
    data = {"image/png": PNG, FIGURE: {"svg": "<svg>√</svg>", "hover": [{"box": [0, 0, 1, 1]}]}}
    elements = Elements(page_of(display(data, {"image/png": {"alt": "a curve", "width": 640}})))
    (image,) = elements.attributes("img")
    assert base64.b64decode(str(image["src"]).removeprefix("data:image/svg+xml;base64,")).decode() == "<svg>√</svg>"
    assert image["alt"] == "a curve"
    assert json.loads(str(elements.attributes("figure")[0]["data-hover"])) == [{"box": [0, 0, 1, 1]}]


def test_an_explorer_keeps_its_numbers_and_the_saved_figure() -> None:
    data = {"application/vnd.jupyter.widget-view+json": "{}", EXPLORER: {"kind": "layers", "start": "</script>"}}
    page = page_of(display(data), display({"image/png": PNG}))
    assert len(Elements(page).attributes("img")) == 1
    (numbers,) = re.findall(r'<script type="application/json">(.*?)</script>', page)
    assert json.loads(numbers) == data[EXPLORER]


def test_the_notebook_can_be_downloaded_without_its_outputs() -> None:
    book = new_notebook(
        cells=[new_markdown_cell("# A lesson"), new_code_cell("1 + 1", outputs=[display({"image/png": PNG})])]
    )
    (link,) = [one for one in Elements(to_html(book)).attributes("a") if "download" in one]
    assert str(link["download"]).endswith(".ipynb")
    kept = nbformat.reads(base64.b64decode(str(link["href"]).partition("base64,")[2]).decode(), as_version=4)
    nbformat.validate(kept)
    assert [cell.source for cell in kept.cells] == ["# A lesson", "1 + 1"]
    assert kept.cells[1].outputs == []


def test_files_are_links_where_the_project_is_published(monkeypatch: pytest.MonkeyPatch) -> None:
    prose = new_notebook(cells=[new_markdown_cell("`README.md`, `docs/no_such_file.md`, `make lab`")])
    assert not Elements(to_html(prose)).attributes("a")[-1]["href"].endswith("README.md")  # type: ignore[union-attr]
    monkeypatch.setattr(page_module, "REPOSITORY_URL", "https://example.org/codeq")
    found = [
        str(link["href"]) for link in Elements(to_html(prose)).attributes("a") if "example.org" in str(link["href"])
    ]
    assert found == ["https://example.org/codeq/blob/main/README.md"]


def test_page_fetches_nothing_and_runs_only_its_own_script(tmp_path: Path) -> None:
    (tmp_path / "near image.png").write_bytes(base64.b64decode(PNG))
    book = new_notebook()
    prose = "![near](near%20image.png) ![badge](https://example.org/badge.svg) [link](https://example.org) $x^2$"
    book.cells.append(new_markdown_cell(prose))
    book.cells.append(new_code_cell("", outputs=[display({"application/vnd.jupyter.widget-view+json": "{}"})]))
    page = to_html(book, tmp_path)
    elements = Elements(page)
    assert elements.fetched() == []
    assert [script.get("src") for script in elements.attributes("script")] == [None]  # its own, which is inline
    (policy,) = [meta for meta in elements.attributes("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert str(policy["content"]).startswith("default-src 'none'; img-src data:;")
    assert "url(" not in page
    assert "@import" not in page
    assert [image["alt"] for image in elements.attributes("img")] == ["near"]
    assert '<span class="remote-image">badge</span>' in page
    assert "https://example.org" in [link.get("href") for link in elements.attributes("a")]


def test_title_is_the_first_heading_and_sections_are_listed() -> None:
    prose = ("# A *small* lesson", "## A section\n\n```\n# no heading\n```", "## Second `one`", "## Third $x$")
    book = new_notebook(cells=[new_markdown_cell(source) for source in prose])
    page = to_html(book)
    assert "<title>A small lesson</title>" in page
    contents = page[page.index("<nav") : page.index("</nav>")]
    assert re.findall(r'href="#([^"]+)"', contents)[:2] == ["A-section", "Second-one"]
    assert "no heading" not in contents


@pytest.mark.parametrize(
    ("prose", "expected"),
    [
        ("$x^2$", "<msup><mi>x</mi><mn>2</mn></msup>"),
        ("$$\\frac{1}{2}$$", "<mfrac><mrow><mn>1</mn></mrow><mrow><mn>2</mn></mrow></mfrac>"),
        ("\\begin{align} a &= b \\\\ c &= d \\end{align}", "<mtable"),
        ("$$\\begin{aligned} a &= b \\\\ c &= d \\end{aligned}$$", "<mtable"),
        ("$$\\begin{cases} 0 & |w| \\le d/2 \\\\ 1 & \\text{otherwise} \\end{cases}$$", "<mtext>otherwise</mtext>"),
    ],
)
def test_tex_becomes_mathml(prose: str, expected: str) -> None:
    page = to_html(new_notebook(cells=[new_markdown_cell(f"Text {prose} text")]))
    assert expected in page
    body = page[page.index("<main") : page.index("<script")]
    assert "$" not in body
    assert "\\" not in body


@pytest.mark.parametrize("tex", [r"\frac{", r"\nosuchcommand{x}", r"\begin{tikzcd} a & b \end{tikzcd}", "a & b"])
def test_tex_that_cannot_be_converted_is_shown_as_it_stands(tex: str) -> None:
    shown = tex_to_mathml(tex, "inline")
    assert shown.startswith('<code class="tex">')
    assert shown.count("&amp;") == tex.count("&")


def test_a_widget_that_no_kernel_answers_is_left_out() -> None:
    view = "application/vnd.jupyter.widget-view+json"
    page = page_of(display({view: '{"model_id": "1"}', "text/plain": "interactive(children=())"}))
    assert 'class="output' not in page
    assert "Loading widget" not in page
    assert "interactive(children" not in page


def test_table_of_an_output_can_scroll_and_text_is_escaped() -> None:
    page = page_of(display({"text/html": "<table><tr><td>1</td></tr></table>"}), new_output("stream", text="a < b & c"))
    (box,) = [attributes for attributes in Elements(page).attributes("div") if attributes.get("role") == "group"]
    assert (str(box["class"]).split(), box["tabindex"]) == (["output", "html"], "0")
    assert "a &lt; b &amp; c" in page
    assert re.search(r"\.output\.html, \.scroll \{[^}]*overflow-x: auto", page)


def test_lines_that_stand_in_columns_are_not_wrapped_and_sentences_are() -> None:
    columns = page_of(new_output("stream", text="Epoch 1/2 | Loss: 2.3 | Acc: 10%\nEpoch 2/2 | Loss: 1.3 | Acc: 30%\n"))
    sentences = page_of(new_output("stream", text="NOTICE: this is not CIFAR-10.\nIt is small.\n"))
    classes = [str(Elements(page).attributes("pre")[-1]["class"]).split() for page in (columns, sentences)]
    assert classes == [["output", "text", "columns"], ["output", "text"]]


def test_lines_of_a_cell_that_is_to_be_folded_are_shown_on_a_click() -> None:
    cell = new_code_cell(
        "train()", outputs=[new_output("stream", text=f"Epoch {n}\n") for n in (1, 2)], metadata={"tags": ["folded"]}
    )
    page = to_html(new_notebook(cells=[cell]))
    assert re.search(
        r"<details[^>]*><summary>2 lines of output</summary>\s*<pre[^>]*>Epoch 1\nEpoch 2\n</pre></details>", page
    )


def test_a_folded_part_of_the_prose_holds_what_is_written_in_it() -> None:
    page = to_html(
        new_notebook(cells=[new_markdown_cell("<details><summary>More</summary>\n\nThe *text*.\n\n</details>\n\nRest")])
    )
    folded = page[page.index("<details><summary>More") :].partition("</details>")[0]
    assert "The <em>text</em>." in folded


# What the head of the page says about the run.

FACTS_OF_A_RUN: dict[str, Any] = {
    "config": {"model": "resnet20", "preset": "smoke", "epochs": 24, "batch_size": 48, "seed": 0, "limit": None},
    "data": {"title": "digits", "train_images": 1437, "test_images": 360},
    "machine": {"device": "cpu", "device_name": "a processor", "precision": "float32", "threads": 2, "system": "Linux"},
    "versions": {"torch": "2.6.0", "<python>": "3.11.7"},
    "results": {"accuracy_float32": 0.994, "mean_bits": 6.12, "structured_mac_ratio": None},
    "in_words": ["It is smaller.", "It is faster."],
    "verdict": {"state": "faulty", "headline": "FAULT: 1 of 9 expectations not met (bits fall)"},
}


def recorded(*facts: dict[str, Any], **run: Any) -> NotebookNode:
    outputs = [display({"text/plain": "a line", FACTS: one}) for one in facts]  # type: ignore[dict-item]
    return new_notebook(cells=[new_code_cell("1", outputs=[output]) for output in outputs], metadata={"run": run})


def test_head_shows_the_facts_that_the_notebook_has_published_last() -> None:
    first = FACTS_OF_A_RUN | {"versions": {"torch": "1.0"}}
    book = recorded(first, FACTS_OF_A_RUN, started="2026-03-01T10:00:00+02:00", seconds=59.6, command="run it")
    assert header(book) == {
        "state": "faulty",
        "verdict": "Fault found",
        "detail": "1 of 9 expectations not met (bits fall)",
        "words": "It is smaller. It is faster.",
        "results": {"test accuracy": "99.4 %", "bits a weight": "6.1"},
        "run": "resnet20 on digits, 1,437 training and 360 test images; preset smoke, 24 epochs, seed 0; "
        "cpu (a processor), float32, threads: 2; 1 March 2026, 08:00 UTC, took 1 min 00 s",
        "settings": {"command": "run it"}
        | {name: str(value) for name, value in FACTS_OF_A_RUN["config"].items()}
        | {"system": "Linux", "versions": "<python> 3.11.7, torch 2.6.0"},
    }
    book.cells.insert(0, new_markdown_cell("# The title\n\nThe text."))
    page = to_html(book)
    assert page.index("</h1>") < page.index("&lt;python&gt; 3") < page.index("The text.")
    assert "<python>" not in page


def test_head_of_a_notebook_that_says_nothing_says_so() -> None:
    head = header(new_notebook(cells=[new_code_cell("1")]))
    assert (head["state"], head["verdict"]) == ("no-verdict", "No verdict")
    assert head["run"] == "Which run it was is not recorded."
    assert head["results"] == head["settings"] == {}


def test_stopped_run_has_no_verdict_even_where_an_earlier_cell_published_one() -> None:
    book = recorded(FACTS_OF_A_RUN, status="failed", message="failed at cell 7 (code cell 4)\n  ValueError: no")
    head = header(book)
    assert (head["state"], head["detail"]) == ("stopped", "failed at cell 7 (code cell 4). There is no verdict.")
    assert "of 9 expectations" not in to_html(book)

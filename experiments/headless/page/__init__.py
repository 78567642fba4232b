r"""An executed notebook as one HTML file that needs no network and no server.

What the stock template would fetch or lose is replaced: TeX becomes MathML, a PNG keeps the alt text of its
metadata (`{"image/png": {"alt": ...}}`), images beside the notebook are embedded, a widget becomes a note. Code is
folded in <details>; the one script, page.js, folds and unfolds all of it and is not needed for anything else. A
content security policy in the page keeps every browser from fetching anything, and from running any other script.
The page's structure is index.html.j2, its look style.css, its head experiments/facts.py.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import html
import logging
import mimetypes
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from jinja2 import pass_context
from nbconvert.exporters import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode

from experiments.headless import facts
from experiments.headless.page.budget import fit
from experiments.headless.page.mathml import tex_to_mathml

__all__ = ["headings", "tex_to_mathml", "title", "to_html"]

HERE = Path(__file__).resolve().parent
TITLE_IF_NONE = "Notebook"

_log = logging.getLogger(__name__)


def to_html(notebook: NotebookNode, folder: str | Path = ".") -> str:
    """The notebook as a page of its own. Relative image addresses are read from `folder`, the notebook's.

    The title is the first heading, and the facts of the run (see `facts.header`) stand below it. Where
    `notebook.metadata["run"]` has the status "failed" a banner says so. `notebook` itself stays as it is.
    """
    notebook = copy.deepcopy(notebook)
    fit(notebook)
    exporter = _OfflineExporter(template_name="page", extra_template_basedirs=[str(HERE.parent)])
    resources = {
        "metadata": {"name": title(notebook), "path": str(folder)},
        "header": facts.header(notebook),
        "stylesheet": (HERE / "style.css").read_text(encoding="utf-8").strip(),
        "script": (HERE / "page.js").read_text(encoding="utf-8").strip(),
    }
    digest = hashlib.sha256(str(resources["script"]).encode()).digest()
    resources["script_hash"] = f"sha256-{base64.b64encode(digest).decode('ascii')}"
    page, _ = exporter.from_notebook_node(notebook, resources)
    page = _embed_images(_head_below_title(page), Path(folder))
    contents = _contents(page)
    for mark in ("side", "top"):
        page = page.replace(f"<!--contents {mark}-->", contents, 1)
    return page


def title(notebook: NotebookNode) -> str:
    """Text of the first Markdown heading, without its markup."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for heading in headings(cell.source):
                return heading
    return TITLE_IF_NONE


def headings(markdown: str) -> list[str]:
    """The headings of a Markdown cell in order, as plain text; a comment in a fenced block is none."""
    prose = re.sub(r"^(```|~~~).*?^\1", "", markdown, flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"^ {0,3}#{1,6}[ \t]+(.+?)[ \t#]*$", prose, flags=re.MULTILINE)
    return [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).replace("`", "").replace("*", "") for text in found]


class _Renderer(IPythonRenderer):  # type: ignore[misc, unused-ignore]
    """Markdown with MathML where the stock renderer leaves TeX for a script to find, and tables that can scroll."""

    def block_math(self, body: str) -> str:
        return f'<div class="equation" tabindex="0">{tex_to_mathml(body, "block")}</div>\n'

    def inline_math(self, body: str) -> str:
        return tex_to_mathml(body, "inline")

    def latex_environment(self, name: str, body: str) -> str:
        return self.block_math(f"\\begin{{{name}}}{body}\\end{{{name}}}")

    def table(self, text: str) -> str:
        return f'<div class="scroll" tabindex="0" role="group" aria-label="Table"><table>{text}</table></div>\n'


class _OfflineExporter(HTMLExporter):  # type: ignore[misc, unused-ignore]
    """nbconvert's exporter with the filters that the template of this folder asks for."""

    @property
    def default_config(self) -> Any:
        config = super().default_config
        # What can be read comes first; the widget's own text (a Python repr) comes after the note.
        config.NbConvertBase.display_data_priority = [
            "text/html",
            "text/markdown",
            "image/svg+xml",
            "image/png",
            "image/jpeg",
            "text/latex",
            "application/vnd.jupyter.widget-view+json",
            "text/plain",
        ]
        return config

    @pass_context
    def markdown2html(self, context: Any, source: str) -> str:
        attachments = context.get("cell", {}).get("attachments", {})
        return MarkdownWithMath(renderer=_Renderer(escape=False, attachments=attachments)).render(source)

    def default_filters(self) -> Any:
        yield from super().default_filters()
        yield "markdown2html", self.markdown2html
        yield "readable_types", _readable_types
        yield "latex2mathml", _latex_output
        yield "text_class", _text_class
        yield "html_class", _html_class


_MIME_PRIORITY = _OfflineExporter().config.NbConvertBase.display_data_priority


def _readable_types(data: dict[str, Any]) -> list[str]:
    """The one type of an output that is shown: nbconvert's own filter drops a widget without saved state."""
    return [kind for kind in _MIME_PRIORITY if kind in data][:1]


def _latex_output(text: str) -> str:
    """A text/latex output: formulas between dollar signs or in an environment, prose around them."""
    return MarkdownWithMath(renderer=_Renderer(escape=True)).render(text)


def _text_class(text: str) -> str:
    """ "columns" where lines stand under each other and must not be wrapped, "" for running text."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    in_columns = [line for line in lines if re.search(r"\S {2,}\S| \| ", line)]
    return "columns" if len(in_columns) > 1 and 2 * len(in_columns) > len(lines) else ""


def _html_class(fragment: str) -> str:
    """ "paper" where an output brings colours of its own, which were chosen for a white page; "" otherwise.

    Colours that let the page shine through, rgba(...), were chosen for any page.
    """
    values = re.findall(r"(?<![-\w])(?:background(?:-color)?|color)\s*:\s*([^;}\"]+)", fragment)
    return "paper" if any("rgba(" not in value for value in values) else ""


def _head_below_title(page: str) -> str:
    """Move the head of the page behind its first <h1>, where there is one."""
    found = re.search(r"<!--head-->(.*?)<!--/head-->", page, flags=re.DOTALL)
    if found is None:
        return page
    rest = page[: found.start()] + page[found.end() :]
    place = rest.find("</h1>", found.start())
    if place < 0:
        return page
    place += len("</h1>")
    return rest[:place] + found.group(1) + rest[place:]


def _embed_images(page: str, folder: Path) -> str:
    """Give every <img> with a relative address its bytes, and every one that would be fetched its alt text alone."""

    def embedded(match: re.Match[str]) -> str:
        tag, address = match.group(0), html.unescape(match.group(1))
        if address.startswith("data:"):
            return tag
        if re.match(r"(?:[a-z][a-z0-9+.-]*:)?//", address, flags=re.IGNORECASE):
            alt = re.search(r'\balt="([^"]*)"', tag)
            return f'<span class="remote-image">{alt.group(1) if alt and alt.group(1) else "image on the web"}</span>'
        file = folder / unquote(address)
        if not file.is_file():
            _log.warning("no such image: %s", address)
            return tag
        kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
        data = f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode('ascii')}"
        return tag.replace(f'src="{match.group(1)}"', f'src="{data}"', 1)

    return re.sub(r'<img\b[^>]*?\bsrc="([^"]*)"[^>]*>', embedded, page)


def _contents(page: str) -> str:
    """Links to the sections of a rendered page, its second-level headings; "" where there are fewer than three."""
    found = re.findall(r'<h2[^>]*\bid="([^"]*)"[^>]*>(.*?)</h2>', page, flags=re.DOTALL)
    if len(found) < 3:
        return ""
    items = []
    for anchor, inner in found:
        text = re.sub(r"<[^>]+>", "", re.sub(r'<a class="anchor-link".*?</a>', "", inner, flags=re.DOTALL))
        items.append(f'<li><a href="#{anchor}">{text.strip()}</a></li>')
    return f"<ol>{''.join(items)}</ol>"

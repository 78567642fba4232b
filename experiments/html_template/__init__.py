r"""An executed notebook as one HTML file that needs no network, no script and no server.

What the stock template would fetch or lose is replaced: TeX becomes MathML, a PNG keeps the alt text of its
metadata (`{"image/png": {"alt": ...}}`), images beside the notebook are embedded, a widget becomes a note.
The page's structure is index.html.j2, its look style.css, both in this folder.
"""

from __future__ import annotations

import base64
import html
import logging
import mimetypes
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from jinja2 import pass_context
from latex2mathml.converter import convert as latex_to_mathml
from nbconvert.exporters import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode
from pygments.formatters import HtmlFormatter

HERE = Path(__file__).resolve().parent
TITLE_IF_NONE = "Notebook"

_log = logging.getLogger(__name__)


def to_html(notebook: NotebookNode, folder: str | Path = ".") -> str:
    """The notebook as a page of its own. Relative image addresses are read from `folder`, the notebook's.

    The title is the first heading. `notebook.metadata["run"]` (status, message, seconds, command; all optional)
    is shown: a banner where the status is "failed", and a line on how the page was made.
    """
    exporter = _OfflineExporter(template_name="html_template", extra_template_basedirs=[str(HERE.parent)])
    resources = {"metadata": {"name": title(notebook), "path": str(folder)}}
    page, _ = exporter.from_notebook_node(notebook, resources)
    page = _embed_images(page, Path(folder))
    return page.replace("<!--contents-->", _contents(page), 1)


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


def tex_to_mathml(tex: str, display: str) -> str:
    r"""One formula as MathML; display is "inline" or "block". TeX that cannot be converted is shown as it stands."""
    source = re.sub(r"\\(begin|end)\{(?:aligned|split)\}", r"\\\1{align*}", tex.strip())
    source = re.sub(r"\\(?:begin|end)\{equation\*?\}", "", source.replace(r"\operatorname*", r"\operatorname"))
    source = re.sub(r"\\tag\{([^}]*)\}", r"\\qquad\\text{(\1)}", source)
    try:
        mathml = latex_to_mathml(source, display=display)
        ElementTree.fromstring(mathml)
        if re.search(r"<m[ion][^>]*>\\", mathml):
            raise ValueError("a command is unknown")
    except Exception as error:  # the converter raises its own, IndexError and others on TeX it does not know
        _log.warning("left as TeX: %s (%s: %s)", tex.strip(), type(error).__name__, error)
        return f'<code class="tex">{html.escape(tex.strip())}</code>'
    return _space_like_tex(mathml)


class _Renderer(IPythonRenderer):  # type: ignore[misc, unused-ignore]
    """Markdown with MathML where the stock renderer leaves TeX for a script to find."""

    def block_math(self, body: str) -> str:
        return tex_to_mathml(body, "block")

    def inline_math(self, body: str) -> str:
        return tex_to_mathml(body, "inline")

    def latex_environment(self, name: str, body: str) -> str:
        return tex_to_mathml(f"\\begin{{{name}}}{body}\\end{{{name}}}", "block")


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
        yield "duration", _duration

    def _init_resources(self, resources: Any) -> Any:
        resources = super()._init_resources(resources)
        resources["stylesheet"] = (HERE / "style.css").read_text(encoding="utf-8")
        resources["code_stylesheet"] = HtmlFormatter(style="friendly", nobackground=True).get_style_defs(".highlight")
        return resources


_MIME_PRIORITY = _OfflineExporter().config.NbConvertBase.display_data_priority


def _readable_types(data: dict[str, Any]) -> list[str]:
    """The one type of an output that is shown: nbconvert's own filter drops a widget without saved state."""
    return [kind for kind in _MIME_PRIORITY if kind in data][:1]


def _latex_output(text: str) -> str:
    """A text/latex output: formulas between dollar signs or in an environment, prose around them."""
    return MarkdownWithMath(renderer=_Renderer(escape=True)).render(text)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _space_like_tex(mathml: str) -> str:
    """Spacing that browsers give by the character, TeX by its use: bars, slash, sign, tanh before a letter."""
    mathml = re.sub(
        r"<mo[^>]*>&#x(0007C|02016|0002F);</mo>", r'<mo stretchy="false" lspace="0" rspace="0">&#x\1;</mo>', mathml
    )
    mathml = re.sub(r"<mo>([A-Za-z]{2,})</mo>", r"<mi>\1</mi>", mathml)
    mathml = re.sub(r"(&#x0(?:002C|0028|003D|2264);</mo>)<mo>&#x02212;", r'\1<mo form="prefix">&#x02212;', mathml)
    return re.sub(r"(<mi>[A-Za-z]{2,}</mi>)(?=<m(?:i|n|sub|sup|frac|sqrt)\b)", r'\1<mspace width="0.17em" />', mathml)


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
    """Links to the sections of a rendered page: its second-level headings."""
    found = re.findall(r'<h2[^>]*\bid="([^"]*)"[^>]*>(.*?)</h2>', page, flags=re.DOTALL)
    if len(found) < 3:
        return ""
    items = []
    for anchor, inner in found:
        text = re.sub(r"<[^>]+>", "", re.sub(r'<a class="anchor-link".*?</a>', "", inner, flags=re.DOTALL))
        items.append(f'<li><a href="#{anchor}">{text.strip()}</a></li>')
    return f'<nav aria-label="Contents"><ol>{"".join(items)}</ol></nav>'

r"""An executed notebook as one HTML file that needs no network and no server.

What the stock template would fetch or lose is replaced: TeX becomes MathML, a PNG keeps the alt text of its
metadata (`{"image/png": {"alt": ...}}`), images beside the notebook are embedded. A figure that comes with an SVG is
shown as that; an explorer that comes with its numbers or its pictures works in the page, any other widget is left out,
and what it has shown stays. Code is folded in <details>. Without scripts all is there but the explorers, of which the
saved figure stays. A content security policy in the page keeps every browser from fetching anything, and from running
any script but the page's own. The page's structure, look and scripts are in template/.

About its run a page says what the notebook has published beside outputs that it shows anyway, under a type that only
the page reads: it travels with the executed notebook and is never of another run. What was not published is said to
be absent.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import html
import logging
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from jinja2 import pass_context
from latex2mathml.converter import convert as latex_to_mathml
from nbconvert.exporters import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from nbformat import NotebookNode, from_dict, writes

from src.storage import duration

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
REPOSITORY_URL = ""  # where the project is published, e.g. https://github.com/OWNER/NAME: then files become links
NOTEBOOK_NAME = "codeq_walkthrough.ipynb"
SCRIPTS = ("page.js", "explorers.js")
# The one type of an output that is shown is the first of these that it has.
SHOWN_TYPES = (
    "application/vnd.codeq.figure+json",
    "application/vnd.codeq.explorer+json",
    "text/html",
    "text/markdown",
    "image/svg+xml",
    "image/png",
    "image/jpeg",
    "text/latex",
    "application/vnd.jupyter.widget-view+json",
    "text/plain",
)
STATES = {"healthy": "Healthy", "faulty": "Fault found", "inconclusive": "Inconclusive"}
RESULTS = {  # name in run.json: label, factor, format
    "accuracy_float32": ("test accuracy", 100, "{:.1f} %"),
    "baseline_accuracy": ("uncompressed", 100, "{:.1f} %"),
    "packed_ratio": ("smaller file", 1, "{:.1f}×"),
    "structured_mac_ratio": ("fewer MACs", 1, "{:.1f}×"),
    "time_ratio": ("of the time", 100, "{:.0f} %"),
    "unstructured_sparsity": ("zero weights", 100, "{:.1f} %"),
    "mean_bits": ("bits a weight", 1, "{:.1f}"),
}
_log = logging.getLogger(__name__)


def to_html(notebook: NotebookNode, folder: str | Path = ".") -> str:
    """The notebook as a page of its own. Relative image addresses are read from `folder`, the notebook's.

    The title is the first heading, and the facts of the run (see `header`) stand below it. Where
    `notebook.metadata["run"]` has the status "failed" a banner says so. `notebook` itself stays as it is.
    """
    script = "\n".join((HERE / "template" / name).read_text(encoding="utf-8").strip() for name in SCRIPTS)
    found = [text for cell in notebook.cells if cell.cell_type == "markdown" for text in headings(cell.source)]
    resources = {
        "metadata": {"name": found[0] if found else "Notebook", "path": str(folder)},
        "header": header(notebook),
        "download": {"name": NOTEBOOK_NAME, "address": _address(notebook)},
        "stylesheet": (HERE / "template/style.css").read_text(encoding="utf-8").strip(),
        "script": script,
        "script_hash": f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode('ascii')}",
    }
    exporter = _PageExporter(template_name="template", extra_template_basedirs=[str(HERE)])
    exporter.register_preprocessor(CoalesceStreamsPreprocessor, enabled=True)  # lines that came one by one
    page, _ = exporter.from_notebook_node(notebook, resources)
    head = re.search(r"<!--head-->(.*?)<!--/head-->", page, flags=re.DOTALL)
    if head and "</h1>" in page:
        page = page.replace(head.group(), "").replace("</h1>", f"</h1>{head.group(1)}", 1)
    return page.replace("<!--contents-->", _contents(page))


def _address(notebook: NotebookNode) -> str:
    """The notebook itself, without its outputs, as the address of a link."""
    cells = [{**cell, "outputs": [], "execution_count": None} if "outputs" in cell else cell for cell in notebook.cells]
    plain = from_dict({**notebook, "cells": cells, "metadata": {**notebook.metadata, "run": None}})
    del plain.metadata["run"]
    return f"data:application/x-ipynb+json;base64,{base64.b64encode(writes(plain).encode()).decode('ascii')}"


def headings(markdown: str) -> list[str]:
    """The headings of a Markdown cell in order, as plain text; a comment in a fenced block is not a heading."""
    prose = re.sub(r"^(```|~~~).*?^\1", "", markdown, flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"^ {0,3}#{1,6}[ \t]+(.+?)[ \t#]*$", prose, flags=re.MULTILINE)
    return [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).replace("`", "").replace("*", "") for text in found]


def tex_to_mathml(tex: str, display: str) -> str:
    r"""One formula as MathML; display is "inline" or "block". TeX that cannot be converted is shown as it is.

    Browsers show MathML without a script or a font from the network, but space it by the character, TeX by its use:
    bars, slash, sign, tanh before a letter.
    """
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
    bars = r"<mo[^>]*>&#x(0007C|02016|0002F);</mo>"
    mathml = re.sub(bars, r'<mo stretchy="false" lspace="0" rspace="0">&#x\1;</mo>', mathml)
    mathml = re.sub(r"<mo>([A-Za-z]{2,})</mo>", r"<mi>\1</mi>", mathml)
    mathml = re.sub(r"(&#x0(?:002C|0028|003D|2264);</mo>)<mo>&#x02212;", r'\1<mo form="prefix">&#x02212;', mathml)
    return re.sub(r"(<mi>[A-Za-z]{2,}</mi>)(?=<m(?:i|n|sub|sup|frac|sqrt)\b)", r'\1<mspace width="0.17em" />', mathml)


class _Renderer(IPythonRenderer):  # type: ignore[misc, unused-ignore]
    """Markdown with MathML where the stock renderer leaves TeX for a script; tables and code can scroll."""

    def block_math(self, body: str) -> str:
        return f'<div class="equation" tabindex="0">{tex_to_mathml(body, "block")}</div>\n'

    def inline_math(self, body: str) -> str:
        return tex_to_mathml(body, "inline")

    def latex_environment(self, name: str, body: str) -> str:
        return self.block_math(f"\\begin{{{name}}}{body}\\end{{{name}}}")

    def codespan(self, text: str) -> str:
        """A file of the project is a link where the project is published."""
        code = str(super().codespan(text))
        known = REPOSITORY_URL and re.fullmatch(r"[\w./-]+", text) and (ROOT / text).exists()
        return f'<a href="{REPOSITORY_URL}/blob/main/{text}">{code}</a>' if known else code

    def block_code(self, code: str, info: str | None = None) -> str:
        return str(super().block_code(code, info)).replace("<pre>", '<pre tabindex="0">')

    def table(self, text: str) -> str:
        return f'<div class="scroll" tabindex="0" role="group" aria-label="Table"><table>{text}</table></div>\n'

    def block_html(self, html: str) -> str:
        # What looks for images closes every open tag, too, and a folded part begins in one block and ends in another.
        return str(super().block_html(html)) if "<img" in html else html

    def image(self, text: str, url: str, title: str | None = None) -> str:
        if "//" in url[:10]:  # a browser would fetch it
            return f'<span class="remote-image">{html.escape(text) or "image on the web"}</span>'
        return str(super().image(text, unquote(url), title))


class _PageExporter(HTMLExporter):  # type: ignore[misc, unused-ignore]
    """nbconvert's exporter with the filters that the template asks for."""

    @pass_context
    def markdown2html(self, context: Any, source: str) -> str:
        attachments = context.get("cell", {}).get("attachments", {})
        folder = context["resources"]["metadata"]["path"]
        renderer = _Renderer(escape=False, attachments=attachments, embed_images=True, path=folder)
        return MarkdownWithMath(renderer=renderer).render(source)

    def default_filters(self) -> Any:
        yield from super().default_filters()
        yield "markdown2html", self.markdown2html
        # nbconvert's own filter of types drops a widget without saved state.
        yield "readable_types", lambda data: [kind for kind in SHOWN_TYPES if kind in data][:1]
        yield "text_class", _text_class


def _text_class(text: str) -> str:
    """ "columns" where lines stand under each other and must not be wrapped, "" for running text."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    in_columns = [line for line in lines if re.search(r"\S {2,}\S| \| ", line)]
    return "columns" if len(in_columns) > 1 and 2 * len(in_columns) > len(lines) else ""


def _contents(page: str) -> str:
    """Links to the sections of a rendered page, its second-level headings; "" where there are fewer than three."""
    found = re.findall(r'<h2[^>]*\bid="([^"]*)"[^>]*>(.*?)<a class="anchor-link"', page, flags=re.DOTALL)
    items = [f'<li><a href="#{anchor}">{re.sub("<[^>]+>", "", text).strip()}</a></li>' for anchor, text in found]
    return f"<ol>{''.join(items)}</ol>" if len(found) > 2 else ""


def header(notebook: NotebookNode) -> dict[str, Any]:
    """The head of the page of an executed notebook, from its facts and the runner's `notebook.metadata["run"]`.

    state: healthy, faulty, inconclusive, stopped or no-verdict. verdict: that in words; detail: one sentence on it.
    words: what the compression cost and gained. run: which run it is, in a line. results, settings: label and text; the
    settings are folded.
    """
    facts, run = _published(notebook), notebook.metadata.get("run", {})
    line = []
    settings = {"command": run["command"]} if "command" in run else {}
    started, config = run.get("started") or facts.get("recorded"), facts.get("config", {})
    if config:  # then there is the rest of what a run is
        data, machine = facts["data"], facts["machine"]
        images = f"{data['train_images']:,} training and {data['test_images']:,} test images"
        named = f"{machine['device']} ({machine['device_name']})" if machine["device_name"] else machine["device"]
        line += [
            f"{config['model']} on {data['title']}, {images}",
            f"preset {config['preset']}, {config['epochs']} epochs, seed {config['seed']}",
            f"{named}, {machine['precision']}, threads: {machine['threads']}",
        ]
        versions = ", ".join(f"{name} {version}" for name, version in sorted(facts["versions"].items()))
        settings |= {name: str(value) for name, value in config.items() if name != "given"}
        settings |= {"system": machine["system"], "versions": versions}
    if started:
        line.append(_date(started, run.get("seconds")))
    return {
        **_verdict(facts.get("verdict"), run),
        "words": " ".join(facts.get("in_words", [])),
        "results": {
            label: form.format(factor * facts["results"][name])
            for name, (label, factor, form) in RESULTS.items()
            if facts.get("results", {}).get(name) is not None
        },
        "run": "; ".join(line) or "Which run it was is not recorded.",
        "settings": settings,
    }


def _published(notebook: NotebookNode) -> dict[str, Any]:
    """The facts in the outputs of an executed notebook, merged in the order of its cells."""
    from experiments.notebook import FACTS  # loads torch

    facts: dict[str, Any] = {}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            facts.update(output.get("data", {}).get(FACTS, {}))
    return facts


def _verdict(judged: Mapping[str, Any] | None, run: Mapping[str, Any]) -> dict[str, str]:
    if run.get("status") == "failed":
        where = run["message"].partition("\n")[0]
        return {"state": "stopped", "verdict": "Stopped before the end", "detail": f"{where}. There is no verdict."}
    if judged is None:
        detail = "The notebook that this page was made from holds none."
        return {"state": "no-verdict", "verdict": "No verdict", "detail": detail}
    sentence = judged["headline"].partition(": ")[2]
    verdict = STATES[judged["state"]]
    return {"state": judged["state"], "verdict": verdict, "detail": sentence[:1].upper() + sentence[1:]}


def _date(started: str, seconds: float | None) -> str:
    moment = datetime.datetime.fromisoformat(started).astimezone(datetime.UTC)
    took = f", took {duration(seconds)}" if seconds is not None else ""
    return f"{moment.day} {moment:%B %Y, %H:%M} UTC{took}"

"""A menu of faults, and what the doctor says of a pipeline that has the chosen one."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from typing import Any

from experiments.doctor import Report, report_figure, report_table
from experiments.notebook import display
from experiments.notebook.controls import widgets
from experiments.notebook.display import figure_bundle
from src.training import in_notebook

Bundle = tuple[dict[str, str], dict[str, Any]]


def explore(
    menu: Sequence[str], diagnose: Callable[[str], Report], what_breaks: Callable[[str], str], first: str = ""
) -> None:
    """Show the menu, the doctor's answer to `first` (by default the menu's second entry) and the checks as a figure.

    menu: names of faults. diagnose: the report on a pipeline that has the fault of that name; it may take seconds.
    what_breaks: one sentence on a fault. A later choice replaces both displays, so a saved page holds one example.
    """
    ipywidgets = widgets()
    pick = ipywidgets.Dropdown(options=list(menu), value=first or menu[1], description="fault")
    if in_notebook():
        import IPython.display

        IPython.display.display(ipywidgets.VBox([pick]))
    report = diagnose(pick.value)
    answer = display.put(*_answer(what_breaks(pick.value), report))
    figure = display.put(*figure_bundle(report_figure(report)))

    def examine(_: object) -> None:
        name = pick.value
        wait = f"The doctor examines a pipeline with this fault: {name} ... The figure below is still the one before."
        display.put(*_text(wait), handle=answer)
        try:
            found = diagnose(name)
            display.put(*_answer(what_breaks(name), found), handle=answer)
            display.put(*figure_bundle(report_figure(found)), handle=figure)
        except Exception as error:  # a callback's traceback would be lost in the kernel's log
            display.put(*_text(f"{name}: {type(error).__name__}: {error}"), handle=answer)

    pick.observe(examine, names="value")


def _answer(breaks: str, report: Report) -> Bundle:
    lines = [f"<b>What was broken:</b> {html.escape(breaks)}", f"<b>{html.escape(report.headline)}</b>"]
    table = report_table(report, only_failed=True).to_html() if report.faulty else ""
    page = "".join(f"<p>{line}</p>" for line in lines) + table
    return {"text/html": page, "text/plain": f"{breaks}\n{report.text(passed=False)}"}, {}


def _text(line: str) -> Bundle:
    return {"text/html": f"<p>{html.escape(line)}</p>", "text/plain": line}, {}

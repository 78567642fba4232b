"""The doctor's report as a figure and as a table for the notebook."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from experiments.doctor.core.findings import FAILED, NOT_JUDGED, PASSED, STAGES, Finding, Report
from experiments.figures import plain_table, result_css, style

COLORS = {PASSED: style.BLUE, FAILED: style.VERMILLION, NOT_JUDGED: style.FAINT}
WORDS = {PASSED: "passed", FAILED: "failed", NOT_JUDGED: "not judged"}
NAMED = 3  # failed checks named beside their stage, causes named of each
TOP = "text-align: left; vertical-align: top; white-space: normal; overflow-wrap: break-word"


@style.styled
def report_figure(report: Report, *, subtitle: str = "") -> Figure:
    """One row a stage, one square a check in the order they ran; what failed is named beside its row."""
    stages = [stage for stage in STAGES if any(f.stage == stage for f in report.findings)]
    rows = [[f for f in report.findings if f.stage == stage] for stage in stages]
    widest = max((len(row) for row in rows), default=1)
    failed = sum(finding.failed for finding in report.findings)
    passed = sum(finding.status == PASSED for finding in report.findings)
    title = f"{failed} of {len(report.findings)} checks failed" if failed else f"No fault found: {passed} checks passed"
    skipped = len(report.findings) - failed - passed
    title += f", {skipped} not judged" if skipped else ""
    worst = ", ".join(finding.name for finding in report.failed[:NAMED])
    likely = f" Most likely: {report.diagnosis[0].text}" if report.diagnosis else ""
    alt = f"{title}{f', first {worst}' if worst else ''}.{likely}"
    figure = style.canvas(title, subtitle, alt, height=1.2 + 0.62 * max(len(rows), 1))
    axes = figure.subplots()
    axes.grid(False)
    for place, row in enumerate(rows):
        colors = [COLORS[finding.status] for finding in row]
        hatches = ["xxx" if finding.failed else "" for finding in row]
        axes.bar(range(len(row)), [0.5] * len(row), bottom=place - 0.15, width=0.86, color=colors, hatch=hatches)
        bad = [finding.name for finding in row if finding.failed]
        more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        text = f"failed: {', '.join(bad[:NAMED])}{more}" if bad else ""
        axes.text(-0.43, place - 0.24, text, color=style.VERMILLION, va="bottom")
    axes.set_yticks([place + 0.1 for place in range(len(rows))], stages)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(-0.5, widest - 0.5)
    axes.set_xticks([])
    axes.set_xlabel("checks, in the order they ran")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    handles = [Patch(facecolor=COLORS[status], label=WORDS[status]) for status in COLORS]
    style.legend_above(axes, columns=3, handles=handles)
    return figure


class ReportTable:
    """The findings as a notebook shows them: what failed, worst first, then each stage's other checks, folded."""

    def __init__(self, report: Report, only_failed: bool = False) -> None:
        self._report, self._only_failed = report, only_failed

    def to_html(self) -> str:
        """A card for each failed check, then the table of every stage (the cards alone where `only_failed`)."""
        parts = [_card(finding) for finding in self._report.failed]
        for stage in () if self._only_failed else STAGES:
            rest = [f for f in self._report.worst_first if f.stage == stage and not f.failed]
            if rest:
                summary = f"{stage}: {_counted(rest)}"
                parts.append(f'<details class="stage"><summary>{summary}</summary>{_table(rest)}</details>')
        return "\n".join(parts)

    _repr_html_ = to_html

    def __repr__(self) -> str:
        return self._report.text(passed=not self._only_failed)


def report_table(report: Report, only_failed: bool = False) -> ReportTable:
    """What was checked, expected and measured; for what failed the likely causes and what to do, too."""
    return ReportTable(report, only_failed)


def _card(finding: Finding) -> str:
    """A failed check with one line for each of its parts: a row of eight columns would run off the page."""
    causes = "".join(f"<li>{_text(cause.text)}</li>" for cause in finding.causes[:NAMED])
    parts = {
        "proves": _text(finding.proves),
        "expected": _text(finding.expected),
        "measured": _text(finding.measured),
        "likely causes": f'<ol style="margin: 0; padding-left: 1.3em">{causes}</ol>',
        "what to do": _text(finding.remedy),
    }
    rows = [
        f'<tr><th scope="row" style="{TOP}">{name}</th><td style="{TOP}">{text}</td></tr>'
        for name, text in parts.items()
        if text
    ]
    head = f'<th colspan="2" style="{TOP}; {result_css(FAILED)}">{FAILED} {finding.stage}: {_text(finding.name)}</th>'
    return f'<table style="margin: 0 0 1em"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _table(findings: Sequence[Finding]) -> str:
    rows = [
        {
            "result": finding.status,
            "check": finding.name,
            "proves": finding.proves,
            "expected": finding.expected,
            "measured": finding.measured,
        }
        for finding in findings
    ]
    styled = plain_table(rows).map(result_css, subset=["result"]).format(_text)
    wrapped = {"white-space": "normal", "vertical-align": "top", "overflow-wrap": "break-word"}
    return str(styled.set_properties(**wrapped).to_html())


def _text(text: str) -> str:
    """As HTML, with what stands between backticks as code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))


def _counted(findings: Sequence[Finding]) -> str:
    passed = sum(finding.status == PASSED for finding in findings)
    skipped = len(findings) - passed
    return f"{passed} passed" + (f", {skipped} not judged" if skipped else "")

"""The doctor's report as a figure and as a table for the notebook."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.patches import Patch
from pandas.io.formats.style import Styler

from experiments import style
from experiments.diagnosis.findings import FAILED, NOT_APPLICABLE, PASSED, STAGES, Report
from experiments.lessons import plain_table

COLORS = {PASSED: style.BLUE, FAILED: style.VERMILLION, NOT_APPLICABLE: style.FAINT}
WORDS = {PASSED: "passed", FAILED: "failed", NOT_APPLICABLE: "not applicable"}
NAMED = 3  # failed checks named beside their stage


@style.styled
def report_figure(report: Report, *, subtitle: str = "") -> Figure:
    """One row a stage, one square a check in the order they ran; what failed is named beside its row."""
    stages = [stage for stage in STAGES if any(f.stage == stage for f in report.findings)]
    rows = [[f for f in report.findings if f.stage == stage] for stage in stages]
    widest = max((len(row) for row in rows), default=1)
    failed = sum(finding.failed for finding in report.findings)
    passed = sum(finding.status == PASSED for finding in report.findings)
    title = f"{failed} of {len(report.findings)} checks failed" if failed else f"No fault found: {passed} checks passed"
    figure = style.canvas(title, subtitle, height=1.2 + 0.62 * max(len(rows), 1))
    axes = figure.subplots()
    for place, row in enumerate(rows):
        colors = [COLORS[finding.status] for finding in row]
        hatches = ["xxx" if finding.failed else "" for finding in row]
        axes.bar(range(len(row)), [0.5] * len(row), bottom=place - 0.15, width=0.86, color=colors, hatch=hatches)
        bad = [finding.name for finding in row if finding.failed]
        more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        text = f"failed: {', '.join(bad[:NAMED])}{more}" if bad else ""
        axes.text(-0.43, place - 0.24, text, color=style.VERMILLION, fontsize=style.SMALL, va="bottom")
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
    worst = ", ".join(finding.name for finding in report.failed[:NAMED])
    likely = f" Most likely: {report.diagnosis[0].text}" if report.diagnosis else ""
    return style.finish(figure, f"{title}{f', first {worst}' if worst else ''}.{likely}")


def report_table(report: Report, only_failed: bool = False) -> Styler:
    """The findings, worst first: what was checked, expected and measured, the likely causes and what to do."""
    shown = report.failed if only_failed else report.worst_first
    rows = [
        {
            "result": finding.status,
            "when": finding.stage,
            "check": finding.name,
            "expected": finding.expected,
            "measured": finding.measured,
            "likely causes, in order": " ".join(f"{n}. {c.text}" for n, c in enumerate(finding.causes[:3], 1)),
            "what to do": finding.remedy,
        }
        for finding in shown
    ]
    if not rows:
        rows = [{"result": PASSED, "when": "", "check": "none failed", "expected": "", "measured": ""}]
    colors = {PASSED: "color: #1b6e3c", FAILED: "color: #a3262a; font-weight: bold"}
    styled = plain_table(rows).map(lambda status: colors.get(status, ""), subset=["result"])
    return styled.set_properties(**{"white-space": "normal", "vertical-align": "top"})

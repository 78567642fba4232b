"""What a check says, and the report that is made of it.

A check is a small object: what it proves, what was expected, what was measured, whether that passed, and where it
failed the likely causes, most likely first. Causes are known by a stable key; experiments/doctor/causes/ has the
sentence and the remedy of each.
"""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from experiments.figures import plain_table, result_css, style

PASSED, FAILED, UNUSUAL, NOT_JUDGED = "passed", "FAILED", "unusual", "not judged"
BEFORE, FIRST_STEPS, TRAINING, AFTERWARDS = "before training", "first steps", "while training", "afterwards"
STAGES = (BEFORE, FIRST_STEPS, TRAINING, AFTERWARDS)
LINE = 118
SUBJECTS = {
    "data": "the images behind the loader",
    "tests": "the test set",
    "epochs": "the training",
    "measure": "what is measured of an epoch",
    "save": "the checkpoint",
    "evaluate": "the reported figures",
    "baseline": "the architecture",
    "expected.lambda_dz": "the loss",
    "expected.penalty": "the penalty",
    "expected.crop_padding": "the augmentation",
    "expected.coefficients": "the penalty's schedule",
    "expected.groups": "the learning rates",
    "expected.quantizer": "the quantizers' settings",
}
"""By field of a Pipeline: what a check would look at if the field were given."""


@dataclass(frozen=True)
class Cause:
    """One thing that may be wrong with a pipeline. key: stable name; text: a sentence; remedy: what to do about it."""

    key: str
    text: str
    remedy: str


@dataclass(frozen=True)
class Finding:
    """One check and its outcome.

    stage: one of STAGES. status: PASSED, FAILED, UNUSUAL (legal, and not what most pipelines do) or NOT_JUDGED, where
    `measured` says why and `needs` names the field that would let the check look. causes: what most likely broke it,
    in order of the evidence; empty unless it failed or is unusual. error: how far the measurement is from what was
    expected, as a multiple of what is tolerated (above 1 fails); 0 where there is no such number.
    """

    name: str
    proves: str
    stage: str
    expected: str
    measured: str
    status: str
    causes: tuple[Cause, ...] = ()
    error: float = 0.0
    needs: str = ""

    @property
    def failed(self) -> bool:
        """Whether the check found a fault."""
        return self.status == FAILED

    @property
    def remedy(self) -> str:
        """What to do: the remedy of the most likely cause."""
        return self.causes[0].remedy if self.causes else ""

    def to_json(self) -> dict[str, Any]:
        """The finding as plain data, as run.json holds it."""
        return {
            "name": self.name,
            "proves": self.proves,
            "stage": self.stage,
            "expected": self.expected,
            "measured": self.measured,
            "status": self.status,
            "causes": [{"key": cause.key, "text": cause.text} for cause in self.causes],
            "what_to_do": self.remedy,
            "needs": self.needs,
        }


@dataclass(frozen=True)
class Report:
    """Findings of any stages, in the order in which they were made. Reports are joined with `+`."""

    findings: tuple[Finding, ...] = ()

    def __add__(self, other: Report | Iterable[Finding]) -> Report:
        more = other.findings if isinstance(other, Report) else tuple(other)
        return Report(self.findings + more)

    @property
    def failed(self) -> tuple[Finding, ...]:
        """What failed, worst first: see `worst_first`."""
        return tuple(finding for finding in self.worst_first if finding.failed)

    @property
    def faulty(self) -> bool:
        """Whether any check failed."""
        return any(finding.failed for finding in self.findings)

    @property
    def worst_first(self) -> tuple[Finding, ...]:
        """Failed, then unusual, then passed, then not judged; within each the earlier stage first, because a fault that
        shows before training explains what shows after it."""
        order = {FAILED: 0, UNUSUAL: 1, PASSED: 2, NOT_JUDGED: 3}
        return tuple(sorted(self.findings, key=lambda f: (order[f.status], STAGES.index(f.stage))))

    @property
    def diagnosis(self) -> tuple[Cause, ...]:
        """The likely causes over all failed findings, most likely first.

        A finding speaks for its first cause with weight 1, for its second with 1/2, and so on. An earlier stage sees
        more directly, so its voice counts for more: 1, 1/2, 1/4, 1/4. Second is what the first check that failed
        names, unless it is first anyway: it stood nearest to the source, however many others saw what followed.
        """
        votes: dict[str, float] = {}
        known: dict[str, Cause] = {}
        for finding in self.failed:
            voice = (1.0, 0.5, 0.25, 0.25)[STAGES.index(finding.stage)]
            for place, cause in enumerate(finding.causes):
                votes[cause.key] = votes.get(cause.key, 0.0) + voice / (place + 1)
                known.setdefault(cause.key, cause)
        ranked = sorted(votes, key=lambda key: -votes[key])
        nearest = next((finding.causes[0].key for finding in self.failed if finding.causes), None)
        if nearest is not None and nearest != ranked[0]:
            ranked.remove(nearest)
            ranked.insert(1, nearest)
        return tuple(known[key] for key in ranked)

    @property
    def headline(self) -> str:
        """One line: the most likely cause where something failed, else what passed and what was not looked at."""
        if not self.findings:
            return "DOCTOR: nothing was examined"
        if self.failed:
            likely = self.diagnosis[0].text if self.diagnosis else self.failed[0].measured
            return f"DOCTOR: {len(self.failed)} of {len(self.findings)} checks failed. Most likely: {likely}"
        unseen = f"; not looked at: {', '.join(self.not_looked_at)}" if self.not_looked_at else ""
        return f"DOCTOR: no fault found; {counted(self.findings, 'checks passed')}{unseen}"

    @property
    def not_looked_at(self) -> tuple[str, ...]:
        """What checks would look at if one more field were given: "the test set (give tests=)", each once."""
        missing = dict.fromkeys(f.needs for f in self.findings if f.status == NOT_JUDGED and f.needs)
        return tuple(f"{SUBJECTS[field]} (give {field}=)" for field in missing)

    @property
    def line(self) -> str:
        """`38 checks, 1 failed; most likely: ...`, for progress."""
        count = sum(finding.status != NOT_JUDGED for finding in self.findings)
        likely = f"; most likely: {self.diagnosis[0].text}" if self.diagnosis else ""
        return f"{count} checks, {len(self.failed)} failed{likely}"

    def text(self, passed: bool = False) -> str:
        """What failed or is unusual as a table for a terminal, with `passed` all other findings after it; the headline
        is last."""
        shown = [finding for finding in self.worst_first if passed or finding.status in (FAILED, UNUSUAL)]
        lines = []
        width = max((len(finding.name) for finding in shown), default=0)
        for finding in shown:
            head = f"  {finding.status:<14}  {finding.stage:<15}  {finding.name:<{width}}  "
            if finding.status not in (FAILED, UNUSUAL):
                lines.append(_cut(head + finding.measured))
                continue
            lines.append(head.rstrip())
            lines += _block("proves", finding.proves) + _block("expected", finding.expected)
            lines += _block("measured", finding.measured)
            for number, cause in enumerate(finding.causes, 1):
                lines += _block(f"cause {number}", f"{cause.text} [{cause.key}]")
            lines += _block("do", finding.remedy)
        return "\n".join([*lines, self.headline])

    def to_json(self) -> dict[str, Any]:
        """For run.json: state, headline, likely causes and every finding."""
        return {
            "state": "faulty" if self.faulty else "healthy",
            "headline": self.headline,
            "likely_causes": [{"key": c.key, "text": c.text, "what_to_do": c.remedy} for c in self.diagnosis],
            "findings": [finding.to_json() for finding in self.findings],
        }


def counted(findings: Sequence[Finding], passed: str = PASSED) -> str:
    """`30 passed, 1 unusual, 4 not judged`, without what there is none of."""
    numbers = {passed: PASSED, UNUSUAL: UNUSUAL, NOT_JUDGED: NOT_JUDGED}
    counts = {word: sum(f.status == status for f in findings) for word, status in numbers.items()}
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count or word == passed)


def joined(reports: Sequence[Report]) -> Report:
    """One report of many."""
    return sum(reports, Report())


def _block(label: str, text: str) -> list[str]:
    if not text:
        return []
    return textwrap.wrap(text, LINE, initial_indent=f"      {label:<9} ", subsequent_indent=" " * 16)


def _cut(line: str) -> str:
    return line if len(line) <= LINE else line[: LINE - 3].rstrip() + "..."


COLORS = {PASSED: style.BLUE, FAILED: style.VERMILLION, UNUSUAL: style.ORANGE, NOT_JUDGED: style.FAINT}
WORDS = {PASSED: "passed", FAILED: "failed", UNUSUAL: "unusual", NOT_JUDGED: "not judged"}
NAMED = 3  # failed checks named beside their stage, causes named of each
TOP = "text-align: left; vertical-align: top; white-space: normal; overflow-wrap: break-word"


@style.styled
def report_figure(report: Report, *, subtitle: str = "") -> Figure:
    """One row a stage, one square a check in the order they ran; what failed is named beside its row."""
    stages = [stage for stage in STAGES if any(f.stage == stage for f in report.findings)]
    rows = [[f for f in report.findings if f.stage == stage] for stage in stages]
    widest = max((len(row) for row in rows), default=1)
    failed = sum(finding.failed for finding in report.findings)
    rest = counted(report.findings, "checks passed")
    title = f"{failed} of {len(report.findings)} checks failed, {rest}" if failed else f"No fault found: {rest}"
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
    style.legend_above(axes, columns=4, handles=handles)
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
                summary = f"{stage}: {counted(rest)}"
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

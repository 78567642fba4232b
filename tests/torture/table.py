"""All faults in the order of the table, and the table as Markdown between two marks in docs/reliability.md."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path

from src.runs import versions
from tests.torture import broken_runs, damaged_files, harmful, harmful_snapshots, long_runs, stops
from tests.torture.fault import FAULTS, Fault, Outcome

__all__ = ["BEGIN", "DOCUMENT", "END", "ROWS", "console_line", "document", "markdown", "rows_of"]

ROWS: dict[str, Fault] = {
    name: row
    for module in (stops, broken_runs, damaged_files, harmful, harmful_snapshots, long_runs)
    for name, row in FAULTS.items()
    if row.run.__module__ == module.__name__
}
DOCUMENT = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- table of faults: written by `make torture` -->", "<!-- end of the table -->"


def console_line(name: str, outcome: Outcome, seconds: float) -> str:
    """One line on a terminal: counts, time, name, and what else there is to know."""
    more = outcome.skipped or outcome.note
    counts = "  skipped" if outcome.skipped else f"{outcome.survived:>4}/{outcome.tried:<4}"
    return f"{counts} {seconds:>6.1f} s  {name}" + (f" ({more})" if more else "")


def markdown(outcomes: Mapping[str, Outcome], kept: Mapping[str, str] | None = None) -> str:
    """The table: what was done, how often, how often it was survived, and what counts as that. No dates, no times.

    kept: lines of the table that was there, by fault, for faults that are not among `outcomes`.
    """
    fresh = {name: _line(name, outcome) for name, outcome in outcomes.items()}
    both = {**(kept or {}), **fresh}
    rows = {name: both[name] for name in ROWS if name in both}
    lines = [
        "| fault | tried | survived | lost | survived means |",
        "| --- | ---: | ---: | ---: | --- |",
        *rows.values(),
    ]
    cells = [row.split(" | ") for row in rows.values()]
    tried, lost = (sum(int(row[place]) for row in cells) for place in (1, 3))
    shaping = ", ".join(f"{library} {version}" for library, version in versions().items() if library in _SHAPING)
    lines += ["", f"{tried} tries, {lost} lost, on {platform.system()} with {shaping}."]
    return "\n".join(lines)


def _line(name: str, outcome: Outcome) -> str:
    counts = f"{outcome.tried} | {outcome.survived} | {len(outcome.lost)}"
    note = f" ({outcome.skipped or outcome.note})" if outcome.skipped or outcome.note else ""
    return f"| {name} | {counts} | {ROWS[name].survived}{note} |"


def rows_of(text: str) -> dict[str, str]:
    """The lines of the table in `text`, by fault."""
    table = text.partition(BEGIN)[2].partition(END)[0]
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines() if line.startswith("| ")}
    return {name: line for name, line in lines.items() if name in ROWS}


def document(text: str, outcomes: Mapping[str, Outcome]) -> str:
    """The document with the table between its marks: `outcomes`, and of the other faults the lines that are there.

    Raises ValueError where the marks are not there once each, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{DOCUMENT.name} needs the lines {BEGIN!r} and {END!r} once, in this order")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{markdown(outcomes, rows_of(text))}\n\n{END}{rest.partition(END)[2]}"


_SHAPING = ("python", "torch", "numpy", "matplotlib")

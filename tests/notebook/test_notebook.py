"""The walkthrough as it is committed: prose first, short cells, no outputs."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks/codeq_walkthrough.ipynb"
MOST_LINES, MOST_CELLS, MOST_WORDS, EXERCISES = 20, 60, 3500, 6
LOOK_FOR = "*Look for*"
ANSWERED = {"parameters", "setup", "imports"}  # cells that show nothing: the next question may follow at once


@pytest.fixture(scope="module")
def cells() -> list[NotebookNode]:
    return list(nbformat.read(NOTEBOOK, as_version=4).cells)


def tags(cell: NotebookNode) -> set[str]:
    return set(cell.metadata.get("tags", []))


def test_every_code_cell_follows_the_question_that_it_answers(cells: list[NotebookNode]) -> None:
    """The question is bold and stands between the last thing to look for and the cell."""
    for before, cell in itertools.pairwise(cells):
        if cell.cell_type == "code" and not (tags(cell) & ANSWERED and tags(before) & ANSWERED):
            assert before.cell_type == "markdown", f"no prose above: {cell.source[:80]}"
            asked = before.source.rpartition(LOOK_FOR)[2]
            assert re.search(r"\*\*[^*]+\?\*\*", asked), f"no question above: {cell.source[:80]}"


def test_what_to_see_stands_below_every_code_cell(cells: list[NotebookNode]) -> None:
    for cell, below in itertools.pairwise(cells):
        if cell.cell_type == "code" and not tags(cell) & ANSWERED:
            assert below.source.startswith(LOOK_FOR), f"nothing to look for below: {cell.source[:80]}"


def test_cells_are_short_and_define_nothing_but_a_network_of_ones_own(cells: list[NotebookNode]) -> None:
    for cell in cells:
        if cell.cell_type == "code":
            assert len(cell.source.splitlines()) <= MOST_LINES
            assert "own" in tags(cell) or not re.search(r"^\s*(def|class) ", cell.source, flags=re.MULTILINE)


def test_it_can_be_read_in_one_sitting(cells: list[NotebookNode]) -> None:
    assert len(cells) <= MOST_CELLS
    assert sum(len(cell.source.split()) for cell in cells if cell.cell_type == "markdown") <= MOST_WORDS


def test_every_exercise_has_a_folded_answer(cells: list[NotebookNode]) -> None:
    exercises = [part for cell in cells for part in cell.source.split("**Try it.**")[1:]]
    assert len(exercises) >= EXERCISES
    for exercise in exercises:
        assert re.match(r"[^<]+\?\n\n<details[^>]*><summary>Answer</summary>\n\n.+?</details>", exercise, re.DOTALL)


def test_nothing_that_was_run_is_committed(cells: list[NotebookNode]) -> None:
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.outputs for cell in code] == [[]] * len(code)
    assert {cell.execution_count for cell in code} == {None}


def test_chapters_are_numbered_in_order(cells: list[NotebookNode]) -> None:
    found = [re.findall(r"^## (\d+)\. ", cell.source, re.MULTILINE) for cell in cells if cell.cell_type == "markdown"]
    numbers = [int(number) for some in found for number in some]
    assert numbers == list(range(1, len(numbers) + 1))

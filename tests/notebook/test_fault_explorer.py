"""The menu of faults: the answer names what was broken and what the doctor says, for every choice, errors included."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import ipywidgets
import pytest

from experiments.doctor import Report
from experiments.doctor.causes.causes import causes
from experiments.doctor.core.findings import BEFORE, FAILED, PASSED, Finding
from experiments.notebook import display, fault_explorer
from tests.faults import FAULTS
from tests.faults.demonstration import MENU, what_breaks

SHOWN = list[tuple[dict[str, str], Any]]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> SHOWN:
    """Every bundle that was displayed, with the display it replaces (None: a new one)."""
    bundles: SHOWN = []

    def put(data: dict[str, str], metadata: dict[str, Any], *, handle: Any = None) -> int:
        bundles.append((data, handle))
        return len(bundles)

    monkeypatch.setattr(display, "put", put)
    return bundles


@pytest.fixture
def menu(monkeypatch: pytest.MonkeyPatch) -> list[ipywidgets.Dropdown]:
    """The dropdowns that were made."""
    made: list[ipywidgets.Dropdown] = []

    def dropdown(**settings: Any) -> ipywidgets.Dropdown:
        made.append(ipywidgets.Dropdown(**settings))
        return made[-1]

    monkeypatch.setattr(fault_explorer, "widgets", lambda: SimpleNamespace(Dropdown=dropdown, VBox=ipywidgets.VBox))
    return made


def found(name: str) -> Report:
    if name == "impossible":
        raise RuntimeError("no such <pipeline>")
    passed = Finding("all well", "", BEFORE, "1", "1", PASSED)
    failed = Finding("a check", "", BEFORE, "1", "2", FAILED, causes("learning-rate-zero"))
    return Report((passed,) if name == "nothing" else (passed, failed))


def test_a_choice_replaces_the_answer_and_the_figure(shown: SHOWN, menu: list[ipywidgets.Dropdown]) -> None:
    fault_explorer.explore(["nothing", "a <fault>"], found, lambda name: f"This breaks {name}.")
    assert [handle for _, handle in shown] == [None, None]
    first = shown[0][0]["text/html"]
    assert "This breaks a &lt;fault&gt;." in first
    assert "1 of 2 checks failed. Most likely: a learning rate is 0" in first
    assert first.count("<table") == 1, "what failed, alone"
    assert "FAILED before training: a check" in first
    assert "all well" not in first
    assert "1 of 2 checks failed" in shown[1][0]["text/plain"]

    shown.clear()
    menu[0].value = "nothing"
    assert [handle for _, handle in shown] == [1, 1, 2]
    assert "The doctor examines a pipeline with this fault: nothing" in shown[0][0]["text/html"]
    assert "no fault found; 1 checks passed" in shown[1][0]["text/html"]
    assert "<table" not in shown[1][0]["text/html"]


def test_an_error_of_the_examination_is_told_in_the_answer(shown: SHOWN, menu: list[ipywidgets.Dropdown]) -> None:
    fault_explorer.explore(["nothing", "impossible"], found, str, first="nothing")
    menu[0].value = "impossible"
    assert shown[-1] == (
        {
            "text/html": "<p>impossible: RuntimeError: no such &lt;pipeline&gt;</p>",
            "text/plain": "impossible: RuntimeError: no such <pipeline>",
        },
        1,
    )


def test_the_notebooks_menu_holds_faults_of_the_library() -> None:
    assert set(MENU) <= {*FAULTS, "nothing"}
    assert len({what_breaks(name) for name in MENU}) == len(MENU)

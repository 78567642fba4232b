"""Every fault once, and healthy runs: what is broken is caught and named, what is healthy raises no finding.

The examination stops at the first stage that finds something. Faults in measuring and saving are whole until training
starts, so the two stages before it are left out there.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from experiments.doctor import Report, afterwards
from experiments.doctor.causes.catalogue import CAUSES
from experiments.doctor.examine import examine, while_training
from experiments.notebook.demonstration import BREAKS, EPOCHS, diagnose, edited
from tests.faults import FAULTS, THEMES, break_it, healthy, power, small_config
from tests.faults.foreign import FOREIGN
from tests.faults.power import PAGE

REPORTING = {fault.name for fault in THEMES["measuring and saving"]}
SETTINGS: tuple[Mapping[str, Any], ...] = (
    {},
    {"learnable_bit": False, "seed": 1},
    {"regularization": "decoupled", "seed": 2},
    {"learnable_bit": False, "regularization": "decoupled", "precision": "bf16", "seed": 3},
    {"peak": 0.0, "learnable_deadzone": False, "seed": 4},
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if n % 12 == 0 else pytest.mark.slow) for n, name in enumerate(FAULTS)]
)
def test_fault_is_caught_and_named(name: str, tmp_path: Path) -> None:
    with warnings.catch_warnings(), edited(FAULTS[name]):
        warnings.simplefilter("ignore")  # torch itself warns of some of what is broken on purpose
        report = _reporting(name, tmp_path) if name in REPORTING else _up_to_the_first_finding(name, tmp_path)
    named = [cause.key for cause in report.diagnosis[:2]]
    assert report.faulty, f"{FAULTS[name].breaks} Nothing was found."
    assert set(named) & set(FAULTS[name].causes), f"{named} were named:\n{report.text(passed=False)}"


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_healthy_run_has_no_finding(settings: Mapping[str, Any], tmp_path: Path) -> None:
    report = examine(healthy(small_config(**settings)), tmp_path)
    assert not report.failed, report.text(passed=False)
    assert len(report.findings) > 40


@pytest.mark.parametrize("name", FOREIGN)
def test_a_healthy_pipeline_of_another_form_is_not_called_wrong(name: str) -> None:
    report = examine(FOREIGN[name].build())
    assert not report.failed, report.text(passed=False)


def test_causes_of_faults_are_known_to_the_doctor() -> None:
    unknown = {(fault.name, key) for fault in FAULTS.values() for key in fault.causes if key not in CAUSES}
    assert not unknown


def test_every_fault_breaks_something_of_its_own() -> None:
    sentences = [fault.breaks for fault in FAULTS.values()]
    assert len(FAULTS) == sum(len(faults) for faults in THEMES.values()), "two faults share a name"
    assert len(set(sentences)) == len(sentences)
    assert all(sentence.endswith(".") for sentence in sentences)


def test_the_page_was_measured_on_these_faults() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert [
        name for name in FAULTS if f"| {name} | {FAULTS[name].breaks.replace('|', chr(92) + '|')} |" not in text
    ] == []
    assert f"{len(FAULTS)} of {len(FAULTS)} faults caught, {len(FAULTS)} of {len(FAULTS)} with the right cause" in text
    assert "0 false alarms in" in text
    assert [case.name for case in FOREIGN.values() if f"| {case.name} | {case.what} |" not in text] == []


def test_results_are_read_as_they_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fired = (("first steps", "a check", ("penalty-wrong", "penalty-scaled")),)
    outcome = power.Outcome(
        "fault", "a name", {"seed": 1}, fired, ("penalty-wrong",), (("first steps", "a check"),), 1, ("odd",), ("so",)
    )
    monkeypatch.setattr(power, "RESULTS", tmp_path / "results.json")
    power.RESULTS.write_text(json.dumps([asdict(outcome)]))
    assert power._last_results() == [outcome]


def test_a_menu_for_the_notebook() -> None:
    assert set(BREAKS) <= {"nothing", *FAULTS}
    heard: list[str] = []
    report = diagnose("half of the layers", lambda stage, found: heard.append(stage))
    assert heard == ["before training"], "the doctor stops where it finds something"
    assert [cause.key for cause in report.diagnosis[:1]] == ["quantizers-missing"]


def _up_to_the_first_finding(name: str, folder: Path) -> Report:
    return examine(break_it(name), folder, stop_when_faulty=True)


def _reporting(name: str, folder: Path) -> Report:
    pipeline = break_it(name, small_config(epochs=EPOCHS))
    seen, reported = while_training(pipeline, folder)
    return seen if seen.faulty else afterwards(pipeline, reported)

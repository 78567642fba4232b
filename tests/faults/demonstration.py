"""A few faults for a reader to try: break the pipeline, call the doctor, look at what it says.

    show_broken("half of the layers")        # a menu in a notebook, a figure and a table without one

Each takes seconds: the doctor stops after the stage that finds something, and a run lasts a few epochs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure

from experiments import live
from experiments.controls import widgets
from experiments.diagnosis.figure import report_figure
from experiments.diagnosis.findings import Report
from experiments.doctor import examine
from tests.faults import FAULTS, break_it, healthy
from tests.faults.fault import small_config

HEALTHY = "nothing"
MENU = (
    HEALTHY,
    "half of the layers",
    "logits missing",
    "round stops the gradient",
    "test images in the training set",
    "penalty on latent weights",
    "coefficient ramps to 1",
    "BatchNorm in eval mode",
    "sparsity of latent weights",
    "half of the test set",
)
EPOCHS = 4


def diagnose(name: str, on_stage: Callable[[str, Report], Any] | None = None) -> Report:
    """What the doctor says of the small pipeline with the fault called `name`, up to the first stage that finds one.

    `name`: one of MENU or of FAULTS. Raises KeyError for another. on_stage: hears each stage and its findings.
    """
    config = small_config(epochs=EPOCHS)
    subject = healthy(config) if name == HEALTHY else break_it(name, config)
    return examine(subject, stop_when_faulty=True, on_stage=on_stage)


def what_breaks(name: str) -> str:
    """One sentence on the fault called `name`."""
    return "Nothing is broken." if name == HEALTHY else FAULTS[name].breaks


def broken_figure(name: str) -> Figure:
    """The report on the pipeline with the fault called `name`: every check, and the cause that is blamed."""
    report = diagnose(name)
    blamed = f" The doctor: {report.diagnosis[0].text}" if report.diagnosis else ""
    return report_figure(report, subtitle=what_breaks(name) + blamed)


def show_broken(name: str) -> None:
    """A menu of faults above the doctor's report, which starts with the fault called `name`."""
    live.explorer(broken_figure, name=widgets().Dropdown(options=MENU, value=name, description="broken"))

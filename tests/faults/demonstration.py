"""A few faults for a reader to try: break the pipeline, call the doctor, look at what it says.

    fault_explorer.explore(MENU, diagnose, what_breaks)

Each takes seconds: the doctor stops after the stage that finds something, and a run lasts a few epochs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from experiments.doctor import Report
from experiments.doctor.examine import examine
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
    pipeline = healthy(config) if name == HEALTHY else break_it(name, config)
    return examine(pipeline, stop_when_faulty=True, on_stage=on_stage)


def what_breaks(name: str) -> str:
    """One sentence on the fault called `name`."""
    return "Nothing is broken." if name == HEALTHY else FAULTS[name].breaks

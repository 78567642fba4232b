"""A library of faults: each breaks one thing of the real pipeline, and the doctor has to find it.

pipeline = break_it("half of the layers")
report = examine(pipeline)
"""

from __future__ import annotations

from experiments.doctor import Pipeline
from experiments.notebook.demonstration import Fault, broken, healthy, small_config
from experiments.pipeline import RunConfig
from tests.faults import (
    attachment_faults,
    data_faults,
    late_faults,
    measure_faults,
    network_faults,
    optimizer_faults,
    penalty_faults,
    quantizer_faults,
    sampling_faults,
    step_faults,
)

__all__ = ["FAULTS", "THEMES", "Fault", "break_it", "healthy", "small_config"]

THEMES: dict[str, tuple[Fault, ...]] = {
    "quantizer": quantizer_faults.FAULTS,
    "attachment": attachment_faults.FAULTS,
    "optimizer": optimizer_faults.FAULTS,
    "penalty and schedule": penalty_faults.FAULTS,
    "data": data_faults.FAULTS + sampling_faults.FAULTS,
    "network and training step": step_faults.FAULTS + network_faults.FAULTS,
    "in mid-run": late_faults.FAULTS,
    "measuring and saving": measure_faults.FAULTS,
}
FAULTS: dict[str, Fault] = {fault.name: fault for faults in THEMES.values() for fault in faults}


def break_it(name: str, config: RunConfig | None = None) -> Pipeline:
    """The small pipeline with the fault called `name` in it. Raises KeyError for an unknown name."""
    return broken(FAULTS[name], config)

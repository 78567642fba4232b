"""The doctor examines a training pipeline in four stages and names what is broken.

before, first_steps, Watcher and afterwards each return a Report; `python -m experiments.doctor` runs all four.
Its rooms: core, causes, and the checks of quantizer, network, data, step and training.
"""

from __future__ import annotations

from experiments.doctor import demonstration
from experiments.doctor.core.expected import Expected
from experiments.doctor.core.figure import report_figure, report_table
from experiments.doctor.core.findings import Report
from experiments.doctor.core.pipeline import Pipeline
from experiments.doctor.examination import Examination
from experiments.doctor.examine import afterwards, before, first_steps
from experiments.doctor.training.reported import Reported
from experiments.doctor.training.training_checks import Watcher

__all__ = [
    "Examination",
    "Expected",
    "Pipeline",
    "Report",
    "Reported",
    "Watcher",
    "afterwards",
    "before",
    "demonstration",
    "first_steps",
    "report_figure",
    "report_table",
]

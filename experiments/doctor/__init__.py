"""The doctor examines a training pipeline in four stages and names what is broken.

before, first_steps, Watcher and afterwards each return a Report; `python -m experiments.doctor` runs all four.
Its rooms: core, causes, and the checks of quantizer, network, data, step and training.
"""

from __future__ import annotations

from experiments.doctor.core.figure import report_figure, report_table
from experiments.doctor.core.findings import Report
from experiments.doctor.core.subject import Subject
from experiments.doctor.examination import Examination
from experiments.doctor.examine import afterwards, before, first_steps
from experiments.doctor.training.reported import Reported
from experiments.doctor.training.training_checks import Watcher

__all__ = [
    "Examination",
    "Report",
    "Reported",
    "Subject",
    "Watcher",
    "afterwards",
    "before",
    "first_steps",
    "report_figure",
    "report_table",
]

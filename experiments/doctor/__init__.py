"""The doctor examines a training pipeline in four stages and names what is broken.

before, first_steps, Watcher and afterwards each return a Report; `python -m experiments.doctor` runs all four.
Its rooms: the checks by stage, and causes, which ranks what may be wrong.
"""

from __future__ import annotations

from experiments.doctor.checks.reported import Reported
from experiments.doctor.examine import Examination, afterwards, before, examine, first_steps
from experiments.doctor.expected import Expected
from experiments.doctor.pipeline import Pipeline, PipelineParts, build_pipeline, run_measure
from experiments.doctor.report import Report, report_figure, report_table
from experiments.doctor.training.watcher import Watcher

__all__ = [
    "Examination",
    "Expected",
    "Pipeline",
    "PipelineParts",
    "Report",
    "Reported",
    "Watcher",
    "afterwards",
    "before",
    "build_pipeline",
    "examine",
    "first_steps",
    "report_figure",
    "report_table",
    "run_measure",
]

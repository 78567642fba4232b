"""What a running notebook shows: live figures, progress, explorers, tables, one image through three networks.

Outside a notebook nothing is displayed.
"""

from __future__ import annotations

from experiments.notebook import display, explorers, fault_explorer, lessons, live
from experiments.notebook.controls import widgets
from experiments.notebook.display import FACTS, publish, put, show
from experiments.notebook.lab_run import LabRunError, explorable, training_command
from experiments.notebook.live import LiveFigure, explorer, follow
from experiments.notebook.progress import Progress, TerminalProgress, duration

__all__ = [
    "FACTS",
    "LabRunError",
    "LiveFigure",
    "Progress",
    "TerminalProgress",
    "display",
    "duration",
    "explorable",
    "explorer",
    "explorers",
    "fault_explorer",
    "follow",
    "lessons",
    "live",
    "publish",
    "put",
    "show",
    "training_command",
    "widgets",
]

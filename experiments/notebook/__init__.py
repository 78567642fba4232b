"""What a running notebook shows: live figures, progress, explorers, tables, one image through three networks.

Outside a notebook nothing is displayed, and TerminalProgress takes the place of ProgressBar.
"""

from __future__ import annotations

from experiments.notebook import explorers, lessons
from experiments.notebook.live import FACTS, LiveFigure, publish, show
from experiments.notebook.progress import ProgressBar, TerminalProgress, duration

__all__ = [
    "FACTS",
    "LiveFigure",
    "ProgressBar",
    "TerminalProgress",
    "duration",
    "explorers",
    "lessons",
    "publish",
    "show",
]

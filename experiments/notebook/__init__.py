"""What a running notebook shows: live figures, progress, explorers, tables, one image through three networks.

Outside a notebook nothing is displayed, and progress is a line on stderr.
"""

from __future__ import annotations

from experiments.notebook import demonstration, explorers, lessons
from experiments.notebook.live import FACTS, LiveFigure, ProgressBar, publish, show

__all__ = [
    "FACTS",
    "LiveFigure",
    "ProgressBar",
    "demonstration",
    "explorers",
    "lessons",
    "publish",
    "show",
]

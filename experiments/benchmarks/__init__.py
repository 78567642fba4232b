"""What the benchmark times: training steps in four variants, inference in five forms, and memory at its peak.

Everything is timed in turns, in one process.
"""

from __future__ import annotations

from experiments.benchmarks import inference
from experiments.benchmarks.inference import run_command
from experiments.benchmarks.memory import peak_memory
from experiments.benchmarks.naive import NaiveQuantizer, group_parts, naive_loader, naive_penalty, naive_step

__all__ = [
    "NaiveQuantizer",
    "group_parts",
    "inference",
    "naive_loader",
    "naive_penalty",
    "naive_step",
    "peak_memory",
    "run_command",
]

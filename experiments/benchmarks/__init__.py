"""What the benchmark times: training steps in four variants, inference in five forms, and memory at its peak.

All variants are timed in turns, in one process; memory is measured in a process of its own.
"""

from experiments.benchmarks.inference import bench_inference, inference_table
from experiments.benchmarks.training import MODES, bench_training, training_table

__all__ = [
    "MODES",
    "bench_inference",
    "bench_training",
    "inference_table",
    "training_table",
]

"""Many runs of the script: a grid of settings and seeds, trained on Ray, and what it reached in one table.

`python -m experiments.sweep`; one run of it is `python -m experiments.debug_run`.
"""

from __future__ import annotations

from experiments.sweep.grid import ATTEMPTS, Job, main, train

__all__ = ["ATTEMPTS", "Job", "main", "train"]

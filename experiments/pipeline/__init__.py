"""From a configuration to a trained, judged run: presets, the stages, the loop, reading a run back, the verdict.

The script and the notebook are two thin callers of these functions.
"""

from __future__ import annotations

from experiments.pipeline import comparison
from experiments.pipeline.baseline import WISHES, add_teacher, obtain_baseline
from experiments.pipeline.budget import BudgetControl, packed_ratio
from experiments.pipeline.compression import STEPS_A_TURN, Take, compress, spread, synchronize, time_in_turns
from experiments.pipeline.config import BUDGETS, DEBUG, PRESETS, PRESETS_HELP, ConfigError, RunConfig, configure
from experiments.pipeline.run import Baseline, Run, TrainingLoop, epoch_settings
from experiments.pipeline.saved_run import SavedRun, contents, load_run
from experiments.pipeline.stages import (
    attach,
    build_network,
    build_optimizer,
    build_run,
    compression_table,
    described,
    evaluate_run,
    expected_layers,
    in_words,
    judge_run,
    prepare_data,
    save_figures,
    summary,
)
from experiments.pipeline.verdict import FAILED, NOT_JUDGED, PASSED, Verdict, judge, lagging_statistics, lowest_accuracy

__all__ = [
    "BUDGETS",
    "DEBUG",
    "FAILED",
    "NOT_JUDGED",
    "PASSED",
    "PRESETS",
    "PRESETS_HELP",
    "STEPS_A_TURN",
    "WISHES",
    "Baseline",
    "BudgetControl",
    "ConfigError",
    "Run",
    "RunConfig",
    "SavedRun",
    "Take",
    "TrainingLoop",
    "Verdict",
    "add_teacher",
    "attach",
    "build_network",
    "build_optimizer",
    "build_run",
    "comparison",
    "compress",
    "compression_table",
    "configure",
    "contents",
    "described",
    "epoch_settings",
    "evaluate_run",
    "expected_layers",
    "in_words",
    "judge",
    "judge_run",
    "lagging_statistics",
    "load_run",
    "lowest_accuracy",
    "obtain_baseline",
    "packed_ratio",
    "prepare_data",
    "save_figures",
    "spread",
    "summary",
    "synchronize",
    "time_in_turns",
]

"""One training step, one epoch, one evaluation, and what is recorded of them.

Devices and precision, CUDA graphs, interruptions between two steps, and errors that say what failed live here too.
Nothing here knows a file or a figure.
"""

from __future__ import annotations

from src.training.compiled import CompiledGradients, fast_step
from src.training.cuda_graph import GraphedStep
from src.training.devices import (
    DEVICES,
    PRECISIONS,
    TrainingError,
    autocast,
    is_out_of_memory,
    keep_freed_memory,
    pick_device,
    pick_precision,
    repeatable,
)
from src.training.epoch import (
    EpochMeans,
    LrLambda,
    Step,
    cosine_to_zero,
    epoch_seed,
    hold_then_linear,
    not_finite,
    train_epoch,
    warmed_up,
)
from src.training.evaluation import (
    evaluate,
    layer_records,
    measure_epoch,
    predict,
    recalibrated_accuracy,
    summarize_layers,
)
from src.training.history import EpochRecord, History, LayerRecord
from src.training.interrupts import Interrupted, Terminated, between_steps, in_notebook, raise_pending, terminations
from src.training.step import (
    Objective,
    Penalty,
    StepFunction,
    StepLosses,
    make_optimizer,
    parameter_groups,
    squared_logits,
    step_gradients,
    task_loss,
    train_step,
)

__all__ = [
    "DEVICES",
    "PRECISIONS",
    "CompiledGradients",
    "EpochMeans",
    "EpochRecord",
    "GraphedStep",
    "History",
    "Interrupted",
    "LayerRecord",
    "LrLambda",
    "Objective",
    "Penalty",
    "Step",
    "StepFunction",
    "StepLosses",
    "Terminated",
    "TrainingError",
    "autocast",
    "between_steps",
    "cosine_to_zero",
    "epoch_seed",
    "evaluate",
    "fast_step",
    "hold_then_linear",
    "in_notebook",
    "is_out_of_memory",
    "keep_freed_memory",
    "layer_records",
    "make_optimizer",
    "measure_epoch",
    "not_finite",
    "parameter_groups",
    "pick_device",
    "pick_precision",
    "predict",
    "raise_pending",
    "recalibrated_accuracy",
    "repeatable",
    "squared_logits",
    "step_gradients",
    "summarize_layers",
    "task_loss",
    "terminations",
    "train_epoch",
    "train_step",
    "warmed_up",
]

"""One training step, one epoch, one evaluation, and what is recorded of them.

Devices and precision, CUDA graphs, interruptions between two steps, and errors that say what failed live here too.
Nothing here knows a file or a figure.
"""

from __future__ import annotations

from src.training import out_of_memory
from src.training.cuda_graph import GraphedStep
from src.training.devices import (
    DEVICES,
    PRECISIONS,
    TrainingError,
    autocast,
    keep_freed_memory,
    pick_device,
    pick_precision,
    repeatable,
)
from src.training.epoch_means import EpochMeans, Step, StepLosses
from src.training.evaluation import evaluate, layer_records, predict
from src.training.finiteness import not_finite
from src.training.history import EpochRecord, History, LayerRecord
from src.training.interrupts import Interrupted, Terminated, between_steps, in_notebook, raise_pending, terminations
from src.training.out_of_memory import advice, is_out_of_memory
from src.training.step import (
    Factor,
    Objective,
    Penalty,
    StepFunction,
    cosine_to_zero,
    epoch_seed,
    hold_then_linear,
    make_optimizer,
    measure_epoch,
    parameter_groups,
    squared_logits,
    train_epoch,
    train_step,
)

__all__ = [
    "DEVICES",
    "PRECISIONS",
    "EpochMeans",
    "EpochRecord",
    "Factor",
    "GraphedStep",
    "History",
    "Interrupted",
    "LayerRecord",
    "Objective",
    "Penalty",
    "Step",
    "StepFunction",
    "StepLosses",
    "Terminated",
    "TrainingError",
    "advice",
    "autocast",
    "between_steps",
    "cosine_to_zero",
    "epoch_seed",
    "evaluate",
    "hold_then_linear",
    "in_notebook",
    "is_out_of_memory",
    "keep_freed_memory",
    "layer_records",
    "make_optimizer",
    "measure_epoch",
    "not_finite",
    "out_of_memory",
    "parameter_groups",
    "pick_device",
    "pick_precision",
    "predict",
    "raise_pending",
    "repeatable",
    "squared_logits",
    "terminations",
    "train_epoch",
    "train_step",
]

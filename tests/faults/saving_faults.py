"""Faults in the records' smaller figures, and in what a checkpoint holds beside the network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from experiments.doctor import Pipeline
from experiments.doctor import pipeline as parts_of
from experiments.evaluator import EvalResult
from experiments.notebook.demonstration import Fault
from metrics import LayerStats
from src.data import test_batches
from src.runs import load_checkpoint
from src.runs.checkpoint import state_bytes
from src.training import EpochRecord, History
from tests.faults.measure_faults import recording


def saving(change: Callable[[dict[str, Any]], Any]) -> Callable[[Pipeline], Pipeline]:
    """The pipeline whose checkpoints are changed before they are written."""

    def save(pipeline: Pipeline, history: History, folder: Path) -> Path:
        path = parts_of.run_save(pipeline, history, folder)
        state = load_checkpoint(path)
        change(state)
        path.write_bytes(state_bytes(state))
        return path

    return lambda pipeline: replace(pipeline, save=save)


def earlier_accuracies_lost(state: dict[str, Any]) -> None:
    for record in state["history"]["records"][:-1]:
        record["accuracy"] = 0.5


def counting(change: Callable[[LayerStats], LayerStats]) -> Callable[[Pipeline], Pipeline]:
    """The pipeline whose evaluation tells something else of every layer that removal leaves."""

    def apply(pipeline: Pipeline) -> Pipeline:
        def evaluate(s: Pipeline) -> tuple[EvalResult, float]:
            assert pipeline.evaluate is not None
            result, accuracy = pipeline.evaluate(s)
            stats = result.structured_stats
            changed = replace(stats, layers=tuple(change(layer) for layer in stats.layers))
            return replace(result, structured_stats=changed), accuracy

        return replace(pipeline, evaluate=evaluate)

    return apply


@torch.no_grad()
def mean_of_batch_means(pipeline: Pipeline, record: EpochRecord) -> EpochRecord:
    """The test loss as the mean of batches of 100, of which the last is smaller."""
    assert pipeline.data is not None
    pipeline.model.eval()
    losses = [float(F.cross_entropy(pipeline.model(x), y)) for x, y in test_batches(pipeline.data, 100)]
    return replace(record, test_loss=sum(losses) / len(losses))


FAULTS = (
    Fault(
        "task loss of the record",
        "The record's task loss is not the mean over the steps.",
        ("loss-misreported",),
        pipeline=recording(lambda s, record: replace(record, task_loss=0.9 * record.task_loss)),
    ),
    Fault(
        "training accuracy flattered",
        "The record's training accuracy is a few points too high.",
        ("accuracy-wrong",),
        pipeline=recording(lambda s, record: replace(record, train_accuracy=min(1.0, 1.1 * record.train_accuracy))),
    ),
    Fault(
        "penalty recorded with its coefficient",
        "The record's penalty is multiplied by the coefficient already.",
        ("loss-misreported",),
        pipeline=recording(lambda s, record: replace(record, group_penalty=record.coefficient * record.group_penalty)),
    ),
    Fault(
        "learning rate of the start recorded",
        "The record always holds the learning rate that the run began with.",
        ("rate-misreported",),
        pipeline=recording(
            lambda s, record: replace(record, learning_rate=s.expected.config.learning_rate)  # type: ignore[union-attr]
        ),
    ),
    Fault(
        "test loss averaged over batches",
        "The test loss is the mean of batches of unequal size.",
        ("test-loss-wrong",),
        pipeline=recording(mean_of_batch_means),
    ),
    Fault(
        "channels left misreported",
        "The removed outputs of a layer are said to be those of its inputs.",
        ("report-wrong",),
        pipeline=counting(lambda layer: replace(layer, null_out=layer.null_in)),
    ),
    Fault(
        "checkpoint without moments",
        "The checkpoint holds the optimizer's groups and none of its moments.",
        ("checkpoint-not-resumable",),
        pipeline=saving(lambda state: state["optimizer"].update(state={})),
    ),
    Fault(
        "checkpoint of another configuration",
        "The checkpoint says that the run had another seed.",
        ("checkpoint-not-resumable",),
        pipeline=saving(lambda state: state["config"].update(seed=77)),
    ),
    Fault(
        "checkpoint's records differ",
        "The records of earlier epochs in the checkpoint are not those of the run.",
        ("checkpoint-not-resumable",),
        pipeline=saving(earlier_accuracies_lost),
    ),
)

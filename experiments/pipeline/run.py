"""A run in memory: everything that moves while a network trains, its steps and its epochs."""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from experiments.pipeline.config import RunConfig
from src import training
from src.data import ImageData
from src.runs import RunProgress, Snapshots
from src.training import EpochMeans, EpochRecord, GraphedStep, History, Interrupted, Objective, Step, StepFunction


def epoch_settings(config: RunConfig, epoch: int, precision: torch.dtype) -> dict[str, Any]:
    """The keyword arguments of `train_epoch` for epoch `epoch` (from 0) of the run that `config` describes."""
    return {
        "epoch": epoch,
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "coefficient": config.schedule()(epoch, config.epochs),
        "lr_lambda": config.lr_lambda(),
        "precision": precision,
        "seed": config.seed,
        "crop_padding": config.crop_padding,
        "flip": config.flip,
    }


@dataclass
class Run:
    """Everything that moves while a network trains. `config` is the one that is really run (see `suited_to`).

    means, seconds: the sums of the unfinished epoch, of which `means.steps` steps are done, and the time they took.
    snapshots: the quantized layers after each epoch; the training loop makes and keeps them.
    step_fn: what a training step does; None is `train_step`, which a CUDA device records (`GraphedStep`).
    is_consistent: False from the beginning of a step to its end, and for good where it failed or was cut off.
    """

    config: RunConfig
    data: ImageData
    device: torch.device
    precision: torch.dtype
    model: nn.Module
    attached: list[str]
    optimizer: torch.optim.Optimizer
    objective: Objective
    history: History
    means: EpochMeans = field(default_factory=EpochMeans)
    seconds: float = 0.0
    is_consistent: bool = True
    snapshots: Snapshots | None = None
    step_fn: StepFunction | None = None

    def __post_init__(self) -> None:
        if self.step_fn is None and self.device.type == "cuda":
            self.step_fn = GraphedStep(warnings.warn)

    @property
    def subtitle(self) -> str:
        """One line for figures: what was trained on what."""
        part = f", {len(self.data.train_labels):,} training images" if self.config.limit else ""
        return f"{self.config.model} on {self.data.title}{part}; preset {self.config.preset}, seed {self.config.seed}"

    @property
    def progress(self) -> RunProgress:
        """How far it has come."""
        return RunProgress(self.history, self.means, self.seconds)

    @progress.setter
    def progress(self, progress: RunProgress) -> None:
        """Continue from there. The history stays the same object, which figures may show."""
        self.history.records[:] = progress.history.records
        self.means, self.seconds, self.is_consistent = progress.means, progress.seconds, True

    def steps(self, step_fn: StepFunction | None = None) -> Iterator[Step]:
        """Train the unfinished epoch from where it stands, yielding after each step, which is counted by then.

        step_fn: what a step does; `self.step_fn` by default. Raises TrainingError where the loss or a gradient is not
        finite or the memory does not hold a batch; the run is not consistent then.
        """
        settings = epoch_settings(self.config, len(self.history), self.precision)
        settings |= {"start": self.means.steps, "step": step_fn or self.step_fn}
        began = time.perf_counter()
        self.is_consistent = False
        try:
            with self._explained_out_of_memory():
                for step in training.train_epoch(self.model, self.optimizer, self.data, self.objective, **settings):
                    now = time.perf_counter()
                    self.means.add(step)
                    self.seconds, began, self.is_consistent = self.seconds + now - began, now, True
                    yield step
                    self.is_consistent = False
        except Interrupted:  # it is raised between two steps only
            self.is_consistent = True
            raise
        self.is_consistent = True

    def finish_epoch(self) -> EpochRecord:
        """Measure the epoch whose steps are all done, put its record into the history and begin the next.

        Raises TrainingError where the test loss is not finite or the memory does not hold the test images.
        """
        epoch = len(self.history)
        with self._explained_out_of_memory():
            record = training.measure_epoch(
                self.model,
                self.optimizer,
                self.data,
                self.means,
                epoch=epoch,
                coefficient=self.config.schedule()(epoch, self.config.epochs),
                seconds=self.seconds,
                precision=self.precision,
            )
        self.history.append(record)
        self.means, self.seconds = EpochMeans(), 0.0
        return record

    @contextmanager
    def _explained_out_of_memory(self) -> Iterator[None]:
        """Inside, an error for want of memory becomes one that says which batch size would do."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not training.is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold the tensors of the failed step
            shape = tuple(self.data.train_images.shape[1:])
            advice = training.batch_size_advice(self.config.batch_size, self.model, shape, self.precision)
            raise training.TrainingError(advice) from error

"""A run: everything that moves while a network trains, and where it stands."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch
from torch import nn

from experiments.pipeline.config import RunConfig
from src.data import ImageData
from src.runs import RunProgress, Snapshots
from src.training import EpochMeans, GraphedStep, History, Objective, StepFunction


@dataclass
class Run:
    """Everything that moves while a network trains. `config` is the one that is really run (see `suited_to`).

    means, seconds: the sums of the unfinished epoch, of which `means.steps` steps are done, and the time they took.
    snapshots: the quantized layers after each epoch; the training loop makes and keeps them.
    step: what a training step does: `train_step` where it is None, `GraphedStep` on CUDA.
    whole: False from the moment a step begins to its end, and for good where it failed or was interrupted within.
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
    whole: bool = True
    snapshots: Snapshots | None = None
    step: StepFunction | None = None

    def __post_init__(self) -> None:
        if self.step is None and self.device.type == "cuda":
            self.step = GraphedStep(warnings.warn)

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
        """Go on from there. The history stays the same object: figures that show it go on showing it."""
        self.history.records[:] = progress.history.records
        self.means, self.seconds, self.whole = progress.means, progress.seconds, True

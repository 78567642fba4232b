"""A run small enough to be broken many times, and the comparison of what a broken run and an unbroken one leave.

Three blocks of 4, 8 and 16 channels on 60 of the digits in batches of 15: 3 epochs of 4 steps, a checkpoint every
3 steps. Its step draws from torch's, numpy's and Python's own generators, so that a resumed run has to restore these.
"""

from __future__ import annotations

import csv
import io
import json
import random
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments import debug_run, pipeline
from experiments.pipeline import PRESETS, Run, TrainingLoop, configure
from resnet import NETWORKS, BasicBlock, ResNet
from src.data import ImageData
from src.runs import load_checkpoint
from src.training import Step, train_step

EPOCHS, STEPS_PER_EPOCH, EVERY = 3, 4, 3
STEPS = EPOCHS * STEPS_PER_EPOCH
SETTINGS = {"data": "digits", "limit": 60, "batch_size": 15, "epochs": EPOCHS, "device": "cpu"}
FIGURES = ("accuracy_curve.png", "sparsity_curves.png", "channel_liveness.png", "per_layer_channels.png")
FILES = {*FIGURES, "checkpoint.pt", "checkpoint.previous.pt", "history.csv", "run.json", "snapshots.npz"}
STEP = "src.training.epoch.train_step"  # where a step is looked up


def tiny(num_classes: int = 10, option: str = "A") -> ResNet:
    """Three blocks of 4, 8 and 16 channels: a step takes milliseconds."""
    return ResNet(BasicBlock, [1, 1, 1], num_classes, option=option, widths=(4, 8, 16))


def prepare(patch: pytest.MonkeyPatch, count: Callable[[], None] = lambda: None) -> None:
    """Let this process know the preset and network "tiny", with a noisy step, and seed the generators.

    count: called after each step.
    """

    def noisy_step(model: Any, optimizer: Any, images: torch.Tensor, *rest: Any) -> Any:
        noise = torch.randn_like(images) * (0.1 * random.random() + 0.1 * float(np.random.rand()))  # noqa: NPY002
        losses = train_step(model, optimizer, images + noise, *rest)
        count()
        return losses

    patch.setitem(NETWORKS, "tiny", tiny)
    preset = replace(PRESETS["smoke"], preset="tiny", model="tiny", precision="fp32", delay=1)
    patch.setitem(PRESETS, "tiny", preset)
    patch.setattr(STEP, noisy_step)
    seed_generators(0)


def seed_generators(seed: int) -> None:
    """The generators that no run seeds itself."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


def run_command(output: Path, *more: str) -> int:
    """The exit status of `python -m experiments.debug_run` for this run, in this process; later words win."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    try:
        return debug_run.main(
            ["--preset=tiny", *flags, "--baseline=false", f"--checkpoint-every={EVERY}", f"--output={output}", *more]
        )
    except SystemExit as stopped:  # argparse
        return int(str(stopped.code))


def run_told(output: Path, *more: str) -> tuple[int, str, str]:
    """The exit status of the command, run in this process with the generators as they are, and its two outputs."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("default")
        status = run_command(output, *more)
    return status, out.getvalue(), err.getvalue()


@dataclass(frozen=True)
class Unbroken:
    """A run of the command that nothing happened to: folder, exit status, what it printed, and how long it took."""

    folder: Path
    status: int
    out: str
    err: str
    seconds: float


Trial = Callable[[random.Random, Path, Unbroken], str]
"""One try of a failure: places and moments from the generator, files into the empty folder. Raises where something is
lost, an AssertionError perhaps; else returns in a word what came of it, where that is worth counting."""


@dataclass(frozen=True)
class Row:
    """A row of the table of failures. survived: what counts as that. share: tries for each try of the others."""

    survived: str
    trial: Trial
    share: float = 1.0


def train_unbroken(folder: Path) -> Unbroken:
    """Train it in this process."""
    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        prepare(patch)
        return Unbroken(folder, *run_told(folder), time.monotonic() - began)


def open_loop(data: ImageData, folder: Path, report: Callable[[str], None], resume: bool = False) -> TrainingLoop:
    """The training loop of a new run. A resumed one starts from other states of the generators."""
    run = build_run(data)
    seed_generators(7 if resume else 0)
    return TrainingLoop.open(run, folder, resume=resume, checkpoint_every=EVERY, notify=report)


def build_run(data: ImageData) -> Run:
    """A new run of this network on these images."""
    return pipeline.build_run(configure("tiny", **SETTINGS), data)


def train(loop: TrainingLoop, observe: Callable[[Step], None] = lambda step: None) -> None:
    """Train the epochs that are left."""
    with loop:
        for _ in loop.epochs():
            for step in loop.steps():
                observe(step)
            loop.finish_epoch()


def steps_kept(folder: Path) -> int:
    """Steps that the newest readable checkpoint of a run holds; 0 where there is none yet."""
    if not any((folder / name).exists() for name in ("checkpoint.pt", "checkpoint.previous.pt")):
        return 0
    # Killed between two renames, a run has only the one before it; reading that is reported, and is no fault.
    state = load_checkpoint(folder / "checkpoint.pt", "cpu", lambda line: None)
    return int(state["epoch"]) * STEPS_PER_EPOCH + int(state["step"])


def differences(folder: Path, unbroken: Path, *, command: bool = True) -> list[str]:
    """What of a finished run is not as in the unbroken one, the seconds left out; and files that are out of place.

    command: whether figures and run.json are there, too.
    """
    found = [path.name for path in folder.iterdir() if path.suffix == ".tmp"]
    one, other = (load_checkpoint(place / "checkpoint.pt") for place in (folder, unbroken))
    parts = ("epoch", "step", "model", "optimizer", "history", "random")
    found += [part for part in parts if not equal(one[part], other[part])]
    files = ("snapshots.npz", *(FIGURES if command else ()))
    found += [name for name in files if (folder / name).read_bytes() != (unbroken / name).read_bytes()]
    tables = [list(csv.DictReader((place / "history.csv").read_text().splitlines())) for place in (folder, unbroken)]
    found += [] if equal(*tables) else ["history.csv"]
    if command:
        results = [json.loads((place / "run.json").read_text())["results"] for place in (folder, unbroken)]
        found += [] if equal(*results) else ["run.json"]
    return found


def equal(one: Any, other: Any) -> bool:
    """The same plain data, tensors bit for bit; entries called "seconds" left out."""
    return _comparable(one) == _comparable(other)


def _comparable(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {key: _comparable(part) for key, part in value.items() if key != "seconds"}
    return [_comparable(part) for part in value] if isinstance(value, (list, tuple)) else value

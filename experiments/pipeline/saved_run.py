"""The one reader of a run's folder: settings, history and results at once; network, images and snapshots on demand."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.pipeline import stages
from experiments.pipeline.config import RunConfig, asked, configure, suited_to
from experiments.pipeline.run import Run
from resnet import NETWORKS, ResNet
from src.data import DataError, ImageData, load_data
from src.runs import (
    CHECKPOINT,
    SNAPSHOTS,
    SUMMARY,
    RunError,
    RunFolder,
    Snapshots,
    check_settings,
    load_checkpoint,
    load_model_state,
)
from src.storage import Notify
from src.training import History, pick_device
from utils_quantization import default_tensors


@dataclass(frozen=True)
class SavedRun:
    """A run as its folder holds it. Build it with `open`.

    weights: the state dict of the network, on the CPU. data_digest: of the images and labels it was trained on, "" if
    unknown. summary: run.json, empty where the run is not finished.
    """

    label: str
    folder: Path
    config: RunConfig
    history: History
    weights: Mapping[str, Tensor]
    data_digest: str
    summary: Mapping[str, Any]

    @classmethod
    def open(cls, folder: str | Path, label: str = "", notify: Notify = warnings.warn) -> SavedRun:
        """Read checkpoint and run.json. label: a short name for tables, by default the folder's.

        notify: receives what `load_checkpoint` says.
        Raises RunError where the folder holds no run of this version, with what it does hold.
        """
        path = Path(folder)
        if not RunFolder(path).has_checkpoint():
            raise RunError(
                f"{str(folder)!r} holds no run: {contents(path)}; name the output folder of a run, with {CHECKPOINT}"
            )
        try:
            state = load_checkpoint(path / CHECKPOINT, notify=notify)
            settings: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in state["config"].items()
            }
            config, history = RunConfig(**settings), History.from_json(state["history"])
        except (ValueError, TypeError) as error:
            reason = str(error).removesuffix("; start without --resume")
            raise RunError(f"the run in {str(folder)!r} cannot be used: {reason}; name another run") from error
        return cls(label or path.name, path, config, history, state["model"], state["data_digest"], _summary(path))

    def resumed(self, preset: str | None = None, **changes: Any) -> RunConfig:
        """The configuration that continues this run: its own, of which `changes` may say where things are.

        Of a finished run they may ask for more epochs. What is None asks for nothing. Raises RunError, with both
        values, for a setting that contradicts the run's.
        """
        own, given = self.config, asked(changes)
        if preset is not None:
            given["preset"] = suited_to(configure(preset), self.data_name).preset
        config = replace(own, **given)
        if config.epochs > own.epochs == len(self.history):
            config = replace(config, continued_from=own.epochs)
        # A larger batch is lowered to the number of images, once these are known; then it is compared, too.
        compared = replace(config, batch_size=min(config.batch_size, own.batch_size))
        check_settings(asdict(own), asdict(compared))
        if {self.data_name, config.data} == {"digits", "cifar10"}:  # others are told apart by their digest
            raise RunError(
                f"the run in {str(self.folder)!r} is on {self.data_name}, not on {config.data}; leave the data out, or "
                "start without --resume"
            )
        return config

    @property
    def data_name(self) -> str:
        """Name of the dataset it was trained on; what was asked for where the run is not finished."""
        return str(self.summary.get("data", {}).get("name", self.config.data))

    @property
    def verdict(self) -> str:
        """healthy, faulty or inconclusive, or "not finished" where there is no verdict yet."""
        return str(self.summary.get("verdict", {}).get("state", "not finished"))

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.weights["linear.bias"])

    @default_tensors()
    def network(self) -> ResNet:
        """The trained network with its quantizers, on the CPU, in eval mode. Raises RunError for other weights."""
        model = NETWORKS[self.config.model](self.classes, self.config.shortcut)
        model.to(memory_format=torch.channels_last)
        stages.attach(self.config, model)
        load_model_state(model, self.weights)
        return model.eval()

    def load_data(self, data_root: str | Path | None = None) -> ImageData:
        """The images it was trained and tested on. Downloads nothing.

        data_root: where they are, by default where they were; of an image folder, the folder itself. Raises RunError
        where others are there, DataError where they are absent or damaged.
        """
        # "auto" takes CIFAR-10 where it is present and never downloads it
        known = self.summary.get("config", vars(self.config))["data"]  # a resumed run may have found them elsewhere
        source = {"digits": "digits", "cifar10": "auto"}.get(self.data_name, known)
        if data_root and source.startswith("folder:"):
            source = f"folder:{data_root}"
        try:
            data = load_data(source, str(data_root or self.config.data_root), self.config.limit)
        except DataError as error:
            raise DataError(f"{error}; name the folder of the run's images with data_root") from error
        if self.data_digest and data.digest != self.data_digest:
            raise RunError(
                f"the run in {str(self.folder)!r} was trained on other images than the {data.title} found here (digest "
                f"{self.data_digest[:12]} then, {data.digest[:12]} now); name the folder of its images with data_root"
            )
        return data


def load_run(folder: str | Path, *, data_root: str | Path | None = None, device: str = "auto") -> Run:
    """The trained run of a folder, as it was after its last epoch: network in eval mode, data, history, snapshots.

    Where the folder has no snapshots, they hold the trained state alone. data_root: see `SavedRun.load_data`. Raises
    what `SavedRun` raises, TrainingError for an absent device, SnapshotError for damaged snapshots.
    """
    saved = SavedRun.open(folder)
    run = stages.build_run(saved.config, saved.load_data(data_root).to(pick_device(device)))
    load_model_state(run.model, saved.weights)
    run.model.eval()
    run.history = saved.history
    run.snapshots = Snapshots.resume(saved.folder / SNAPSHOTS, run.attached, run.model, len(run.history))
    return run


def contents(folder: Path) -> str:
    """What lies in a folder, for an error message."""
    if not folder.is_dir():
        return "there is no such folder"
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    return f"in it are {', '.join(names[:12])}" if names else "it is empty"


def _summary(folder: Path) -> dict[str, Any]:
    path = folder / SUMMARY
    try:
        found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise RunError(f"{str(path)!r} cannot be read: {error}; delete it, the checkpoint holds the run") from error
    return found

"""A finished run, read back from its folder: everything that figures and explorers need, without training."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.pipeline import stages
from experiments.pipeline.config import ConfigError, RunConfig
from experiments.pipeline.run import Run
from src.data import ImageData, load_data
from src.runs import CHECKPOINT, SNAPSHOTS, SUMMARY, RunFolder, Snapshots, load_checkpoint, load_model_state
from src.storage import RunError
from src.training import History, pick_device


@dataclass(frozen=True)
class LoadedRun:
    """A run as its checkpoint holds it. `run` is what the pipeline's functions take; `summary` is run.json, or empty.

    snapshots: where the folder has none, the trained state alone.
    """

    folder: Path
    run: Run
    snapshots: Snapshots
    summary: dict[str, Any]

    @property
    def config(self) -> RunConfig:
        return self.run.config

    @property
    def data(self) -> ImageData:
        return self.run.data

    @property
    def model(self) -> nn.Module:
        return self.run.model

    @property
    def history(self) -> History:
        return self.run.history

    @property
    def subtitle(self) -> str:
        return self.run.subtitle


def load_run(folder: str | Path, *, data_root: str | Path | None = None, device: str = "auto") -> LoadedRun:
    """Rebuild configuration, data, network and history from a run's folder. Downloads nothing.

    data_root: where the images are now, by default where they were. Raises RunError where the folder holds no run or
    the data is not the run's; DataError, SnapshotError for damaged files.
    """
    path = Path(folder)
    if not RunFolder(path).has_checkpoint():
        raise RunError(f"{str(folder)!r} holds no run to explore: {contents(path)}; name a folder with {CHECKPOINT}")
    place = pick_device(device)
    state = load_checkpoint(path / CHECKPOINT, place)
    config = config_from_json(state["config"])
    summary = read_summary(path)
    name = summary.get("data", {}).get("name", "")
    source = name if name == "digits" else "auto" if "cifar10" in (name, config.data) else config.data
    data = load_data(source, str(data_root or config.data_root), config.limit).to(place)
    trained_on = state.get("data_digest", "")
    if trained_on and data.digest != trained_on:
        raise RunError(
            f"the run in {str(folder)!r} was trained on other images than the {data.title} found here (digest "
            f"{trained_on[:12]} then, {data.digest[:12]} now); name the folder of its images with data_root"
        )
    run = stages.build_run(config, data)
    load_model_state(run.model, state["model"])
    run.model.eval()
    try:
        run.history = History.from_json(state["history"])
    except ValueError as error:
        raise RunError(f"the checkpoint in {str(folder)!r} holds no history of this version: {error}") from error
    return LoadedRun(path, run, _snapshots(path, run), summary)


def config_from_json(data: dict[str, Any]) -> RunConfig:
    """The configuration that a checkpoint or run.json holds. Raises RunError for one of another version."""
    known = {field.name for field in fields(RunConfig)}
    plain: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in data.items() if key in known
    }
    try:
        return RunConfig(**plain)
    except (ConfigError, TypeError) as error:
        raise RunError(f"the run's configuration is not one of this version: {error}") from error


def read_summary(folder: Path) -> dict[str, Any]:
    """run.json of a folder; empty where it is absent. Raises RunError where it cannot be read."""
    path = folder / SUMMARY
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise RunError(f"{str(path)!r} cannot be read: {error}; delete it, the checkpoint holds the run") from error
    if not isinstance(found, dict):
        raise RunError(f"{str(path)!r} is not the summary of a run; delete it, the checkpoint holds the run")
    return found


def contents(folder: Path) -> str:
    """What lies in a folder, for an error message."""
    if not folder.exists():
        return "there is no such folder"
    if not folder.is_dir():
        return "it is a file"
    names = sorted(
        entry.name + ("/" if entry.is_dir() else "") for entry in folder.iterdir() if not entry.name.startswith(".")
    )
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return f"in it are {', '.join(names[:12])}{more}" if names else "it is empty"


@torch.no_grad()
def _snapshots(folder: Path, run: Run) -> Snapshots:
    return Snapshots.resume(folder / SNAPSHOTS, run.attached, run.model, len(run.history))

"""A run's folder: what is written where, whole or not at all, and how a run is taken up again.

One process at a time has the folder. An earlier run's files move to `previous/N`; nothing is ever deleted.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from src.runs.checkpoint import (
    CHECKPOINT,
    CHECKPOINT_BEFORE,
    CHECKPOINT_DAMAGED,
    CHECKPOINT_FORMAT,
    Progress,
    Report,
    check_model_state,
    checkpoint_bytes,
    load_checkpoint,
    load_model_state,
    restore,
)
from src.runs.earlier_runs import FIGURES, HISTORY, MOVING, PREVIOUS, SUMMARY, put_back, set_aside
from src.runs.environment import machine, versions
from src.storage import RunError, check_writable, folder_lock, not_writable, remove_leftovers, write_atomic
from src.training import EpochMeans, History

__all__ = [
    "CHECKPOINT",
    "CHECKPOINT_BEFORE",
    "CHECKPOINT_FORMAT",
    "FIGURES",
    "HISTORY",
    "PREVIOUS",
    "SUMMARY",
    "Progress",
    "RunError",
    "RunFolder",
    "check_model_state",
    "check_writable",
    "load_checkpoint",
    "load_model_state",
    "machine",
    "versions",
    "write_atomic",
]


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run. Build it with `open`, which takes the folder for this process."""

    path: Path
    _warned: set[str] = field(default_factory=set, repr=False, compare=False)

    @classmethod
    def open(cls, path: str | Path, *, keep: bool = False) -> RunFolder:
        """Create the folder, or take it over. An earlier run's files move to `previous/N` unless `keep` is set.

        Raises RunError where the path is a file, cannot be written to, or is in use by another process.
        """
        check_writable(path)
        folder = Path(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            folder_lock.hold(folder)
            remove_leftovers(folder)
            run = cls(folder)
            (put_back if keep else set_aside)(folder)
        except OSError as error:
            raise not_writable(path, error) from error
        return run

    def close(self) -> None:
        """Let other processes have the folder. The end of the process does so, too."""
        folder_lock.release(self.path)

    def write(self, name: str, data: bytes | str) -> Path:
        """Write one file of the run, whole or not at all. Raises OSError."""
        target = self.path / name
        write_atomic(target, data.encode() if isinstance(data, str) else data)
        return target

    def write_json(self, name: str, data: Mapping[str, Any]) -> Path:
        return self.write(name, json.dumps(data, indent=2, allow_nan=False, default=str) + "\n")

    def try_write(self, name: str, data: bytes | str) -> bool:
        """Write one file that a run can do without: its first failure is a warning, and the old file stays."""
        try:
            self.write(name, data)
        except OSError as error:
            if name not in self._warned:
                self._warned.add(name)
                text = f"{str(self.path / name)!r} could not be written ({error.strerror or error}); the run goes on"
                warnings.warn(text, RuntimeWarning, stacklevel=2)
            return False
        return True

    def save_progress(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        history: History,
        config: Mapping[str, Any],
        data_digest: str = "",
        means: EpochMeans | None = None,
        seconds: float = 0.0,
    ) -> None:
        """Write the checkpoint, and after an epoch the history. data_digest: of the images and labels trained on.

        means, seconds: of an unfinished epoch. The checkpoint before is kept. Raises RunError where the checkpoint
        cannot be written, TrainingError where a weight is not finite; both leave the old one. A folder that vanished
        is made again, with a warning, and taken again.
        """
        progress = Progress(history, means or EpochMeans(), seconds)
        data = checkpoint_bytes(model, optimizer, progress, config, data_digest)
        try:
            if folder_lock.is_held(self.path) and not self.path.exists():
                text = f"output folder {str(self.path)!r} was gone and is made again; what was in it is lost"
                warnings.warn(text, RuntimeWarning, stacklevel=2)
            self.path.mkdir(parents=True, exist_ok=True)
            folder_lock.hold(self.path)
            write_atomic(self.path / CHECKPOINT, data, keep=self.path / CHECKPOINT_BEFORE)
        except OSError as error:
            raise RunError(
                f"the checkpoint {progress.text} could not be written to {str(self.path)!r} "
                f"({error.strerror or error}); make room, or the folder writable again"
            ) from error
        if not progress.means.steps:
            self.try_write(HISTORY, history.csv_text())

    def has_checkpoint(self) -> bool:
        """Whether there is one, or the one before it."""
        return any((self.path / name).exists() for name in (CHECKPOINT, CHECKPOINT_BEFORE))

    def check_resumable(self) -> None:
        """Raise RunError where there is no checkpoint, nor one that `open` puts back. Changes nothing."""
        if not self.has_checkpoint() and not RunFolder(self.path / PREVIOUS / MOVING).has_checkpoint():
            raise RunError(f"there is no checkpoint at {str(self.path)!r} to resume from; run without --resume first")

    def restore(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: Mapping[str, Any],
        device: torch.device,
        data_digest: str = "",
        report: Report | None = None,
    ) -> Progress:
        """Load the checkpoint into `model`, `optimizer` and the random generators, and return how far the run came.

        Raises RunError where there is none, it cannot be read, or it belongs to another configuration, architecture or
        (where both digests are known) other data. Nothing is changed before all of that is checked. A damaged file is
        put out of the way of the good one before it.
        """
        heard: list[str] = []
        state = load_checkpoint(self.path / CHECKPOINT, device, heard.append)
        progress = restore(state, model, optimizer, config, data_digest, report)
        for line in heard:
            if report:
                report(line)
        if heard and (self.path / CHECKPOINT).exists():
            (self.path / CHECKPOINT).replace(self.path / CHECKPOINT_DAMAGED)
        return progress

    def resume(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: Mapping[str, Any],
        device: torch.device,
        data_digest: str = "",
    ) -> History:
        """`restore` for a loop that goes by whole epochs. Raises RunError, too, for a checkpoint in mid-epoch."""
        state = load_checkpoint(self.path / CHECKPOINT, device)
        if state["unfinished"].get("steps"):
            raise RunError(
                f"the checkpoint in {str(self.path)!r} is in the middle of an epoch; take it up with `restore`"
            )
        return self.restore(model, optimizer, config, device, data_digest).history

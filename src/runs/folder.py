"""A run's folder: what is written where, how a run is resumed, and what happens to the run before it.

One process at a time has the folder. An earlier run's files move to `previous/N`; nothing is ever deleted. They are
moved one by one, and a process can be killed between two of them. So they are gathered in `previous/.moving`, which
becomes `previous/N` when it is complete; the next process moves the rest, or moves back what was moved already.
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
    RunError,
    RunProgress,
    checkpoint_bytes,
    load_checkpoint,
    restore,
)
from src.runs.snapshots import SNAPSHOTS
from src.storage import Notify, check_writable, folder_lock, not_writable, remove_leftovers, write_atomic
from src.training import EpochMeans, History

PREVIOUS, MOVING = "previous", ".moving"
HISTORY, SUMMARY = "history.csv", "run.json"
FIGURES = ("accuracy_curve.png", "sparsity_curves.png", "channel_liveness.png", "per_layer_channels.png")
RUN = frozenset({CHECKPOINT, CHECKPOINT_BEFORE, CHECKPOINT_DAMAGED, HISTORY, SUMMARY})
"""What only a run leaves: a folder without one of these holds no run."""
RESULTS = RUN | {SNAPSHOTS, *FIGURES}
EXPORTS = (".cdq", ".onnx")


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run. Build it with `open`, which takes the folder for this process."""

    path: Path
    _warned: set[str] = field(default_factory=set, repr=False, compare=False)

    @classmethod
    def open(cls, path: str | Path, *, keep: bool = False) -> RunFolder:
        """Create the folder, or take it over. An earlier run's files move to `previous/N` unless `keep` is set.

        Raises StorageError where the path is a file, cannot be written to, or is in use by another process.
        """
        check_writable(path)
        folder = Path(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            folder_lock.hold(folder)
            remove_leftovers(folder)
            (put_back if keep else set_aside)(folder)
        except OSError as error:
            raise not_writable(path, error) from error
        return cls(folder)

    def close(self) -> None:
        """Let other processes have the folder. The end of the process does so, too."""
        folder_lock.release(self.path)

    def write(self, name: str, data: bytes | str) -> Path:
        """Write one file of the run, completely or not at all. Raises OSError."""
        target = self.path / name
        write_atomic(target, data.encode() if isinstance(data, str) else data)
        return target

    def write_json(self, name: str, data: Mapping[str, Any]) -> Path:
        """Write strict JSON; what it has no type for is written as text. Raises ValueError for NaN, and OSError."""
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
        progress = RunProgress(history, means or EpochMeans(), seconds)
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
        """Raise RunError where there is no checkpoint, nor one that `open` moves back. Changes nothing."""
        if not self.has_checkpoint() and not RunFolder(self.path / PREVIOUS / MOVING).has_checkpoint():
            raise RunError(f"there is no checkpoint at {str(self.path)!r} to resume from; run without --resume first")

    def restore(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: Mapping[str, Any],
        device: torch.device,
        data_digest: str = "",
        notify: Notify | None = None,
    ) -> RunProgress:
        """Load the checkpoint into `model`, `optimizer` and the random generators, and return how far the run came.

        Raises RunError where there is none, it cannot be read, or it belongs to another run (see
        `src.runs.checkpoint.restore`). Nothing is changed before all of that is checked. A damaged file is moved away,
        so that it does not replace the good one before it.
        """
        notices: list[str] = []
        state = load_checkpoint(self.path / CHECKPOINT, device, notices.append)
        progress = restore(state, model, optimizer, config, data_digest, notify)
        for line in notices:
            if notify:
                notify(line)
        if notices and (self.path / CHECKPOINT).exists():
            (self.path / CHECKPOINT).replace(self.path / CHECKPOINT_DAMAGED)
        return progress


def set_aside(folder: Path) -> None:
    """Move an earlier run, with what was exported from it, to `previous/N`. Everything else in the folder stays."""
    entries = list(folder.iterdir())
    moving = folder / PREVIOUS / MOVING
    if not any(entry.name in RUN for entry in entries) and not moving.exists():
        return
    moving.mkdir(parents=True, exist_ok=True)
    for entry in entries:
        if entry.name in RESULTS or entry.suffix in EXPORTS:
            entry.replace(moving / entry.name)
    taken = [int(entry.name) for entry in (folder / PREVIOUS).iterdir() if entry.name.isdecimal()]
    moving.rename(folder / PREVIOUS / str(max(taken, default=0) + 1))


def put_back(folder: Path) -> None:
    """Undo a move that was interrupted, so that the run can be resumed. No existing file is replaced."""
    moving = folder / PREVIOUS / MOVING
    if not moving.is_dir():
        return
    for entry in moving.iterdir():
        if not (folder / entry.name).exists():
            entry.rename(folder / entry.name)
    if not any(moving.iterdir()):
        moving.rmdir()

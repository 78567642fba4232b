"""A run's folder: what is written where, how a run is resumed, and what happens to the run before it.

One process at a time writes to it. An earlier run's files move to `previous/N`; nothing is ever deleted.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from src.runs.checkpoint import CHECKPOINT, CHECKPOINT_BEFORE, RunError, RunProgress, checkpoint_bytes, is_readable
from src.runs.snapshots import SNAPSHOTS
from src.storage import check_writable, folder_lock, remove_leftovers, write_atomic

PREVIOUS = "previous"
HISTORY, SUMMARY = "history.csv", "run.json"
FIGURES = ("accuracy_curve.png", "sparsity_curves.png", "channel_liveness.png", "per_layer_channels.png")
RUN = frozenset({CHECKPOINT, CHECKPOINT_BEFORE, HISTORY, SUMMARY})  # a folder without one of these holds no run
PROGRESS = frozenset({CHECKPOINT, CHECKPOINT_BEFORE, SNAPSHOTS, HISTORY})  # what a resumed run goes on with
RESULTS = RUN | {SNAPSHOTS, *FIGURES}
EXPORTS = (".cdq", ".onnx")


@dataclass
class RunFolder:
    """The folder of one run, with the checkpoint that is in it now."""

    path: Path
    _known: tuple[int, int] | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._known = self._checkpoint()

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Create the folder for a new run, or take it over: an earlier run's files move to `previous/N`.

        Raises StorageError where the path is a file, cannot be written to, or is in use by another process.
        """
        check_writable(path)
        folder = cls(Path(path))
        folder.path.mkdir(parents=True, exist_ok=True)
        with folder.lock():
            remove_leftovers(folder.path)
            set_aside(folder.path)
        return folder

    def resume(self) -> None:
        """Make it ready for more epochs of its run; one that was finished is kept as it is now in `previous/N`."""
        with self.lock():
            remove_leftovers(self.path)
            if (self.path / SUMMARY).exists():
                set_aside(self.path, left=PROGRESS)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from writing to the folder inside the block, which may hold another such block.

        Raises StorageError where another process has the folder, or has written another checkpoint since this object
        wrote or found one.
        """
        with folder_lock.hold(self.path) as first:
            if first and self._checkpoint() not in (None, self._known):
                raise RunError(
                    f"another process has changed the run in {str(self.path)!r} since it was opened here; resume what "
                    "is there now (--resume, or RESUME = True and all cells again), or name another folder"
                )
            try:
                yield
            finally:
                self._known = self._checkpoint()

    def write(self, name: str, data: bytes | str) -> None:
        """Write one file of the run, completely or not at all. Raises OSError, and what `lock` raises."""
        with self.lock():
            write_atomic(self.path / name, data.encode() if isinstance(data, str) else data)

    def write_json(self, name: str, data: Mapping[str, Any]) -> None:
        """Write strict JSON; what it has no type for is written as text. Raises ValueError for NaN, and OSError."""
        self.write(name, json.dumps(data, indent=2, allow_nan=False, default=str) + "\n")

    def try_write(self, name: str, data: bytes | str) -> None:
        """Write one file that a run can do without: a failure is a warning, and the old file stays."""
        try:
            self.write(name, data)
        except OSError as error:
            text = f"{str(self.path / name)!r} could not be written ({error.strerror or error}); the run goes on"
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def save_progress(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        progress: RunProgress,
        config: Mapping[str, Any],
        data_digest: str = "",
    ) -> None:
        """Write the checkpoint, and after an epoch the history. data_digest: of the images and labels trained on.

        The checkpoint before is kept; where that is damaged, the good one before it. Raises RunError where the
        checkpoint cannot be written, TrainingError where a weight is not finite; both leave the old one.
        """
        data = checkpoint_bytes(model, optimizer, progress, config, data_digest)
        path = self.path / CHECKPOINT
        with self.lock():
            try:
                write_atomic(path, data, keep=self.path / CHECKPOINT_BEFORE if is_readable(path) else None)
            except OSError as error:
                raise RunError(
                    f"the checkpoint {progress.text} could not be written to {str(self.path)!r} "
                    f"({error.strerror or error}); make room, or the folder writable again"
                ) from error
        if not progress.means.steps:
            self.try_write(HISTORY, progress.history.csv_text())

    def has_checkpoint(self) -> bool:
        """Whether there is one, or the one before it."""
        return any((self.path / name).exists() for name in (CHECKPOINT, CHECKPOINT_BEFORE))

    def _checkpoint(self) -> tuple[int, int] | None:
        """Which checkpoint is there: every one that is written is a new file."""
        try:
            found = (self.path / CHECKPOINT).stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns


def set_aside(folder: Path, left: Collection[str] = ()) -> None:
    """Move an earlier run, with what was exported from it, to `previous/N`. Everything else in the folder stays.

    left: names of files that are copied, not moved.
    """
    entries = list(folder.iterdir())
    if not any(entry.name in RUN for entry in entries):
        return
    earlier = folder / PREVIOUS
    taken = [int(entry.name) for entry in earlier.glob("[0-9]*") if entry.name.isdecimal()]
    place = earlier / str(max(taken, default=0) + 1)
    place.mkdir(parents=True)
    for entry in sorted(entries, key=lambda entry: entry.name not in left):  # killed in between, it is set aside again
        if entry.name in left:
            shutil.copy2(entry, place / entry.name)
        elif entry.name in RESULTS or entry.suffix in EXPORTS:
            entry.replace(place / entry.name)

"""Earlier runs of a folder: a new run moves the results of the one before it to `previous/N`; nothing is deleted.

Files are moved one by one, and a process can be killed between two of them. So they are gathered in `previous/.moving`,
which becomes `previous/N` when all are there. Who comes next moves the rest, or puts back what was moved already.
"""

from __future__ import annotations

from pathlib import Path

from src.runs.checkpoint import CHECKPOINT, CHECKPOINT_BEFORE, CHECKPOINT_DAMAGED
from src.runs.snapshots import SNAPSHOTS

PREVIOUS, MOVING = "previous", ".moving"
HISTORY, SUMMARY = "history.csv", "run.json"
FIGURES = ("accuracy_curve.png", "sparsity_curves.png", "channel_liveness.png", "per_layer_channels.png")
RUN = frozenset({CHECKPOINT, CHECKPOINT_BEFORE, CHECKPOINT_DAMAGED, HISTORY, SUMMARY})
"""What only a run leaves: without one of these there is none."""
RESULTS = RUN | {SNAPSHOTS, *FIGURES}
EXPORTS = (".cdq", ".onnx")


def set_aside(folder: Path) -> None:
    """Move an earlier run, with what was exported from it, to `previous/N`. Everything else in the folder stays."""
    entries = list(folder.iterdir())
    begun, found = (folder / PREVIOUS / MOVING), any(entry.name in RUN for entry in entries)
    if not found and not begun.exists():
        return
    begun.mkdir(parents=True, exist_ok=True)
    for entry in entries:
        if entry.name in RESULTS or entry.suffix in EXPORTS:
            entry.replace(begun / entry.name)
    taken = [int(entry.name) for entry in (folder / PREVIOUS).iterdir() if entry.name.isdecimal()]
    begun.rename(folder / PREVIOUS / str(max(taken, default=0) + 1))


def put_back(folder: Path) -> None:
    """Undo a move that did not come to its end, so that the run can be resumed. Nothing that is there is replaced."""
    begun = folder / PREVIOUS / MOVING
    if not begun.is_dir():
        return
    for entry in begun.iterdir():
        if not (folder / entry.name).exists():
            entry.rename(folder / entry.name)
    if not any(begun.iterdir()):
        begun.rmdir()

"""A run on the disk: its folder, checkpoint, snapshots of the weights, and the environment it was made in.

An interrupted run is resumed from here, bit for bit; an earlier one moves to previous/ and is never deleted.
"""

from __future__ import annotations

from src.runs.checkpoint import (
    CHECKPOINT,
    NOT_SHAPING,
    RunError,
    RunProgress,
    check_settings,
    contradictions,
    load_checkpoint,
    load_model_state,
    restore,
)
from src.runs.environment import machine, versions
from src.runs.folder import PREVIOUS, SUMMARY, RunFolder
from src.runs.snapshots import EDGES, REACH, SNAPSHOTS, LayerSnapshot, SnapshotError, Snapshots

__all__ = [
    "CHECKPOINT",
    "EDGES",
    "NOT_SHAPING",
    "PREVIOUS",
    "REACH",
    "SNAPSHOTS",
    "SUMMARY",
    "LayerSnapshot",
    "RunError",
    "RunFolder",
    "RunProgress",
    "SnapshotError",
    "Snapshots",
    "check_settings",
    "contradictions",
    "load_checkpoint",
    "load_model_state",
    "machine",
    "restore",
    "versions",
]

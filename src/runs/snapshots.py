"""How the weights of every quantized layer looked after each epoch, small enough to keep with the run.

A snapshot holds, for each quantized layer, the histogram of its latent weights in units of its own range R, and what
the quantizer made of them: R, d, bits, zeros, dead filters. The bins are fixed, 121 from -1.5 R to 1.5 R and one
beyond each end, so that epochs can be compared. All of a run is one container (src/storage/container.py), about 10 kB
an epoch of ResNet-20.
Axis letters: E epochs, L layers, B = 123 bins, O output channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from src.quantizer import weight_ranges
from src.storage import container_bytes, read_container, save_arrays
from src.training import layer_records
from utils_quantization import latent_weight, quantized_layers

SNAPSHOTS = "snapshots.npz"
INNER_BINS = 121  # odd: the middle one is centred on 0
REACH = 1.5  # in units of R
EDGES: NDArray[np.float64] = np.linspace(-REACH, REACH, INNER_BINS + 1)
"""Borders of the inner bins in units of R, (122,); counts have one more bin below the first and above the last."""
# Attributes of LayerSnapshot that are one number a layer, (E, L) in the file, and their types there.
COLUMNS = {"range": "<f4", "dead_zone": "<f8", "bits": "|u1", "sparsity": "<f8"}


class SnapshotError(ValueError):
    """Snapshots that are damaged or absent."""


@dataclass(frozen=True)
class LayerSnapshot:
    """One layer after one epoch (0: before training).

    counts: weights a bin, (B,); the first and the last bin hold what lies beyond 1.5 R. range: R in weight units.
    dead_zone: the width d in weight units. sparsity: share of the quantized weights that are 0. dead: (O,), True where
    the whole quantized filter is 0.
    """

    name: str
    epoch: int
    counts: NDArray[np.int64]
    range: float
    dead_zone: float
    bits: int
    sparsity: float
    dead: NDArray[np.bool_]

    @property
    def zone_share(self) -> float:
        """d / (2 R): half of the dead zone in units of R; 0 for a layer whose weights are all 0."""
        return self.dead_zone / (2 * self.range) if self.range else 0.0

    @property
    def levels(self) -> NDArray[np.float64]:
        """The quantizer's levels in units of R, ascending: 0, and Q on each side, from outside the dead zone to R."""
        count = 2 ** (self.bits - 1) - 1
        step = (1 - self.zone_share) / (count - 0.5)
        side = self.zone_share + (np.arange(1, count + 1) - 0.5) * step
        return np.concatenate([-side[::-1], [0.0], side])


class Snapshots:
    """The snapshots of one run. Build it with the quantized layers' names, `add` after each epoch, write `to_bytes`."""

    def __init__(self, layer_names: Sequence[str]) -> None:
        self.layer_names = tuple(layer_names)
        self._rows: dict[int, dict[str, NDArray[Any]]] = {}  # epoch, ascending -> the arrays of `_measure`

    @property
    def epochs(self) -> list[int]:
        """The epochs that are kept, ascending; 0 is the state before training."""
        return list(self._rows)

    @torch.no_grad()
    def add(self, model: nn.Module, epoch: int) -> None:
        """Take a snapshot of `model` after `epoch`. It replaces that of the same epoch, and all later ones."""
        self._cut(epoch - 1)
        self._rows[epoch] = _measure(model)

    def view(self, layer: str, epoch: int) -> LayerSnapshot:
        """One layer at the newest epoch that is not after `epoch`."""
        course = list(self.through(layer))
        return next((seen for seen in reversed(course) if seen.epoch <= epoch), course[0])

    def through(self, layer: str) -> Iterator[LayerSnapshot]:
        """One layer at every epoch, in order."""
        place = self.layer_names.index(layer)
        for epoch, row in self._rows.items():
            numbers = {name: row[name][place].item() for name in COLUMNS}
            yield LayerSnapshot(
                layer, epoch, row["counts"][place].astype(np.int64), dead=row[f"dead {layer}"], **numbers
            )

    def _cut(self, epochs: int) -> None:
        self._rows = {epoch: row for epoch, row in self._rows.items() if epoch <= epochs}

    def to_bytes(self) -> bytes:
        """The file's contents, the same bytes for the same snapshots."""
        rows = list(self._rows.values())
        arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        return container_bytes("snapshots", {"layers": self.layer_names, "epochs": self.epochs}, save_arrays(arrays))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file. Raises SnapshotError where it is absent or damaged."""
        try:
            description, arrays = read_container(path, "snapshots")
        except (OSError, ValueError) as error:
            raise SnapshotError(
                f"the snapshots at {str(path)!r} cannot be read ({error}); delete it, and the run goes on without the "
                "earlier epochs' histograms"
            ) from error
        found = cls(description["layers"])
        for place, epoch in enumerate(description["epochs"]):
            found._rows[epoch] = {name: values[place] for name, values in arrays.items()}
        return found

    @classmethod
    def resume(cls, path: str | Path, layer_names: Sequence[str], model: nn.Module, epochs: int) -> Self:
        """What an unbroken run holds after `epochs` epochs; the file may be ahead of the checkpoint.

        Where there is no file, the first snapshot is the state of `model`. Raises SnapshotError for a damaged file.
        """
        found = cls.load(path) if Path(path).exists() else cls(layer_names)
        found._cut(epochs)
        if not found.epochs:
            found.add(model, epochs)
        return found


def _measure(model: nn.Module) -> dict[str, NDArray[Any]]:
    """The arrays of one epoch as the file has them: (L,) for each of COLUMNS, counts (L, B), and dead (O,) by layer."""
    latent = [latent_weight(layer).detach().float() for layer in quantized_layers(model).values()]
    ranges = weight_ranges(latent)
    bins = []
    for w, scale in zip(latent, torch.where(ranges > 0, ranges, torch.ones_like(ranges)), strict=True):
        share = torch.nan_to_num(w.flatten() / scale, nan=2 * REACH)
        inner = torch.floor((share + REACH) * (INNER_BINS / (2 * REACH))).clamp(-1, INNER_BINS)
        bins.append(torch.bincount(inner.long() + 1, minlength=INNER_BINS + 2))
    records, measured = layer_records(model), ranges.float().cpu().numpy()
    columns = {
        "range": measured,
        "dead_zone": 2 * measured.astype(np.float64) * [record.dead_zone for record in records],
        "bits": [record.bits for record in records],
        "sparsity": [record.sparsity for record in records],
    }
    return {
        **{name: np.array(columns[name], dtype=kind) for name, kind in COLUMNS.items()},
        "counts": torch.stack(bins).cpu().numpy().astype("<u4"),
        **{f"dead {record.name}": np.array(record.dead) for record in records},
    }

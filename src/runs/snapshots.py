"""How the weights of every quantized layer looked after each epoch, small enough to keep with the run.

A snapshot holds, for each quantized layer, the histogram of its latent weights in units of its own range R, and what
the quantizer made of them: R, d, bits, zeros, dead filters. The bins are fixed, 121 from -1.5 R to 1.5 R and one
beyond each end, so that epochs can be compared. All of a run is one container (src/storage/container.py).

A long run is thinned out: the file keeps the first snapshot, the newest one, and those whose epoch is a multiple of the
smallest power of two that leaves at most `most_kept` of them, so that it stays below 2 MB. What is kept depends on the
newest epoch alone: a run that was interrupted and resumed has the same file as an unbroken one.
Axis letters: E epochs kept, L layers, B = 123 bins, O output channels, C output channels of all layers.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from src.quantizer import LARGEST_BITS, MIN_BITS, weight_ranges
from src.storage import check_arrays, container_bytes, read_container, save_arrays
from src.training import layer_records
from utils_quantization import latent_weight, quantized_layers

SNAPSHOTS = "snapshots.npz"
INNER_BINS = 121  # odd: the middle one is centred on 0
REACH = 1.5  # in units of R
EDGES: NDArray[np.float64] = np.linspace(-REACH, REACH, INNER_BINS + 1)
"""Borders of the inner bins in units of R, (122,); counts have one more bin below the first and above the last."""
MOST_BYTES = 1_800_000
BYTES_PER_LAYER = 130  # of one layer in one snapshot, compressed; measured 110 on ResNets
# Attributes of LayerSnapshot that are one number a layer, (E, L) in the file, and their types there.
COLUMNS = {"range": "<f4", "dead_zone": "<f8", "bits": "|u1", "sparsity": "<f8"}


class SnapshotError(ValueError):
    """Snapshots that are damaged or absent, or that belong to other layers."""


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
        if not layer_names:
            raise SnapshotError("no layer to look at: attach quantizers first and hand over the names that returns")
        self.layer_names = tuple(layer_names)
        self._rows: dict[int, list[LayerSnapshot]] = {}  # epoch, ascending -> all layers, (L,)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def epochs(self) -> list[int]:
        """The epochs that are kept, ascending; 0 is the state before training."""
        return list(self._rows)

    @property
    def most_kept(self) -> int:
        """The largest number of snapshots that are kept: 512, or fewer where there are many layers."""
        return min(512, max(16, MOST_BYTES // (BYTES_PER_LAYER * len(self.layer_names))))

    @torch.no_grad()
    def add(self, model: nn.Module, epoch: int) -> None:
        """Take a snapshot of `model` after `epoch`. It replaces that of the same epoch, and all later ones.

        Raises SnapshotError where the network has other quantized layers.
        """
        layers = quantized_layers(model)
        if tuple(layers) != self.layer_names:
            odd = sorted(set(layers) ^ set(self.layer_names)) or list(layers)
            raise SnapshotError(
                f"the network's quantized layers are not those of these snapshots ({odd[0]!r} is one that differs); "
                "hand over the names that attaching the quantizers returned"
            )
        self.cut(epoch - 1)
        self._rows[epoch] = _measure(model, epoch)
        self._thin_out()

    def view(self, layer: str, epoch: int) -> LayerSnapshot:
        """One layer at the newest kept epoch that is not after `epoch`. Raises SnapshotError for an unknown layer."""
        course = list(self.through(layer))
        if not course:
            raise SnapshotError("there is no snapshot yet: train an epoch first")
        return next((seen for seen in reversed(course) if seen.epoch <= epoch), course[0])

    def through(self, layer: str) -> Iterator[LayerSnapshot]:
        """One layer at every kept epoch, in order. Raises SnapshotError for an unknown layer."""
        if layer not in self.layer_names:
            raise SnapshotError(f"no quantized layer is called {layer!r}: choose one of {', '.join(self.layer_names)}")
        place = self.layer_names.index(layer)
        return (row[place] for row in self._rows.values())

    def cut(self, epochs: int) -> None:
        """Forget all that is after epoch `epochs`."""
        self._rows = {epoch: row for epoch, row in self._rows.items() if epoch <= epochs}

    def to_bytes(self) -> bytes:
        """The file's contents, the same bytes for the same snapshots."""
        rows = list(self._rows.values())
        channels = [len(layer.dead) for layer in rows[0]] if rows else []
        description = {"layers": self.layer_names, "channels": channels, "epochs": self.epochs}
        arrays: dict[str, NDArray[Any]] = {}
        if rows:
            arrays = {
                name: np.array([[getattr(layer, name) for layer in row] for row in rows], dtype=kind)
                for name, kind in COLUMNS.items()
            }
            counts = np.array([[layer.counts for layer in row] for row in rows], dtype="<u4")
            planes = np.moveaxis(counts[..., None].view(np.uint8), -1, 0)  # (4, E, L, B): equal bytes together
            arrays["counts"] = np.frombuffer(zlib.compress(planes.tobytes()), dtype=np.uint8)
            arrays["dead"] = np.packbits([np.concatenate([layer.dead for layer in row]) for row in rows], axis=1)
        return container_bytes("snapshots", description, save_arrays(arrays))

    @classmethod
    def load(cls, path: str | Path, epochs: int | None = None) -> Self:
        """Read a file, up to epoch `epochs` (None: all). Raises SnapshotError where it is absent or damaged."""
        if not Path(path).is_file():
            raise SnapshotError(f"there are no snapshots at {str(path)!r}: a run writes them while it trains")
        try:
            found = cls._from_file(path)
        except (OSError, ValueError, LookupError, TypeError, ArithmeticError, zlib.error) as error:
            raise SnapshotError(
                f"the snapshots at {str(path)!r} cannot be read ({error!s:.300}): the file is damaged or of another "
                "version; delete it, and the run goes on without the earlier epochs' histograms"
            ) from error
        if epochs is not None:
            found.cut(epochs)
        return found

    @classmethod
    def resume(cls, path: str | Path, layer_names: Sequence[str], model: nn.Module, epochs: int) -> Self:
        """What an unbroken run holds after `epochs` epochs; the file may be ahead of the checkpoint.

        Where there is no file, the first snapshot is the state of `model`. Raises SnapshotError for a damaged file or
        other layers.
        """
        found = cls.load(path, epochs) if Path(path).exists() else cls(layer_names)
        if found.layer_names != tuple(layer_names):
            raise SnapshotError(f"the snapshots at {str(path)!r} are of other layers; delete the file to go on")
        if not len(found):
            found.add(model, epochs)
        return found

    def _thin_out(self) -> None:
        first, newest = self.epochs[0], self.epochs[-1]
        stride = 1
        while newest // stride + 2 > self.most_kept:
            stride *= 2
        self._rows = {
            epoch: row for epoch, row in self._rows.items() if epoch in (first, newest) or epoch % stride == 0
        }

    @classmethod
    def _from_file(cls, path: str | Path) -> Self:
        description, arrays = read_container(path, "snapshots")
        layers, channels, epochs = (description[name] for name in ("layers", "channels", "epochs"))
        found = cls([str(name) for name in layers])
        if not epochs:
            return found
        shape = (len(epochs), len(layers))
        if epochs != sorted(set(epochs)) or len(channels) != len(layers):
            raise ValueError(f"{len(epochs)} epochs, or not in order; {len(channels)} channels, {len(layers)} layers")
        needed: dict[str, tuple[str, tuple[int | None, ...]]] = {name: (kind, shape) for name, kind in COLUMNS.items()}
        needed |= {"counts": ("|u1", (None,)), "dead": ("|u1", (len(epochs), -(-sum(channels) // 8)))}
        check_arrays(arrays, needed)
        planes_shape = (4, *shape, INNER_BINS + 2)
        unpacked = zlib.decompressobj().decompress(arrays["counts"].tobytes(), int(np.prod(planes_shape)) + 1)
        planes = np.moveaxis(np.frombuffer(unpacked, dtype=np.uint8).reshape(planes_shape), 0, -1)
        counts = np.ascontiguousarray(planes).view("<u4")[..., 0]
        if min(channels) < 1 or not ((arrays["bits"] >= MIN_BITS) & (arrays["bits"] <= LARGEST_BITS)).all():
            raise ValueError(f"a layer without channels, or bits that no quantizer has ({MIN_BITS} to {LARGEST_BITS})")
        flags = np.unpackbits(arrays["dead"], axis=1, count=sum(channels)).astype(bool)
        parts = np.split(flags, np.cumsum(channels)[:-1], axis=1)
        for row, epoch in enumerate(epochs):
            found._rows[epoch] = [
                LayerSnapshot(
                    name=name,
                    epoch=epoch,
                    counts=counts[row, place].astype(np.int64),
                    dead=parts[place][row],
                    **{column: arrays[column][row, place].item() for column in COLUMNS},
                )
                for place, name in enumerate(found.layer_names)
            ]
        return found


def _measure(model: nn.Module, epoch: int) -> list[LayerSnapshot]:
    latent = [latent_weight(layer).detach().float() for layer in quantized_layers(model).values()]
    ranges = weight_ranges(latent)
    bins = []
    for w, scale in zip(latent, torch.where(ranges > 0, ranges, torch.ones_like(ranges)), strict=True):
        share = torch.nan_to_num(w.flatten() / scale, nan=2 * REACH)
        inner = torch.floor((share + REACH) * (INNER_BINS / (2 * REACH))).clamp(-1, INNER_BINS)
        bins.append(torch.bincount(inner.long() + 1, minlength=INNER_BINS + 2))
    return [
        LayerSnapshot(
            name=record.name,
            epoch=epoch,
            counts=counts,
            range=range_,
            dead_zone=2 * range_ * record.dead_zone,
            bits=int(record.bits),
            sparsity=record.sparsity,
            dead=np.array(record.dead),
        )
        for record, counts, range_ in zip(
            layer_records(model), torch.stack(bins).cpu().numpy(), ranges.float().tolist(), strict=True
        )
    ]

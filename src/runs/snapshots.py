"""How the weights of every quantized layer looked through the epochs, small enough to keep with the run.

A snapshot holds, for each quantized layer, the histogram of its latent weights in units of its own range R, and what
the quantizer made of them: R, d, bits, zeros, dead filters. The bins are fixed, 121 from -1.5 R to 1.5 R and one
beyond each end, so that epochs can be laid beside each other. All of a run is one compressed file of plain arrays.

A long run is thinned out: the file keeps the first snapshot, the newest one, and those whose epoch is a multiple of the
smallest power of two that leaves at most `most_kept` of them, so that it stays below 2 MB. What is kept depends on the
newest epoch alone: a run that was interrupted and taken up again has the same file as an unbroken one.
Axis letters: E epochs kept, L layers, B = 123 bins, O output channels, C output channels of all layers.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from src.quantizer import weight_ranges
from src.runs.snapshot_file import COLUMNS, FORMAT, Arrays, read_arrays
from utils_quantization import latent_weight, quantized_layers, quantizer_of, shared_quantized_weights

SNAPSHOTS = "snapshots.npz"
INNER_BINS = 121  # odd: the middle one is centred on 0
REACH = 1.5  # in units of R
EDGES: NDArray[np.float64] = np.linspace(-REACH, REACH, INNER_BINS + 1)
"""Borders of the inner bins in units of R, (122,); counts have one more bin below the first and above the last."""
MOST_BYTES = 1_800_000
BYTES_PER_LAYER = 130  # of one layer in one snapshot, compressed; measured 110 on ResNets


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


@dataclass(frozen=True)
class _Frame:
    epoch: int
    counts: NDArray[np.uint32]  # (L, B)
    ranges: NDArray[np.float32]  # (L,), as all of the next
    dead_zones: NDArray[np.float32]
    bits: NDArray[np.uint8]
    zeros: NDArray[np.uint32]
    dead: NDArray[np.bool_]  # (C,)


class Snapshots:
    """The snapshots of one run. Build it with the quantized layers' names, `add` after each epoch, write `to_bytes`."""

    def __init__(self, layer_names: Sequence[str]) -> None:
        if not layer_names:
            raise SnapshotError("no layer to look at: attach quantizers first and hand over the names that returns")
        self.layer_names = tuple(layer_names)
        self._sizes: NDArray[np.int64] | None = None  # weights of each layer, (L,)
        self._channels: NDArray[np.int64] | None = None
        self._frames: list[_Frame] = []

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def epochs(self) -> list[int]:
        """The epochs that are kept, ascending; 0 is the state before training."""
        return [frame.epoch for frame in self._frames]

    @property
    def most_kept(self) -> int:
        """At most so many snapshots are kept: 512, or fewer where there are many layers."""
        return min(512, max(16, MOST_BYTES // (BYTES_PER_LAYER * len(self.layer_names))))

    @torch.no_grad()
    def add(self, model: nn.Module, epoch: int) -> None:
        """Look at the quantized layers of `model` after `epoch`. One that is trained again replaces what was there.

        Raises SnapshotError where the network's quantized layers are others.
        """
        layers = quantized_layers(model)
        if tuple(layers) != self.layer_names:
            odd = sorted(set(layers) ^ set(self.layer_names)) or list(layers)
            raise SnapshotError(
                f"the network's quantized layers are not those of these snapshots ({odd[0]!r} is one that differs); "
                "hand over the names that attaching the quantizers returned"
            )
        latent = [latent_weight(layer).detach().float() for layer in layers.values()]
        self._sizes = np.array([w.numel() for w in latent])
        self._channels = np.array([len(w) for w in latent])
        self.cut(epoch - 1)
        self._frames.append(_look(layers, latent, epoch))
        self._thin_out()

    def view(self, layer: str, epoch: int) -> LayerSnapshot:
        """One layer at the newest kept epoch that is not after `epoch`. Raises SnapshotError for an unknown layer."""
        place = self._place(layer)
        if not self._frames:
            raise SnapshotError("there is no snapshot yet: train an epoch first")
        earlier = [frame for frame in self._frames if frame.epoch <= epoch]
        return self._layer(earlier[-1] if earlier else self._frames[0], place)

    def through(self, layer: str) -> Iterator[LayerSnapshot]:
        """One layer at every kept epoch, in order."""
        place = self._place(layer)
        return (self._layer(frame, place) for frame in self._frames)

    def cut(self, epochs: int) -> None:
        """Forget all that is after epoch `epochs`."""
        self._frames = [frame for frame in self._frames if frame.epoch <= epochs]

    def to_bytes(self) -> bytes:
        """The file's contents: a compressed .npz of plain arrays, the same bytes for the same snapshots."""
        counts = np.stack([frame.counts for frame in self._frames]) if self._frames else np.zeros((0, 0, 0), np.uint32)
        planes = counts.astype("<u4")[..., None].view(np.uint8)  # (E, L, B, 4): equal bytes together compress better
        columns: dict[str, Any] = {
            name: np.stack([getattr(frame, name) for frame in self._frames]) if self._frames else np.zeros((0, 0))
            for name in COLUMNS
        }
        dead = np.stack([frame.dead for frame in self._frames]) if self._frames else np.zeros((0, 0), bool)
        out = io.BytesIO()
        np.savez_compressed(
            out,
            format=np.array(FORMAT),
            layers=np.array(self.layer_names),
            sizes=self._sizes if self._sizes is not None else np.zeros(0, np.int64),
            channels=self._channels if self._channels is not None else np.zeros(0, np.int64),
            epochs=np.array(self.epochs, dtype=np.int64),
            count_bytes=np.moveaxis(planes, -1, 0),
            dead=np.packbits(dead, axis=1),
            **columns,
        )
        return out.getvalue()

    @classmethod
    def load(cls, path: str | Path, epochs: int | None = None) -> Self:
        """Read a file, up to epoch `epochs` (None: all). Raises SnapshotError where it is absent or damaged."""
        if not Path(path).is_file():
            raise SnapshotError(f"there are no snapshots at {str(path)!r}: a run writes them while it trains")
        try:
            found = cls._from_arrays(read_arrays(path, len(EDGES) + 1))
        except Exception as error:  # a damaged archive makes the reader fail in many ways; all mean the same here
            raise SnapshotError(
                f"the snapshots at {str(path)!r} cannot be read ({type(error).__name__}: {error!s:.200}): the file is "
                "damaged or of another version; delete it, and the run goes on without the earlier epochs' histograms"
            ) from error
        if epochs is not None:
            found.cut(epochs)
        return found

    @classmethod
    def resume(cls, path: str | Path, layer_names: Sequence[str], model: nn.Module, epochs: int) -> Self:
        """What an unbroken run holds after `epochs` epochs; the file may be ahead of the checkpoint.

        Where there is no file, they start with the state of `model`. Raises SnapshotError for a damaged file or other
        layers.
        """
        found = cls.load(path, epochs) if Path(path).exists() else cls(layer_names)
        if found.layer_names != tuple(layer_names):
            raise SnapshotError(f"the snapshots at {str(path)!r} are of other layers; delete the file to go on")
        if not len(found):
            found.add(model, epochs)
        return found

    def _thin_out(self) -> None:
        newest, most = self._frames[-1].epoch, self.most_kept
        stride = 1
        while newest // stride + 2 > most:
            stride *= 2
        ends = (self._frames[0].epoch, newest)
        self._frames = [frame for frame in self._frames if frame.epoch in ends or frame.epoch % stride == 0]

    def _place(self, layer: str) -> int:
        if layer not in self.layer_names:
            raise SnapshotError(f"no quantized layer is called {layer!r}: choose one of {', '.join(self.layer_names)}")
        return self.layer_names.index(layer)

    def _layer(self, frame: _Frame, place: int) -> LayerSnapshot:
        assert self._sizes is not None
        assert self._channels is not None  # both are set with the first frame
        first = int(self._channels[:place].sum())
        return LayerSnapshot(
            name=self.layer_names[place],
            epoch=frame.epoch,
            counts=frame.counts[place].astype(np.int64),
            range=float(frame.ranges[place]),
            dead_zone=float(frame.dead_zones[place]),
            bits=int(frame.bits[place]),
            sparsity=int(frame.zeros[place]) / int(self._sizes[place]),
            dead=frame.dead[first : first + int(self._channels[place])],
        )

    @classmethod
    def _from_arrays(cls, arrays: Arrays) -> Self:
        found = cls([str(name) for name in arrays["layers"]])
        epochs = [int(epoch) for epoch in arrays["epochs"]]
        if not epochs:
            return found
        found._sizes, found._channels = arrays["sizes"].astype(np.int64), arrays["channels"].astype(np.int64)
        planes = np.ascontiguousarray(np.moveaxis(arrays["count_bytes"].astype(np.uint8), 0, -1))
        counts = planes.view("<u4")[..., 0]
        dead = np.unpackbits(arrays["dead"], axis=1, count=int(found._channels.sum())).astype(bool)
        if epochs != sorted(set(epochs)):
            raise ValueError(f"the epochs {epochs[:20]} are not in order")
        if (counts.sum(axis=2, dtype=np.int64) != found._sizes).any():
            raise ValueError("a histogram does not hold as many weights as its layer")
        columns = [arrays[name] for name in COLUMNS]
        for place, (epoch, *values) in enumerate(zip(epochs, *columns, strict=True)):
            ranges, zones, bits, zeros = values
            found._frames.append(_Frame(epoch, counts[place], ranges, zones, bits, zeros, dead[place]))
        return found


def _look(layers: dict[str, nn.Module], latent: list[Tensor], epoch: int) -> _Frame:
    ranges = weight_ranges(latent)
    scale = torch.where(ranges > 0, ranges, torch.ones_like(ranges))
    places = []
    for number, w in enumerate(latent):
        share = torch.nan_to_num(w.flatten() / scale[number], nan=2 * REACH)
        inner = torch.floor((share + REACH) * (INNER_BINS / (2 * REACH))).clamp(-1, INNER_BINS)
        places.append(inner.long() + 1 + number * (INNER_BINS + 2))
    counts = torch.bincount(torch.cat(places), minlength=len(latent) * (INNER_BINS + 2))
    together = nn.ModuleList(layers.values())
    with shared_quantized_weights(together):
        zero = [cast(Tensor, layer.weight).flatten(1) == 0 for layer in together]
    quantizers = [cast(Any, quantizer_of(layer)) for layer in layers.values()]
    share = torch.stack([quantizer.dead_zone_share() for quantizer in quantizers]).float()
    return _Frame(
        epoch=epoch,
        counts=counts.view(len(latent), -1).cpu().numpy().astype(np.uint32),
        ranges=ranges.cpu().numpy().astype(np.float32),
        dead_zones=(2 * ranges * share).cpu().numpy().astype(np.float32),
        bits=torch.stack([quantizer.get_bitwidth() for quantizer in quantizers]).cpu().numpy().astype(np.uint8),
        zeros=torch.stack([z.sum() for z in zero]).cpu().numpy().astype(np.uint32),
        dead=torch.cat([z.all(1) for z in zero]).cpu().numpy(),
    )

"""The history of a run: what was measured at the end of each epoch.

Shares (accuracy, sparsity) are numbers from 0 to 1; only printed text uses per cent.
Axis letters: E epochs, L layers, O output channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray


@dataclass(frozen=True)
class LayerRecord:
    """One quantized layer at the end of an epoch.

    bits: learned bit width b, rounded as the quantizer rounds it.
    dead_zone: d / (2 R) = 1 - |tanh(theta_dz)|, the dead zone's half width as a share of the layer's range R.
    sparsity: share of the quantized weights that are exactly 0.
    dead: one flag per output channel (O,), True where the whole quantized filter is 0.
    """

    name: str
    bits: float
    dead_zone: float
    sparsity: float
    dead: tuple[bool, ...]

    @property
    def channels(self) -> int:
        """Number of output channels."""
        return len(self.dead)

    @property
    def dead_channels(self) -> int:
        """Number of output channels whose quantized filter is 0."""
        return sum(self.dead)


@dataclass(frozen=True)
class EpochRecord:
    """One epoch. Losses are means over its batches; accuracies are shares of images; epochs count from 1.

    loss = task_loss + logit_penalty + coefficient * group_penalty; group_penalty is the sparsity penalty before it
    is multiplied by the coefficient. learning_rate and coefficient are those the epoch was trained with.
    recalibrated_accuracy: on some test images, with BatchNorm's statistics measured anew (`recalibrated_accuracy`).
    Of a run with a budget: cost is the budgeted cost at the end of the epoch, as a share of the dense network's;
    penalised are the groups of channels that the next epoch penalises, where it does not penalise all.
    """

    epoch: int
    loss: float
    task_loss: float
    logit_penalty: float
    group_penalty: float
    coefficient: float
    learning_rate: float
    train_accuracy: float
    test_loss: float
    accuracy: float
    unstructured_sparsity: float
    structured_sparsity: float
    mean_bits: float
    seconds: float
    layers: tuple[LayerRecord, ...]
    cost: float | None = None
    penalised: tuple[int, ...] = ()
    recalibrated_accuracy: float | None = None

    def console_line(self, epochs: int) -> str:
        """The line that the script prints for this epoch; `epochs` is the number planned."""
        width = len(str(epochs))
        return (
            f"Epoch {self.epoch:>{width}}/{epochs} | Loss: {self.loss:.2f} | Acc: {100 * self.accuracy:.1f}% "
            f"| Unstr: {100 * self.unstructured_sparsity:.1f}% | Struct: {100 * self.structured_sparsity:.1f}% "
            f"| Bits: {self.mean_bits:.1f}"
        )


SCALARS = tuple(f.name for f in fields(EpochRecord) if f.name not in ("layers", "penalised"))
LAYER_SCALARS = ("bits", "dead_zone", "sparsity", "dead_channels")


@dataclass
class History:
    """The records of one run in order. `epochs` is the number planned, `len(history)` the number done."""

    epochs: int
    records: list[EpochRecord] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[EpochRecord]:
        return iter(self.records)

    def __getitem__(self, index: int) -> EpochRecord:
        return self.records[index]

    @property
    def last(self) -> EpochRecord:
        """The newest record."""
        return self.records[-1]

    @property
    def lowest(self) -> EpochRecord:
        """The record of the lowest test accuracy while the penalty is on; of all records where it never is."""
        penalised = [record for record in self.records if record.coefficient > 0]
        return min(penalised or self.records, key=lambda record: record.accuracy)

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The quantized layers, in the network's order; () before the first record."""
        return tuple(layer.name for layer in self.records[0].layers) if self.records else ()

    def append(self, record: EpochRecord) -> None:
        """Add the next epoch."""
        self.records.append(record)

    def column(self, name: str) -> NDArray[np.float64]:
        """One scalar of every epoch, shape (E,)."""
        return np.array([getattr(record, name) for record in self.records], np.float64)

    def layer_column(self, name: str) -> NDArray[np.float64]:
        """One number of every layer in every epoch, shape (E, L): bits, dead_zone, sparsity or dead_channels."""
        return np.array([[getattr(layer, name) for layer in record.layers] for record in self.records], np.float64)

    def csv_text(self) -> str:
        """One row per epoch: the scalars (those that some epoch has), then LAYER_SCALARS of each layer."""
        rows = []
        for record in self:
            layers = {f"{layer.name}.{key}": getattr(layer, key) for layer in record.layers for key in LAYER_SCALARS}
            rows.append({name: getattr(record, name) for name in SCALARS} | layers)
        return pd.DataFrame(rows).dropna(axis="columns", how="all").to_csv(index=False)

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists; `from_json` is the inverse."""
        return {"epochs": self.epochs, "records": [asdict(record) for record in self.records]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> History:
        """Rebuild a history. Raises ValueError where a field is missing or unknown."""
        history = cls(data["epochs"])
        for entry in data["records"]:
            try:
                layers = tuple(LayerRecord(**{**layer, "dead": tuple(layer["dead"])}) for layer in entry["layers"])
                penalised = tuple(entry.get("penalised", ()))
                history.append(EpochRecord(**{**entry, "layers": layers, "penalised": penalised}))
            except TypeError as error:
                raise ValueError(f"not a history of this version: {error}; start without --resume") from error
        return history

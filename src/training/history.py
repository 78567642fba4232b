"""The history of a run: what was measured at the end of each epoch.

Training writes records, figures and files read them; neither knows of the other. Shares (accuracy, sparsity)
are numbers from 0 to 1; only printed text uses per cent. Axis letters: E epochs, L layers, O output channels.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
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
        return len(self.dead)

    @property
    def dead_channels(self) -> int:
        return sum(self.dead)


@dataclass(frozen=True)
class EpochRecord:
    """One epoch. Losses are means over its batches; accuracies are shares of images; epochs count from 1.

    loss = task_loss + logit_penalty + coefficient * group_penalty; group_penalty is the sparsity penalty before it
    is multiplied by the coefficient. learning_rate and coefficient are those the epoch was trained with.
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

    def console_line(self, epochs: int) -> str:
        """The line that the script prints for this epoch; `epochs` is the number planned."""
        width = len(str(epochs))
        return (
            f"Epoch {self.epoch:>{width}}/{epochs} | Loss: {self.loss:.2f} | Acc: {100 * self.accuracy:.1f}% "
            f"| Unstr: {100 * self.unstructured_sparsity:.1f}% | Struct: {100 * self.structured_sparsity:.1f}% "
            f"| Bits: {self.mean_bits:.1f}"
        )


SCALARS = tuple(f.name for f in fields(EpochRecord) if f.name != "layers")


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
        """The newest record. Raises ValueError while there is none."""
        if not self.records:
            raise ValueError("the history is empty: no epoch has finished yet; train one before reading `last`")
        return self.records[-1]

    @property
    def layer_names(self) -> tuple[str, ...]:
        return tuple(layer.name for layer in self.records[0].layers) if self.records else ()

    def append(self, record: EpochRecord) -> None:
        """Add the next epoch. Raises ValueError where its number is not the next one."""
        if record.epoch != len(self.records) + 1:
            raise ValueError(f"epoch {record.epoch} does not follow {len(self.records)} recorded epochs")
        self.records.append(record)

    def column(self, name: str) -> NDArray[np.float64]:
        """One scalar of every epoch, shape (E,). Raises ValueError for an unknown name."""
        if name not in SCALARS:
            raise ValueError(f"unknown column {name!r}: choose one of {', '.join(SCALARS)}")
        return np.array([getattr(record, name) for record in self.records], dtype=np.float64)

    def layer_column(self, name: str) -> NDArray[np.float64]:
        """One number of every layer in every epoch, shape (E, L): bits, dead_zone, sparsity or dead_channels."""
        allowed = ("bits", "dead_zone", "sparsity", "dead_channels")
        if name not in allowed:
            raise ValueError(f"unknown layer column {name!r}: choose one of {', '.join(allowed)}")
        return np.array(
            [[getattr(layer, name) for layer in record.layers] for record in self.records], dtype=np.float64
        )

    def csv_text(self) -> str:
        """One row per epoch: the scalars, then bits, dead_zone, sparsity and dead_channels of each layer."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        per_layer = ("bits", "dead_zone", "sparsity", "dead_channels")
        writer.writerow([*SCALARS, *(f"{name}.{key}" for name in self.layer_names for key in per_layer)])
        for record in self.records:
            layers = [getattr(layer, key) for layer in record.layers for key in per_layer]
            writer.writerow([*(getattr(record, name) for name in SCALARS), *layers])
        return out.getvalue()

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists; `from_json` is the inverse."""
        return {"epochs": self.epochs, "records": [asdict(record) for record in self.records]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> History:
        """Rebuild a history. Raises ValueError where a field is missing or unknown."""
        try:
            records = [_epoch_from_json(entry) for entry in data["records"]]
            if [record.epoch for record in records] != list(range(1, len(records) + 1)):
                raise ValueError("its epochs are not 1, 2, 3, ...")
            return cls(epochs=int(data["epochs"]), records=records)
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise ValueError(f"not a history of this version: {error}; start the run again without --resume") from error


def _epoch_from_json(entry: dict[str, Any]) -> EpochRecord:
    layers: Sequence[dict[str, Any]] = entry["layers"]
    parsed = tuple(LayerRecord(**{**layer, "dead": tuple(bool(flag) for flag in layer["dead"])}) for layer in layers)
    record = EpochRecord(**{**entry, "layers": parsed})
    numbers = [getattr(record, name) for name in SCALARS]
    numbers += [number for layer in parsed for number in (layer.bits, layer.dead_zone, layer.sparsity)]
    if any(isinstance(number, bool) or not isinstance(number, (int, float)) for number in numbers):
        raise TypeError(f"epoch {record.epoch!r} holds something else than numbers")
    return record

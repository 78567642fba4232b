"""The history of a run: its line on the console, its table, its JSON, its errors."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from src.training import EpochRecord, History
from src.training.history import SCALARS
from tests.histories import NAMES, make_history

RECORD = replace(
    make_history(1)[0], loss=2.3149, accuracy=0.1024, unstructured_sparsity=0.0, structured_sparsity=0.0, mean_bits=7.94
)
SECOND = replace(RECORD, epoch=2, loss=1.85, accuracy=0.284, unstructured_sparsity=0.012, mean_bits=7.6)
LAST = replace(RECORD, epoch=20, accuracy=1.0, structured_sparsity=0.0884)


@pytest.mark.parametrize(
    ("record", "epochs", "line"),
    [
        (RECORD, 20, "Epoch  1/20 | Loss: 2.31 | Acc: 10.2% | Unstr: 0.0% | Struct: 0.0% | Bits: 7.9"),
        (SECOND, 20, "Epoch  2/20 | Loss: 1.85 | Acc: 28.4% | Unstr: 1.2% | Struct: 0.0% | Bits: 7.6"),
        (LAST, 20, "Epoch 20/20 | Loss: 2.31 | Acc: 100.0% | Unstr: 0.0% | Struct: 8.8% | Bits: 7.9"),
        (SECOND, 300, "Epoch   2/300 | Loss: 1.85 | Acc: 28.4% | Unstr: 1.2% | Struct: 0.0% | Bits: 7.6"),
    ],
)
def test_the_console_line_is_the_specified_one(record: EpochRecord, epochs: int, line: str) -> None:
    assert record.console_line(epochs) == line


def test_the_table_gives_every_number_back() -> None:
    made = make_history(12)
    made.records[:] = [replace(record, cost=1 / record.epoch) for record in made]
    rows = list(csv.DictReader(io.StringIO(made.csv_text())))
    keys = ("bits", "dead_zone", "sparsity", "dead_channels")
    assert list(rows[0]) == [*SCALARS, *(f"{name}.{key}" for name in NAMES for key in keys)]
    for row, entry in zip(rows, made, strict=True):
        assert {name: float(row[name]) for name in SCALARS} == {name: getattr(entry, name) for name in SCALARS}
        assert float(row["layer1.0.conv1.dead_zone"]) == entry.layers[0].dead_zone
    assert [row["layer3.2.conv2.dead_channels"] for row in rows] == ["0"] * 9 + ["17"] * 3


def test_json_gives_the_history_back() -> None:
    made = make_history(3)
    back = History.from_json(json.loads(json.dumps(made.to_json())))
    assert back == made
    assert isinstance(back[0].layers[0].dead, tuple)


def test_columns() -> None:
    made = make_history(3)
    np.testing.assert_array_equal(made.column("group_penalty"), [499, 498, 497])
    assert made.layer_column("dead_zone").tolist() == [[0.01] * 18, [0.02] * 18, [0.03] * 18]
    assert list(made.layer_names) == NAMES
    assert (len(made), made.last.epoch, made[0].epoch, made.epochs) == (3, 3, 1, 20)
    assert made.last.layers[17].channels == 64
    assert History(3).layer_names == ()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data["records"][1].pop("loss"),
        lambda data: data["records"][1].update(colour=1),
    ],
    ids=["a field less", "a field more"],
)
def test_a_history_of_another_version_is_refused(damage: Callable[[Any], object]) -> None:
    data = make_history(3).to_json()
    damage(data)
    with pytest.raises(ValueError, match=r"not a history of this version: .*--resume"):
        History.from_json(data)

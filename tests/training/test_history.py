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

from src.training import EpochRecord, History, LayerRecord
from src.training.history import SCALARS


def record(epoch: int = 1, **changes: object) -> EpochRecord:
    layers = (
        LayerRecord("layer1.0.conv1", 7.0, 0.1 / 3, 0.25, (True, False, False, False)),
        LayerRecord("layer2.0.conv2", 4.0, 0.2, 1 / 3, (False, False)),
    )
    plain = EpochRecord(
        epoch=epoch, loss=2.3149, task_loss=2.0, logit_penalty=0.3, group_penalty=14.9, coefficient=0.001,
        learning_rate=1e-3, train_accuracy=0.1, test_loss=2.2, accuracy=0.1024, unstructured_sparsity=0.0,
        structured_sparsity=0.0, mean_bits=7.94, seconds=1.5, layers=layers,
    )  # fmt: skip
    return replace(plain, **changes)  # type: ignore[arg-type]


def history(count: int = 3) -> History:
    made = History(20)
    for epoch in range(1, count + 1):
        made.append(record(epoch, accuracy=epoch / 7, loss=1 / epoch, seconds=0.1 + epoch))
    return made


def test_the_console_line_is_the_specified_one() -> None:
    expected = "Epoch  1/20 | Loss: 2.31 | Acc: 10.2% | Unstr: 0.0% | Struct: 0.0% | Bits: 7.9"
    assert record().console_line(20) == expected
    second = record(2, loss=1.85, accuracy=0.284, unstructured_sparsity=0.012, mean_bits=7.6)
    assert second.console_line(20) == "Epoch  2/20 | Loss: 1.85 | Acc: 28.4% | Unstr: 1.2% | Struct: 0.0% | Bits: 7.6"
    last = record(20, accuracy=1.0, structured_sparsity=0.0884)
    assert last.console_line(20) == "Epoch 20/20 | Loss: 2.31 | Acc: 100.0% | Unstr: 0.0% | Struct: 8.8% | Bits: 7.9"
    assert record(7).console_line(300).startswith("Epoch   7/300 |")
    assert record().console_line(1).startswith("Epoch 1/1 |")


def test_the_table_gives_every_number_back() -> None:
    made = history()
    rows = list(csv.DictReader(io.StringIO(made.csv_text())))
    assert len(rows) == 3
    assert list(rows[0]) == [
        *SCALARS,
        *(f"layer1.0.conv1.{key}" for key in ("bits", "dead_zone", "sparsity", "dead_channels")),
        *(f"layer2.0.conv2.{key}" for key in ("bits", "dead_zone", "sparsity", "dead_channels")),
    ]
    for row, entry in zip(rows, made, strict=True):
        assert {name: float(row[name]) for name in SCALARS} == {name: getattr(entry, name) for name in SCALARS}
        assert float(row["layer1.0.conv1.dead_zone"]) == 0.1 / 3
        assert (row["layer1.0.conv1.dead_channels"], row["layer2.0.conv2.dead_channels"]) == ("1", "0")
    assert History(5).csv_text().strip() == ",".join(SCALARS)


def test_json_gives_the_history_back() -> None:
    made = history()
    back = History.from_json(json.loads(json.dumps(made.to_json())))
    assert back == made
    assert isinstance(back[0].layers[0].dead, tuple)
    assert back.csv_text() == made.csv_text()


def test_columns() -> None:
    made = history()
    np.testing.assert_array_equal(made.column("accuracy"), np.array([1, 2, 3]) / 7)
    assert made.layer_column("bits").tolist() == [[7.0, 4.0]] * 3
    assert made.layer_column("dead_channels").tolist() == [[1, 0]] * 3
    assert made.layer_names == ("layer1.0.conv1", "layer2.0.conv2")
    assert (len(made), made.last.epoch, made[0].epoch, made.epochs) == (3, 3, 1, 20)
    assert [layer.channels for layer in made.last.layers] == [4, 2]
    assert History(3).layer_names == ()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("epochs"),
        lambda data: data["records"][1].pop("loss"),
        lambda data: data["records"][1].update(colour=1),
        lambda data: data["records"].reverse(),
    ],
    ids=["no epochs", "a field less", "a field more", "out of order"],
)
def test_a_history_of_another_version_is_refused(damage: Callable[[Any], object]) -> None:
    data = history().to_json()
    damage(data)
    with pytest.raises(ValueError, match=r"not a history of this version: .*--resume"):
        History.from_json(data)

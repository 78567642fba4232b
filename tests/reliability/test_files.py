"""A few tries of each row about files; `python -m tests.reliability` makes many."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.reliability.files import ROWS, damaged
from tests.reliability.small_run import Unbroken

QUICK = 4


@pytest.mark.parametrize("name", ROWS)
def test_a_file_is_refused_or_read_as_it_was(name: str, tiny_run: Unbroken, tmp_path: Path) -> None:
    for number in range(QUICK if ROWS[name].share == 1 else 1):
        folder = tmp_path / str(number)
        folder.mkdir()
        ROWS[name].trial(random.Random(f"{name} {number}"), folder, tiny_run)


def test_damage_changes_or_shortens_the_bytes() -> None:
    data, rng = bytes(range(1, 201)), random.Random(0)
    found = [damaged(data, rng) for _ in range(300)]
    assert data not in found
    assert {len(bad) == 200 or data.startswith(bad) for bad in found} == {True}
    assert any(len(bad) < 200 for bad in found)

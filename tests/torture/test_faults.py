"""A few rounds of every fault, so that CI sees each of them; `python -m tests.torture` runs all."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.torture.table import ROWS


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.quick])
def test_nothing_is_lost(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    outcome = row.run(random.Random(f"quick {name}"), tmp_path, row.quick)
    if outcome.skipped:
        pytest.skip(outcome.skipped)
    assert outcome.tried > 0
    assert not outcome.lost, "\n".join(outcome.lost)
    assert outcome.survived == outcome.tried

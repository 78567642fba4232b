"""What every test starts from: a fixed seed, figures without a display, property tests no busy machine can fail."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

os.environ.setdefault("MPLBACKEND", "Agg")

# Deadlines measure the machine, not the code; the same examples every time make a failure repeatable.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True, max_examples=50, database=None)
hypothesis.settings.load_profile("steady")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)

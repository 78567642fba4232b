"""What every test starts from: a fixed seed, figures without a display, property tests no busy machine can fail."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

# Before torch is loaded: a worker has one core, and so have the processes that its tests start.
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

if TYPE_CHECKING:
    from tests.reliability.small_run import Unbroken

# Deadlines measure the machine, not the code; the same examples every time make a failure repeatable.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True, max_examples=50, database=None)
hypothesis.settings.load_profile("steady")

# A shell that runs the tests in the background, or under nohup, has SIGINT or SIGHUP ignored in all that it starts,
# and what ignores a signal cannot be tested for how it takes it.
signal.signal(signal.SIGINT, signal.default_int_handler)
for _name in ("SIGTERM", "SIGHUP"):
    if hasattr(signal, _name):
        signal.signal(getattr(signal, _name), signal.SIG_DFL)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    """The small run of tests/reliability, trained once. Copy its folder before changing anything in it."""
    from tests.reliability.small_run import train_unbroken

    return train_unbroken(tmp_path_factory.mktemp("tiny") / "deep" / "run")

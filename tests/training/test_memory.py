"""The allocator setting: done on glibc, seen by the number of page faults, and harmless elsewhere."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from src.training import devices as memory

COUNT = """
import resource, sys, torch
from src.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    buffers = [torch.ones(4_000_000) for _ in range(10)]  # 160 MB, written and freed together
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc, whose allocator this sets")
def test_freed_blocks_are_used_again() -> None:
    faults = {}
    for mode in ("keep", "leave"):
        done = subprocess.run([sys.executable, "-c", COUNT, mode], capture_output=True, text=True, check=True)
        faults[mode] = int(done.stdout)
    # 5 x 160 MB are 195,000 pages of 4 kB where all is given back each time; fewer where the system uses larger pages
    assert faults["keep"] < 1_000
    assert faults["leave"] >= faults["keep"]


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert memory.keep_freed_memory() is False

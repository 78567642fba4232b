"""Which device and arithmetic are picked, and the allocator, whose setting shows in the number of page faults."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from src.training import TrainingError, devices, keep_freed_memory, pick_device, pick_precision

COUNT_FAULTS = """
import resource, sys, torch
from src.training import keep_freed_memory
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


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(TrainingError, match="'cuda' is not present here: use one of cpu, or auto"):
        pick_device("cuda")
    with pytest.raises(TrainingError, match="'gpu' is unknown: choose one of auto, cpu, cuda, mps"):
        pick_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device().type == "cuda"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device().type == "mps"


def test_precision_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert pick_precision("fp32", cpu) is torch.float32
    assert pick_precision("bf16", cpu) is torch.bfloat16
    found: dict[str, bool] = {}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert pick_precision("auto", cpu) is torch.float32
    for capability in ("avx512_bf16", "amx_bf16"):
        found.clear()
        found[capability] = True
        assert pick_precision("auto", cpu) is torch.bfloat16
    assert pick_precision("auto", torch.device("mps")) is torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert pick_precision("auto", torch.device("cuda")) is torch.float32  # emulated is slower
    with pytest.raises(TrainingError, match="'fp8' is unknown: choose one of auto, fp32, bf16"):
        pick_precision("fp8", cpu)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc, whose allocator this sets")
def test_freed_blocks_are_used_again() -> None:
    """Two processes that load torch: about 5 s."""
    faults = {}
    for mode in ("keep", "leave"):
        done = subprocess.run([sys.executable, "-c", COUNT_FAULTS, mode], capture_output=True, text=True, check=True)
        faults[mode] = int(done.stdout)
    # 5 x 160 MB are 195,000 pages of 4 kB where all is given back each time; fewer where the system uses larger pages
    assert faults["keep"] < 1_000
    assert faults["leave"] >= faults["keep"]


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.sys, "platform", "darwin")
    assert keep_freed_memory() is False

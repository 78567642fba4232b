"""Which device and arithmetic are picked, what a lack of memory looks like, and the allocator's page faults."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from src.training import TrainingError, batch_size_advice, is_out_of_memory, pick_device, pick_precision

COUNT_FAULTS = """
import resource, torch
from src.training import keep_freed_memory
keep_freed_memory()
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
    found["amx_bf16"] = True
    assert pick_precision("auto", cpu) is torch.bfloat16
    assert pick_precision("auto", torch.device("mps")) is torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert pick_precision("auto", torch.device("cuda")) is torch.float32  # emulated is slower


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc, whose allocator this sets")
def test_freed_blocks_are_used_again() -> None:
    done = subprocess.run([sys.executable, "-c", COUNT_FAULTS], capture_output=True, text=True, check=True)
    # 5 x 160 MB are 195,000 pages of 4 kB where all is given back each time; fewer where the system uses larger pages
    assert int(done.stdout) < 1_000


def test_what_a_lack_of_memory_looks_like() -> None:
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**60, dtype=torch.uint8)
    for error in (real.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")):
        assert is_out_of_memory(error)
    for other in (RuntimeError("shape mismatch"), ValueError("not enough memory")):
        assert not is_out_of_memory(other)


def test_half_the_batch_is_suggested() -> None:
    cpu = torch.device("cpu")
    assert batch_size_advice(512, cpu) == (
        "the memory of cpu does not hold a batch of 512 images; try batches of 256: --batch-size 256, or BATCH_SIZE = "
        "256"
    )
    assert "try batches of 2:" in batch_size_advice(3, cpu)

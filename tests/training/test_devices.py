"""Which device and arithmetic are picked, what a lack of memory looks like, and the allocator's page faults."""

from __future__ import annotations

import pytest
import torch

from src.training import TrainingError, is_out_of_memory, pick_device, pick_precision


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


def test_what_a_lack_of_memory_looks_like() -> None:
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**60, dtype=torch.uint8)
    for error in (real.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")):
        assert is_out_of_memory(error)
    for other in (RuntimeError("shape mismatch"), ValueError("not enough memory")):
        assert not is_out_of_memory(other)

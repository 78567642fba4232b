"""What is recognised as a lack of memory, and which batch size is suggested then."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from resnet import BasicBlock, ResNet
from src.training import advice, is_out_of_memory, out_of_memory

SHAPE = (3, 32, 32)


def network() -> ResNet:
    return ResNet(BasicBlock, [1, 1, 1], widths=(4, 8, 16))


def test_what_a_lack_of_memory_looks_like() -> None:
    real = None
    try:
        torch.empty(2**60, dtype=torch.uint8)
    except RuntimeError as error:
        real = error
    assert real is not None
    for error in (real, MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")):
        assert is_out_of_memory(error)
    for other in (RuntimeError("shape mismatch"), ValueError("not enough memory")):
        assert not is_out_of_memory(other)


def test_on_a_cpu_the_half_is_suggested() -> None:
    said = advice(512, network(), SHAPE, torch.float32)
    said_before, _, remedy = said.partition("; ")
    assert said_before == "the memory of cpu does not hold a batch of 512 images"
    assert remedy == "try batches of 256: --batch-size 256, or BATCH_SIZE = 256"
    assert "try batches of 2:" in advice(3, network(), SHAPE, torch.float32)
    assert advice(2, network(), SHAPE, torch.float32).endswith("end other programs, or use another device")


@pytest.mark.parametrize(
    ("bytes_per_image", "free", "suggested"),
    [
        (2**20, 2**30, 512),  # 0.8 of 1024 MiB hold 819 images of 1 MiB: the first power of two below is 512
        (2**20, 2**40, 2048),  # room for all, and yet 4096 did not fit: the half
        (2**20, 2**24, 8),  # 0.8 of 16 MiB hold 12 images
        (2**30, 2**20, 2),  # not even one: the smallest there is
        (0, 2**30, 2048),  # it could not be measured
    ],
)
def test_on_cuda_the_suggestion_fits_into_what_is_free(
    bytes_per_image: float, free: int, suggested: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OnCuda:
        """The only thing that is asked of the network here."""

        def parameters(self) -> Any:
            return iter([type("P", (), {"device": torch.device("cuda")})()])

    monkeypatch.setattr(out_of_memory, "_measure", lambda *_: (bytes_per_image, free))
    said = advice(4096, OnCuda(), SHAPE, torch.float32)  # type: ignore[arg-type]
    assert f"try batches of {suggested} (" in said
    assert f"--batch-size {suggested}, or BATCH_SIZE = {suggested}" in said


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_suggestion_that_was_measured_fits() -> None:
    device = torch.device("cuda")
    model = network().to(device)
    free = torch.cuda.mem_get_info()[0]
    blocker = torch.empty(int(free * 0.97), dtype=torch.uint8, device=device)
    said = advice(2**20, model, SHAPE, torch.float32)
    count = int(said.rpartition("= ")[2])
    assert 2 < count < 2**19
    model(torch.zeros(count, *SHAPE, device=device)).sum().backward()
    del blocker

"""What is recognised as a lack of memory, which batch size is suggested then, and what is said of a diverged run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from src.training import (
    EpochMeans,
    Objective,
    Step,
    StepLosses,
    TrainingError,
    batch_size_advice,
    failures,
    is_out_of_memory,
    measure_epoch,
    train_epoch,
)
from tests.training.small import images, network, optimizer_of, quantized

SHAPE = (3, 32, 32)
SETTINGS: dict[str, Any] = {"epochs": 3, "batch_size": 16, "lr_lambda": lambda progress: 0.0}


def test_a_weight_that_is_not_finite_stops_the_run_and_is_named() -> None:
    """The rate is 0, so that the step before the check does not spread it."""
    model = quantized()
    model.get_submodule("layer2.0.bn1").get_parameter("weight").data[3] = math.nan
    with pytest.raises(TrainingError, match=r"loss is nan at epoch 3, step 1 .*: weight layer2\.0\.bn1\.weight"):
        list(train_epoch(model, optimizer_of(model), images(), Objective(), epoch=2, coefficient=0.0, **SETTINGS))


def test_an_infinite_loss_is_found_in_its_own_step_on_a_cpu() -> None:
    model, calls = quantized(), []

    def penalty(_: nn.Module) -> Tensor:
        calls.append(1)
        return torch.tensor(math.inf if len(calls) >= 3 else 1.0)

    message = r"loss is inf at epoch 1, step 3 .*none of inputs, weights and .*; lower the"
    with pytest.raises(TrainingError, match=message):
        list(
            train_epoch(model, optimizer_of(model), images(), Objective(penalty), epoch=0, coefficient=1.0, **SETTINGS)
        )


def test_a_network_broken_by_the_last_update_gives_no_record() -> None:
    model, means = quantized(), EpochMeans()
    model.linear.bias.data.fill_(math.nan)
    means.add(Step(0, 1, 8, StepLosses(*torch.ones(5))))
    with pytest.raises(TrainingError, match=r"test loss is nan after epoch 1; .*linear\.bias"):
        measure_epoch(model, optimizer_of(model), images(), means, epoch=0, coefficient=0.0, seconds=0.0)


def test_what_a_lack_of_memory_looks_like() -> None:
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**60, dtype=torch.uint8)
    for error in (real.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")):
        assert is_out_of_memory(error)
    for other in (RuntimeError("shape mismatch"), ValueError("not enough memory")):
        assert not is_out_of_memory(other)


def test_on_a_cpu_the_half_is_suggested() -> None:
    model = network()
    assert batch_size_advice(512, model, SHAPE, torch.float32) == (
        "the memory of cpu does not hold a batch of 512 images; try batches of 256: --batch-size 256, or BATCH_SIZE = "
        "256"
    )
    assert "try batches of 2:" in batch_size_advice(3, model, SHAPE, torch.float32)
    assert batch_size_advice(2, model, SHAPE, torch.float32).endswith("end other programs, or use another device")


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

    monkeypatch.setattr(failures, "_measure", lambda *_: (bytes_per_image, free))
    said = batch_size_advice(4096, OnCuda(), SHAPE, torch.float32)  # type: ignore[arg-type]
    assert f"try batches of {suggested} (" in said
    assert f"--batch-size {suggested}, or BATCH_SIZE = {suggested}" in said


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_suggestion_that_was_measured_fits() -> None:
    device = torch.device("cuda")
    model = network().to(device)
    blocker = torch.empty(int(torch.cuda.mem_get_info()[0] * 0.97), dtype=torch.uint8, device=device)
    count = int(batch_size_advice(2**20, model, SHAPE, torch.float32).rpartition("= ")[2])
    assert 2 < count < 2**19
    model(torch.zeros(count, *SHAPE, device=device)).sum().backward()
    del blocker

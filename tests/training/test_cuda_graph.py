"""A recorded step gives the numbers of an eager one; that needs a CUDA device, the last tests do not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from experiments import pipeline
from experiments.pipeline import TrainingLoop, configure
from experiments.sparsity import coupled_group_lasso
from resnet import ResNet
from src.training import GraphedStep, Objective, StepLosses, cuda_graph, repeatable, train_step
from tests.reliability.small_run import differences, train
from tests.training.small import optimizer_of, quantized
from utils_quantization import quantization

on_cuda = pytest.mark.cuda
CUDA = torch.device("cuda")
Step = Callable[..., StepLosses]


@pytest.fixture
def ordered_sums() -> Iterator[None]:
    """The process as a run prepares it, and as it was afterwards."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    repeatable(CUDA)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def network() -> ResNet:
    return quantized().to(CUDA).train()


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    drawn = torch.Generator().manual_seed(2)
    return [
        (torch.randn(n, 3, 32, 32, generator=drawn).to(CUDA), torch.randint(10, (n,), generator=drawn).to(CUDA))
        for n in sizes
    ]


def trained(model: nn.Module, step: Step, sizes: list[int], coefficients: list[float]) -> list[list[float]]:
    """The parts of every step's loss; `model` is trained in place."""
    optimizer, objective = optimizer_of(model), Objective(coupled_group_lasso(model), 0.01, 0.01)
    rows = []
    for (images, labels), coefficient in zip(batches(*sizes), coefficients, strict=True):
        losses = step(model, optimizer, images, labels, objective, coefficient)
        rows.append([float(part) for part in vars(losses).values()])
    return rows


@on_cuda
def test_recorded_steps_equal_eager_ones(ordered_sums: None) -> None:
    """Two shapes of batch, with and without the penalty: four recordings, used in turns. Bit for bit.

    Recording changes neither BatchNorm's averages nor the random numbers that come after it.
    """
    sizes, coefficients = [16, 16, 8, 8, 16, 8, 16], [0.0, 0.1, 0.1, 0.0, 0.2, 0.3, 0.0]
    eager, recorded, step = network(), network(), GraphedStep()
    random = torch.cuda.get_rng_state()
    assert trained(eager, train_step, sizes, coefficients) == trained(recorded, step, sizes, coefficients)
    assert torch.equal(torch.cuda.get_rng_state(), random)
    for (name, a), b in zip(eager.state_dict().items(), recorded.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert len(step._recordings) == 4
    assert not step.failure


@on_cuda
def test_switched_quantizers_are_recorded_anew(ordered_sums: None) -> None:
    found = []
    for step in (train_step, GraphedStep()):
        model = network()
        optimizer, losses = optimizer_of(model), []
        for enabled in (True, False, True):
            with quantization(model, enabled):
                losses.append(float(step(model, optimizer, *batches(16)[0], Objective(), 0.0).task))
        found.append(losses)
    assert found[0] == found[1]


@on_cuda
def test_a_step_that_cannot_be_recorded_runs_eagerly() -> None:
    class Deciding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3 * 32 * 32, 10)

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.linear(x.flatten(1))
            return scores if float(scores.detach().mean()) > 1e9 else 2 * scores  # waits for the device

    told: list[str] = []
    assert_same_losses(Deciding().to(CUDA), GraphedStep(told.append), *batches(8)[0])
    assert len(told) == 1
    assert "cannot be recorded as a CUDA graph" in told[0]


@on_cuda
@pytest.mark.parametrize("recorded", [False, True])
def test_a_step_does_not_wait_for_the_device(recorded: bool) -> None:
    model, step = network(), GraphedStep() if recorded else train_step
    optimizer, objective = optimizer_of(model), Objective(coupled_group_lasso(model), 0.01, 0.01)
    images, labels = batches(16)[0]
    for _ in range(2):  # the first makes what is kept
        step(model, optimizer, images, labels, objective, 0.1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = step(model, optimizer, images, labels, objective, 0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(losses.total)


def small_run(seed: int = 0) -> pipeline.Run:
    config = configure("smoke", data="digits", device="cuda", epochs=3, limit=144, delay=1, ramp=1, seed=seed)
    return pipeline.build_run(*pipeline.prepare_data(config))


@on_cuda
@pytest.mark.parametrize("steps", [1, 3, 7])
def test_a_resumed_run_ends_with_the_same_bits(ordered_sums: None, tmp_path: Path, steps: int) -> None:
    """144 images in batches of 48, 3 steps an epoch: stopped within the first, at its end, within the third."""
    unbroken, taken = small_run(), list[object]()
    train(TrainingLoop.open(unbroken, tmp_path / "unbroken"))

    def stop(step: object) -> None:
        taken.append(step)
        if len(taken) == steps:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(TrainingLoop.open(small_run(), tmp_path / "parts"), stop)
    resumed = small_run(seed=7)  # other weights: they all come from the checkpoint
    resumed.config = unbroken.config
    train(TrainingLoop.open(resumed, tmp_path / "parts", resume=True))
    assert differences(tmp_path / "parts", tmp_path / "unbroken", command=False) == []


def assert_same_losses(model: nn.Module, step: Step, images: Tensor, labels: Tensor) -> None:
    """Three steps of `step` give the losses of three eager ones."""
    losses = []
    for net, step_fn in ((copy.deepcopy(model), train_step), (model, step)):
        optimizer = optimizer_of(net)
        losses.append([float(step_fn(net, optimizer, images, labels, Objective(), 0.0).total) for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1])


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Recording fails with the error that is put here; afterwards the list has one entry more per attempt."""
    attempts: list[object] = []

    def refuse(*arguments: object) -> None:
        attempts.append(arguments)
        raise attempts[0]  # type: ignore[misc]

    monkeypatch.setattr(cuda_graph, "_record", refuse)
    return attempts


@pytest.fixture
def plain() -> tuple[nn.Module, Tensor, Tensor]:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 10)), torch.randn(4, 3, 2, 2), torch.randint(10, (4,))


def test_where_recording_fails_steps_are_eager(refused: list[object], plain: tuple[nn.Module, Tensor, Tensor]) -> None:
    """That costs speed alone, except where the memory is too small for a batch: that is the user's to know."""
    refused.append(RuntimeError("not permitted\ndetails"))
    told: list[str] = []
    assert_same_losses(plain[0], GraphedStep(told.append), *plain[1:])
    assert len(refused) == 2
    assert told == ["this step cannot be recorded as a CUDA graph and runs without one: not permitted"]
    refused[:] = [torch.OutOfMemoryError("none left")]
    with pytest.raises(torch.OutOfMemoryError):
        GraphedStep()(plain[0], optimizer_of(plain[0]), *plain[1:], Objective(), 0.0)


def test_hooks_run_in_every_step(refused: list[object], plain: tuple[nn.Module, Tensor, Tensor]) -> None:
    """The doctor puts hooks on the network for one step of an epoch; a replay would run none of them."""
    refused.append(RuntimeError("not permitted"))
    (model, *batch), seen = plain, list[int]()
    step, optimizer = GraphedStep(), optimizer_of(model)
    hook = model.get_submodule("1").register_forward_hook(lambda *_: seen.append(1))
    step(model, optimizer, *batch, Objective(), 0.0)
    hook.remove()
    assert (len(seen), len(refused)) == (1, 1)
    step(model, optimizer, *batch, Objective(), 0.0)
    assert (len(seen), len(refused)) == (1, 2)


def test_only_a_cuda_device_records() -> None:
    config = configure("smoke", data="digits", device="cpu", limit=48)
    run = pipeline.build_run(*pipeline.prepare_data(config))
    assert run.step_fn is None
    assert isinstance(replace(run, device=CUDA).step_fn, GraphedStep), "the notebook builds its run by hand"
    assert not torch.are_deterministic_algorithms_enabled()

"""A compiled step gives the numbers of an eager one but for rounding, and leaves a run and its files as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.utils import counters

from experiments import pipeline
from experiments.pipeline import TrainingLoop, configure
from experiments.sparsity import coupled_group_lasso
from resnet import NETWORKS
from src.runs import CHECKPOINT, load_checkpoint
from src.training import CompiledGradients, Objective, StepLosses, compiled, train_step
from tests.reliability.small_run import differences, tiny, train
from tests.training.small import batch, optimizer_of, quantized

SIZE, COEFFICIENTS = 8, [0.0, 0.1, 0.2]
Gradients = Callable[..., StepLosses]


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch._dynamo.reset()
    counters.clear()


def rows(model: nn.Module, gradients: Gradients | None) -> list[list[float]]:
    """The parts of the losses of some steps; `model` is trained in place."""
    optimizer, objective = optimizer_of(model), Objective(coupled_group_lasso(model), 0.01, 0.01)
    found = []
    for coefficient in COEFFICIENTS:
        losses = train_step(model, optimizer, *batch(SIZE), objective, coefficient, gradients=gradients)
        found.append([float(part) for part in vars(losses).values()])
    return found


def test_compiled_steps_equal_eager_ones() -> None:
    """Without the penalty and with it: two compilations, each said once, and none for another coefficient."""
    told: list[str] = []
    eager, model, step = quantized().train(), quantized().train(), CompiledGradients(told.append, "aot_eager")
    assert rows(model, step) == [pytest.approx(row, rel=1e-5) for row in rows(eager, None)]
    assert not step.failure
    assert [line.partition(" in ")[0] for line in told] == 2 * ["compiled the step for batches of 8"]
    assert len(counters["graph_break"]) == 1, "where backward begins: the network is in one piece"
    assert counters["stats"]["unique_graphs"] == 4, "for each, what precedes backward and what follows it"
    assert list(model.state_dict()) == list(eager.state_dict())
    for own, other in zip(model.state_dict().values(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(own, other)


def test_a_hook_is_called() -> None:
    """The doctor puts hooks on the network for one step of an epoch; a compiled step would call none of them."""
    model, seen, told = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)), list[int](), list[str]()
    step = CompiledGradients(told.append, "eager")
    for hooked in (False, True, False):
        hook = model[1].register_forward_hook(lambda *_: seen.append(1)) if hooked else None
        step(model, *batch(), Objective(), 0.0)
        if hook:
            hook.remove()
    assert (len(seen), len(told), counters["stats"]["unique_graphs"]) == (1, 1, 2)


def test_what_cannot_be_compiled_runs_as_it_is() -> None:
    """As where there is no C++ compiler. Too little memory is the user's to know."""

    def fail(error: Exception) -> CompiledGradients:
        def backend(*_: object) -> None:
            raise error

        return CompiledGradients(told.append, backend)  # type: ignore[arg-type]

    told: list[str] = []
    assert rows(quantized().train(), fail(FileNotFoundError("no g++"))) == rows(quantized().train(), None)
    assert len(told) == 1
    assert told[0].startswith("this step cannot be compiled and runs without: ")
    assert "no g++" in told[0]


@pytest.mark.slow
def test_a_compiled_run_is_resumed_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its checkpoint is that of any other run, so that it can be read, and continued without a compiler."""

    class Quick(CompiledGradients):
        def __init__(self, notify: Callable[[str], None]) -> None:
            super().__init__(notify, "eager")

    def run(**changes: object) -> pipeline.Run:
        changes |= {"epochs": 1, "limit": 30, "batch_size": 15, "delay": 0, "precision": "fp32", "device": "cpu"}
        return pipeline.build_run(*pipeline.prepare_data(configure("smoke", **changes)))

    def stop(step: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(NETWORKS, "resnet20", tiny)
    monkeypatch.setattr(compiled, "CompiledGradients", Quick)
    train(TrainingLoop.open(run(compile=True), tmp_path / "unbroken"))
    with pytest.raises(KeyboardInterrupt):
        train(TrainingLoop.open(run(compile=True), tmp_path / "parts"), stop)
    train(TrainingLoop.open(run(compile=True), tmp_path / "parts", resume=True))
    assert counters["stats"]["unique_graphs"] > 0
    assert differences(tmp_path / "parts", tmp_path / "unbroken", command=False) == []
    eager = run()
    assert list(load_checkpoint(tmp_path / "parts" / CHECKPOINT)["model"]) == list(eager.model.state_dict())
    TrainingLoop.open(eager, tmp_path / "parts", resume=True)

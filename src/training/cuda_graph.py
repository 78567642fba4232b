"""A training step recorded once as a CUDA graph and replayed: a small network on a GPU waits for launches otherwise.

A step of ResNet-20 is more than a thousand kernels of a few microseconds, and Python starts them more slowly than the
GPU finishes them. A graph starts all of them at once. Forward pass, losses and backward pass are recorded; the update
is the optimizer's own, so that its rates, hooks and state are as without a graph. Axis letters: N batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from src.training.epoch_means import StepLosses
from src.training.step import Objective, step_gradients, train_step

WARM_UP = 3  # eager passes before a recording, in which libraries choose algorithms and allocate workspaces


@dataclass(frozen=True)
class _Recording:
    """A graph and the memory it reads and writes. gradients: of the parameters, in the model's order."""

    graph: torch.cuda.CUDAGraph
    images: Tensor
    labels: Tensor
    coefficient: Tensor
    losses: StepLosses
    gradients: list[Tensor | None]


class GraphedStep:
    """`train_step` for one model on a CUDA device, to be called with the same arguments and giving the same numbers.

    A recording is made for every shape of batch and whatever else changes what is computed: whether the penalty counts,
    the precision, training mode, which quantizers are on, which parameters learn. The model must do the same in every
    step: a forward pass that decides by the values of a tensor cannot be recorded, and is run as `train_step` does,
    which `report` hears once. A replay runs no Python, so while a module has a hook, to watch it or to change what
    passes, steps are those of `train_step`, too.
    """

    def __init__(self, report: Callable[[str], None] = lambda line: None) -> None:
        self._report = report
        self._recordings: dict[Any, _Recording] = {}
        self._model: nn.Module | None = None
        self.failure = ""

    def __call__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        images: Tensor,
        labels: Tensor,
        objective: Objective,
        coefficient: float,
        precision: torch.dtype = torch.float32,
    ) -> StepLosses:
        """One update on one batch; see `train_step`."""
        if self.failure or any(map(_is_hooked, model.modules())):
            return train_step(model, optimizer, images, labels, objective, coefficient, precision)
        if model is not self._model:
            self._recordings.clear()
            self._model = model
        parameters = list(model.parameters())
        key = self._key(model, parameters, images, labels, objective, coefficient, precision)
        if key not in self._recordings:
            try:
                self._recordings[key] = _record(model, images, labels, objective, coefficient, precision)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.failure = str(error).splitlines()[0]
                self._recordings.clear()
                self._report(f"this step cannot be recorded as a CUDA graph and runs without one: {self.failure}")
                return train_step(model, optimizer, images, labels, objective, coefficient, precision)
        recording = self._recordings[key]
        recording.images.copy_(images)
        recording.labels.copy_(labels)
        recording.coefficient.fill_(coefficient)
        recording.graph.replay()
        for parameter, gradient in zip(parameters, recording.gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        return StepLosses(*(part.clone() for part in vars(recording.losses).values()))

    @staticmethod
    def _key(model: nn.Module, parameters: list[nn.Parameter], images: Tensor, labels: Tensor, *rest: Any) -> Any:
        objective, coefficient, precision = rest
        batch = images.shape, images.stride(), images.dtype, labels.shape
        learned = tuple((p.data_ptr(), p.requires_grad) for p in parameters)
        modes = tuple((module.training, getattr(module, "enabled", None)) for module in model.modules())
        return batch, objective, bool(coefficient), precision, learned, modes


def _is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    )


def _record(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    objective: Objective,
    coefficient: float,
    precision: torch.dtype,
) -> _Recording:
    images, labels = images.clone(), labels.clone()
    weight = torch.full((), float(coefficient), device=images.device)

    def take() -> StepLosses:
        for parameter in model.parameters():
            parameter.grad = None
        return step_gradients(model, images, labels, objective, weight if coefficient else 0.0, precision)

    with _undone(model, images.device):
        stream = torch.cuda.Stream(images.device)
        stream.wait_stream(torch.cuda.current_stream(images.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                take()
        torch.cuda.current_stream(images.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        losses = take()
    return _Recording(graph, images, labels, weight, losses, [p.grad for p in model.parameters()])


@contextmanager
def _undone(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Afterwards buffers (BatchNorm's averages) and the device's random numbers are what they were."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    random = torch.cuda.get_rng_state(device)
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        torch.cuda.set_rng_state(random, device)

"""A training step recorded once as a CUDA graph and replayed: a small network on a GPU waits for launches otherwise.

A step of ResNet-20 is more than a thousand kernels of a few microseconds, and Python starts them more slowly than the
GPU finishes them. A graph starts all of them at once. Forward pass, losses and backward pass are recorded; the update
is the optimizer's own, so that its rates, hooks and state are as without a graph. Axis letters: N batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from src.storage import Notify
from src.training.step import Gradients, Objective, StepLosses, is_hooked, step_gradients, train_step

WARM_UP = 3  # eager passes before a recording, in which libraries choose algorithms and allocate workspaces


Replay = Callable[[Tensor, Tensor, float], StepLosses]
"""Leaves the gradients of a batch in the parameters and returns its losses; takes images, labels, coefficient."""


class GraphedStep:
    """`train_step` for one model on a CUDA device, to be called with the same arguments and giving the same numbers.

    A recording is made for whatever changes what is computed (`_key`). A forward pass that decides by the values of a
    tensor cannot be recorded; its steps are those of `train_step`, and `notify` is told once. A replay runs no Python,
    so while a module has a hook, steps are those of `train_step`, too. gradients: what is recorded.
    """

    def __init__(self, notify: Notify = lambda line: None, gradients: Gradients = step_gradients) -> None:
        self._notify, self._gradients = notify, gradients
        self._unrecorded = partial(train_step, gradients=gradients)
        self._recordings: dict[Any, Replay] = {}
        self.failure = ""

    def __call__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *arguments: Any) -> StepLosses:
        """One update on one batch; the arguments are those of `train_step`."""
        if self.failure or is_hooked(model):
            return self._unrecorded(model, optimizer, *arguments)
        key = _key(model, *arguments)
        if key not in self._recordings:
            try:
                self._recordings[key] = _record(self._gradients, model, *arguments)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.failure = str(error).splitlines()[0]
                self._recordings.clear()
                self._notify(f"this step cannot be recorded as a CUDA graph and runs without one: {self.failure}")
                return self._unrecorded(model, optimizer, *arguments)
        images, labels, _, coefficient, *_ = arguments
        losses = self._recordings[key](images, labels, coefficient)
        optimizer.step()
        return losses


def _key(model: nn.Module, images: Tensor, labels: Tensor, objective: Objective, coefficient: float, *rest: Any) -> Any:
    """Whatever decides which kernels a step runs, on which memory."""
    trained = tuple((p.data_ptr(), p.requires_grad) for p in model.parameters())
    modes = tuple((module.training, getattr(module, "enabled", None)) for module in model.modules())
    batch = (images.shape, images.stride(), images.dtype, labels.shape)
    return batch, objective, bool(coefficient), rest, trained, modes


def _record(
    gradients_of: Gradients,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    objective: Objective,
    coefficient: float,
    precision: torch.dtype = torch.float32,
) -> Replay:
    weight = torch.full((), float(coefficient), dtype=torch.float32, device=images.device)
    held = (images.clone(), labels.clone(), weight)

    def losses_and_gradients() -> StepLosses:
        model.zero_grad(set_to_none=True)
        return gradients_of(model, *held[:2], objective, held[2] if coefficient else 0.0, precision)

    # The passes before the recording leave no trace in buffers (BatchNorm's averages) and random numbers.
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    random = torch.cuda.get_rng_state(images.device)
    stream = torch.cuda.Stream(images.device)
    stream.wait_stream(torch.cuda.current_stream(images.device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            losses_and_gradients()
    torch.cuda.current_stream(images.device).wait_stream(stream)
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
    torch.cuda.set_rng_state(random, images.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        losses = losses_and_gradients()
    gradients = [parameter.grad for parameter in model.parameters()]

    def replay(images: Tensor, labels: Tensor, coefficient: float) -> StepLosses:
        held[0].copy_(images)
        held[1].copy_(labels)
        held[2].fill_(coefficient)
        graph.replay()
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        return StepLosses(*(part.clone() for part in vars(losses).values()))

    return replay

"""A step's losses and gradients compiled by torch.compile: one kernel where PyTorch starts several.

What is compiled is `step_gradients` as it stands: BatchNorm, ReLU and add become one pass over the memory, and so do
the quantizers of all layers. It takes from seconds to minutes, once for every shape of batch, with and without penalty,
and PyTorch needs a C++ compiler for it, on a GPU Triton. On a GPU the compiled step is then recorded (`GraphedStep`).
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from src.storage import Notify
from src.training.cuda_graph import GraphedStep
from src.training.devices import is_out_of_memory
from src.training.step import Objective, StepFunction, StepLosses, is_hooked, step_gradients, train_step


class CompiledGradients:
    """`step_gradients` compiled; its numbers are the same but for rounding.

    `notify` is told how long each compilation took. A step that cannot be compiled runs as it is, and `notify` is told
    once; so does a step whose network has a hook, which the compiled one would not call.
    """

    def __init__(self, notify: Notify, backend: str = "inductor") -> None:
        self._notify = notify
        self._compiled: Any = torch.compile(step_gradients, dynamic=False, backend=backend)
        self._kinds: set[Any] = set()
        self.failure = ""

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        objective: Objective,
        coefficient: float | Tensor,
        precision: torch.dtype = torch.float32,
    ) -> StepLosses:
        """Losses and gradients of a batch; the arguments are those of `step_gradients`."""
        given = (model, images, labels, objective, coefficient, precision)
        if self.failure or is_hooked(model):
            return step_gradients(*given)
        if not isinstance(coefficient, Tensor) and coefficient:  # a number would be compiled in
            coefficient = torch.full((), coefficient, dtype=torch.float32, device=images.device)
        step = partial(self._compiled, model, images, labels, objective, coefficient, precision)
        kind = (images.shape, isinstance(coefficient, Tensor))
        if kind in self._kinds:
            return step()
        try:
            losses = self._compile(step, model, objective)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self.failure = " ".join(str(error).splitlines()[:2])
            self._notify(f"this step cannot be compiled and runs without: {self.failure}")
            return step_gradients(*given)
        self._kinds.add(kind)
        return losses

    def _compile(self, step: partial[StepLosses], model: nn.Module, objective: Objective) -> StepLosses:
        if objective.penalty:
            with torch.no_grad():
                objective.penalty(model)  # what it keeps from its first call would be a reason to compile again
        began = time.perf_counter()
        losses = step()
        self._notify(f"compiled the step for batches of {len(step.args[1])} in {time.perf_counter() - began:.0f} s")
        return losses


def fast_step(device: torch.device, compiled: bool, notify: Notify) -> StepFunction | None:
    """What a training step does on `device`; None for `train_step` as it is."""
    gradients = CompiledGradients(notify) if compiled else step_gradients
    if device.type == "cuda":
        return GraphedStep(notify, gradients)
    return partial(train_step, gradients=gradients) if compiled else None

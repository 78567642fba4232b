"""One real step of a pipeline, watched: what it reported, the gradients its optimizer saw, what it changed.

Axis letters: N batch, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from experiments.doctor.core.objective import Gradients, plain
from experiments.doctor.pipeline import Pipeline, step_losses
from experiments.doctor.runner import RAISED, PartFailed
from src.training import StepLosses
from utils_quantization import FakeQuantParametrization

Norm = nn.modules.batchnorm._NormBase


@dataclass
class StepTrace:
    """What one step did. Tensors are float64 on the CPU, by name.

    gradients: as the optimizer's update found them (None where there was none); updates: how many it made. means: what
    each BatchNorm saw in its first training pass, (C,). modes: BatchNorm's modes during the pass, quantizers' switches.
    """

    losses: StepLosses | None = None
    returned: Any = None
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    updates: int = 0
    before: Gradients = field(default_factory=dict)
    after: Gradients = field(default_factory=dict)
    norms_in_eval: set[str] = field(default_factory=set)
    means: dict[str, Tensor] = field(default_factory=dict)
    quantizers_off: set[str] = field(default_factory=set)
    quantizers_seen: set[str] = field(default_factory=set)
    modes_changed: bool = False
    inside: bool = False  # whether the update itself calls backward, as LBFGS does with its closure
    images: Tensor | None = None  # that the network read first


def watched_step(pipeline: Pipeline, images: Tensor, labels: Tensor, coefficient: float) -> StepTrace:
    """Take one step and watch it. Raises PartFailed where the step raises. The caller restores the state."""
    seen = StepTrace()
    seen.before = state_of_parts(pipeline.model)
    modes = {module: module.training for module in pipeline.model.modules()}
    with watching_step(pipeline, seen):
        try:
            seen.returned = pipeline.take_step(images, labels, coefficient)
            seen.losses = step_losses(seen.returned)
        except RAISED as error:
            raise PartFailed("step-raises", error) from error
    if not any(g is not None for g in seen.gradients.values()):
        # No torch optimizer, no update, or one that calls backward itself: what backward left behind.
        seen.inside = seen.updates > 0
        seen.gradients = gradients_left(pipeline.model)
    seen.after = state_of_parts(pipeline.model)
    seen.modes_changed = any(module.training != training for module, training in modes.items())
    return seen


def state_of_parts(model: nn.Module) -> Gradients:
    """All parameters and buffers by name, float64 on the CPU."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: plain(tensor) for name, tensor in tensors.items()}


def gradients_left(model: nn.Module) -> dict[str, Tensor | None]:
    """The gradient of every trainable parameter, None where it has none."""
    return {n: None if p.grad is None else plain(p.grad) for n, p in model.named_parameters() if p.requires_grad}


@contextmanager
def watching_step(pipeline: Pipeline, seen: StepTrace) -> Iterator[None]:
    """Inside, what one step of the pipeline does is written down in `seen`."""
    handles: list[Any] = []

    def before_update(*_: Any) -> None:
        # A wrapper's step() calls the wrapped one: what that sees counts, as long as nothing has moved yet.
        own = dict(pipeline.model.named_parameters())
        if seen.updates and any(not torch.equal(plain(p), seen.before[n]) for n, p in own.items()):
            seen.updates += 1
            return
        seen.updates = 1
        seen.gradients = gradients_left(pipeline.model)

    if isinstance(pipeline.optimizer, torch.optim.Optimizer):
        handles.append(pipeline.optimizer.register_step_pre_hook(before_update))

    def read(module: nn.Module, inputs: Any) -> None:
        if seen.images is None and inputs and isinstance(inputs[0], Tensor):
            seen.images = inputs[0].detach().clone()

    handles.append(pipeline.model.register_forward_pre_hook(read))
    for name, module in pipeline.model.named_modules():
        if isinstance(module, Norm):
            handles.append(module.register_forward_pre_hook(_norm_hook(seen, name)))
        elif isinstance(module, FakeQuantParametrization):
            handles.append(module.register_forward_pre_hook(_quantizer_hook(seen, name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _norm_hook(seen: StepTrace, name: str) -> Any:
    def look(module: nn.Module, inputs: Any) -> None:
        if not torch.is_grad_enabled():
            return
        if not module.training:
            seen.norms_in_eval.add(name)
        elif name not in seen.means:
            x = inputs[0].detach().float()
            seen.means[name] = plain(x.mean([dim for dim in range(x.dim()) if dim != 1]))

    return look


def _quantizer_hook(seen: StepTrace, name: str) -> Any:
    layer = name.partition(".parametrizations")[0]

    def look(module: nn.Module, inputs: Any) -> None:
        if torch.is_grad_enabled():
            seen.quantizers_seen.add(layer)
            if not module.enabled:
                seen.quantizers_off.add(layer)

    return look

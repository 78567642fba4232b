"""What a pipeline reported of itself, and what passed through its network while it measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from experiments.doctor.observe import Norm
from experiments.doctor.runner import PartFailed
from experiments.evaluator import EvalResult
from src.training import History
from utils_quantization import FakeQuantParametrization


@dataclass
class Seen:
    """What passed through the network while it was measured."""

    images: int = 0
    training: bool = False
    quantizers_off: bool = False
    handles: list[Any] = field(default_factory=list)


@dataclass
class Reported:
    """The figures under test. checkpoint: of the last epoch; history: all records; result, accuracy: the evaluation."""

    checkpoint: Path | None = None
    history: History | None = None
    result: EvalResult | None = None
    accuracy: float | None = None
    seen: Seen | None = None
    changed: bool = False
    error: PartFailed | None = None


@contextmanager
def watching(model: nn.Module) -> Iterator[Seen]:
    """Count the images that pass, and note BatchNorm in training mode and quantizers that are off."""
    seen = Seen()

    def count(module: nn.Module, inputs: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor) and not isinstance(inputs[0], torch.fx.Proxy):
            seen.images += len(inputs[0])

    def look(module: nn.Module, inputs: Any) -> None:
        seen.training |= module.training

    def switch(module: nn.Module, inputs: Any) -> None:
        seen.quantizers_off |= not cast(Any, module).enabled

    seen.handles = [model.register_forward_pre_hook(count)]
    for module in model.modules():
        if isinstance(module, Norm):
            seen.handles.append(module.register_forward_pre_hook(look))
        elif isinstance(module, FakeQuantParametrization):
            seen.handles.append(module.register_forward_pre_hook(switch))
    try:
        yield seen
    finally:
        for handle in seen.handles:
            handle.remove()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_state(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether two state dicts have the same names and equal tensors, bit for bit."""
    return left.keys() == right.keys() and all(equal_tensors(left[name], right[name]) for name in left)


def equal_tensors(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have the same shape and values, on whatever device."""
    return left.shape == right.shape and torch.equal(left.cpu(), right.cpu())

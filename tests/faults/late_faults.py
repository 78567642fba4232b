"""Faults that begin in mid-run: the first steps are whole, and a later one is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from experiments.doctor import Pipeline
from experiments.doctor import pipeline as parts_of
from experiments.notebook.demonstration import Fault
from src import training
from tests.faults.step_faults import after_each
from utils_quantization import toggle_quantization


def from_epoch(number: int, change: Callable[[Pipeline], Pipeline]) -> Callable[[Pipeline], Pipeline]:
    """The pipeline whose loop trains `change(pipeline)` from epoch `number` on, counted from 1."""

    def apply(pipeline: Pipeline) -> Pipeline:
        def train_epoch(s: Pipeline, epoch: int) -> Iterator[training.Step]:
            yield from parts_of.run_epoch(change(s) if epoch + 1 >= number else s, epoch)

        return replace(pipeline, train_epoch=train_epoch)

    return apply


def around_epoch(
    before: Callable[[Pipeline, int], Any], after: Callable[[Pipeline, int], Any] = lambda s, epoch: None
) -> Callable[[Pipeline], Pipeline]:
    """The pipeline whose loop does something before and after the steps of every epoch (from 0)."""

    def apply(pipeline: Pipeline) -> Pipeline:
        def train_epoch(s: Pipeline, epoch: int) -> Iterator[training.Step]:
            before(s, epoch)
            yield from parts_of.run_epoch(s, epoch)
            after(s, epoch)

        return replace(pipeline, train_epoch=train_epoch)

    return apply


def frozen(*words: str) -> Callable[[Pipeline], Pipeline]:
    """Parameters whose names hold one of `words` no longer require a gradient."""

    def change(pipeline: Pipeline) -> Pipeline:
        for name, p in pipeline.model.named_parameters():
            if any(word in name for word in words):
                p.requires_grad_(False)
        return pipeline

    return change


class NoUpdate:
    """An optimizer that forgets to step."""

    def __init__(self, of: torch.optim.Optimizer) -> None:
        self.of = of

    def zero_grad(self, **options: Any) -> None:
        self.of.zero_grad(**options)

    def step(self) -> None: ...


def without_update(pipeline: Pipeline) -> Pipeline:
    step = pipeline.step
    return replace(pipeline, step=lambda model, optimizer, *rest: step(model, NoUpdate(optimizer), *rest))  # type: ignore[arg-type]


def without_squares(pipeline: Pipeline) -> Pipeline:
    return replace(pipeline, objective=replace(pipeline.objective, lambda_dz=0.0, lambda_bit=0.0))


def labels_mixed(pipeline: Pipeline) -> Pipeline:
    step = pipeline.step

    def mixed(model: Any, optimizer: Any, images: Tensor, labels: Tensor, *rest: Any) -> Any:
        return step(model, optimizer, images, labels.roll(1), *rest)

    return replace(pipeline, step=mixed)


def three_times_the_coefficient(pipeline: Pipeline) -> Pipeline:
    given = pipeline.coefficient
    return replace(pipeline, coefficient=lambda epoch: 3 * given(epoch))


@torch.no_grad()
def clamped(model: torch.nn.Module, _: Any) -> None:
    for name, p in model.named_parameters():
        if name.endswith(("logit_dz", "logit_bit")):
            p.clamp_(min=2.7)


def averaged(pipeline: Pipeline) -> Pipeline:
    """A running average of the weights takes their place after every epoch."""
    kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def follow(model: torch.nn.Module, _: Any) -> None:
        for name, p in model.named_parameters():
            kept[name] = p.clone() if name not in kept else 0.95 * kept[name] + 0.05 * p

    @torch.no_grad()
    def exchange(s: Pipeline, epoch: int) -> None:
        for name, p in s.model.named_parameters():
            p.copy_(kept[name])

    return around_epoch(lambda s, epoch: None, exchange)(after_each(follow)(pipeline))


FAULTS = (
    Fault(
        "trained in float from epoch 5",
        "The quantizers are off in every later training step, and on again whenever something is measured.",
        ("quantizers-off-in-training",),
        pipeline=around_epoch(
            lambda s, epoch: toggle_quantization(s.model, epoch < 4),
            lambda s, epoch: toggle_quantization(s.model, True),
        ),
    ),
    Fault(
        "a stage frozen from epoch 4",
        "The first stage no longer requires a gradient once the run is under way.",
        ("parameter-frozen",),
        pipeline=from_epoch(4, frozen("layer1")),
    ),
    Fault(
        "logits frozen from epoch 3",
        "Dead zones and bits stay where they are after two epochs.",
        ("parameter-frozen", "logits-stuck"),
        pipeline=from_epoch(3, frozen("logit")),
    ),
    Fault(
        "no update in the last epoch",
        "The optimizer no longer steps in the last epoch.",
        ("no-update",),
        pipeline=from_epoch(8, without_update),
    ),
    Fault(
        "moments forgotten every epoch",
        "The optimizer's moments and count are cleared at the start of every epoch.",
        ("optimizer-reset",),
        pipeline=around_epoch(lambda s, epoch: s.optimizer.state.clear()),
    ),
    Fault(
        "averaged weights swapped in",
        "A running average of the weights takes their place after every epoch.",
        ("weights-reset",),
        pipeline=averaged,
    ),
    Fault(
        "squares left out from epoch 3",
        "The squared logits are in the loss of the first two epochs alone.",
        ("logit-squares-missing",),
        pipeline=from_epoch(3, without_squares),
    ),
    Fault(
        "labels rolled in later steps",
        "From the sixth epoch on the step trains each image on its neighbour's label.",
        ("step-labels-wrong",),
        pipeline=from_epoch(6, labels_mixed),
    ),
    Fault(
        "coefficient tripled in later epochs",
        "The loop applies three times the coefficient that the record tells, from epoch 5 on.",
        ("coefficient-wrong", "coefficient-too-large"),
        pipeline=from_epoch(5, three_times_the_coefficient),
    ),
    Fault(
        "logits clamped",
        "No logit may fall below 2.7, so dead zones and bits stop moving after some steps.",
        ("logits-stuck", "update-wrong"),
        pipeline=after_each(clamped),
    ),
)

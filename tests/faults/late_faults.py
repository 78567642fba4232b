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


def other_batches(choose: Callable[[list[Any]], list[Any]]) -> Callable[[Pipeline], Pipeline]:
    """The loader's batches of an epoch, others of them."""

    def change(pipeline: Pipeline) -> Pipeline:
        drawn = pipeline.train_batches
        return replace(pipeline, train_batches=lambda s, epoch: choose(list(drawn(s, epoch))))

    return change


def every_second_step(pipeline: Pipeline) -> Pipeline:
    """From epoch 5 on the loop calls the step on every second batch alone, and counts on."""

    def halved(s: Pipeline, epoch: int) -> list[Any]:
        return list(parts_of.run_batches(s, epoch))[::2]

    def train_epoch(s: Pipeline, epoch: int) -> Iterator[training.Step]:
        if epoch < 4:
            yield from parts_of.run_epoch(s, epoch)
            return
        for step in parts_of.run_epoch(replace(s, train_batches=halved), epoch):
            yield replace(step, index=2 * step.index, steps=2 * step.steps)

    return replace(pipeline, train_epoch=train_epoch)


def in_the_order_of(epoch: int) -> Callable[[Pipeline], Pipeline]:
    return lambda pipeline: replace(pipeline, train_batches=lambda s, _: list(parts_of.run_batches(s, epoch)))


def in_eval_mode(pipeline: Pipeline) -> Pipeline:
    step = pipeline.step
    return replace(pipeline, step=lambda model, *rest: step(model.eval(), *rest))


class NoZeroGrad(NoUpdate):
    """An optimizer that keeps the gradients of the step before."""

    def zero_grad(self, **options: Any) -> None: ...

    def step(self) -> None:
        self.of.step()


def without_zero_grad(pipeline: Pipeline) -> Pipeline:
    step = pipeline.step
    return replace(pipeline, step=lambda model, optimizer, *rest: step(model, NoZeroGrad(optimizer), *rest))  # type: ignore[arg-type]


def penalty_detached(pipeline: Pipeline) -> Pipeline:
    penalty = pipeline.objective.penalty
    assert penalty is not None
    return replace(pipeline, objective=replace(pipeline.objective, penalty=lambda model: penalty(model).detach()))


def at_a_tenth(pipeline: Pipeline) -> Pipeline:
    given = pipeline.lr_lambda
    return replace(pipeline, lr_lambda=lambda done: given(done) / 10)


def put_back(pipeline: Pipeline) -> Pipeline:
    """Before epoch 4 the loop loads the weights of the start."""
    kept = {name: value.clone() for name, value in pipeline.model.state_dict().items()}
    return around_epoch(lambda s, epoch: s.model.load_state_dict(kept) if epoch == 3 else None)(pipeline)


def statistics_cleared(pipeline: Pipeline) -> Pipeline:
    def clear(s: Pipeline, epoch: int) -> None:
        for module in s.model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.reset_running_stats()

    return around_epoch(clear)(pipeline)


FAULTS = (
    Fault(
        "half of the batches skipped from epoch 4",
        "Later epochs stop after half of their batches.",
        ("loader-incomplete",),
        pipeline=from_epoch(4, other_batches(lambda batches: batches[: len(batches) // 2])),
    ),
    Fault(
        "every second batch skipped from epoch 5",
        "The loop counts every batch and trains every second one, once the run is under way.",
        ("loader-incomplete",),
        pipeline=every_second_step,
    ),
    Fault(
        "half of the images twice from epoch 4",
        "Later epochs read their first half twice and never the second.",
        ("loader-repeats",),
        pipeline=from_epoch(4, other_batches(lambda batches: 2 * batches[: len(batches) // 2])),
    ),
    Fault(
        "batches repeated from epoch 3",
        "Later epochs read their first five batches again at the end.",
        ("loader-incomplete", "loader-repeats"),
        pipeline=from_epoch(3, other_batches(lambda batches: batches + batches[:5])),
    ),
    Fault(
        "one order from epoch 5",
        "Later epochs read the images in the order of the fifth.",
        ("loader-same-order",),
        pipeline=from_epoch(5, in_the_order_of(4)),
    ),
    Fault(
        "eval mode from epoch 3",
        "Somebody measured in between, and the network stays in eval mode.",
        ("batchnorm-in-eval",),
        pipeline=from_epoch(3, in_eval_mode),
    ),
    Fault(
        "gradients added up from epoch 6",
        "Later steps add their gradient to the one before.",
        ("gradients-accumulate",),
        pipeline=from_epoch(6, without_zero_grad),
    ),
    Fault(
        "penalty detached from epoch 4",
        "Later losses hold the penalty's value and not its gradient.",
        ("penalty-detached",),
        pipeline=from_epoch(4, penalty_detached),
    ),
    Fault(
        "a tenth of the rate from epoch 5",
        "A second schedule divides the learning rate by ten in later epochs.",
        ("learning-rate-schedule",),
        pipeline=from_epoch(5, at_a_tenth),
    ),
    Fault(
        "weights of the start put back",
        "Before the fourth epoch the loop loads the state it began with.",
        ("weights-reset",),
        pipeline=put_back,
    ),
    Fault(
        "statistics cleared every epoch",
        "BatchNorm's statistics are reset before every epoch.",
        ("batchnorm-in-eval", "evaluation-changes-model"),
        pipeline=statistics_cleared,
    ),
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

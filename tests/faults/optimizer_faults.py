"""Faults in the optimizer: what is in it, in which group, with which rate and decay, and how it steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from experiments.doctor import Pipeline
from experiments.doctor.pipeline import PipelineParts
from experiments.notebook import demonstration
from experiments.notebook.demonstration import Fault
from experiments.pipeline import RunConfig, build_optimizer
from src import training

Groups = dict[str, dict[str, Any]]
DECOUPLED: Mapping[str, Any] = {"regularization": "decoupled"}


def parameters_of(model: nn.Module, leaf: str) -> list[nn.Parameter]:
    """Trainable parameters whose own name is `leaf`."""
    return [p for name, p in model.named_parameters() if name.rpartition(".")[2] == leaf and p.requires_grad]


def groups_of(config: RunConfig, model: nn.Module) -> Groups:
    """The pipeline's three groups by name."""
    return {group["name"]: group for group in training.parameter_groups(model, **config.group_kwargs)}


def regrouped(change: Callable[[Groups], object]) -> Callable[[PipelineParts], PipelineParts]:
    """The pipeline's optimizer after `change` to its groups."""

    def optimizer(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
        groups = groups_of(config, model)
        change(groups)
        return training.make_optimizer([group for group in groups.values() if group["params"]])

    return lambda parts: replace(parts, optimizer=optimizer)


def setting(
    name: str, key: str, factor: float = 1.0, value: float | None = None
) -> Callable[[PipelineParts], PipelineParts]:
    """One setting of one group multiplied, or replaced."""

    def change(groups: Groups) -> None:
        groups[name][key] = groups[name][key] * factor if value is None else value
        if key == "lr":
            groups[name]["base_lr"] = groups[name]["lr"]

    return regrouped(change)


def kind(make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]) -> Callable[[PipelineParts], PipelineParts]:
    """Another optimizer over the pipeline's own groups."""
    return lambda parts: replace(parts, optimizer=lambda config, model: make([*groups_of(config, model).values()]))


def without(*names: str) -> Callable[[PipelineParts], PipelineParts]:
    return regrouped(lambda groups: [groups.pop(name) for name in names])


def logits_among_weights(groups: Groups) -> None:
    for name in ("logit_dz", "logit_bit"):
        groups["weights"]["params"] += groups.pop(name)["params"]


def logits_swapped(groups: Groups) -> None:
    dz, bit = groups["logit_dz"], groups["logit_bit"]
    dz["params"], bit["params"] = bit["params"], dz["params"]


def decay_on_weights(groups: Groups) -> None:
    groups["weights"]["weight_decay"] = groups["logit_dz"]["weight_decay"]
    groups["logit_dz"]["weight_decay"] = groups["logit_bit"]["weight_decay"] = 0.0


def one_twice(groups: Groups) -> None:
    groups["weights"]["params"].append(groups["weights"]["params"][0])


def without_vectors(groups: Groups) -> None:
    groups["weights"]["params"] = [p for p in groups["weights"]["params"] if p.dim() != 1]


def built_before_attaching(parts: PipelineParts) -> PipelineParts:
    early: dict[int, torch.optim.Optimizer] = {}

    def attach(config: RunConfig, model: nn.Module) -> list[str]:
        early[id(model)] = build_optimizer(config, model)
        return parts.attach(config, model)

    return replace(parts, attach=attach, optimizer=lambda config, model: early[id(model)])


def added_later(parts: PipelineParts) -> PipelineParts:
    """Built before attaching, then the logits added as one group with the optimizer's default settings."""
    early = built_before_attaching(parts)

    def optimizer(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
        built = early.optimizer(config, model)
        logits = parameters_of(model, "logit_dz") + parameters_of(model, "logit_bit")
        built.add_param_group({"params": logits, "name": "added"})
        return built

    return replace(early, optimizer=optimizer)


def of_another_network(parts: PipelineParts) -> PipelineParts:
    """The network is copied after its optimizer was built, and the copy is trained."""
    return replace(parts, optimizer=lambda config, model: build_optimizer(config, copy.deepcopy(model)))


class NeverClears(torch.optim.AdamW):
    def zero_grad(self, set_to_none: bool = True) -> None:
        pass


class StepsTwice(torch.optim.AdamW):
    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        return super().step(closure)


class ClipsToNothing(torch.optim.AdamW):
    """Every gradient is clipped to a norm of 1e-7, where AdamW's epsilon is as large as the gradient."""

    def step(self, closure: Any = None) -> Any:
        torch.nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 1e-7)
        return super().step(closure)


class EveryFourth(torch.optim.AdamW):
    """Three of four updates are left out."""

    calls = 0

    def step(self, closure: Any = None) -> Any:
        self.calls += 1
        return super().step(closure) if self.calls % 4 == 0 else None


def rates(factor: Callable[[float], float]) -> Callable[[Pipeline], Pipeline]:
    return lambda pipeline: replace(pipeline, lr_lambda=factor)


def logits_follow_the_schedule(pipeline: Pipeline) -> Pipeline:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, *rest: Any) -> training.StepLosses:
        weights, *logits = optimizer.param_groups
        for group in logits:
            group["lr"] = group["base_lr"] * weights["lr"] / weights["base_lr"]
        return training.train_step(model, optimizer, *rest)

    return replace(pipeline, step=step)


def frozen_logits(pipeline: Pipeline) -> Pipeline:
    for p in parameters_of(pipeline.model, "logit_bit"):
        p.requires_grad_(False)
    return pipeline


def classifier_apart(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The classifier has the weights' rate at the start, in a group that the schedule does not know."""
    groups = training.parameter_groups(model, **config.group_kwargs)
    own = [p for name, p in model.named_parameters() if name.startswith("linear")]
    kept = {id(p) for p in own}
    groups[0]["params"] = [p for p in groups[0]["params"] if id(p) not in kept]
    rate = config.learning_rate
    apart = {"name": "classifier", "lr": rate, "base_lr": rate, "weight_decay": 0.0, "params": own}
    return training.make_optimizer([*groups, apart])


FAULTS = (
    demonstration.FAULTS["logits missing"],
    Fault(
        "dead-zone logits missing",
        "The optimizer does not hold the dead-zone logits.",
        ("logits-not-in-optimizer",),
        parts=without("logit_dz"),
    ),
    Fault(
        "bit logits frozen",
        "The bit-width logits do not require a gradient although bits are to be learned.",
        ("parameter-frozen",),
        pipeline=frozen_logits,
    ),
    Fault(
        "logits among the weights",
        "The logits are in the group of the weights, with its rate and its schedule.",
        ("wrong-group",),
        parts=regrouped(logits_among_weights),
    ),
    Fault(
        "logits swapped",
        "Dead-zone logits are in the group of the bit logits and the other way round.",
        ("wrong-group",),
        parts=regrouped(logits_swapped),
    ),
    Fault(
        "built before the quantizers",
        "The optimizer was built before the quantizers were attached and knows nothing of their logits.",
        ("optimizer-built-before-quantizers", "logits-not-in-optimizer"),
        parts=built_before_attaching,
    ),
    Fault(
        "logits added later",
        "The logits joined the built optimizer as one group with its default rate and decay.",
        ("added-later", "optimizer-built-before-quantizers", "wrong-group"),
        parts=added_later,
    ),
    Fault(
        "optimizer of another network",
        "The optimizer holds the parameters of a copy, so the network that is trained never moves.",
        ("foreign-parameter",),
        parts=of_another_network,
    ),
    Fault(
        "BatchNorm not optimized",
        "Scales, shifts and biases are missing from the optimizer.",
        ("parameter-not-in-optimizer",),
        parts=regrouped(without_vectors),
    ),
    Fault(
        "parameter twice",
        "The stem's weight stands twice in its group and moves twice a step.",
        ("parameter-twice",),
        parts=regrouped(one_twice),
    ),
    Fault(
        "decay ten times too large",
        "The dead-zone logits decay by 0.1 instead of 0.01.",
        ("wrong-decay",),
        parts=setting("logit_dz", "weight_decay", factor=10),
        settings=DECOUPLED,
    ),
    Fault(
        "decay on the weights",
        "The decay meant for the logits acts on the weights.",
        ("decay-on-wrong-group",),
        parts=regrouped(decay_on_weights),
        settings=DECOUPLED,
    ),
    Fault(
        "decay in loss and optimizer",
        "The logits' 0.01 acts in the loss and in the optimizer as well.",
        ("wrong-decay",),
        parts=regrouped(lambda groups: [groups[n].update(weight_decay=0.01) for n in ("logit_dz", "logit_bit")]),
    ),
    Fault(
        "learning rate 0",
        "The weights' learning rate is 0.",
        ("learning-rate-zero",),
        parts=setting("weights", "lr", value=0.0),
    ),
    Fault(
        "learning rate 100 times too large",
        "The weights' learning rate is 0.3 instead of 0.003.",
        ("learning-rate-too-large", "wrong-learning-rate"),
        parts=setting("weights", "lr", factor=100),
    ),
    Fault(
        "logits' learning rate 100 times too small",
        "The dead-zone logits hardly move in the whole run.",
        ("wrong-learning-rate",),
        parts=setting("logit_dz", "lr", factor=0.01),
    ),
    Fault(
        "plain SGD",
        "Plain gradient descent takes AdamW's place at AdamW's rates.",
        ("other-optimizer",),
        parts=kind(lambda groups: torch.optim.SGD(groups, lr=1e-3)),
    ),
    Fault(
        "gradient ascent",
        "The optimizer maximises the loss.",
        ("ascent",),
        parts=kind(lambda groups: torch.optim.AdamW(groups, maximize=True)),
    ),
    Fault(
        "gradients never cleared",
        "zero_grad does nothing, so every step adds to the gradients of all before.",
        ("gradients-accumulate",),
        parts=kind(NeverClears),
    ),
    Fault(
        "two updates a step",
        "The optimizer steps twice on every gradient.",
        ("update-wrong",),
        parts=kind(StepsTwice),
    ),
    Fault(
        "gradients clipped to nothing",
        "Gradients are clipped to a norm of 1e-7, below what AdamW can see.",
        ("gradients-scaled",),
        parts=kind(ClipsToNothing),
    ),
    Fault(
        "three of four updates skipped",
        "The optimizer steps on every fourth batch alone.",
        ("no-update", "update-wrong"),
        parts=kind(EveryFourth),
    ),
    Fault(
        "learning rate never falls",
        "The schedule of the weights' rate is not applied.",
        ("learning-rate-schedule",),
        pipeline=rates(lambda done: 1.0),
    ),
    Fault(
        "learning rate rises instead",
        "The schedule runs backwards: from 0 up to the full rate.",
        ("learning-rate-schedule", "learning-rate-zero"),
        pipeline=rates(lambda done: min(1.0, done / 0.3)),
    ),
    Fault(
        "logits follow the weights' schedule",
        "The falling factor of the weights' rate acts on the logits as well.",
        ("learning-rate-schedule", "logits-rate", "wrong-learning-rate"),
        pipeline=logits_follow_the_schedule,
    ),
    Fault(
        "classifier outside the schedule",
        "The classifier is in a group of its own, whose rate never falls.",
        ("learning-rate-schedule",),
        parts=lambda parts: replace(parts, optimizer=classifier_apart),
    ),
)

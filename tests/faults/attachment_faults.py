"""Faults in what is attached where, and in switching it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from experiments.doctor import Pipeline
from experiments.doctor import pipeline as parts_of
from experiments.doctor.pipeline import PipelineParts
from experiments.notebook import demonstration
from experiments.notebook.demonstration import Fault, attaching
from experiments.pipeline import RunConfig
from src import training
from src.quantizer import DeadZoneLDZCompander
from utils_quantization import (
    FakeQuantParametrization,
    quantization,
    quantized_layers,
    toggle_quantization,
)


def with_settings(**settings: Any) -> Any:
    """Attach with other arguments of the quantizer than the configuration's."""
    return attaching(lambda **given: DeadZoneLDZCompander(**{**given, **settings}))


def after_attaching(change: Any) -> Any:
    """Attach as usual, then do something to the network."""

    def apply(parts: PipelineParts) -> PipelineParts:
        def attach(config: RunConfig, model: nn.Module) -> list[str]:
            names = parts.attach(config, model)
            change(model)
            return names

        return replace(parts, attach=attach)

    return apply


def off_in_training(pipeline: Pipeline) -> Pipeline:
    def step(model: nn.Module, *rest: Any) -> training.StepLosses:
        with quantization(model, enabled=False):
            return training.train_step(model, *rest)

    return replace(pipeline, step=step)


def off_in_evaluation(pipeline: Pipeline) -> Pipeline:
    def measure(s: Pipeline, *rest: Any) -> Any:
        record = parts_of.run_measure(s, *rest)
        with quantization(s.model, enabled=False):
            loss, accuracy = training.evaluate(s.model, parts_of._image_data(s), precision=s.precision)
        return replace(record, test_loss=loss, accuracy=accuracy)

    return replace(pipeline, measure=measure)


class StaysOff(FakeQuantParametrization):
    """Once switched off, it does not come on again."""

    @property
    def enabled(self) -> bool:
        return self.__dict__.get("_on", True)

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self.__dict__["_on"] = value and self.enabled


class StaysOn(FakeQuantParametrization):
    """The switch has no effect."""

    enabled = property(lambda self: True, lambda self, on: None)  # type: ignore[assignment]


def switch(kind: type[FakeQuantParametrization], layers: slice = slice(None)) -> Any:
    """Exchange the switch of some layers."""

    def change(model: nn.Module) -> None:
        chosen: Sequence[Any] = list(quantized_layers(model).values())[layers]
        for layer in chosen:
            layer.parametrizations.weight[0].__dict__.pop("enabled", None)
            layer.parametrizations.weight[0].__class__ = kind

    return after_attaching(change)


FAULTS = (
    demonstration.FAULTS["half of the layers"],
    Fault(
        "one layer left out",
        "A quantizer is missing on the last convolution alone.",
        ("quantizers-missing",),
        parts=attaching(exclude=("conv1", "layer3.0.conv2", "bn", "linear")),
    ),
    Fault(
        "linear layer quantized",
        "The classifier gets a quantizer although it is excluded.",
        ("quantizers-extra",),
        parts=attaching(exclude=("conv1", "bn")),
    ),
    Fault(
        "stem quantized",
        "The first convolution gets a quantizer although it is excluded.",
        ("quantizers-extra",),
        parts=attaching(exclude=("bn", "linear")),
    ),
    Fault(
        "nothing attached",
        "No quantizer is attached at all; the network trains in float.",
        ("no-quantizers",),
        parts=lambda parts: replace(parts, attach=lambda config, model: []),
    ),
    Fault(
        "one quantizer for all layers",
        "Every layer holds the same quantizer, so all share one dead zone and one bit width.",
        ("quantizer-shared",),
        parts=attaching(functools.cache(lambda **given: DeadZoneLDZCompander(**given))),
    ),
    Fault(
        "attached switched off",
        "The quantizers are attached, and off from the start.",
        ("quantizers-off",),
        parts=after_attaching(lambda model: toggle_quantization(model, enabled=False)),
    ),
    Fault(
        "other bit range",
        "The quantizers are built with at most 4 bits; the configuration says 8.",
        ("quantizer-settings", "bits-wrong"),
        parts=with_settings(max_bits=4),
    ),
    Fault(
        "fixed bits forgotten",
        "The configuration asks for 4 fixed bits; the quantizers learn theirs.",
        ("quantizer-settings", "bits-wrong"),
        parts=with_settings(learnable_bit=True),
        settings={"learnable_bit": False},
    ),
    Fault(
        "logits start at 0.3",
        "The dead zone starts over most of the range instead of at half a per cent of it.",
        ("quantizer-settings",),
        parts=with_settings(init_deadzone_logit=0.3),
    ),
    Fault(
        "off in training",
        "The quantizers are switched off in every training step and on afterwards.",
        ("quantizers-off-in-training",),
        pipeline=off_in_training,
    ),
    Fault(
        "off in evaluation",
        "Test loss and accuracy are those of the float weights.",
        ("quantizers-off-in-evaluation",),
        pipeline=off_in_evaluation,
    ),
    Fault(
        "switch does not restore",
        "A quantizer that was switched off once stays off.",
        ("toggle-broken",),
        parts=switch(StaysOff),
    ),
    Fault(
        "switch without effect in one layer",
        "One quantizer stays on when all are switched off.",
        ("toggle-broken",),
        parts=switch(StaysOn, slice(0, 1)),
    ),
)

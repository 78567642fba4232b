"""Faults that no weight shows: what happens between the layers, and on the way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from experiments.doctor import Pipeline
from experiments.notebook.demonstration import Fault
from resnet import BasicBlock


def norms(**settings: float) -> Callable[[Pipeline], Pipeline]:
    """BatchNorm with other settings everywhere."""

    def change(pipeline: Pipeline) -> Pipeline:
        for module in pipeline.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for name, value in settings.items():
                    setattr(module, name, value)
        return pipeline

    return change


def without_last_relu(pipeline: Pipeline) -> Pipeline:
    """The first block gives what it adds, without the activation behind the addition."""
    block: Any = next(module for module in pipeline.model.modules() if isinstance(module, BasicBlock))

    def forward(x: Tensor) -> Tensor:
        inside = F.relu(block.bn1(block.conv1(x)))
        return block.bn2(block.conv2(inside)) + block.shortcut(x)

    block.forward = forward
    return pipeline


def shortcut_silenced(pipeline: Pipeline) -> Pipeline:
    shortcut = pipeline.model.get_submodule("layer2.0.shortcut")
    shortcut.register_forward_hook(lambda module, inputs, output: 0 * output)
    return pipeline


def stage_scaled(pipeline: Pipeline) -> Pipeline:
    """A hook on every parameter of the last stage hands on 0.3 of its gradient."""
    for name, p in pipeline.model.named_parameters():
        if name.startswith("layer3"):
            p.register_hook(lambda gradient: 0.3 * gradient)
    return pipeline


FAULTS = (
    Fault(
        "an activation forgotten",
        "The first block lacks the ReLU behind its addition.",
        ("network-differs",),
        pipeline=without_last_relu,
    ),
    Fault(
        "a shortcut silenced",
        "A forward hook sets what one shortcut carries to zero.",
        ("network-differs",),
        pipeline=shortcut_silenced,
    ),
    Fault(
        "BatchNorm momentum 0.9",
        "The momentum is written as Keras means it, so statistics are those of the last batch.",
        ("batchnorm-momentum",),
        pipeline=norms(momentum=0.9),
    ),
    Fault(
        "BatchNorm eps 1",
        "eps is 1 instead of 1e-5, so small variances are not divided out.",
        ("network-differs",),
        pipeline=norms(eps=1.0),
    ),
    Fault(
        "gradients of a stage scaled",
        "Hooks on its parameters hand on 0.3 of the last stage's gradients.",
        ("gradients-scaled",),
        pipeline=stage_scaled,
    ),
)

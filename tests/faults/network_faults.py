"""Faults that no weight shows: what happens between the layers, and on the way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from experiments.doctor import Subject
from resnet import BasicBlock
from tests.faults.fault import Fault


def norms(**settings: float) -> Callable[[Subject], Subject]:
    """BatchNorm with other settings everywhere."""

    def change(subject: Subject) -> Subject:
        for module in subject.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for name, value in settings.items():
                    setattr(module, name, value)
        return subject

    return change


def without_last_relu(subject: Subject) -> Subject:
    """The first block gives what it adds, without the activation behind the addition."""
    block: Any = next(module for module in subject.model.modules() if isinstance(module, BasicBlock))

    def forward(x: Tensor) -> Tensor:
        inside = F.relu(block.bn1(block.conv1(x)))
        return block.bn2(block.conv2(inside)) + block.shortcut(x)

    block.forward = forward
    return subject


def shortcut_silenced(subject: Subject) -> Subject:
    shortcut = subject.model.get_submodule("layer2.0.shortcut")
    shortcut.register_forward_hook(lambda module, inputs, output: 0 * output)
    return subject


def stage_scaled(subject: Subject) -> Subject:
    """A hook on every parameter of the last stage hands on 0.3 of its gradient."""
    for name, p in subject.model.named_parameters():
        if name.startswith("layer3"):
            p.register_hook(lambda gradient: 0.3 * gradient)
    return subject


FAULTS = (
    Fault(
        "an activation forgotten",
        "The first block lacks the ReLU behind its addition.",
        ("network-differs",),
        subject=without_last_relu,
    ),
    Fault(
        "a shortcut silenced",
        "A forward hook sets what one shortcut carries to zero.",
        ("network-differs",),
        subject=shortcut_silenced,
    ),
    Fault(
        "BatchNorm momentum 0.9",
        "The momentum is written as Keras means it, so statistics are those of the last batch.",
        ("batchnorm-momentum",),
        subject=norms(momentum=0.9),
    ),
    Fault(
        "BatchNorm eps 1",
        "eps is 1 instead of 1e-5, so small variances are not divided out.",
        ("network-differs",),
        subject=norms(eps=1.0),
    ),
    Fault(
        "gradients of a stage scaled",
        "Hooks on its parameters hand on 0.3 of the last stage's gradients.",
        ("gradients-scaled",),
        subject=stage_scaled,
    ),
)

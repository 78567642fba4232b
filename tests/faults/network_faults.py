"""Faults that no weight shows: what happens between the layers, and on the way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.doctor import Pipeline
from experiments.notebook.demonstration import Fault
from resnet import BasicBlock
from src.pruning import ChannelGroups
from tests.faults.step_faults import network


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


def weights(change: Callable[[Tensor], Any]) -> Callable[[Any], Any]:
    """Every convolution's weight starts changed in place."""

    def apply(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                change(module.weight.data)

    return network(apply)


def biased(model: nn.Module) -> None:
    model.get_parameter("linear.bias").data.copy_(-0.4 * torch.arange(10.0))


def slices_left_out(members: Any, names: Any) -> ChannelGroups:
    return ChannelGroups(tuple(member for member in members if member.role != "slice"), names)


FAULTS = (
    Fault(
        "groups without slices",
        "The channel groups leave out the slices that read a channel.",
        ("penalty-without-slices",),
        edits={"src.pruning.groups.ChannelGroups": slices_left_out},
    ),
    Fault(
        "all weights start alike",
        "Every convolution starts at 0.1, and nothing tells its filters apart.",
        ("initial-weights",),
        parts=weights(lambda weight: weight.fill_(0.1)),
    ),
    Fault(
        "one random filter for all",
        "Every filter of a convolution starts as a copy of the first.",
        ("initial-weights",),
        parts=weights(lambda weight: weight.copy_(weight[:1].clone().expand_as(weight))),
    ),
    Fault(
        "weights start a hundred times too large",
        "Convolutions start with a deviation a hundred times too large, which BatchNorm hides.",
        ("weights-too-large",),
        parts=weights(lambda weight: weight.mul_(100)),
    ),
    Fault(
        "head's bias of another data set",
        "The classifier's bias starts at the logarithm of the class shares of another, unbalanced data set.",
        ("head-bias-wrong",),
        parts=network(biased),
    ),
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

"""What a fault is, and the small pipeline that faults are put into.

A fault breaks one thing of the pipeline through the seams that anybody may use: another part when it is built
(`PipelineParts`), other data, or another function afterwards (`dataclasses.replace(pipeline, step=...)`). The
configuration stays what it was, and so does what is expected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from experiments.doctor import Pipeline
from experiments.doctor.core.pipeline import PipelineParts, build_pipeline
from experiments.evaluator import Evaluator
from experiments.pipeline import RunConfig, configure, prepare_data
from resnet import BasicBlock, ResNet
from src import training
from src.data import ImageData

WIDTHS = (8, 16, 32)
DIGITS: Mapping[str, Any] = {
    "limit": 480,
    "batch_size": 24,
    "learning_rate": 0.01,
    "dz_learning_rate": 0.02,
    "bit_learning_rate": 0.02,
    "delay": 1,
    "ramp": 2,
    "flip": False,
}
CIFAR10: Mapping[str, Any] = {
    **DIGITS,
    "limit": 960,
    "batch_size": 32,
    "learning_rate": 5e-3,
    "dz_learning_rate": 0.01,
    "bit_learning_rate": 0.01,
    "flip": True,
}


@dataclass(frozen=True)
class Fault:
    """One thing broken.

    name: stable, for tables and menus. breaks: one sentence. causes: keys of experiments/diagnosis/causes.py, any of
    which names this fault rightly. parts, data, pipeline: what is exchanged; each returns what it was given where
    nothing is. settings: of the configuration in which the fault can show at all (decay needs the decoupled form).
    """

    name: str
    breaks: str
    causes: tuple[str, ...]
    parts: Callable[[PipelineParts], PipelineParts] = lambda parts: parts
    data: Callable[[ImageData], ImageData] = lambda data: data
    pipeline: Callable[[Pipeline], Pipeline] = lambda pipeline: pipeline
    settings: Mapping[str, Any] = field(default_factory=dict)


def small_config(data: str = "digits", seed: int = 0, **settings: Any) -> RunConfig:
    """A run of a few seconds in which everything happens that the doctor looks at.

    Digits: 480 training images in 20 steps an epoch, 8 epochs; at the end nine of ten test images are right, half of
    the weights are zero, some filters dead and 5 bits left of 8. CIFAR-10: 960 images in 30 steps, flipped.
    """
    given: dict[str, Any] = {"data": data, "seed": seed, "device": "cpu", "precision": "fp32", "epochs": 8}
    own = {"digits": DIGITS, "cifar10": CIFAR10}[data]
    return configure("smoke", **{**given, **own, **settings})


@lru_cache(maxsize=4)
def small_data(data: str = "digits", limit: int | None = 480) -> ImageData:
    """The images of `small_config`, loaded once."""
    return prepare_data(small_config(data, limit=limit))[1]


def small_network(config: RunConfig, data: ImageData) -> ResNet:
    """One block a stage at half the width, from `config.seed`: 19,738 parameters."""
    torch.manual_seed(config.seed)
    network = ResNet(BasicBlock, [1, 1, 1], data.num_classes, widths=WIDTHS)
    return network.to(memory_format=torch.channels_last)


def small_parts() -> PipelineParts:
    """The project's own parts around the small network."""
    return PipelineParts(network=small_network)


def healthy(config: RunConfig | None = None) -> Pipeline:
    """The small pipeline with nothing broken."""
    config = config or small_config()
    return build(config, small_data(config.data, config.limit), small_parts())


def broken(fault: Fault, config: RunConfig | None = None) -> Pipeline:
    """The small pipeline with `fault` in it."""
    config = replace(config or small_config(), **fault.settings)
    data = fault.data(small_data(config.data, config.limit))
    return fault.pipeline(build(config, data, fault.parts(small_parts())))


def build(config: RunConfig, data: ImageData, parts: PipelineParts) -> Pipeline:
    """`build_pipeline`, compared with the dense network that the faultless parts would make."""
    pipeline = build_pipeline(config, data, parts)
    baseline = small_network(config, data)
    return replace(
        pipeline,
        evaluate=lambda s: evaluated(s, Evaluator(baseline)),
        baseline=lambda: small_network(config, data),
    )


def evaluated(pipeline: Pipeline, evaluator: Evaluator) -> Any:
    """Compression by `evaluator`, and the float32 accuracy."""
    assert pipeline.data is not None
    return evaluator.evaluate(pipeline.model), training.evaluate(pipeline.model, pipeline.data)[1]


def parameters_of(model: nn.Module, leaf: str) -> list[nn.Parameter]:
    """Trainable parameters whose own name is `leaf`."""
    return [p for name, p in model.named_parameters() if name.rpartition(".")[2] == leaf and p.requires_grad]

"""What is expected of a pipeline, written down without the code that is meant to keep it.

The schedules and rates are computed here a second time, from the settings alone, so that a fault in the pipeline's own
functions shows as a difference. What is None is not expected, and nothing is compared with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from experiments.pipeline import RunConfig
from src.data import ImageData

LOGITS = ("logit_dz", "logit_bit")


def kind_of(name: str) -> str:
    """The group a parameter belongs to: logit_dz, logit_bit, or weights."""
    leaf = name.rpartition(".")[2]
    return leaf if leaf in LOGITS else "weights"


@dataclass(frozen=True)
class ExpectedGroup:
    """Learning rate and decoupled decay that a kind of parameter should have at the start of a run."""

    learning_rate: float
    decay: float


@dataclass(frozen=True)
class ExpectedQuantizer:
    """The settings of the CoDeQ quantizer: b = round(|tanh theta_bit| (max - min) + min), or `fixed_bits`."""

    max_bits: int
    fixed_bits: int
    learns_bits: bool
    learns_dead_zone: bool
    init_bit_logit: float
    init_dz_logit: float
    min_bits: int = 2


@dataclass(frozen=True)
class Expected:
    """What the parts of a pipeline should do. All of it is optional.

    quantized: names of the layers that should have a quantizer. groups: by kind of parameter, "weights", "logit_dz",
    "logit_bit". optimizer: class name. coefficients: of every epoch. lr_factors: the learning rate's factor at the
    start of every epoch. mean, std: of the images per channel, in units of 0..1. clip_norm, clip_value: gradients are
    clipped to this 2-norm over all parameters, each entry to this size. label_smoothing: the task loss's. objective:
    "open" where the loss holds what cannot be told here (mixup, distillation, an L1 term): it is then not judged.
    Without it and without lambda_dz, a step is compared with the mean cross entropy, and another loss is "unusual".
    """

    quantized: tuple[str, ...] | None = None
    quantizer: ExpectedQuantizer | None = None
    groups: Mapping[str, ExpectedGroup] | None = None
    optimizer: str | None = None
    lambda_dz: float | None = None
    lambda_bit: float | None = None
    label_smoothing: float = 0.0
    objective: str | None = None
    clip_norm: float | None = None
    clip_value: float | None = None
    penalty: str | None = None
    coefficients: tuple[float, ...] | None = None
    lr_factors: tuple[float, ...] | None = None
    epochs: int | None = None
    batch_size: int | None = None
    num_classes: int | None = None
    input_size: tuple[int, int, int] | None = None
    crop_padding: int | None = None
    flip: bool | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    config: RunConfig | None = None

    @classmethod
    def of_config(cls, config: RunConfig, model: nn.Module, data: ImageData) -> Expected:
        """What `config` asks of a network and data from `pipeline`."""
        decoupled, open_ = config.regularization == "decoupled", bool(config.target or config.distill)
        schedule = tuple(_coefficient(config, epoch) for epoch in range(config.epochs))
        factor = factor_of(config)
        return cls(
            quantized=_meant(config, model),
            quantizer=None  # it is one for all layers
            if config.stem_bits
            else ExpectedQuantizer(
                max_bits=config.max_bits,
                fixed_bits=config.fixed_bits,
                learns_bits=config.learnable_bit,
                learns_dead_zone=config.learnable_deadzone,
                init_bit_logit=config.init_bit_logit,
                init_dz_logit=config.init_deadzone_logit,
            ),
            groups={
                "weights": ExpectedGroup(config.learning_rate, 0.0),
                "logit_dz": ExpectedGroup(config.dz_learning_rate, config.logit_decay_dz if decoupled else 0.0),
                "logit_bit": ExpectedGroup(config.bit_learning_rate, config.logit_decay_bit if decoupled else 0.0),
            },
            optimizer="AdamW",
            # With a budget the penalty and its coefficient follow the run: there is nothing to expect beforehand.
            # Nor are a teacher's scores computed a second time.
            lambda_dz=None if open_ else 0.0 if decoupled else config.logit_decay_dz,
            lambda_bit=None if open_ else 0.0 if decoupled else config.logit_decay_bit,
            label_smoothing=config.label_smoothing,
            objective="open" if open_ else None,
            penalty="coupled group lasso" if config.peak > 0 and not config.target else None,
            coefficients=None if config.target else schedule,
            lr_factors=tuple(factor(epoch / config.epochs) for epoch in range(config.epochs)),
            epochs=config.epochs,
            batch_size=config.batch_size,
            num_classes=data.num_classes,
            input_size=(3, 32, 32),
            crop_padding=config.crop_padding,
            flip=config.flip,
            mean=_known_statistics(data)[0],
            std=_known_statistics(data)[1],
            config=config,
        )

    @property
    def peak(self) -> float:
        """The largest expected coefficient, 0 where none is."""
        return max(self.coefficients or (0.0,))


def _meant(config: RunConfig, model: nn.Module) -> tuple[str, ...] | None:
    """Every convolution but the stem; with patterns of one's own, every candidate that none names by its whole path."""
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    if config.exclude_layers == ("conv1", "bn", "linear"):
        return tuple(convolutions[0 if config.stem_bits else 1 :])
    return None


def _coefficient(config: RunConfig, epoch: int) -> float:
    """0 before `delay`, then a straight line to `peak` at `delay + ramp`."""
    if epoch < config.delay:
        return 0.0
    share = 1.0 if config.ramp == 0 else min((epoch - config.delay) / config.ramp, 1.0)
    return config.peak * share


def factor_of(config: RunConfig) -> Callable[[float], float]:
    """The factor on the weights' learning rate at a share of the run done, from the settings alone."""
    shapes = {
        "constant": lambda done: 1.0,
        "hold_then_linear": lambda done: 1.0 if done < config.hold else (1 - done) / (1 - config.hold),
        "cosine": lambda done: 0.5 + 0.5 * math.cos(math.pi * done),
    }
    shape, warm = shapes[config.learning_rate_shape], config.warmup_epochs
    return lambda done: shape(done) * (min(done * config.epochs / warm, 1.0) if warm else 1.0)


def _known_statistics(data: ImageData) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation per channel: the published ones of CIFAR-10, otherwise those of the training images (float64).

    CIFAR-10's are written down here because a small part of it has slightly other ones.
    """
    if data.name == "cifar10":
        return (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    counts = [data.train_images[:, c].flatten().bincount(minlength=256).double().cpu() for c in range(3)]
    mean, std = [], []
    for count in counts:
        share = count / count.sum()
        value = share.new_tensor(range(256)) / 255
        centre = float((share * value).sum())
        mean.append(centre)
        std.append(math.sqrt(float((share * (value - centre) ** 2).sum())))
    return tuple(mean), tuple(std)

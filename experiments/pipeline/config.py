"""Configurations of a run: a frozen, checked dataclass, and the presets by name.

Everything that shapes a result is in `RunConfig` and is saved with the result. Peaks, rates and schedules that the
method leaves open were chosen by measurement: docs/experiments.md has what each variant gave.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from experiments.schedules import Schedule, linear_warmup
from resnet import NETWORKS
from src.quantizer import BITS_REMEDY, LARGEST_BITS, LOGIT_REMEDY, MIN_BITS, check_range
from src.training import DEVICES, PRECISIONS, LrLambda, Objective, Penalty, cosine_to_zero, hold_then_linear

LEARNING_RATE_SHAPES: dict[str, Callable[[float], LrLambda]] = {
    "constant": lambda hold: lambda done: 1.0,
    "hold_then_linear": hold_then_linear,
    "cosine": lambda hold: cosine_to_zero,
}
REGULARIZATIONS = ("loss", "decoupled")
WHOLE_NUMBERS = {
    "epochs": (1, 100_000),
    "batch_size": (2, 1_000_000),
    "limit": (1, 10**9),
    "seed": (0, 2**31 - 1),
    "crop_padding": (0, 32),
    "delay": (0, 100_000),
    "ramp": (0, 100_000),
}
NUMBERS = {
    "learning_rate": (0, 10),
    "dz_learning_rate": (0, 10),
    "bit_learning_rate": (0, 10),
    "logit_decay_dz": (0, 1000),
    "logit_decay_bit": (0, 1000),
    "peak": (0, 1000),
    "hold": (0, 0.999),
    "expected_accuracy": (0, 1),
}


class ConfigError(ValueError):
    """A setting is out of range or unknown."""


def _choice(name: str, value: object, allowed: Any) -> None:
    if not isinstance(value, str) or value not in allowed:
        near = difflib.get_close_matches(str(value), list(allowed), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{name}={value!r} is unknown: choose one of {', '.join(allowed)}{hint}")


@dataclass(frozen=True)
class RunConfig:
    """One run. Raises ConfigError, when it is built, for any setting out of range.

    logit_decay_dz, logit_decay_bit: the method's 0.01 for theta_dz and theta_bit. `regularization` says how they act:
        "loss" adds their weighted squares to the loss, as the paper does; "decoupled" hands them to AdamW.
    peak, delay, ramp: the sparsity coefficient, 0 up to epoch `delay`, `peak` from epoch `delay + ramp` on.
    hold: share of the run after which a "hold_then_linear" learning rate starts to fall. It acts on the weights alone.
    limit: at most so many training and so many test images; None for all.
    expected_accuracy: what the verdict asks of a full run, as a share.
    given: names of the settings that were asked for by name; they stay when the data calls for another preset.
    """

    preset: str
    data: str = "auto"
    data_root: str = "data"
    model: str = "resnet20"
    shortcut: str = "A"
    epochs: int = 20
    batch_size: int = 512
    limit: int | None = None
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    crop_padding: int = 4
    flip: bool = True
    exclude_layers: tuple[str, ...] = ("conv1", "bn", "linear")
    fixed_bits: int = 4
    max_bits: int = 8
    init_bit_logit: float = 3.0
    init_deadzone_logit: float = 3.0
    learnable_bit: bool = True
    learnable_deadzone: bool = True
    learning_rate: float = 1e-3
    dz_learning_rate: float = 1e-3
    bit_learning_rate: float = 1e-3
    learning_rate_shape: str = "hold_then_linear"
    hold: float = 0.7
    regularization: str = "loss"
    logit_decay_dz: float = 0.01
    logit_decay_bit: float = 0.01
    delay: int = 5
    ramp: int = 5
    peak: float = 0.008
    expected_accuracy: float = 0.6
    given: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        _choice("model", self.model, NETWORKS)
        _choice("shortcut", self.shortcut, ("A", "B"))
        _choice("device", self.device, DEVICES)
        _choice("precision", self.precision, PRECISIONS)
        _choice("learning_rate_shape", self.learning_rate_shape, LEARNING_RATE_SHAPES)
        _choice("regularization", self.regularization, REGULARIZATIONS)
        for name, (lowest, highest) in WHOLE_NUMBERS.items():
            if name != "limit" or self.limit is not None:
                check_range(name, getattr(self, name), lowest, highest, error=ConfigError)
        for name, (least, most) in NUMBERS.items():
            check_range(name, getattr(self, name), least, most, whole=False, error=ConfigError)
        for name in ("fixed_bits", "max_bits"):
            check_range(name, getattr(self, name), MIN_BITS, LARGEST_BITS, remedy=BITS_REMEDY, error=ConfigError)
        for name in ("init_bit_logit", "init_deadzone_logit"):
            check_range(name, getattr(self, name), -math.inf, whole=False, remedy=LOGIT_REMEDY, error=ConfigError)
        if isinstance(self.exclude_layers, str):
            raise ConfigError(
                f"exclude_layers={self.exclude_layers!r}: need a tuple of patterns, ({self.exclude_layers!r},)"
            )

    @property
    def quantizer_kwargs(self) -> dict[str, Any]:
        """Arguments of `DeadZoneLDZCompander`."""
        return {
            "fixed_bit_val": self.fixed_bits,
            "max_bits": self.max_bits,
            "init_bit_logit": self.init_bit_logit,
            "init_deadzone_logit": self.init_deadzone_logit,
            "learnable_bit": self.learnable_bit,
            "learnable_deadzone": self.learnable_deadzone,
        }

    @property
    def group_kwargs(self) -> dict[str, float]:
        """Arguments of `parameter_groups`: rates of the three groups, and the decay where the optimizer applies it."""
        decoupled = self.regularization == "decoupled"
        return {
            "learning_rate": self.learning_rate,
            "dz_learning_rate": self.dz_learning_rate,
            "bit_learning_rate": self.bit_learning_rate,
            "dz_decay": self.logit_decay_dz if decoupled else 0.0,
            "bit_decay": self.logit_decay_bit if decoupled else 0.0,
        }

    def objective(self, penalty: Penalty | None) -> Objective:
        """What a step minimises beside the task loss."""
        in_loss = self.regularization == "loss"
        return Objective(penalty, self.logit_decay_dz if in_loss else 0.0, self.logit_decay_bit if in_loss else 0.0)

    def schedule(self) -> Schedule:
        """The sparsity coefficient: fn(epoch, epochs)."""
        return linear_warmup(self.delay, self.ramp, self.peak)

    def lr_lambda(self) -> LrLambda:
        """The factor on the weights' learning rate: fn(share of the run done)."""
        return LEARNING_RATE_SHAPES[self.learning_rate_shape](self.hold)


DEBUG = RunConfig(preset="debug")
SMOKE = RunConfig(
    preset="smoke",
    data="digits",
    epochs=24,
    batch_size=48,
    flip=False,  # a mirrored 2 is no digit
    learning_rate=3e-3,
    dz_learning_rate=4e-3,
    bit_learning_rate=4e-3,
    delay=6,
    ramp=0,
    peak=0.01,
    expected_accuracy=0.9,
)
PAPER = RunConfig(
    preset="paper",
    data="cifar10",
    epochs=300,
    learning_rate_shape="cosine",
    delay=0,
    ramp=0,
    peak=0.0,
    expected_accuracy=0.91,
)
PAPER_4BIT = replace(PAPER, preset="paper-4bit", learnable_bit=False, fixed_bits=4)
PRESETS = {config.preset: config for config in (DEBUG, SMOKE, PAPER, PAPER_4BIT)}


def configure(preset: str = "debug", **changes: Any) -> RunConfig:
    """The preset called `preset` with `changes`; None, and "auto" for the data, leave the preset's value.

    Raises ConfigError for an unknown preset or setting, with the nearest known name.
    """
    _choice("preset", preset, PRESETS)
    known = [f.name for f in fields(RunConfig) if f.name != "given"]
    for name in changes:
        _choice("setting", name, known)
    given = {name: value for name, value in changes.items() if value is not None}
    if given.get("data") == "auto":  # some presets are made for one dataset
        del given["data"]
    return replace(PRESETS[preset], **given, given=tuple(sorted(given)))


def suited_to(config: RunConfig, data_name: str) -> RunConfig:
    """The configuration that is really run on the data called `data_name`.

    On the embedded digits the debug preset becomes `smoke`: 1,437 images in batches of 512 make two steps an epoch, too
    few for anything to happen in 20 epochs. Settings that were asked for by name are kept.
    """
    if data_name != "digits" or config.preset != "debug":
        return config
    kept = {name: getattr(config, name) for name in config.given}
    return replace(SMOKE, **kept, given=config.given)

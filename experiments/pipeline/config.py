"""Configurations of a run: a frozen, checked dataclass, and the presets by name.

Everything that shapes a result is in `RunConfig` and is saved with the result. Peaks, rates and schedules that the
method leaves open were chosen by measurement: docs/experiments.md has what each variant gave.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

from experiments.schedules import Schedule, linear_warmup
from resnet import NETWORKS
from src.data import check_source
from src.quantizer import BITS_REMEDY, LARGEST_BITS, LOGIT_REMEDY, MIN_BITS, check_range
from src.training import (
    DEVICES,
    PRECISIONS,
    LrLambda,
    Objective,
    Penalty,
    cosine_to_zero,
    hold_then_linear,
    warmed_up,
)

BUDGETS = {"bops": "BOPs", "macs": "MACs", "bytes": "bytes"}
ALSO_CALLED = {"gpu": "cuda"}  # by letters alone "gpu" is nearest to "cpu"
LEARNING_RATE_SHAPES: dict[str, Callable[[float], LrLambda]] = {
    "constant": lambda hold: lambda done: 1.0,
    "hold_then_linear": hold_then_linear,
    "cosine": lambda hold: cosine_to_zero,
}


class ConfigError(ValueError):
    """A setting is out of range or unknown."""


def check_choice(name: str, value: object, allowed: Iterable[str]) -> None:
    """Raise ConfigError, with the nearest known name, unless `value` is one of `allowed`."""
    known = list(allowed)
    if value not in known:
        near = difflib.get_close_matches(ALSO_CALLED.get(str(value), str(value)), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{name}={value!r} is unknown: choose one of {', '.join(known)}{hint}")


def _one_of(default: str, allowed: Iterable[str]) -> Any:
    """A field whose value is one of `allowed`."""
    return field(default=default, metadata={"check": partial(check_choice, allowed=allowed)})


def _within(default: float | None, lowest: float, highest: float = math.inf, remedy: str = "") -> Any:
    """A field with a number in lowest..highest, a whole one unless the default is a float."""
    whole = not isinstance(default, float)
    check = partial(check_range, lowest=lowest, highest=highest, whole=whole, remedy=remedy, error=ConfigError)
    return field(default=default, metadata={"check": check})


@dataclass(frozen=True)
class Budget:
    """At most `share` of the dense FP32 network's cost of this kind: "bops", "macs" or "bytes"."""

    kind: str
    share: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read "bops 3%", "macs 0.5" or "bytes 20x" (a twentieth). Raises ConfigError for anything else."""
        kind, _, amount = text.strip().partition(" ")
        try:
            number = float(amount.strip().rstrip("%x"))
            share = 1 / number if amount.endswith("x") else number / (100 if amount.endswith("%") else 1)
        except (ValueError, ZeroDivisionError):
            share = math.nan
        if kind not in BUDGETS or not 0 < share < 1:
            raise ConfigError(
                f"target={text!r}: need one of {', '.join(BUDGETS)}, and a share of the dense network's cost below 1, "
                "such as 'bops 3%', 'macs 0.5' or 'bytes 20x' (a twentieth)"
            )
        return cls(kind, share)

    def __str__(self) -> str:
        return f"{100 * self.share:.4g} % of the dense FP32 network's {BUDGETS[self.kind]}"


@dataclass(frozen=True)
class RunConfig:
    """One run. Raises ConfigError, when it is built, for any setting out of range.

    logit_decay_dz, logit_decay_bit: the method's 0.01 for theta_dz and theta_bit. `regularization` says how they act:
        "loss" adds their weighted squares to the loss, as the paper does; "decoupled" hands them to AdamW.
    peak, delay, ramp: the sparsity coefficient, 0 up to epoch `delay`, `peak` from epoch `delay + ramp` on.
    compile: compile the training step (src/training/compiled.py); it changes speed and the last digits.
    hold: share of the run after which a "hold_then_linear" learning rate starts to fall. It acts on the weights alone,
        and so does warmup_epochs, in which the rate rises from 0 in a straight line.
    label_smoothing: share of the right answer that is spread over all classes. distill: share of the task loss that
        is the distance to the scores of the run without compression, at `temperature` (`src.training.task_loss`).
    stem_bits: a fixed bit width of the first convolution, whose dead zone is fixed, too; None leaves it to
        `exclude_layers`.
    target: a budget for the finished network, such as "bops 3%" (see `Budget`); the peak is then where the coefficient
        begins (experiments/pipeline/budget.py). "" for none.
    limit: use at most this many training images and this many test images; None for all.
    expected_accuracy: what the verdict asks of a full run, as a share. allowed_cost: how far below the accuracy without
        compression it may stay, as a share.
    continued_from: how many epochs the run had when it was continued to `epochs`; None for an unbroken run.
    given: names of the settings that were asked for by name; they stay when the data calls for another preset.
    """

    preset: str
    data: str = "auto"
    data_root: str = "data"
    model: str = _one_of("resnet20", NETWORKS)
    shortcut: str = _one_of("A", ("A", "B"))
    epochs: int = _within(20, 1, 100_000)
    batch_size: int = _within(512, 2, 1_000_000)
    limit: int | None = _within(None, 1, 10**9)
    seed: int = _within(0, 0, 2**31 - 1)
    device: str = _one_of("auto", DEVICES)
    precision: str = _one_of("auto", PRECISIONS)
    compile: bool = False
    crop_padding: int = _within(4, 0, 32)
    flip: bool = True
    exclude_layers: tuple[str, ...] = ("conv1", "bn", "linear")
    stem_bits: int | None = _within(None, MIN_BITS, LARGEST_BITS, "8 is the usual width")
    fixed_bits: int = _within(4, MIN_BITS, LARGEST_BITS, BITS_REMEDY)
    max_bits: int = _within(8, MIN_BITS, LARGEST_BITS, BITS_REMEDY)
    init_bit_logit: float = _within(3.0, -math.inf, remedy=LOGIT_REMEDY)
    init_deadzone_logit: float = _within(3.0, -math.inf, remedy=LOGIT_REMEDY)
    learnable_bit: bool = True
    learnable_deadzone: bool = True
    learning_rate: float = _within(1e-3, 0, 10)
    dz_learning_rate: float = _within(1e-3, 0, 10)
    bit_learning_rate: float = _within(1e-3, 0, 10)
    learning_rate_shape: str = _one_of("hold_then_linear", LEARNING_RATE_SHAPES)
    hold: float = _within(0.7, 0, 0.999)
    warmup_epochs: int = _within(0, 0, 100_000)
    label_smoothing: float = _within(0.0, 0, 0.99)
    distill: float = _within(0.0, 0, 1)
    temperature: float = _within(4.0, 0.01, 1000)
    regularization: str = _one_of("loss", ("loss", "decoupled"))
    logit_decay_dz: float = _within(0.01, 0, 1000)
    logit_decay_bit: float = _within(0.01, 0, 1000)
    delay: int = _within(5, 0, 100_000)
    ramp: int = _within(5, 0, 100_000)
    peak: float = _within(0.008, 0, 1000)
    target: str = field(default="", metadata={"check": lambda name, value: value and Budget.parse(value)})
    expected_accuracy: float = _within(0.6, 0, 1)
    allowed_cost: float = _within(0.02, 0, 1)
    continued_from: int | None = _within(None, 1)
    given: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            if "check" in setting.metadata and not (setting.default is None and value is None):
                setting.metadata["check"](setting.name, value)
        if isinstance(self.exclude_layers, str):
            raise ConfigError(
                f"exclude_layers={self.exclude_layers!r}: need a tuple of patterns, ({self.exclude_layers!r},)"
            )
        if self.warmup_epochs >= self.epochs:
            raise ConfigError(f"warmup_epochs={self.warmup_epochs}: need fewer than the run's {self.epochs} epochs")
        if self.target and (self.peak == 0 or self.regularization != "loss"):
            raise ConfigError(
                f"target={self.target!r}, peak={self.peak:g}, regularization={self.regularization!r}: a budget is met "
                "by moving the penalty's coefficient; need a peak above 0, such as 0.008, and the squares in the loss"
            )

    @property
    def budget(self) -> Budget | None:
        """The budget of the finished network, None without one."""
        return Budget.parse(self.target) if self.target else None

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
        return warmed_up(LEARNING_RATE_SHAPES[self.learning_rate_shape](self.hold), self.warmup_epochs / self.epochs)


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
MIXED_BITS = replace(
    DEBUG,
    preset="mixed-bits",
    data="cifar10",
    logit_decay_dz=3e-5,  # small enough for the task's gradient to tell layers apart
    logit_decay_bit=3e-5,
    dz_learning_rate=3e-3,
    bit_learning_rate=3e-3,
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
    allowed_cost=0.01,
)
PAPER_4BIT = replace(PAPER, preset="paper-4bit", learnable_bit=False, fixed_bits=4)
PRESETS = {config.preset: config for config in (DEBUG, SMOKE, MIXED_BITS, PAPER, PAPER_4BIT)}
PRESETS_HELP = "named settings, which the other flags change: " + ", ".join(
    f"{name} ({config.epochs} epochs of batches of {config.batch_size}, data {config.data})"
    for name, config in PRESETS.items()
)


def configure(preset: str = "debug", **changes: Any) -> RunConfig:
    """The preset called `preset` with `changes`; None, and "auto" for the data, leave the preset's value.

    Raises ConfigError for an unknown preset or setting, with the nearest known name, and what `asked` raises.
    """
    check_choice("preset", preset, PRESETS)
    given = asked(changes)
    return replace(PRESETS[preset], **given, given=tuple(sorted(given)))


def asked(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among `changes` that are asked for by name: None, and "auto" for the data, ask for nothing.

    Raises ConfigError for an unknown setting, with the nearest known name, and DataError for an unknown source.
    """
    known = [f.name for f in fields(RunConfig) if f.name not in ("given", "continued_from")]
    for name in changes:
        check_choice("setting", name, known)
    given = {name: value for name, value in changes.items() if value is not None}
    if given.get("data") == "auto":  # some presets are made for one dataset
        del given["data"]
    if "data" in given:
        check_source(given["data"])
    return given


def suited_to(config: RunConfig, data_name: str) -> RunConfig:
    """The configuration that is really run on the data called `data_name`.

    On the embedded digits the debug preset becomes `smoke`: 1,437 images in batches of 512 make two steps an epoch, too
    few for anything to happen in 20 epochs. Settings that were asked for by name are kept.
    """
    if data_name != "digits" or config.preset != "debug":
        return config
    kept = {name: getattr(config, name) for name in config.given}
    return replace(SMOKE, **kept, given=config.given)

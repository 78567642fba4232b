"""Configurations: what each preset fixes, what is refused and in which words, what becomes of it on the digits."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from experiments.pipeline import DEBUG, ConfigError, RunConfig, configure
from experiments.pipeline.config import PAPER, SMOKE, suited_to

NAN, INF = float("nan"), float("inf")


def test_the_debug_preset_is_the_specified_run() -> None:
    assert (DEBUG.model, DEBUG.epochs, DEBUG.batch_size) == ("resnet20", 20, 512)
    assert (DEBUG.crop_padding, DEBUG.flip) == (4, True)
    assert DEBUG.exclude_layers == ("conv1", "bn", "linear")
    assert DEBUG.quantizer_kwargs == {
        "fixed_bit_val": 4, "max_bits": 8, "init_bit_logit": 3.0, "init_deadzone_logit": 3.0,
        "learnable_bit": True, "learnable_deadzone": True,
    }  # fmt: skip
    rates = {"learning_rate": 1e-3, "dz_learning_rate": 1e-3, "bit_learning_rate": 1e-3, "dz_decay": 0, "bit_decay": 0}
    assert DEBUG.group_kwargs == rates
    schedule = DEBUG.schedule()
    assert [schedule(epoch, 20) for epoch in (0, 5)] == [0, 0]
    assert [schedule(epoch, 20) / DEBUG.peak for epoch in (6, 10, 19)] == pytest.approx([0.2, 1, 1])


def test_the_two_ways_for_the_decay_to_act() -> None:
    decoupled = replace(DEBUG, regularization="decoupled", logit_decay_bit=0.02)
    assert (DEBUG.objective(None).lambda_dz, DEBUG.objective(None).lambda_bit) == (0.01, 0.01)
    assert (decoupled.group_kwargs["dz_decay"], decoupled.group_kwargs["bit_decay"]) == (0.01, 0.02)
    assert (decoupled.objective(None).lambda_dz, decoupled.objective(None).lambda_bit) == (0, 0)


BAD: list[tuple[str, Any, str]] = [
    ("model", "resnet-20", "model='resnet-20' is unknown: choose one of resnet20, .*; did you mean 'resnet20'"),
    ("device", "gpu", "device='gpu' is unknown: .*; did you mean 'cuda'"),
    ("epochs", True, "epochs=True: need .*, a whole number"),
    ("fixed_bits", 1, "fixed_bits=1: need 2..16, a whole number; 2 means ternary"),
    ("init_bit_logit", NAN, "init_bit_logit=nan: need any finite number; 3.0 starts"),
    ("expected_accuracy", 60, "expected_accuracy=60: need 0..1"),
    ("warmup_epochs", 20, "warmup_epochs=20: need fewer than the run's 20 epochs"),
    ("exclude_layers", "conv1", r"exclude_layers='conv1': need a tuple of patterns, \('conv1',\)"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD, ids=[f"{name}={value!r}" for name, value, _ in BAD])
def test_a_setting_out_of_range_is_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configure("debug", **{name: value})


FREE = {
    "compile",
    "preset",
    "target",
    "data",
    "data_root",
    "exclude_layers",
    "flip",
    "learnable_bit",
    "learnable_deadzone",
    "given",
}


@pytest.mark.parametrize("name", sorted({f.name for f in fields(RunConfig)} - FREE))
def test_every_number_and_choice_is_checked(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}=-inf"):
        RunConfig(preset="mine", **{name: -INF})


def test_unknown_presets_and_settings() -> None:
    with pytest.raises(ConfigError, match=r"'debgu' is unknown: choose one of debug, .*did you mean 'debug'"):
        configure("debgu")
    with pytest.raises(ConfigError, match=r"setting='epoch' is unknown: .*did you mean 'epochs'"):
        configure("debug", epoch=3)


def test_what_is_not_given_keeps_the_presets_value() -> None:
    assert configure("debug", epochs=None, data="auto", limit=None) == DEBUG
    assert configure("smoke", data="auto").data == "digits"
    assert configure("paper", data="digits").data == "digits"
    changed = configure("debug", epochs=3, seed=7)
    assert (changed.epochs, changed.seed, changed.batch_size) == (3, 7, 512)


def test_on_the_digits_debug_becomes_smoke_and_keeps_what_was_changed() -> None:
    assert suited_to(DEBUG, "cifar10") is DEBUG
    assert suited_to(PAPER, "digits") is PAPER
    assert suited_to(DEBUG, "digits") == SMOKE
    suited = suited_to(configure("debug", data="digits", epochs=2, limit=100, peak=0.5, seed=3), "digits")
    assert suited == replace(SMOKE, data="digits", epochs=2, limit=100, peak=0.5, seed=3)
    asked = configure("debug", epochs=DEBUG.epochs, batch_size=DEBUG.batch_size)  # asked for, though they are its own
    assert (suited_to(asked, "digits").epochs, suited_to(asked, "digits").batch_size) == (20, 512)

"""Configurations: what each preset fixes, what is refused and in which words, what becomes of it on the digits."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from experiments.pipeline import DEBUG, PRESETS, ConfigError, RunConfig, configure
from experiments.pipeline.config import PAPER, PAPER_4BIT, SMOKE, suited_to

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


def test_the_paper_presets_hold_the_300_epoch_recipe() -> None:
    for preset in (PAPER, PAPER_4BIT):
        assert (preset.epochs, preset.batch_size, preset.data, preset.peak) == (300, 512, "cifar10", 0.0)
        assert [preset.lr_lambda()(done) for done in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
        assert (preset.logit_decay_dz, preset.logit_decay_bit) == (0.01, 0.01)
    assert PAPER.learnable_bit
    assert (PAPER_4BIT.learnable_bit, PAPER_4BIT.fixed_bits) == (False, 4)
    assert list(PRESETS) == ["debug", "smoke", "paper", "paper-4bit"]


def test_the_two_ways_for_the_decay_to_act() -> None:
    decoupled = replace(DEBUG, regularization="decoupled", logit_decay_bit=0.02)
    assert (DEBUG.objective(None).lambda_dz, DEBUG.objective(None).lambda_bit) == (0.01, 0.01)
    assert (decoupled.group_kwargs["dz_decay"], decoupled.group_kwargs["bit_decay"]) == (0.01, 0.02)
    assert (decoupled.objective(None).lambda_dz, decoupled.objective(None).lambda_bit) == (0, 0)


def test_learning_rate_shapes() -> None:
    def at(shape: str) -> list[float]:
        factor = configure("debug", learning_rate_shape=shape, hold=0.5).lr_lambda()
        return [factor(done) for done in (0.0, 0.5, 0.75, 1.0)]

    assert at("constant") == [1, 1, 1, 1]
    assert at("hold_then_linear") == [1, 1, 0.5, 0]
    assert at("cosine") == pytest.approx([1, 0.5, 0.1464466, 0])


BAD: list[tuple[str, Any, str]] = [
    ("model", "resnet-20", "model='resnet-20' is unknown: choose one of resnet20, .*; did you mean 'resnet20'"),
    ("shortcut", "C", "shortcut='C' is unknown: choose one of A, B"),
    ("epochs", 0, "epochs=0: need 1..100000"),
    ("epochs", True, "epochs=True: need .*, a whole number"),
    ("batch_size", 1, "batch_size=1: need 2"),
    ("limit", 0, "limit=0: need 1"),
    ("fixed_bits", 1, "fixed_bits=1: need 2..16, a whole number; 2 means ternary"),
    ("max_bits", 17, "max_bits=17: need 2..16"),
    ("init_bit_logit", NAN, "init_bit_logit=nan: need any finite number; 3.0 starts"),
    ("learning_rate", -1e-3, "learning_rate=-0.001: need 0..10"),
    ("hold", 1.0, "hold=1.0: need 0..0.999"),
    ("expected_accuracy", 60, "expected_accuracy=60: need 0..1"),
    ("exclude_layers", "conv1", r"exclude_layers='conv1': need a tuple of patterns, \('conv1',\)"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD, ids=[f"{name}={value!r}" for name, value, _ in BAD])
def test_a_setting_out_of_range_is_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configure("debug", **{name: value})


FREE = {"preset", "data", "data_root", "exclude_layers", "flip", "learnable_bit", "learnable_deadzone", "given"}


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

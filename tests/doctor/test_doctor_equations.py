"""The doctor's own equations against hand calculations, finite differences and the quantizer it examines."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from experiments.doctor.data.images import Affine, affine_of
from experiments.doctor.quantizer import equations
from src.quantizer import DeadZoneLDZCompander


def weights(count: int = 400, seed: int = 0) -> equations.Values:
    return np.random.default_rng(seed).standard_normal(count) * 0.1


def test_a_grid_written_out_by_hand() -> None:
    # 101 weights 0.00 .. 1.00: the 0.99-quantile is 0.99. tanh(theta) = 0.5: d = 2 x 0.99 x 0.5 = 0.99, share 1/2.
    w = np.arange(101) / 100
    g = equations.grid(w, math.atanh(0.5), bits=3)
    assert g.range == pytest.approx(0.99)
    assert g.dead_zone == pytest.approx(0.99)
    assert g.levels == 3
    assert g.step == pytest.approx((0.99 - 0.495) / 2.5)  # 0.198
    assert g.shift == pytest.approx(0.495 - 0.099)
    values = equations.quantized(w, g)
    assert sorted(set(values.round(6))) == pytest.approx([0.0, 0.594, 0.792, 0.99])


@pytest.mark.parametrize(
    ("theta", "bits"), [(0.0, 2), (3.0, 8), (-3.0, 8), (math.atanh(0.5), 5), (math.atanh(0.24), 3)]
)
def test_bits_are_rounded_to_the_nearest(theta: float, bits: int) -> None:
    assert equations.bit_width(theta, 8) == bits  # 6 |tanh| + 2: 2, 7.97, 7.97, 5, 3.44


@pytest.mark.parametrize(("theta_dz", "theta_bit"), [(0.5, 0.3), (1.2, 0.9), (-0.8, 1.6), (3.0, 3.0)])
def test_gradients_of_the_logits_are_the_slopes_of_the_smooth_surrogate(theta_dz: float, theta_bit: float) -> None:
    w, c = weights(), np.random.default_rng(1).standard_normal(400)
    bits = equations.bit_width(theta_bit, 8)
    found = equations.gradient(w, c, theta_dz, theta_bit, equations.grid(w, theta_dz, bits), 8)

    def at(dz: float, bit: float) -> float:
        return equations.smooth_surrogate(w, c, theta_dz, theta_bit, (8, True, bits), (dz, bit))

    h = 1e-6
    assert found.logit_dz == pytest.approx(
        (at(theta_dz + h, theta_bit) - at(theta_dz - h, theta_bit)) / (2 * h), rel=1e-4
    )
    assert found.logit_bit == pytest.approx(
        (at(theta_dz, theta_bit + h) - at(theta_dz, theta_bit - h)) / (2 * h), rel=1e-4
    )


@pytest.mark.parametrize("wrong", ["", *equations.MISTAKES])
def test_every_mistake_differs_from_the_right_gradient(wrong: str) -> None:
    w, c = weights(), np.random.default_rng(1).standard_normal(400)
    g = equations.grid(w, 0.8, 4)
    right = equations.gradient(w, c, 0.8, math.atanh(2 / 6), g, 8)
    other = equations.gradient(w, c, 0.8, math.atanh(2 / 6), g, 8, wrong=wrong)
    parts = ((right.weights, other.weights), (right.logit_dz, other.logit_dz), (right.logit_bit, other.logit_bit))
    assert all(np.allclose(a, b) for a, b in parts) == (wrong == "")


def test_the_quantizer_agrees_in_value_and_gradient() -> None:
    quantizer = DeadZoneLDZCompander(init_deadzone_logit=0.7, init_bit_logit=0.6).double()
    w = torch.tensor(weights(), requires_grad=True)
    c = torch.randn(400, dtype=torch.float64)
    values = quantizer(w)
    (values * c).sum().backward()
    g = equations.grid(w.detach().numpy(), 0.7, equations.bit_width(0.6, 8))
    meant = equations.gradient(w.detach().numpy(), c.numpy(), 0.7, 0.6, g, 8)
    assert np.allclose(values.detach().numpy(), equations.quantized(w.detach().numpy(), g), atol=1e-12)
    assert w.grad is not None
    assert np.allclose(w.grad.numpy(), meant.weights)
    assert quantizer.logit_dz.grad is not None
    assert quantizer.logit_bit.grad is not None
    # the quantizer's logits were made in float32, so they differ from 0.7 and 0.6 by 1e-8
    assert quantizer.logit_dz.grad.item() == pytest.approx(meant.logit_dz, rel=1e-5)
    assert quantizer.logit_bit.grad.item() == pytest.approx(meant.logit_bit, rel=1e-5)


def test_a_normalisation_is_read_off_the_spacing_of_values() -> None:
    mean, std = np.array([0.5, 0.4, 0.3]), np.array([0.25, 0.2, 0.3])
    pixels = torch.randint(0, 256, (16, 3, 8, 8), generator=torch.Generator().manual_seed(0)).double() / 255
    images = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    found = affine_of(images.float(), Affine(np.array([0.45] * 3), np.array([0.25] * 3)))
    assert found is not None
    assert np.allclose(found.mean, mean, atol=1e-3)
    assert np.allclose(found.std, std, rtol=1e-3)

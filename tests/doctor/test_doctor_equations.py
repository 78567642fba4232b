"""The doctor's own equations against hand calculations, central differences and the quantizer it examines."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.doctor.causes.quantizer_mutants import WRONG_GRADIENTS, WRONG_VALUES
from experiments.doctor.checks.augmentation import Affine, affine_of
from experiments.doctor.checks.quantizers import gradients
from experiments.doctor.reference.quantizer import Grid, QuantizerEquations
from src.quantizer import DeadZoneLDZCompander

LOGITS = [(0.5, 0.3), (1.2, 0.9), (-0.8, -1.6), (3.0, 3.0)]


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def weights(count: int = 400, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(count) * 0.1)


def answers(equations: QuantizerEquations, w: Tensor, c: Tensor, theta: tuple[float, float]) -> list[Tensor]:
    """Values at w, in both modes, at -3 w and at w again; gradients of sum(c v) for w and both logits."""
    leaves = [w.clone().requires_grad_(), number(theta[0]).requires_grad_(), number(theta[1]).requires_grad_()]
    values = equations(*leaves)  # type: ignore[arg-type]
    slopes = gradients((c * values).sum(), leaves)
    later = [equations(factor * w, leaves[1], leaves[2], mode) for factor, mode in ((1, False), (-3, True), (1, True))]
    return [values, *later, *slopes]


def test_a_grid_written_out_by_hand() -> None:
    # 101 weights 0.00 .. 1.00: the 0.99-quantile is 0.99. tanh(theta) = 0.5: d = 2 x 0.99 x 0.5 = 0.99, share 1/2.
    w, equations = torch.arange(101, dtype=torch.float64) / 100, QuantizerEquations(fixed_bits=3)
    g = equations.grid(w, number(math.atanh(0.5)), number(0.0))
    assert g.range.item() == pytest.approx(0.99)
    assert g.dead_zone.item() == pytest.approx(0.99)
    assert g.levels == 3
    assert g.step.item() == pytest.approx((0.99 - 0.495) / 2.5)  # 0.198
    assert g.shift.item() == pytest.approx(0.495 - 0.099)
    values = equations(w, number(math.atanh(0.5)), number(0.0))
    assert sorted({round(value, 6) for value in values.tolist()}) == pytest.approx([0.0, 0.594, 0.792, 0.99])


@pytest.mark.parametrize(
    ("theta", "bits"), [(0.0, 2), (3.0, 8), (-3.0, 8), (math.atanh(0.5), 5), (math.atanh(0.24), 3)]
)
def test_bits_are_rounded_to_the_nearest(theta: float, bits: int) -> None:
    assert QuantizerEquations().bits(number(theta)) == bits  # 6 |tanh| + 2: 2, 7.97, 7.97, 5, 3.44


def surrogate(w: Tensor, c: Tensor, theta: tuple[float, float], at: tuple[float, float]) -> float:
    """sum(c v) at the logits `at`, with what rounding, clip and the dead zone did at `theta` frozen.

    o(t) = o + sign(w) (delta - delta(t));  v(t) = o(t) + s(t) (q - o / s) + delta(t) sign(q). Its derivatives at theta
    are the straight-through gradients.
    """

    def grid(dz: float, bits: float) -> Grid:
        return QuantizerEquations(fixed_bits=bits).grid(w, number(dz), number(0.0))

    bits = float(QuantizerEquations().bits(number(theta[1])))
    g = grid(theta[0], bits)
    h = grid(at[0], bits + 6 * (abs(math.tanh(at[1])) - abs(math.tanh(theta[1]))))
    outside = w.sign() * (w.abs() - g.shift).clamp(min=0)
    q = (outside / g.step).round().clamp(-g.levels, g.levels)
    values = outside + w.sign() * (g.shift - h.shift) + h.step * (q - outside / g.step) + h.shift * q.sign()
    return float(c @ values)


@pytest.mark.parametrize("theta", LOGITS)
def test_gradients_of_the_logits_are_the_slopes_of_the_smooth_surrogate(theta: tuple[float, float]) -> None:
    w, c, h = weights(), weights(seed=1), 1e-6
    *_, of_weights, of_dz, of_bit = answers(QuantizerEquations(), w, c, theta)
    sides = [surrogate(w, c, theta, (theta[0] + dz, theta[1] + b)) for dz, b in ((h, 0), (-h, 0), (0, h), (0, -h))]
    assert of_dz.item() == pytest.approx((sides[0] - sides[1]) / (2 * h), rel=1e-4)
    assert of_bit.item() == pytest.approx((sides[2] - sides[3]) / (2 * h), rel=1e-4)
    assert torch.allclose(of_weights, c, rtol=1e-12), "pruned and saturated weights move like all others"


def test_a_weight_of_zero_has_no_side_and_no_gradient() -> None:
    w = weights()
    w[::7] = 0
    slope = answers(QuantizerEquations(), w, torch.ones(400, dtype=torch.float64), (0.8, 0.9))[4]
    assert torch.allclose(slope, (w != 0).double())


@pytest.mark.parametrize("place", range(len(WRONG_VALUES)))
def test_every_mistake_in_values_shows(place: int) -> None:
    assert shown(WRONG_VALUES[place].change, slice(0, 7)), WRONG_VALUES[place].key


@pytest.mark.parametrize("place", range(len(WRONG_GRADIENTS)))
def test_every_mistake_in_gradients_shows_in_gradients_alone(place: int) -> None:
    assert shown(WRONG_GRADIENTS[place].change, slice(4, 7)), WRONG_GRADIENTS[place].key
    assert not shown(WRONG_GRADIENTS[place].change, slice(0, 4)), WRONG_GRADIENTS[place].key


def shown(change: Callable[[QuantizerEquations], QuantizerEquations], part: slice) -> bool:
    """Whether the mutant answers otherwise than the equations at any logits, with learned or with fixed bits."""
    w, c = weights().view(20, 20), weights(seed=1).view(20, 20)
    for right in (QuantizerEquations(), QuantizerEquations(fixed_bits=5)):
        wrong = change(right)
        for theta in LOGITS:
            pairs = zip(answers(right, w, c, theta)[part], answers(wrong, w, c, theta)[part], strict=True)
            if not all(torch.allclose(a, b) for a, b in pairs):
                return True
    return False


def test_the_quantizer_agrees_in_value_and_gradient() -> None:
    quantizer = DeadZoneLDZCompander(init_deadzone_logit=0.7, init_bit_logit=0.6).double()
    w, c = weights().requires_grad_(), weights(seed=1)
    values = quantizer(w)
    (values * c).sum().backward()
    theta = (quantizer.logit_dz.item(), quantizer.logit_bit.item())
    meant = answers(QuantizerEquations(), w.detach(), c, theta)
    found = [values, w.grad, quantizer.logit_dz.grad, quantizer.logit_bit.grad]
    for number_found, number_meant in zip(found, [meant[0], *meant[4:]], strict=True):
        assert number_found is not None
        assert torch.allclose(number_found, number_meant, rtol=1e-9, atol=1e-12)


def test_a_normalisation_is_read_off_the_spacing_of_values() -> None:
    mean, std = np.array([0.5, 0.4, 0.3]), np.array([0.25, 0.2, 0.3])
    pixels = torch.randint(0, 256, (16, 3, 8, 8), generator=torch.Generator().manual_seed(0)).double() / 255
    images = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    found = affine_of(images.float(), Affine(np.array([0.45] * 3), np.array([0.25] * 3)))
    assert found is not None
    assert np.allclose(found.mean, mean, atol=1e-3)
    assert np.allclose(found.std, std, rtol=1e-3)

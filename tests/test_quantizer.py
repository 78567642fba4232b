"""The dead-zone quantizer against an independent float64 reference in numpy, and the properties it promises.

The reference follows the equations of CoDeQ (section 3), with every gradient derived by hand, none taken from autograd.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from src.quantizer import (
    DeadZoneLDZCompander,
    QuantizerError,
    check_range,
)
from utils_quantization import FakeQuantParametrization, attach_weight_quantizers

Floats = NDArray[np.float64]
EPSILON = 1e-8
QUICK = settings(max_examples=60, deadline=None, derandomize=True)
LOGITS = st.floats(-4, 4).filter(lambda x: abs(x) > 1e-3)
SHAPES = [(1,), (2,), (7,), (101,), (4, 5), (3, 2, 3, 3), (16, 3, 3, 3), (1, 1, 1, 1), ()]


class Reference(NamedTuple):
    """What the reference computes for one tensor."""

    values: Floats
    indices: Floats
    bits: float
    dead_zone: float
    step: float
    grad_w: Floats
    grad_dz: float
    grad_bit: float


def reference(w: Floats, theta_dz: float, theta_bit: float, upstream: Floats, max_bits: int = 8) -> Reference:
    """The quantizer and all its gradients by hand.

    Forward, with R the 0.99-quantile of |w|:
        d = 2 R (1 - |tanh theta_dz|), b = round(|tanh theta_bit| (max - 2) + 2), Q = 2^(b-1) - 1
        s = (R - d/2) / (Q - 1/2) + eps, delta = d/2 - s/2
        x = sign(w) max(|w| - delta, 0) / s, q = clip(round(x), -Q, Q), value = s q + delta sign(q)

    Backward. Straight through means that round, max(., 0) and clip have slope 1, while sign and R are held fixed, and
    the clipping bound passes nothing. So, with the forward values of x and q,
        dq = dx = sign(w) (d|w| - d delta) / s - x ds / s,            d|w| = sign(w) dw
        dvalue = q ds + s dq + sign(q) d delta
               = sign(w)^2 dw + (q - x) ds + (sign(q) - sign(w)) d delta
    The weight's own slope is 1 wherever w != 0, pruned and saturated weights included. The dead zone:
        ds/dd = -1 / (2 (Q - 1/2)), d delta/dd = 1/2 - (ds/dd) / 2, dd/dtheta = -2 R sign(tanh) (1 - tanh^2)
    The bits, straight through their rounding:
        ds/dQ = -(R - d/2) / (Q - 1/2)^2, d delta/dQ = -(ds/dQ) / 2, dQ/db = ln(2) 2^(b-1),
        db/dtheta = (max - 2) sign(tanh) (1 - tanh^2)
    """
    magnitude = np.abs(w)
    range_ = float(np.quantile(magnitude, 0.99, method="linear"))
    tanh_dz, tanh_bit = math.tanh(theta_dz), math.tanh(theta_bit)
    dead_zone = 2 * range_ * (1 - abs(tanh_dz))
    bits = float(np.round(abs(tanh_bit) * (max_bits - 2) + 2))
    levels = 2 ** (bits - 1) - 1
    step = (range_ - dead_zone / 2) / (levels - 0.5) + EPSILON
    shift = dead_zone / 2 - step / 2
    sign = np.sign(w)
    x = sign * np.maximum(magnitude - shift, 0) / step
    q = np.clip(np.round(x), -levels, levels)

    wrt_step = float((upstream * (q - x)).sum())
    wrt_shift = float((upstream * (np.sign(q) - sign)).sum())
    step_dz = -0.5 / (levels - 0.5)
    wrt_dead_zone = wrt_step * step_dz + wrt_shift * (0.5 - step_dz / 2)
    step_levels = -(range_ - dead_zone / 2) / (levels - 0.5) ** 2
    wrt_levels = wrt_step * step_levels - wrt_shift * step_levels / 2
    return Reference(
        values=step * q + shift * np.sign(q),
        indices=q,
        bits=bits,
        dead_zone=dead_zone,
        step=step,
        grad_w=upstream * sign**2,
        grad_dz=wrt_dead_zone * -2 * range_ * math.copysign(1, tanh_dz) * (1 - tanh_dz**2),
        grad_bit=wrt_levels
        * math.log(2)
        * 2 ** (bits - 1)
        * (max_bits - 2)
        * math.copysign(1, tanh_bit)
        * (1 - tanh_bit**2),
    )


def made(
    theta_dz: float = 3.0, theta_bit: float = 3.0, max_bits: int = 8, dtype: torch.dtype = torch.float64
) -> DeadZoneLDZCompander:
    """A quantizer whose logits have full precision: the constructor's own are float32."""
    quantizer = DeadZoneLDZCompander(max_bits=max_bits).to(dtype)
    with torch.no_grad():
        quantizer.logit_dz.fill_(theta_dz)
        quantizer.logit_bit.fill_(theta_bit)
    return quantizer


def weights(shape: tuple[int, ...], seed: int, kind: str = "normal") -> Floats:
    generator = np.random.default_rng(seed)
    w = generator.standard_normal(shape) * 0.1
    if kind == "zeros":
        return np.zeros(shape)
    if kind == "half zeros":
        return w * generator.integers(0, 2, shape)
    if kind == "outlier":
        return w + 50 * (generator.random(shape) > 0.9)
    return w


def assert_matches_reference(w: Floats, theta_dz: float, theta_bit: float, max_bits: int, seed: int) -> None:
    upstream = np.random.default_rng(seed + 1).standard_normal(w.shape)
    expected = reference(w, theta_dz, theta_bit, upstream, max_bits)
    quantizer = made(theta_dz, theta_bit, max_bits)
    latent = torch.tensor(w, requires_grad=True)
    values = quantizer(latent)
    values.backward(torch.tensor(upstream))
    assert values.shape == latent.shape
    assert values.dtype == torch.float64
    np.testing.assert_allclose(values.detach().numpy(), expected.values, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(quantizer.indices(latent).numpy(), expected.indices)
    assert quantizer.get_bitwidth().item() == expected.bits
    assert latent.grad is not None
    assert quantizer.logit_dz.grad is not None
    assert quantizer.logit_bit.grad is not None
    np.testing.assert_allclose(latent.grad.numpy(), expected.grad_w, rtol=1e-9, atol=1e-12)
    scale = np.abs(w).sum() * 2.0**max_bits + 1e-9  # sums of many terms that cancel
    np.testing.assert_allclose(float(quantizer.logit_dz.grad), expected.grad_dz, rtol=1e-7, atol=1e-11 * scale)
    np.testing.assert_allclose(float(quantizer.logit_bit.grad), expected.grad_bit, rtol=1e-7, atol=1e-11 * scale)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["normal", "zeros", "half zeros", "outlier"])
@pytest.mark.parametrize(("theta_dz", "theta_bit"), [(3.0, 3.0), (-0.4, 0.5), (0.7, -0.2), (-1.5, -3.0)])
def test_values_and_all_gradients_match_the_reference(
    shape: tuple[int, ...], kind: str, theta_dz: float, theta_bit: float
) -> None:
    assert_matches_reference(weights(shape, 11, kind), theta_dz, theta_bit, 8, seed=3)


@QUICK
@given(
    size=st.integers(1, 300),
    seed=st.integers(0, 10_000),
    theta_dz=LOGITS,
    theta_bit=LOGITS,
    max_bits=st.integers(2, 12),
)
def test_reference_over_random_tensors(size: int, seed: int, theta_dz: float, theta_bit: float, max_bits: int) -> None:
    assert_matches_reference(weights((size,), seed), theta_dz, theta_bit, max_bits, seed)


def test_one_case_by_hand() -> None:
    """Five weights, 2 bits: Q = 1, one level on each side, so that every number can be followed.

    |w| sorted: 0.1 0.2 0.3 0.4 0.5; quantile position 0.99 * 4 = 3.96, so R = 0.4 + 0.96 * 0.1 = 0.496.
    tanh(atanh 0.5) = 0.5: d = 2 * 0.496 * 0.5 = 0.496, d / 2 = 0.248. s = 0.248 / 0.5 = 0.496 (+ 1e-8),
    delta = 0.248 - 0.248 = 0. |w| <= 0.248 becomes 0, all else +-(s + delta) = +-0.496.
    """
    w = torch.tensor([0.1, -0.2, 0.3, -0.4, 0.5], dtype=torch.float64)
    quantizer = made(math.atanh(0.5), 3.0, max_bits=2)
    np.testing.assert_allclose(quantizer(w).detach().numpy(), [0, 0, 0.496, -0.496, 0.496], atol=2e-8)
    assert quantizer.indices(w).tolist() == [0, 0, 1, -1, 1]
    grid = quantizer.grid(w)
    assert float(grid.range) == pytest.approx(0.496, abs=1e-12)
    assert float(grid.dead_zone) == pytest.approx(0.496, abs=1e-12)
    assert float(grid.levels) == 1
    assert quantizer.dead_zone_share().item() == pytest.approx(0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batched_equals_one_at_a_time(dtype: torch.dtype) -> None:
    """Values bit for bit; gradients but for the order of sums."""
    shapes = [(16, 3, 3, 3), (5,), (1, 1), (600, 900), (64, 32, 3, 3), (10, 64)]
    tensors = [torch.tensor(weights(shape, i), dtype=dtype, requires_grad=True) for i, shape in enumerate(shapes)]
    factors = [torch.tensor(weights(shape, 20 + i), dtype=dtype) for i, shape in enumerate(shapes)]
    tensors[1].data.zero_()
    quantizers = [made(0.4 * i - 1.1, 1.2 - 0.5 * i, dtype=dtype) for i in range(len(shapes))]
    batched = DeadZoneLDZCompander.quantize_many(quantizers, tensors)
    single = [quantizer(w) for quantizer, w in zip(quantizers, tensors, strict=True)]
    assert all(value.dtype == dtype for value in batched)
    assert all(map(torch.equal, batched, single))
    parameters = [*tensors, *(q.logit_dz for q in quantizers), *(q.logit_bit for q in quantizers)]
    gradients = [
        torch.autograd.grad(sum((v * f).sum() for v, f in zip(values, factors, strict=True)), parameters)
        for values in (batched, single)
    ]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


class Recorder(TorchDispatchMode):
    """How often layers were put in order, and how many numbers the largest tensor made has."""

    orderings = numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.orderings += function is torch.ops.aten.topk.default
        self.numbers = max([self.numbers, *(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor))])
        return result


@pytest.mark.parametrize(
    ("sizes", "orderings", "numbers"),
    [
        ([2_000] * 100, 1, 200_000),
        ([2_000] * 50 + [5_000_000] + [2_000] * 50, 2, 5_000_000),  # the large one pads no other
        ([5_000_000, 9_000_000], 2, 9_000_000),
    ],
)
def test_small_layers_are_computed_together_and_large_ones_alone(
    sizes: list[int], orderings: int, numbers: int
) -> None:
    quantizers = [DeadZoneLDZCompander(learnable_bit=False).to("meta") for _ in sizes]
    with Recorder() as recorder:
        values = DeadZoneLDZCompander.quantize_many(quantizers, [torch.empty(size, device="meta") for size in sizes])
    assert [value.numel() for value in values] == sizes
    assert (recorder.orderings, recorder.numbers) == (orderings, numbers)


@pytest.mark.parametrize(
    ("theta", "max_bits", "bits"),
    [(0.0, 8, 2), (3.0, 8, 8), (-3.0, 8, 8), (0.5, 8, 5), (0.5, 4, 3), (10.0, 16, 16), (1.0, 2, 2)],
)
def test_bits_by_hand(theta: float, max_bits: int, bits: int) -> None:
    """tanh 0.5 = 0.4621: 0.4621 * 6 + 2 = 4.77 -> 5 and 0.4621 * 2 + 2 = 2.92 -> 3; tanh 3 = 0.995: 7.97 -> 8."""
    assert DeadZoneLDZCompander(max_bits=max_bits, init_bit_logit=theta).get_bitwidth().item() == bits


@pytest.mark.parametrize("flag", [torch.tensor(0.0), torch.tensor(False)])
def test_flags_of_a_loaded_checkpoint_take_effect(flag: torch.Tensor) -> None:
    checkpoint = {
        "logit_dz": torch.tensor(1.5),
        "logit_bit": torch.tensor(0.7),
        "fixed_bit": torch.tensor(5.0),
        "max_bits": torch.tensor(6.0),
        "min_bits": torch.tensor(2.0),
        "learnable_bit": flag,
        "learnable_deadzone": flag,
    }
    quantizer = DeadZoneLDZCompander()
    assert set(quantizer.state_dict()) == set(checkpoint)
    quantizer.load_state_dict(checkpoint)
    assert quantizer.get_bitwidth().item() == 5
    assert quantizer.get_deadzone_logit().item() == 1.5
    assert quantizer.get_bitwidth_logit().item() == pytest.approx(0.7)
    assert not quantizer.logit_dz.requires_grad
    assert not quantizer.logit_bit.requires_grad
    assert "5 fixed" in repr(quantizer)
    # tanh 0.7 = 0.6044: 0.6044 * 4 + 2 = 4.42 -> 4
    on = {**checkpoint, "learnable_bit": torch.tensor(1.0), "learnable_deadzone": torch.tensor(1.0)}
    quantizer.load_state_dict(on)
    assert quantizer.get_bitwidth().item() == 4
    assert quantizer.logit_dz.requires_grad
    assert quantizer.logit_bit.requires_grad
    assert "2..6 learned" in repr(quantizer)


@pytest.mark.parametrize("name", ["fixed_bit_val", "max_bits", "init_bit_logit", "init_deadzone_logit"])
def test_settings_out_of_range(name: str) -> None:
    bits = "bit_val" in name or "max" in name
    need = r"2\.\.16, a whole number; 2 means ternary" if bits else "any finite number; 3.0 starts"
    for value in ([1, 17, 4.0] if bits else [math.nan, math.inf]) + ["4", True, None]:
        with pytest.raises(QuantizerError, match=rf"^{name}={value!r}: need {need}"):
            DeadZoneLDZCompander(**{name: value})


@pytest.mark.parametrize(
    ("value", "limits", "message"),
    [
        (0.5, {"lowest": 0, "highest": 1, "whole": False}, None),
        (1, {"lowest": 0, "highest": 1}, None),
        (10**9, {"lowest": 0}, None),
        (1.5, {"lowest": 0, "highest": 1, "whole": False}, "share=1.5: need 0..1"),
        (1.0, {"lowest": 0, "highest": 1}, "share=1.0: need 0..1, a whole number"),
        (-1, {"lowest": 0, "remedy": "count from 0"}, "share=-1: need 0 or more, a whole number; count from 0"),
        (math.inf, {"lowest": 0, "whole": False}, "share=inf: need 0 or more"),
        (math.nan, {"lowest": 0, "whole": False}, "share=nan: need 0 or more"),
        (True, {"lowest": 0}, "share=True: need 0 or more, a whole number"),
    ],
)
def test_ranges_include_their_limits_and_the_message_names_them(
    value: object, limits: dict[str, Any], message: str | None
) -> None:
    if message is None:
        check_range("share", value, **limits)
        return
    with pytest.raises(LookupError, match=f"^{re.escape(message)}$"):
        check_range("share", value, **limits, error=type("Custom", (LookupError, ValueError), {}))


@pytest.mark.parametrize("w", [torch.zeros(0), torch.zeros(3, 0), torch.zeros(4, dtype=torch.int64)])
def test_tensors_that_cannot_be_quantized(w: torch.Tensor) -> None:
    for call in (DeadZoneLDZCompander(), DeadZoneLDZCompander().grid, DeadZoneLDZCompander().indices):
        with pytest.raises(QuantizerError, match="at least one floating-point weight"):
            call(w)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_quantized_in_float32_and_rounded_once(half: torch.dtype) -> None:
    w = torch.randn(50, 40, generator=torch.Generator().manual_seed(2)).mul(1e-3).to(half)
    for changes in ({"max_bits": 16}, {"init_deadzone_logit": 0.7, "max_bits": 4}):
        quantizer = DeadZoneLDZCompander(**changes)
        latent = w.clone().requires_grad_()
        values = quantizer(latent)
        assert values.dtype == half
        assert torch.equal(values, quantizer(w.float()).to(half))
        assert torch.equal(quantizer.indices(w), quantizer.indices(w.float()))
        gradients = torch.autograd.grad(values.float().square().sum(), [latent, quantizer.logit_dz])
        assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)
    halved = DeadZoneLDZCompander(max_bits=16).to(half)  # 1e-8 is 0 in float16, 2^15 - 1 is not in bfloat16
    assert torch.equal(halved(w), DeadZoneLDZCompander(max_bits=16)(w))
    assert not halved(torch.zeros(3, 4, dtype=half)).any()


def test_tensors_without_numbers_leave_nothing_behind_for_others() -> None:
    quantizer, w = DeadZoneLDZCompander(), torch.linspace(-1, 1, 307)
    for _ in range(2):  # one mode's tensors are of no use to another
        with FakeTensorMode() as mode:
            assert DeadZoneLDZCompander()(mode.from_tensor(w)).shape == w.shape
    assert DeadZoneLDZCompander().to("meta")(w.to("meta")).shape == w.shape
    expected = reference(w.double().numpy(), 3.0, 3.0, np.ones(307))
    np.testing.assert_allclose(quantizer(w).detach().numpy(), expected.values, rtol=1e-5, atol=1e-6)


def test_parametrization_identity_exact_values_gradients() -> None:
    """The three parts: nothing when off, the reference's values when on, a gradient to every learnable."""
    torch.manual_seed(4)
    layer = nn.Linear(40, 30).double()
    original = layer.weight.detach().clone()
    model = nn.Sequential(layer)
    attach_weight_quantizers(model, [], made, {"theta_dz": 0.9, "theta_bit": 0.6}, enabled=False)
    fake_quant = layer.parametrizations.weight[0]
    assert isinstance(fake_quant, FakeQuantParametrization)
    assert torch.equal(layer.weight, original)

    fake_quant.enabled = True
    image = np.random.default_rng(0).standard_normal((7, 40))
    upstream = np.ones((7, 30)).T @ image  # d sum(x W^T) / d W
    expected = reference(original.numpy(), 0.9, 0.6, upstream)
    np.testing.assert_allclose(layer.weight.detach().numpy(), expected.values, rtol=1e-9, atol=1e-12)

    model(torch.from_numpy(image)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    prefix = "0.parametrizations.weight"
    assert set(gradients) == {
        *("0.bias", f"{prefix}.original", f"{prefix}.0.quantizer.logit_dz", f"{prefix}.0.quantizer.logit_bit")
    }
    assert all(gradient.isfinite().all() and torch.count_nonzero(gradient) for gradient in gradients.values())
    np.testing.assert_allclose(gradients[f"{prefix}.original"].numpy(), expected.grad_w, rtol=1e-9)

"""Before training: are the quantizers where they should be, on, with the settings that were asked for?"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from experiments.doctor.expected import ExpectedQuantizer
from experiments.doctor.pipeline import Pipeline
from experiments.doctor.quantizer import equations
from experiments.doctor.runner import CheckRunner, NotApplicable, Outcome, names, preserve_state
from utils_quantization import latent_weight, quantization, quantized_layers, quantizer_of

SWEEP = tuple(float(theta) for theta in np.linspace(-3.2, 3.2, 23))
SINGLE = 2e-3  # of the range, where float32 is compared with float64


def quantizer_checks(runner: CheckRunner, pipeline: Pipeline) -> None:
    """Add the findings about where the quantizers are and how they are set."""
    runner.check("layers quantized", "every layer that should be quantized is, and no other", _attached, pipeline)
    runner.check("quantizers on", "the network trains with the quantizers switched on", _switched_on, pipeline)
    runner.check("starting points", "the logits start where the configuration says", _starting_points, pipeline)
    runner.check(
        "bits follow the logit", "b = round(|tanh theta_bit| (b_max - 2) + 2), from 2 to b_max", _bits, pipeline
    )
    runner.check("toggling", "off is the latent network, on again is the quantized one", _toggling, pipeline)


def promised_quantizer(pipeline: Pipeline) -> ExpectedQuantizer:
    """The quantizer's expected. Raises NotApplicable where there is none."""
    if pipeline.expected.quantizer is None:
        raise NotApplicable("no quantizer settings are expected")
    if not quantized_layers(pipeline.model):
        raise NotApplicable("the network has no quantizer")
    return pipeline.expected.quantizer


def bits_in_use(settings: ExpectedQuantizer, theta_bit: float) -> float:
    """The bit width that the equation gives."""
    if not settings.learns_bits:
        return float(settings.fixed_bits)
    return equations.bit_width(theta_bit, settings.max_bits, settings.min_bits)


def expected_weight(settings: ExpectedQuantizer, layer: nn.Module) -> tuple[equations.Values, equations.Grid]:
    """The quantized weights of a layer, (T,), by the equations, and its grid."""
    w, (theta_dz, theta_bit) = flat(latent_weight(layer)), logits(layer)
    g = equations.grid(w, theta_dz, bits_in_use(settings, theta_bit))
    return equations.quantized(w, g), g


@torch.no_grad()
def logits(layer: nn.Module) -> tuple[float, float]:
    """theta_dz and theta_bit of a quantized layer. Raises NotApplicable for a quantizer without them."""
    quantizer = quantizer_of(layer)
    if not all(isinstance(getattr(quantizer, leaf, None), Tensor) for leaf in ("logit_dz", "logit_bit")):
        raise NotApplicable(f"{type(quantizer).__name__} has no logit_dz and logit_bit")
    return float(cast(Any, quantizer).logit_dz), float(cast(Any, quantizer).logit_bit)


def flat(tensor: Tensor) -> equations.Values:
    """A tensor as float64 numpy, (T,)."""
    return tensor.detach().double().flatten().cpu().numpy()


def _attached(pipeline: Pipeline) -> Outcome:
    layers = quantized_layers(pipeline.model)
    found, meant = list(layers), pipeline.expected.quantized
    if meant is None:
        kinds = (nn.Conv2d, nn.Linear)
        plain = [n for n, m in pipeline.model.named_modules() if isinstance(m, kinds) and n not in found]
        left = f"; not quantized: {names(plain)}" if plain else ""
        return Outcome("at least one quantizer", f"{len(found)} quantizers{left}", bool(found), ["no-quantizers"])
    missing, extra = [n for n in meant if n not in found], [n for n in found if n not in meant]
    double = [n for n in found if len(cast(Any, pipeline.model.get_submodule(n)).parametrizations.weight) > 1]
    distinct = len({id(quantizer_of(layer)) for layer in layers.values()})
    latents = len({id(latent_weight(layer)) for layer in layers.values()})
    shared = min(distinct, latents) < len(found)
    parts = [f"{len(found)} quantizers"]
    parts += [f"missing: {names(missing)}"] if missing else []
    parts += [f"not meant: {names(extra)}"] if extra else []
    parts += [f"more than one on {names(double)}"] if double else []
    parts += [f"only {min(distinct, latents)} of them distinct"] if shared else []
    likely = ["no-quantizers" if meant and not found else None, "quantizers-missing" if missing else None]
    likely += ["quantizer-shared" if shared else None, "quantizers-extra" if extra or double else None]
    ok = not (missing or extra or double or shared)
    return Outcome(f"{len(meant)} quantizers, every one by name", "; ".join(parts), ok, likely)


@torch.no_grad()
def _switched_on(pipeline: Pipeline) -> Outcome:
    layers = quantized_layers(pipeline.model)
    if not layers:
        raise NotApplicable("the network has no quantizer")
    off = [name for name, layer in layers.items() if not cast(Any, layer).parametrizations.weight[0].enabled]
    same: dict[bool, list[str]] = {}
    with preserve_state(pipeline):
        for training in (True, False):
            pipeline.model.train(training)
            same[training] = [
                name
                for name, layer in layers.items()
                if name not in off
                and bool(latent_weight(layer).any())
                and torch.equal(cast(Tensor, layer.weight), latent_weight(layer))
            ]
    measured = f"{len(layers) - len(off)} of {len(layers)} on"
    for training, found in same.items():
        mode = "training" if training else "eval"
        measured += f"; in {mode} mode the weights of {names(found)} are the latent ones" if found else ""
    likely: list[str | None] = ["quantizers-off" if off else None]
    if same[True] != same[False]:
        likely += ["quantizers-off-in-training" if same[True] else "quantizers-off-in-evaluation"]
    ok = not (off or same[True] or same[False])
    return Outcome("all on, in training and in eval mode", measured, ok, [*likely, "not-quantized", "quantizers-off"])


def _starting_points(pipeline: Pipeline) -> Outcome:
    settings = promised_quantizer(pipeline)
    if getattr(pipeline.optimizer, "state", None):
        raise NotApplicable("the network has been trained already")
    wrong = []
    for name, layer in quantized_layers(pipeline.model).items():
        theta_dz, theta_bit = logits(layer)
        if abs(theta_dz - settings.init_dz_logit) > 1e-5 or abs(theta_bit - settings.init_bit_logit) > 1e-5:
            wrong.append(f"{name} starts at theta_dz {theta_dz:g}, theta_bit {theta_bit:g}")
    expected = f"theta_dz {settings.init_dz_logit:g}, theta_bit {settings.init_bit_logit:g}"
    return Outcome(expected, "; ".join(wrong[:2]) or "all there", not wrong, ["quantizer-settings"])


@torch.no_grad()
def _bits(pipeline: Pipeline) -> Outcome:
    settings = promised_quantizer(pipeline)
    quantizers = {name: cast(Any, quantizer_of(layer)) for name, layer in quantized_layers(pipeline.model).items()}
    if not all(hasattr(quantizer, "get_bitwidth") for quantizer in quantizers.values()):
        raise NotApplicable("the quantizers have no get_bitwidth()")
    wrong: list[str] = []
    for name, quantizer in quantizers.items():
        found, meant = float(quantizer.get_bitwidth()), bits_in_use(settings, float(quantizer.logit_bit))
        if abs(found - meant) > 1e-4:
            wrong.append(f"{name} has {found:g} bits, not {meant:g}")
    likely: list[str] = []
    for quantizer in {type(quantizer): quantizer for quantizer in quantizers.values()}.values():
        swept = [(theta, _bits_at(quantizer, theta)) for theta in SWEEP]
        odd = [(theta, b) for theta, b in swept if abs(b - bits_in_use(settings, theta)) > 1e-4]
        if odd:
            theta, found = odd[0]
            wrong.append(f"theta_bit {theta:.2f} gives {found:g} bits, not {bits_in_use(settings, theta):g}")
            likely += _bits_diagnosis(settings, swept)
    likely += ["bits-frozen", "bits-wrong"]
    measured = "; ".join(wrong[:2]) if wrong else f"{len(quantizers)} quantizers and a sweep of theta_bit agree"
    return Outcome(f"the equation's bits, 2 to {settings.max_bits}", measured, not wrong, likely)


def _bits_at(quantizer: nn.Module, theta: float) -> float:
    twin = cast(Any, copy.deepcopy(quantizer))
    twin.logit_bit.fill_(theta)
    return float(twin.get_bitwidth())


def _bits_diagnosis(settings: ExpectedQuantizer, swept: Sequence[tuple[float, float]]) -> list[str]:
    """Which rule gives the measured bits."""
    found = np.array([b for _, b in swept])
    if np.ptp(found) == 0:
        return ["bits-frozen", "quantizer-settings"]

    def exact(largest: float, rounding: equations.Rounding) -> bool:
        meant = [equations.bit_width(theta, largest, 2.0, rounding) for theta, _ in swept]
        return bool(np.abs(meant - found).max() < 1e-3)

    rules: dict[str, equations.Rounding] = {
        "bits-floored": math.floor,
        "bits-ceiled": math.ceil,
        "bits-not-rounded": lambda x: x,
    }
    keys = [key for key, rule in rules.items() if settings.learns_bits and exact(settings.max_bits, rule)]
    others = [n for n in range(2, 17) if exact(n, equations.nearest)]
    keys += ["quantizer-settings"] if others else []
    keys += ["bits-out-of-range"] if found.min() < 2 or found.max() > settings.max_bits else []
    return [*keys, "bits-wrong"]


@torch.no_grad()
def _toggling(pipeline: Pipeline) -> Outcome:
    layers = quantized_layers(pipeline.model)
    if not layers:
        raise NotApplicable("the network has no quantizer")

    def weights() -> list[Tensor]:
        return [cast(Tensor, layer.weight).clone() for layer in layers.values()]

    with preserve_state(pipeline):
        first, before = weights(), weights()
        with quantization(pipeline.model, enabled=False):
            off = weights()
        after = weights()
    latent = [latent_weight(layer).detach() for layer in layers.values()]
    noisy = [n for n, a, b in zip(layers, first, before, strict=True) if not _equal(a, b)]
    if noisy:
        measured = f"two readings differ in {names(noisy)}"
        likely = ["evaluation-not-repeatable", "toggle-broken"]
        return Outcome("the same weights at every reading", measured, False, likely)
    wrong_off = [n for n, a, b in zip(layers, off, latent, strict=True) if not _equal(a, b)]
    wrong_on = [n for n, a, b in zip(layers, before, after, strict=True) if not _equal(a, b)]
    measured = "both exact"
    if wrong_off or wrong_on:
        measured = f"off differs from the latent weights in {names(wrong_off) or 'no layer'}; "
        measured += f"on again differs in {names(wrong_on) or 'no layer'}"
    ok = not (wrong_off or wrong_on)
    return Outcome("exactly the latent, then exactly the same", measured, ok, ["toggle-broken"])


def _equal(left: Tensor, right: Tensor) -> bool:
    """Equal bit for bit; what is not a number equals itself here."""
    return torch.equal(left.nan_to_num(), right.nan_to_num())

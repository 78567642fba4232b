"""Gradients by parameter compared, and which mistake explains a penalty that is not the coupled group lasso."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from experiments.doctor.core import objective
from experiments.doctor.pipeline import Pipeline
from utils_quantization import latent_weight


def penalty_diagnosis(
    pipeline: Pipeline, grouping: objective.Grouping, value: float, found: objective.Gradients
) -> list[str]:
    """Which other grouping gives the value and the gradient best, or whether it is another function altogether."""
    silent = all(float(g.abs().max()) == 0 for g in found.values())
    right_slopes = grouping.lasso(grouping.weights(pipeline.model))[1]
    factor = factor_of(found, as_parameters(pipeline.model, right_slopes))
    if factor is not None and not silent:
        return ["penalty-sign" if factor < 0 else "penalty-scaled", "penalty-wrong"]
    if not silent and _scaled_by_tensor(found, as_parameters(pipeline.model, right_slopes)):
        return ["gradients-scaled", "penalty-wrong"]
    off: dict[str, float] = {}

    def rate(key: str, guess: objective.Grouping, latent: bool) -> None:
        total, slopes = guess.lasso(guess.weights(pipeline.model, latent))
        target = as_parameters(pipeline.model, slopes)
        miss = abs(value - total) / max(total, 1e-12) + (0.0 if silent else misfit(found, target))
        plain_key = key.partition(" ")[0]
        off[plain_key] = min(miss, off.get(plain_key, math.inf))

    rate("right", grouping, False)
    rate("penalty-on-latent", grouping, True)
    for key, guess in objective.other_groupings(pipeline).items():
        rate(key, guess, False)
        rate(key, guess, True)
    right = off.pop("right")
    ranked = sorted((key for key in off if off[key] < max(right, 1e-9)), key=lambda key: off[key])
    if silent:
        return ["penalty-detached", *(key for key in ranked if off[key] < 0.01)]
    exact = [key for key in ranked if off[key] < 0.02]
    if not exact and _not_a_lasso(pipeline, found):
        return ["penalty-not-lasso", "penalty-wrong"]
    return [*exact[:2], *_shape_of_gradient(pipeline, grouping, found), *ranked[:2], "penalty-wrong"]


def factor_of(found: objective.Gradients, meant: objective.Gradients) -> float | None:
    """k where found = k meant, to 1 %; None where it is not parallel to it."""
    size = sum(float(g.square().sum()) for g in meant.values())
    dot = sum(float((found[n] * g).sum()) for n, g in meant.items() if n in found)
    k = dot / size if size else 0.0
    parallel = k != 0 and misfit(found, {n: k * g for n, g in meant.items()}) < 0.01
    return k if parallel else None


def _scaled_by_tensor(found: objective.Gradients, meant: objective.Gradients) -> bool:
    """Whether every tensor's gradient is a multiple of the right one, and not all by one factor: hooks do that."""
    factors = [factor_of({name: found.get(name, 0 * g)}, {name: g}) for name, g in meant.items() if g.abs().max() > 0]
    return len(factors) > 1 and all(k is not None for k in factors)


def _not_a_lasso(pipeline: Pipeline, found: objective.Gradients) -> bool:
    """Whether the gradient is a constant times w, or times its sign, in every layer: no group's norm in it."""
    constant = []
    with torch.no_grad():
        for name, module in pipeline.model.named_modules():
            if not isinstance(module, nn.Conv2d):
                continue
            slope = found.get(parameter_name(pipeline.model, name, "weight"))
            w = objective.plain(module.weight)
            live = w != 0
            if slope is None or not live.any() or not slope.abs().max() > 0:
                continue
            ratios = ((slope / w)[live], slope[live].abs())
            constant.append(any(float(r.std() / r.mean().abs().clamp(min=1e-12)) < 1e-3 for r in ratios))
    return bool(constant) and all(constant)


def _shape_of_gradient(pipeline: Pipeline, grouping: objective.Grouping, found: objective.Gradients) -> list[str]:
    """What the gradient itself says, where no grouping explains it: which parts of the groups it leaves out."""
    reached: dict[str, list[bool]] = {}
    for member in grouping.members:
        name = parameter_name(pipeline.model, member.module, member.parameter)
        if name in found:
            reached.setdefault(member.role, []).append(bool(found[name].abs().max() > 0))
    norms = not any(reached.get("scale", [True])) and not any(reached.get("shift", [True]))
    return ["penalty-without-batchnorm"] if norms else []


def parameter_name(model: nn.Module, module: str, parameter: str) -> str:
    """The parameter behind `module.parameter`: the latent weight of a quantized layer."""
    layer = model.get_submodule(module)
    quantized = parameter == "weight" and latent_weight(layer) is not getattr(layer, "weight", None)
    tail = "parametrizations.weight.original" if quantized and hasattr(layer, "parametrizations") else parameter
    return f"{module}.{tail}" if module else tail


def as_parameters(model: nn.Module, slopes: dict[str, Tensor]) -> objective.Gradients:
    """Gradients by "module.parameter" as gradients by the parameter's name."""
    found = {}
    for key, slope in slopes.items():
        module, _, parameter = key.rpartition(".")
        found[parameter_name(model, module, parameter)] = slope
    return found


def misfit(found: objective.Gradients, meant: objective.Gradients) -> float:
    """||found - meant|| / ||meant|| over all parameters of either; what one lacks is 0."""
    keys = found.keys() | meant.keys()
    zero = torch.zeros(())
    square = sum(float((found.get(k, zero) - meant.get(k, zero)).square().sum()) for k in keys)
    size = sum(float(value.square().sum()) for value in meant.values())
    return math.sqrt(square / size) if size else math.sqrt(square)

"""Before training: the sparsity penalty, its groups and its coefficient's schedule.

The penalty is called on a disturbed network, where quantized and latent weights, and all channels, differ, and its
value and gradient are compared with the definition. Its groups are tested by intervention. Axis letters: G groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from experiments.diagnosis import objective
from experiments.diagnosis.network_checks import batch_of, scores_of
from experiments.diagnosis.subject import Subject
from experiments.diagnosis.ward import Broken, NotApplicable, Outcome, Ward, names, undisturbed
from src.modes import eval_mode
from utils_quantization import latent_weight, quantization, quantized_layers

OUTWEIGHS = 40.0  # times the task loss at chance; the presets' peaks stay below 5
STRESS = (0.6, 0.4)  # theta_dz, theta_bit: a wide dead zone and few bits, so that quantized and latent weights differ
CLOSE = 1e-3


def penalty_checks(ward: Ward, subject: Subject) -> None:
    """Add the findings about the penalty and its schedule."""
    ward.check("coefficient's schedule", "the penalty's weight in every epoch", _coefficients, subject)
    ward.check("coefficient's size", "the penalty at its peak does not drown the task", _peak, subject)
    ward.check("penalty", "the coupled group lasso of the quantized weights, and its gradient", _penalty, subject)
    ward.check("channel groups", "zeroing a group makes its channel zero for all who read it", _groups, subject)


def _coefficients(subject: Subject) -> Outcome:
    promised = subject.promise.coefficients
    if promised is None:
        raise NotApplicable("no schedule is promised")
    found = [float(subject.coefficient(epoch)) for epoch in range(len(promised))]
    return coefficient_outcome(found, list(promised), "the schedule gives")


def coefficient_outcome(found: list[float], promised: list[float], who: str) -> Outcome:
    """Compare the coefficients of epochs 1, 2, ... with the promised ones, and say which mistake they look like."""
    peak = max(promised, default=0.0)
    close = 1e-6 * max(peak, 1e-12)
    odd = [e for e, (a, b) in enumerate(zip(found, promised, strict=True)) if not abs(a - b) <= close]
    expected = f"0 to {peak:g}, epoch by epoch"
    if not odd:
        return Outcome(expected, f"{who} just that", True)
    likely: list[str | None] = []
    if max(found) > 5 * peak:
        likely.append("coefficient-too-large")
    if len(found) > 1 and len(set(found)) == 1:
        likely.append("coefficient-never-ramps" if found[0] == 0 else "coefficient-constant")
    elif max(found) < 0.01 * peak:
        likely.append("coefficient-never-ramps")
    for shift in (1, -1):
        moved = promised[:1] + promised[:-1] if shift == 1 else promised[1:] + promised[-1:]
        if np.allclose(found, moved, rtol=1e-6, atol=close):
            likely.append("coefficient-shifted")
    likely += ["coefficient-wrong", "coefficient-constant", "coefficient-never-ramps"]
    e = odd[0]
    measured = f"{who} {found[e]:.4g} instead of {promised[e]:.4g} in epoch {e + 1} ({len(odd)} epochs differ)"
    return Outcome(expected, measured, False, likely)


def _peak(subject: Subject) -> Outcome:
    if subject.objective.penalty is None:
        raise NotApplicable("there is no penalty")
    epochs = subject.promise.epochs or 1
    largest = max(float(subject.coefficient(epoch)) for epoch in range(epochs))
    with undisturbed(subject), torch.no_grad():
        value = float(_called(subject))
    weighted, chance = largest * value, math.log(subject.promise.num_classes or 10)
    measured = f"{largest:g} x {value:.3g} = {weighted:.3g}"
    ok = weighted < OUTWEIGHS * chance and value >= 0
    likely = ["coefficient-too-large", "penalty-dominates"]
    return Outcome(f"below {OUTWEIGHS:g} ln(classes) = {OUTWEIGHS * chance:.3g}", measured, ok, likely)


def _called(subject: Subject) -> Tensor:
    if subject.objective.penalty is None:
        raise NotApplicable("there is no penalty")
    try:
        return subject.objective.penalty(subject.model)
    except Exception as error:
        raise Broken("penalty-wrong", error) from error


@torch.no_grad()
def unsettle(subject: Subject) -> None:
    """Make every parameter differ from channel to channel and the quantized weights from the latent ones, so that no
    mistake is hidden by equal values. Only inside `undisturbed`."""
    generator = torch.Generator().manual_seed(3)
    for name, p in subject.model.named_parameters():
        leaf = name.rpartition(".")[2]
        if leaf in ("logit_dz", "logit_bit"):
            p.fill_(STRESS[leaf == "logit_bit"])
        else:
            p.mul_(0.5 + torch.rand(p.shape, generator=generator).to(p))
            if p.dim() == 1:
                p.add_(0.2 * torch.rand(p.shape, generator=generator).to(p))


def _penalty(subject: Subject) -> Outcome:
    if subject.objective.penalty is None:
        if subject.promise.penalty:
            return Outcome(subject.promise.penalty, "no penalty at all", False, ["penalty-not-in-loss"])
        raise NotApplicable("there is no penalty")
    with undisturbed(subject):
        if subject.promise.penalty is None:
            value = _called(subject)
            slopes = objective.gradients(value, subject.model)
            size = math.sqrt(sum(float(g.square().sum()) for g in slopes.values()))
            ok = math.isfinite(float(value)) and size > 0 and math.isfinite(size)
            measured = f"value {float(value):.4g}, norm of its gradient {size:.4g}"
            return Outcome("a finite value with a gradient", measured, ok, ["penalty-detached"])
        grouping = objective.channel_grouping(subject)
        unsettle(subject)
        if quantized_layers(subject.model):
            with quantization(subject.model, enabled=True), _leaves(subject.model) as leaves:
                value = _called(subject)
                found = objective.gradients(value, subject.model)
                found = _at_leaves(subject.model, value, leaves, found)
            with quantization(subject.model, enabled=True):
                return _compare_penalty(subject, grouping, float(value.detach()), found)
        value = _called(subject)
        return _compare_penalty(subject, grouping, float(value.detach()), objective.gradients(value, subject.model))


@contextmanager
def _leaves(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Inside, every quantized weight is a leaf of its own: gradients stop there and do not pass the quantizers.

    A layer's weight is then read from where `shared_quantized_weights` keeps it.
    """
    layers = quantized_layers(model)
    with torch.no_grad():
        leaves = {name: cast(Tensor, layer.weight).detach().clone().requires_grad_() for name, layer in layers.items()}
    switches = {name: cast(Any, layer).parametrizations.weight[0] for name, layer in layers.items()}
    before = {name: switch._shared for name, switch in switches.items()}
    try:
        for name, switch in switches.items():
            switch._shared = leaves[name]
        yield leaves
    finally:
        for name, switch in switches.items():
            switch._shared = before[name]


def _at_leaves(
    model: nn.Module, value: Tensor, leaves: dict[str, Tensor], found: objective.Gradients
) -> objective.Gradients:
    """The gradients with those of the quantized weights added to those of the latent ones, which should have none."""
    if not value.requires_grad:
        return found
    grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, retain_graph=True)
    for name, g in zip(leaves, grads, strict=True):
        if g is not None:
            key = parameter_name(model, name, "weight")
            found[key] = found.get(key, torch.zeros(g.shape, dtype=torch.float64)) + objective.plain(g)
    return found


def _compare_penalty(
    subject: Subject, grouping: objective.Grouping, value: float, found: objective.Gradients
) -> Outcome:
    weights = grouping.weights(subject.model)
    right, slopes = grouping.lasso(weights)
    target, gradient = as_parameters(subject.model, slopes), _shared(found)
    miss = max(abs(value - right) / max(right, 1e-12), misfit(gradient, target))
    none = not any(float(g.abs().max()) > 0 for g in found.values())
    broken = [name for name, g in found.items() if not torch.isfinite(g).all()]
    measured = f"value {value:.5g} for {right:.5g}; gradient off by {100 * misfit(gradient, target):.2g}%"
    if none:
        measured = f"value {value:.5g} for {right:.5g}, without any gradient"
    ok = miss < CLOSE and not broken
    likely: list[str] = []
    if not ok:
        likely = ["penalty-not-differentiable"] if broken else ["penalty-detached"] if none else []
        likely += _penalty_diagnosis(subject, grouping, value, gradient)
    expected = f"sum of the 2-norms of {grouping.count} groups"
    return Outcome(expected, measured, ok, likely, miss / CLOSE)


def _penalty_diagnosis(
    subject: Subject, grouping: objective.Grouping, value: float, found: objective.Gradients
) -> list[str]:
    """Which other grouping gives the value and the gradient best, or whether it is another function altogether."""
    silent = all(float(g.abs().max()) == 0 for g in found.values())
    right_slopes = grouping.lasso(grouping.weights(subject.model))[1]
    factor = factor_of(found, as_parameters(subject.model, right_slopes))
    if factor is not None and not silent:
        return ["penalty-sign" if factor < 0 else "penalty-scaled", "penalty-wrong"]
    off: dict[str, float] = {}

    def rate(key: str, guess: objective.Grouping, latent: bool) -> None:
        total, slopes = guess.lasso(guess.weights(subject.model, latent))
        target = as_parameters(subject.model, slopes)
        miss = abs(value - total) / max(total, 1e-12) + (0.0 if silent else misfit(found, target))
        plain_key = key.partition(" ")[0]
        off[plain_key] = min(miss, off.get(plain_key, math.inf))

    rate("right", grouping, False)
    rate("penalty-on-latent", grouping, True)
    for key, guess in objective.other_groupings(subject).items():
        rate(key, guess, False)
        rate(key, guess, True)
    right = off.pop("right")
    ranked = sorted((key for key in off if off[key] < max(right, 1e-9)), key=lambda key: off[key])
    if silent:
        return ["penalty-detached", *(key for key in ranked if off[key] < 0.01)]
    exact = [key for key in ranked if off[key] < 0.02]
    if not exact and _not_a_lasso(subject, found):
        return ["penalty-not-lasso", "penalty-wrong"]
    return [*exact[:2], *_shape_of_gradient(subject, grouping, found), *ranked[:2], "penalty-wrong"]


def factor_of(found: objective.Gradients, meant: objective.Gradients) -> float | None:
    """k where found = k meant, to 1 %; None where it is not parallel to it."""
    size = sum(float(g.square().sum()) for g in meant.values())
    dot = sum(float((found[n] * g).sum()) for n, g in meant.items() if n in found)
    k = dot / size if size else 0.0
    parallel = k != 0 and misfit(found, {n: k * g for n, g in meant.items()}) < 0.01
    return k if parallel else None


def _not_a_lasso(subject: Subject, found: objective.Gradients) -> bool:
    """Whether the gradient is a constant times w, or times its sign, in every layer: no group's norm in it."""
    constant = []
    with torch.no_grad():
        for name, module in subject.model.named_modules():
            if not isinstance(module, nn.Conv2d):
                continue
            slope = found.get(parameter_name(subject.model, name, "weight"))
            w = objective.plain(module.weight)
            live = w != 0
            if slope is None or not live.any() or not slope.abs().max() > 0:
                continue
            ratios = ((slope / w)[live], slope[live].abs())
            constant.append(any(float(r.std() / r.mean().abs().clamp(min=1e-12)) < 1e-3 for r in ratios))
    return bool(constant) and all(constant)


def _shape_of_gradient(subject: Subject, grouping: objective.Grouping, found: objective.Gradients) -> list[str]:
    """What the gradient itself says, where no grouping explains it: which parts of the groups it leaves out."""
    reached: dict[str, list[bool]] = {}
    for member in grouping.members:
        name = parameter_name(subject.model, member.module, member.parameter)
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


def _shared(found: objective.Gradients) -> objective.Gradients:
    """Without the logits, to which the quantizer's grid passes a little of any gradient."""
    return {name: g for name, g in found.items() if name.rpartition(".")[2] not in ("logit_dz", "logit_bit")}


def _groups(subject: Subject) -> Outcome:
    """Zero everything that makes the channels of random groups; those who read them must see zeros there."""
    if subject.promise.penalty is None:
        raise NotApplicable("no penalty on channel groups is promised")
    grouping = objective.channel_grouping(subject)
    images, _ = batch_of(subject, 8)
    random = np.random.default_rng(0)
    wrong: set[str] = set()
    with undisturbed(subject):
        unsettle(subject)
        subject.model.eval()
        for _ in range(4):
            chosen = random.random(grouping.count) < 0.5
            with undisturbed(subject):
                wrong |= _intervene(subject, grouping, chosen, images)
    uncovered = _uncovered(subject, grouping)
    measured = f"{grouping.count} groups hold" if not wrong else f"not zero where {names(sorted(wrong))} read them"
    measured += f"; in no group: channels of {names(uncovered)}" if uncovered else ""
    likely = ["penalty-ignores-shortcut", "penalty-groups-shifted", "penalty-wrong"]
    return Outcome("zero at every reader", measured, not wrong and not uncovered, likely)


def _intervene(subject: Subject, grouping: objective.Grouping, chosen: np.ndarray, images: Tensor) -> set[str]:
    """Modules that read something else than zero from the channels of the chosen groups."""
    model = subject.model
    with torch.no_grad():
        for member in grouping.members:
            if member.role != "slice":
                p = model.get_parameter(parameter_name(model, member.module, member.parameter))
                rows = torch.from_numpy(np.flatnonzero((member.groups >= 0) & chosen[member.groups]))
                p.index_fill_(member.dim, rows.to(p.device), 0.0)
    seen: dict[str, Tensor] = {}
    hooks = []
    for member in grouping.members:
        if member.role == "slice":
            hooks.append(model.get_submodule(member.module).register_forward_pre_hook(_keeper(seen, member.module)))
    try:
        with eval_mode(model):
            scores_of(subject, images)
    finally:
        for hook in hooks:
            hook.remove()
    wrong = set()
    for member in grouping.members:
        if member.role == "slice" and member.module in seen:
            read = np.flatnonzero((member.groups >= 0) & chosen[member.groups])
            if bool((seen[member.module][torch.from_numpy(read)] > 0).any()):
                wrong.add(member.module)
    return wrong


def _keeper(seen: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any], None]:
    def keep(module: nn.Module, inputs: Any) -> None:
        x = inputs[0].detach().abs().cpu()
        seen[name] = x.transpose(0, 1).flatten(1).amax(1)

    return keep


def _uncovered(subject: Subject, grouping: objective.Grouping) -> list[str]:
    """Convolutions with output channels in no group."""
    whole = {m.module for m in grouping.members if m.role == "filter" and (m.groups >= 0).all()}
    return [n for n, m in subject.model.named_modules() if isinstance(m, nn.Conv2d) and n not in whole]

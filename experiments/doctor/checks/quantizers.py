"""Are the quantizers where they should be, on, and set as was asked for; do they compute CoDeQ's values and gradients?

Each quantizer is observed on a copy, in float64, at its own logits and at others, with its own weights and
with larger ones in between, in training and in eval mode; and so are the equations. Where the two differ, the equations
with one mistake in them are observed as well. Axis letters: T weights of a layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from experiments.doctor.causes.explain import explain
from experiments.doctor.causes.quantizer_mutants import WRONG_GRADIENTS, WRONG_VALUES, range_read_off
from experiments.doctor.expected import LOGITS, ExpectedQuantizer
from experiments.doctor.pipeline import Pipeline
from experiments.doctor.reference.objective import plain
from experiments.doctor.reference.quantizer import Grid, QuantizerEquations, near_a_threshold
from experiments.doctor.runner import CheckRunner, NotApplicable, Outcome, names, preserve_state
from utils_quantization import latent_weight, quantization, quantized_layers, quantizer_of, shared_quantized_weights

OTHER_LOGITS = ((0.5, 0.3), (1.2, 0.9), (0.8, -0.62), (-0.9, 1.6))
"""(theta_dz, theta_bit): small and large dead zones, 2 to 8 bits, both signs."""
SWEEP = tuple(float(theta) for theta in np.linspace(-3.2, 3.2, 23))
TOLERANCE, SINGLE = 1e-6, 2e-3  # of the range: float64, and float32, against the equations in float64
GRADIENT_CLOSE = 1e-2  # relative, of one tensor; float32 sums over a layer in another order are good to 1e-4
VALUES = ("values", "values after others")
MOST_WEIGHTS = 2**16  # of a layer: of larger ones the first filters are observed
STEPS, LAYERS = 2, 8  # watched for weights that are kept from one to the next
Observables = dict[str, Tensor]


def quantizer_checks(runner: CheckRunner, pipeline: Pipeline) -> None:
    """Before training: where the quantizers are, how they are set, what they compute alone and all at once."""
    runner.check("layers quantized", "every layer that should be quantized is, and no other", _attached, pipeline)
    runner.check("quantizers on", "the network trains with the quantizers switched on", _switched_on, pipeline)
    runner.check("starting points", "the logits start where the configuration says", _starting_points, pipeline)
    runner.check(
        "bits follow the logit", "b = round(|tanh theta_bit| (b_max - 2) + 2), from 2 to b_max", _bits, pipeline
    )
    runner.check("toggling", "off is the latent network, on again is the quantized one", _toggling, pipeline)
    seen = Observed(pipeline)
    runner.check("quantized values", "the quantizer computes CoDeQ's grid, zeros and levels", _values, seen)
    runner.check("straight-through gradient", "a pruned or saturated weight still moves", _weight_gradient, seen)
    runner.check("gradient of the logits", "dead zone and bit width learn from the loss", _logit_gradient, seen)
    runner.check("weights follow", "a latent weight that moves moves the quantized one", _follow, pipeline)
    runner.check("all layers at once", "together, layers get what each gets alone", _together, pipeline)


def promised_quantizer(pipeline: Pipeline) -> ExpectedQuantizer:
    """The quantizer's expected settings. Raises NotApplicable where there are none, or no quantizer."""
    _layers(pipeline)
    if pipeline.expected.quantizer is None:
        raise NotApplicable("no quantizer settings are expected", needs="expected.quantizer")
    return pipeline.expected.quantizer


def equations_of(settings: ExpectedQuantizer) -> QuantizerEquations:
    """The equations with these settings."""
    fixed = None if settings.learns_bits else float(settings.fixed_bits)
    return QuantizerEquations(float(settings.max_bits), float(settings.min_bits), fixed)


def bits_in_use(settings: ExpectedQuantizer, theta_bit: float) -> float:
    """The bit width that the equations give."""
    return float(equations_of(settings).bits(torch.tensor(theta_bit, dtype=torch.float64)))


@torch.no_grad()
def expected_weight(settings: ExpectedQuantizer, layer: nn.Module) -> tuple[Tensor, Grid]:
    """The quantized weights of a layer by the equations, of the layer's shape, float64 on the CPU, and their grid."""
    w, (dz, bit), equations = plain(latent_weight(layer)), _tensors(logits(layer)), equations_of(settings)
    return equations(w, dz, bit), equations.grid(w, dz, bit)


@torch.no_grad()
def logits(layer: nn.Module) -> tuple[float, float]:
    """theta_dz and theta_bit of a quantized layer. Raises NotApplicable for a quantizer without them."""
    quantizer = cast(Any, quantizer_of(layer))
    if not all(isinstance(getattr(quantizer, leaf, None), Tensor) for leaf in LOGITS):
        raise NotApplicable(f"{type(quantizer).__name__} has no logit_dz and logit_bit")
    return float(quantizer.logit_dz), float(quantizer.logit_bit)


# Values and gradients, beside the equations


@dataclass(frozen=True)
class Case:
    """What a quantizer is observed on. w: of the layer's shape, float64; own: the logits that it has, theta: gets."""

    layer: str
    w: Tensor
    own: tuple[float, float]
    theta: tuple[float, float]
    quantizer: nn.Module
    training: bool = True

    @property
    def text(self) -> str:
        """The case in words: layer, logits, mode."""
        mode = "" if self.training else ", eval mode"
        return f"{self.layer} at theta_dz {self.theta[0]:.2g}, theta_bit {self.theta[1]:.2g}{mode}"


@dataclass(frozen=True)
class Answer:
    """What a quantizer and the equations make of a case; scale: of each observable; sure: see `near_a_threshold`."""

    case: Case
    found: Observables
    right: Observables
    scale: Mapping[str, float]
    sure: Tensor

    def error(self, name: str) -> float:
        """How far an observable is off, as a multiple of what is tolerated."""
        found, right = (self.scaled(name, each) for each in (self.found, self.right))
        if name in VALUES:
            return float((found - right).abs().amax()) / TOLERANCE if len(found) else 0.0
        return float((found - right).norm()) / max(1.0, float(found.norm())) / (10 * TOLERANCE)

    def scaled(self, name: str, of: Observables) -> Tensor:
        """An observable, (T,), in units of R or of the right gradient; without the weights that may fall anywhere."""
        flat = of[name].double().flatten() / self.scale[name]
        return flat[self.sure.repeat(len(flat) // len(self.sure))] if name in VALUES else flat


class Observed:
    """The quantizers of a pipeline and the equations, observed once for all checks."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    @cached_property
    def answers(self) -> list[Answer]:
        """Every layer at its own logits; some layers, and one of every kind of quantizer, at others too."""
        equations = equations_of(promised_quantizer(self._pipeline))
        return [answer_to(case, equations) for case in cases_of(self._pipeline)]

    @cached_property
    def likely(self) -> list[str]:
        """Keys of what explains the layer that is most often wrong."""
        wrong = [a.case.layer for a in self.answers for name in a.found if not a.error(name) <= 1]
        if not wrong:
            return []
        layer = max(dict.fromkeys(wrong), key=wrong.count)
        answers = [answer for answer in self.answers if answer.case.layer == layer]
        if not all(torch.equal(a.found["values"], observed(a.case)["values"]) for a in answers):
            return ["evaluation-not-repeatable"]
        equations = equations_of(promised_quantizer(self._pipeline))
        off = [name for name in answers[0].found if not all(a.error(name) <= 1 for a in answers)]
        values = [name for name in off if name in VALUES]
        read_off = range_read_off(answers[0].found["values"].double(), answers[0].case.w)
        mutants = [*WRONG_VALUES, read_off] if values else WRONG_GRADIENTS

        def stacked(of: Callable[[Answer], Observables], chosen: Sequence[str]) -> Observables:
            pairs = [(answer, of(answer)) for answer in answers]
            return {name: torch.cat([answer.scaled(name, each) for answer, each in pairs]) for name in chosen}

        def ranked(chosen: Sequence[str]) -> list[str]:
            def predict(guess: QuantizerEquations) -> Observables:
                return stacked(lambda answer: predicted(guess, answer.case), chosen)

            return explain(stacked(lambda answer: answer.found, chosen), equations, mutants, predict)

        return ranked(off) or (ranked(values) if values else [])

    def outcome(self, chosen: Sequence[str], expected: str, other: str) -> Outcome:
        """The worst error of the chosen observables, and what explains it; `other`: where nothing does."""
        errors = [(a.error(name), name, a) for a in self.answers for name in chosen if name in a.found]
        if not errors:
            raise NotApplicable("no logit is learned")
        error, name, answer = max(errors, key=lambda entry: np.nan_to_num(entry[0], nan=np.inf))
        ok = error <= 1
        share = error * TOLERANCE * (1 if name in VALUES else 10)
        measured = f"{name}: largest difference {share:.2g}" + ("" if ok else f" ({answer.case.text})")
        return Outcome(expected, measured, ok, [] if ok else [*self.likely[:3], other], error)


def _values(seen: Observed) -> Outcome:
    return seen.outcome(VALUES, "within rounding of the equations in float64, in units of R", "grid-wrong")


def _weight_gradient(seen: Observed) -> Outcome:
    return seen.outcome(["gradient of w"], "the identity on all weights but 0", "weight-gradient-wrong")


def _logit_gradient(seen: Observed) -> Outcome:
    if not all(answer.error("values") <= 1 for answer in seen.answers):
        raise NotApplicable("the values are not CoDeQ's: see quantized values")
    of_logits = [f"gradient of {leaf}" for leaf in LOGITS]
    return seen.outcome(of_logits, "the derivative of d, s and delta", "logit-gradient-wrong")


def cases_of(pipeline: Pipeline) -> Iterator[Case]:
    """What the quantizers are observed on: see `Observed.answers`."""
    layers = list(quantized_layers(pipeline.model).items())
    spread = {round(place) for place in np.linspace(0, len(layers) - 1, 3)}
    kinds: set[type] = set()
    for place, (name, layer) in enumerate(layers):
        quantizer, own, w = quantizer_of(layer), logits(layer), plain(latent_weight(layer))
        w = w[: max(1, MOST_WEIGHTS // w[0].numel())]
        if not w.any():
            continue  # no range, no grid
        yield Case(name, w, own, own, quantizer)
        if place in spread or type(quantizer) not in kinds:
            kinds.add(type(quantizer))
            yield Case(name, w, own, own, quantizer, training=False)
            for theta in OTHER_LOGITS:
                yield Case(name, w, own, theta, quantizer)


def answer_to(case: Case, equations: QuantizerEquations) -> Answer:
    """What the case's quantizer and the equations make of it."""
    right, grid = predicted(equations, case), equations.grid(case.w, *_tensors(case.theta))
    scale = {name: max(float(value.norm()), 1e-12) for name, value in right.items()}
    scale |= dict.fromkeys(VALUES, max(float(grid.range), 1e-30))
    return Answer(case, observed(case), right, scale, ~near_a_threshold(case.w, grid, TOLERANCE).flatten())


def observed(case: Case) -> Observables:
    """The observables of a copy of the case's quantizer, in float64."""
    graphs = {id(kept): kept.detach() for kept in vars(case.quantizer).values() if isinstance(kept, Tensor)}
    twin = copy.deepcopy(case.quantizer, graphs).cpu().double().train(case.training)
    return observables(twin, case, {leaf: getattr(twin, leaf) for leaf in LOGITS})


def predicted(equations: QuantizerEquations, case: Case) -> Observables:
    """The observables of the equations, or of equations with a mistake in them."""
    equations = copy.deepcopy(equations)  # with a memory of its own
    dz, bit = (theta.requires_grad_() for theta in _tensors(case.own))
    thetas = dict(zip(LOGITS, (dz, bit), strict=True))
    return observables(lambda w: equations(w, dz, bit, case.training), case, thetas)


def observables(quantize: Callable[[Tensor], Tensor], case: Case, thetas: Mapping[str, Tensor]) -> Observables:
    """The one observation of `quantize`, which reads `thetas` and has been called with its own logits before:
    values v at the case's logits, gradients of sum(c v), and the values when w was -3 w and when it is w again."""
    w = case.w.clone().requires_grad_()
    quantize(w)
    with torch.no_grad():
        for theta, value in zip(thetas.values(), case.theta, strict=True):
            theta.fill_(value)
    values = quantize(w)
    upstream = torch.randn(w.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    learned = {"w": w, **{leaf: theta for leaf, theta in thetas.items() if theta.requires_grad}}
    slopes = gradients((values * upstream.to(values.dtype)).sum(), list(learned.values()))
    others = []
    for factor in (-3.0, 1.0):
        with torch.no_grad():
            w.copy_(factor * case.w)
        others.append(quantize(w).detach() / abs(factor))
    of_learned = {f"gradient of {name}": slope for name, slope in zip(learned, slopes, strict=True)}
    return {"values": values.detach(), **of_learned, "values after others": torch.stack(others)}


def gradients(loss: Tensor, of: Sequence[Tensor]) -> list[Tensor]:
    """d loss / d each; zeros where the loss does not depend on it."""
    found = torch.autograd.grad(loss, of, allow_unused=True) if loss.requires_grad else [None] * len(of)
    return [torch.zeros_like(p) if g is None else g.detach() for p, g in zip(of, found, strict=True)]


# Attachment, settings, switches


def _layers(pipeline: Pipeline) -> dict[str, nn.Module]:
    layers = quantized_layers(pipeline.model)
    if not layers:
        raise NotApplicable("the network has no quantizer")
    return layers


def _attached(pipeline: Pipeline) -> Outcome:
    layers = quantized_layers(pipeline.model)
    found, meant = list(layers), pipeline.expected.quantized
    if meant is None and not found and pipeline.expected.quantizer is None:
        raise NotApplicable("the network has no quantizer, and none is expected")
    if meant is None:
        kinds = (nn.Conv2d, nn.Linear)
        plain = [n for n, m in pipeline.model.named_modules() if isinstance(m, kinds) and n not in found]
        left = f"; not quantized: {names(plain)}" if plain else ""
        return Outcome("at least one quantizer", f"{len(found)} quantizers{left}", bool(found), ["no-quantizers"])
    missing, extra = [n for n in meant if n not in found], [n for n in found if n not in meant]
    double = [n for n, layer in layers.items() if len(cast(Any, layer).parametrizations.weight) > 1]
    distinct = min(len({id(part(layer)) for layer in layers.values()}) for part in (quantizer_of, latent_weight))
    parts = [f"{len(found)} quantizers"]
    parts += [f"missing: {names(missing)}"] if missing else []
    parts += [f"not meant: {names(extra)}"] if extra else []
    parts += [f"more than one on {names(double)}"] if double else []
    parts += [f"only {distinct} of them distinct"] if distinct < len(found) else []
    likely = ["no-quantizers" if meant and not found else None, "quantizers-missing" if missing else None]
    likely += ["quantizer-shared" if distinct < len(found) else None, "quantizers-extra" if extra or double else None]
    return Outcome(f"{len(meant)} quantizers, every one by name", "; ".join(parts), len(parts) == 1, likely)


@torch.no_grad()
def _switched_on(pipeline: Pipeline) -> Outcome:
    layers = _layers(pipeline)
    off = [name for name, layer in layers.items() if not cast(Any, layer).parametrizations.weight[0].enabled]
    same: dict[bool, list[str]] = {}
    with preserve_state(pipeline):
        for training in (True, False):
            pipeline.model.train(training)
            left = {name: latent_weight(layer) for name, layer in layers.items() if name not in off}
            same[training] = [name for name, w in left.items() if w.any() and torch.equal(_read(layers[name]), w)]
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
    meant = (settings.init_dz_logit, settings.init_bit_logit)
    starts = {name: logits(layer) for name, layer in _layers(pipeline).items()}
    wrong = [
        f"{name} starts at theta_dz {theta[0]:g}, theta_bit {theta[1]:g}"
        for name, theta in starts.items()
        if not np.allclose(theta, meant, rtol=0, atol=1e-5)
    ]
    expected = f"theta_dz {meant[0]:g}, theta_bit {meant[1]:g}"
    return Outcome(expected, "; ".join(wrong[:2]) or "all there", not wrong, ["quantizer-settings"])


@torch.no_grad()
def _bits(pipeline: Pipeline) -> Outcome:
    settings = promised_quantizer(pipeline)
    quantizers = {name: cast(Any, quantizer_of(layer)) for name, layer in _layers(pipeline).items()}
    if not all(hasattr(quantizer, "get_bitwidth") for quantizer in quantizers.values()):
        raise NotApplicable("the quantizers have no get_bitwidth()")
    wrong, likely = [], []
    for name, quantizer in quantizers.items():
        found, meant = float(quantizer.get_bitwidth()), bits_in_use(settings, float(quantizer.logit_bit))
        if abs(found - meant) > 1e-4:
            wrong.append(f"{name} has {found:g} bits, not {meant:g}")
    sweep = torch.tensor(SWEEP, dtype=torch.float64)
    for quantizer in {type(quantizer): quantizer for quantizer in quantizers.values()}.values():
        swept = {"bits": torch.stack([_bits_at(quantizer, theta) for theta in SWEEP])}
        right = equations_of(settings)
        odd = (swept["bits"] - right.bits(sweep)).abs() > 1e-4
        if odd.any():
            first = int(odd.nonzero()[0])
            wrong.append(f"theta_bit {SWEEP[first]:.2f} gives {float(swept['bits'][first]):g} bits")
            likely += explain(swept, right, WRONG_VALUES, lambda guess: {"bits": guess.bits(sweep)})
    measured = "; ".join(wrong[:2]) if wrong else f"{len(quantizers)} quantizers and a sweep of theta_bit agree"
    expected = f"the equation's bits, 2 to {settings.max_bits}"
    return Outcome(expected, measured, not wrong, [*likely, "bits-frozen", "bits-wrong"])


def _bits_at(quantizer: nn.Module, theta: float) -> Tensor:
    twin = cast(Any, copy.deepcopy(quantizer))
    twin.logit_bit.fill_(theta)
    return plain(twin.get_bitwidth())


@torch.no_grad()
def _toggling(pipeline: Pipeline) -> Outcome:
    layers = _layers(pipeline)

    def weights() -> list[Tensor]:
        return [_read(layer).nan_to_num() for layer in layers.values()]

    def differing(left: list[Tensor], right: list[Tensor]) -> list[str]:
        return [n for n, a, b in zip(layers, left, right, strict=True) if not torch.equal(a, b)]

    with preserve_state(pipeline):
        before = weights()
        with quantization(pipeline.model, enabled=False):
            off = weights()
        after = weights()
    wrong_off = differing(off, [latent_weight(layer).detach().nan_to_num() for layer in layers.values()])
    wrong_on = differing(before, after)
    parts = [f"off differs from the latent weights in {names(wrong_off)}"] if wrong_off else []
    parts += [f"on again differs in {names(wrong_on)}"] if wrong_on else []
    measured = "; ".join(parts) or "both exact"
    return Outcome(
        "exactly the latent, then exactly the same", measured, not parts, ["toggle-broken", "evaluation-not-repeatable"]
    )


# Weights that move, layers together, steps


@torch.no_grad()
def _scatter(layers: dict[str, nn.Module]) -> None:
    """Other latent weights and other logits in every layer. Only inside `preserve_state`."""
    generator = torch.Generator().manual_seed(11)
    for place, layer in enumerate(layers.values()):
        latent, quantizer = latent_weight(layer), quantizer_of(layer)
        latent.copy_(torch.randn(latent.shape, generator=generator).to(latent) * 0.3)
        for leaf, theta in (("logit_dz", 0.6 + 0.17 * (place % 5)), ("logit_bit", 0.3 + 0.25 * (place % 6))):
            if isinstance(getattr(quantizer, leaf, None), Tensor):
                getattr(quantizer, leaf).fill_(theta)


def _follow(pipeline: Pipeline) -> Outcome:
    layers = _layers(pipeline)
    with preserve_state(pipeline), quantization(pipeline.model, enabled=True):
        before = {name: _read(layer).detach() for name, layer in layers.items()}
        _scatter(layers)
        still = [name for name, layer in layers.items() if torch.equal(before[name], _read(layer))]
    measured = f"{names(still)} stood still" if still else "all of them follow"
    return Outcome("other latent weights, other quantized weights", measured, not still, ["weights-stale"])


def _together(pipeline: Pipeline) -> Outcome:
    """Values, and gradients of sum(c v) for the latent weights and logits, one layer at a time and all at once."""
    layers = _layers(pipeline)
    owned = {f"{n}.weight": latent_weight(layer) for n, layer in layers.items()}
    owned |= {f"{n}.{leaf}": p for n, layer in layers.items() for leaf, p in quantizer_of(layer).named_parameters()}
    learned = {name: p for name, p in owned.items() if p.requires_grad}
    generator = torch.Generator().manual_seed(12)
    with preserve_state(pipeline), quantization(pipeline.model, enabled=True):
        _scatter(layers)
        upstream = [torch.randn(latent_weight(layer).shape, generator=generator) for layer in layers.values()]

        def read() -> tuple[list[Tensor], list[Tensor]]:
            values = [cast(Tensor, layer.weight) for layer in layers.values()]
            loss = torch.stack([(v * c.to(v)).sum() for v, c in zip(values, upstream, strict=True)]).sum()
            return [value.detach() for value in values], gradients(loss, list(learned.values()))

        alone, slopes = read()
        with shared_quantized_weights(pipeline.model):
            together, joint = read()
        tops = [float(latent_weight(layer).detach().abs().max()) for layer in layers.values()]
    # a few weights on a threshold may fall on its other side
    off = [n for n, a, b, top in zip(layers, alone, together, tops, strict=True) if _rms(a - b) > SINGLE * top]
    pairs = zip(learned, slopes, joint, strict=True)
    wrong = [n for n, a, b in pairs if _rms(a - b) > GRADIENT_CLOSE * max(_rms(a), _rms(b), 1e-9)]
    measured = f"other values in {names(off)}" if off else f"other gradients of {names(wrong)}"
    measured = measured if off or wrong else f"{len(layers)} layers, values and gradients agree"
    expected = "the same values and gradients, together and alone"
    return Outcome(expected, measured, not off + wrong, ["joint-quantization"])


def weights_of_steps(steps: Any, pipeline: Pipeline) -> Outcome:
    """What the network reads in a step and after it, beside the latent weights of then."""
    settings, quantized = promised_quantizer(pipeline), _layers(pipeline).items()
    layers = dict(sorted(quantized, key=lambda entry: latent_weight(entry[1]).numel())[:LAYERS])
    wrong: dict[str, None] = {}
    step = 1

    def compare(name: str, when: str) -> None:
        right, grid = expected_weight(settings, layers[name])
        off = _rms(plain(_read(layers[name])) - right) > SINGLE * float(grid.range)
        if off and not torch.equal(_read(layers[name]), latent_weight(layers[name])):  # off: said elsewhere
            wrong.setdefault(f"{name} {when} step {step}")

    for name in layers:
        compare(name, "before")
    if wrong:
        raise NotApplicable("the values are not CoDeQ's before any step: see quantized values")
    with preserve_state(pipeline), ExitStack() as stack:
        for name, layer in layers.items():
            hook = layer.register_forward_pre_hook(lambda *_, name=name: compare(name, "in"))
            stack.callback(hook.remove)
        pipeline.model.train()
        for images, labels in pipeline.first_batches(STEPS):
            pipeline.take_step(images, labels, pipeline.coefficient(0))
            for name in layers:
                compare(name, "after")
            step += 1
    agree = f"{len(layers)} layers agree, in {STEPS} steps and after each"
    measured = f"others in {names(list(wrong))}" if wrong else agree
    return Outcome("the equations' weights, from the latent ones of now", measured, not wrong, ["weights-stale"])


def _rms(tensor: Tensor) -> float:
    """Root mean square."""
    return float(tensor.detach().square().mean().sqrt())


def _tensors(theta: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """theta_dz and theta_bit as tensors, (), float64."""
    return torch.tensor(theta[0], dtype=torch.float64), torch.tensor(theta[1], dtype=torch.float64)


def _read(layer: nn.Module) -> Tensor:
    """The weight that the network reads, as it is now."""
    return cast(Tensor, layer.weight).clone()

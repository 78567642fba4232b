"""Before training: do the quantizers compute CoDeQ's values and gradients?

Each quantizer is examined on a copy, in float64, at its own logits and at others, against experiments/diagnosis/
equations.py. Where it differs, what it did is compared with the usual mistakes. Axis letters: T weights of a layer.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from experiments.doctor.expected import ExpectedQuantizer
from experiments.doctor.pipeline import Pipeline
from experiments.doctor.quantizer import equations
from experiments.doctor.quantizer.quantizer_cases import TOLERANCE, Answer, Case, answer_to, cases_of, stands_still
from experiments.doctor.quantizer.quantizer_checks import bits_in_use, promised_quantizer
from experiments.doctor.runner import CheckRunner, NotApplicable, Outcome

DIFFERENCES = 0.01  # central differences of step 1e-5 in float64 are good to 1e-5
MUCH_NEARER = 0.2  # a mistake explains what was found where its misfit is below this share of the equations'


def grid_checks(runner: CheckRunner, pipeline: Pipeline) -> None:
    """Add the findings about the quantizers' values and gradients."""
    runner.check("quantized values", "the quantizer computes CoDeQ's grid, zeros and levels", _values, pipeline)
    runner.check("straight-through gradient", "a pruned or saturated weight still moves", _weight_gradient, pipeline)
    runner.check("gradient of the logits", "dead zone and bit width learn from the loss", _logit_gradient, pipeline)


def _values(pipeline: Pipeline) -> Outcome:
    settings = promised_quantizer(pipeline)
    worst, where, tolerated, votes = 0.0, "", TOLERANCE, Counter[str]()
    for case in cases_of(pipeline):
        g = equations.grid(case.weights, case.theta_dz, bits_in_use(settings, case.theta_bit))
        answer, again = answer_to(case), answer_to(case)
        if not np.array_equal(answer.values, again.values):
            measured = f"the same weights give different values twice ({case.text})"
            return Outcome("one value for one weight", measured, False, ["evaluation-not-repeatable", "grid-wrong"])
        if stands_still(case):
            measured = f"other weights give the same values ({case.text})"
            return Outcome("other values for other weights", measured, False, ["weights-stale"])
        if not np.array_equal(answer.values, answer_to(case, after_others=True).values):
            measured = f"the values depend on the weights it saw before ({case.text})"
            return Outcome("one value for one weight", measured, False, ["weights-stale", "range-wrong"])
        sure = ~equations.near_a_threshold(case.weights, g, answer.tolerance)
        error = _largest(answer.values, equations.quantized(case.weights, g), sure) / max(g.range, 1e-30)
        if error > answer.tolerance:
            where, tolerated = where or case.text, answer.tolerance
            for place, key in enumerate(dict.fromkeys(_values_diagnosis(case, settings, answer.values))):
                votes[key] += round(60 * g.bits) // (place + 1)  # a fine grid tells most
        worst = max(worst, error)
    measured = f"largest difference {worst:.2g} of the range R" + (f" ({where})" if where else "")
    likely = [key for key, _ in votes.most_common()]
    return Outcome("within rounding of the equations in float64", measured, not where, likely, worst / tolerated)


def _largest(found: equations.Values, expected: equations.Values, sure: NDArray[np.bool_]) -> float:
    if found.shape != expected.shape or not np.isfinite(found).all():
        return math.inf
    return float(np.abs(found - expected)[sure].max(initial=0.0))


def _values_diagnosis(case: Case, settings: ExpectedQuantizer, found: equations.Values) -> list[str]:
    """Which mistake gives the values that were found, and otherwise which part of the grid is not as it should be."""
    w, bits = case.weights, bits_in_use(settings, case.theta_bit)
    g = equations.grid(w, case.theta_dz, bits)
    right = equations.quantized(w, g)
    if found.shape != right.shape or not np.isfinite(found).all():
        return ["grid-wrong"]
    guesses: list[tuple[str, equations.Values]] = [
        ("not-quantized", w),
        ("clip-missing", equations.quantized(w, g, clip=False)),
        ("dead-zone-frozen", equations.quantized(w, equations.grid(w, settings.init_dz_logit, bits))),
        ("bits-frozen", equations.quantized(w, equations.grid(w, case.theta_dz, float(settings.fixed_bits)))),
    ]
    guesses += [
        ("range-wrong", equations.quantized(w, equations.grid(w, case.theta_dz, bits, q)))
        for q in (1.0, 0.999, 0.95, 0.9)
    ]
    share = 1 - abs(math.tanh(case.theta_dz))
    guesses += [  # half the width taken for the width, or the other way round
        ("dead-zone-wrong", equations.quantized(w, equations.grid(w, math.atanh(1 - other), bits)))
        for other in (share / 2, 2 * share)
        if other < 1
    ]
    if settings.learns_bits:
        place = abs(math.tanh(case.theta_bit)) * (settings.max_bits - 2) + 2
        others = [("bits-floored", math.floor(place)), ("bits-ceiled", math.ceil(place)), ("bits-not-rounded", place)]
        others += [("bits-frozen", bits_in_use(settings, settings.init_bit_logit))]
        for largest in (2, 3, 4, 5, 6, 7, 10, 12, 16):
            other = equations.bit_width(case.theta_bit, largest)
            others.append(("bits-out-of-range" if other > settings.max_bits else "quantizer-settings", other))
        guesses += [
            (key, equations.quantized(w, equations.grid(w, case.theta_dz, float(other))))
            for key, other in others
            if abs(other - bits) > 1e-9 and other > 1.6
        ]
    guesses += [("range-wrong", _by_filter(case, bits))] if len(case.shape) > 1 else []
    off: dict[str, float] = {}
    for key, guess in guesses:
        off[key] = min(_misfit(guess, found), off.get(key, math.inf))
    limit = MUCH_NEARER * _misfit(right, found)
    ranked = sorted((key for key in off if off[key] < limit), key=lambda key: off[key])
    mode = {True: "quantizers-off-in-training", False: "quantizers-off-in-evaluation"}
    if "not-quantized" in ranked[:1]:
        ranked.insert(0, mode[case.training])
    return ranked[:2] if ranked else [*_parts_of_the_grid(found, g), "grid-wrong"]


def _by_filter(case: Case, bits: float) -> equations.Values:
    """The values where every filter has a range of its own."""
    rows = case.weights.reshape(case.shape[0], -1)
    return np.concatenate([equations.quantized(w, equations.grid(w, case.theta_dz, bits)) for w in rows])


def _parts_of_the_grid(found: equations.Values, g: equations.Grid) -> list[str]:
    """Range, dead zone and step read off the values: the largest is R, the smallest d / 2 + s / 2, their spacing s."""
    if np.array_equal(found, torch.from_numpy(found).bfloat16().double().numpy()):
        return ["quantizer-precision"]
    levels = np.unique(np.abs(found[found != 0]).round(9))
    if not len(levels):
        return ["dead-zone-wrong"]
    gaps = np.diff(levels)
    step = float(np.median(gaps)) if len(gaps) else g.step
    top, zone = float(levels[-1]), float(2 * levels[0] - step)
    share = g.dead_zone / (2 * g.range)
    if abs(top - g.range) > 0.02 * g.range:
        return ["range-wrong", "grid-wrong"]
    if abs(zone / (2 * top) - share) > 0.05 + step / top:
        return ["dead-zone-wrong", "grid-wrong"]
    return ["grid-wrong", "bits-wrong"] if abs(step - g.step) > 0.02 * g.step else ["grid-wrong"]


def _misfit(guess: equations.Values, found: equations.Values) -> float:
    size = float(np.linalg.norm(found)) or 1.0
    return float(np.linalg.norm(guess - found)) / size


@dataclass(frozen=True)
class Miss:
    """The largest relative error of a gradient, and the case that shows it."""

    error: float
    tolerated: float
    case: Case
    upstream: equations.Values
    answer: Answer


def _worst(pipeline: Pipeline, parts: tuple[int, ...]) -> Miss:
    """parts: 0 the weights, 1 and 2 the logits. Raises NotApplicable where none of them is learned."""
    settings = promised_quantizer(pipeline)
    random = np.random.default_rng(0)
    worst: Miss | None = None
    for case in cases_of(pipeline):
        upstream = random.standard_normal(len(case.weights))
        answer = answer_to(case, upstream)
        if 0 not in parts and not _on_the_grid(case, settings, answer):
            continue
        right = _expected(case, settings, upstream)
        errors = [e for place in parts if (e := _error(answer.gradients[place], right[place])) is not None]
        if errors and (worst is None or max(errors) / answer.tolerance > worst.error / (worst.tolerated / 10)):
            worst = Miss(max(errors), 10 * answer.tolerance, case, upstream, answer)
    if worst is None:
        raise NotApplicable("no logit is learned, or the values are not CoDeQ's: see quantized values")
    return worst


def _on_the_grid(case: Case, settings: ExpectedQuantizer, answer: Answer) -> bool:
    """Whether the values are right; the gradients of the logits mean nothing otherwise."""
    g = equations.grid(case.weights, case.theta_dz, bits_in_use(settings, case.theta_bit))
    sure = ~equations.near_a_threshold(case.weights, g, answer.tolerance)
    miss = _largest(answer.values, equations.quantized(case.weights, g), sure)
    return miss <= answer.tolerance * g.range


def _expected(
    case: Case, settings: ExpectedQuantizer, upstream: equations.Values, wrong: str = ""
) -> list[equations.Values]:
    g = equations.grid(case.weights, case.theta_dz, bits_in_use(settings, case.theta_bit))
    out = equations.gradient(
        case.weights, upstream, case.theta_dz, case.theta_bit, g, settings.max_bits, settings.learns_bits, wrong
    )
    return [out.weights, np.array([out.logit_dz]), np.array([out.logit_bit])]


def _error(found: equations.Values | None, right: equations.Values) -> float | None:
    """Relative error of one gradient; None where it is not learned."""
    if found is None:
        return None
    size = max(float(np.linalg.norm(right)), float(np.linalg.norm(found)), 1e-12)
    return float(np.linalg.norm(found - right)) / size


def _weight_gradient(pipeline: Pipeline) -> Outcome:
    return _outcome(pipeline, (0,), "weight-gradient-wrong", "the identity on all weights but 0")


def _logit_gradient(pipeline: Pipeline) -> Outcome:
    settings = promised_quantizer(pipeline)
    if not settings.learns_bits and not settings.learns_dead_zone:
        raise NotApplicable("neither bits nor dead zones are learned")
    return _outcome(pipeline, (1, 2), "logit-gradient-wrong", "the derivative of d, s and delta")


def finite_differences(pipeline: Pipeline) -> Outcome:
    """The quantizers' gradients of their logits beside central differences of the smooth surrogate."""
    settings = promised_quantizer(pipeline)
    random, step = np.random.default_rng(2), 1e-5
    worst, where, signs = 0.0, "", 0
    for case in cases_of(pipeline):
        upstream = random.standard_normal(len(case.weights))
        answer = answer_to(case, upstream)
        if not _on_the_grid(case, settings, answer):
            continue
        own = (case.theta_dz, case.theta_bit)
        fixed = (float(settings.max_bits), settings.learns_bits, bits_in_use(settings, case.theta_bit))
        for place in (1, 2):
            found = answer.gradients[place]
            if found is None or (place == 2 and not settings.learns_bits):
                continue
            sides = []
            for sign in (1, -1):
                at = (own[0] + sign * step * (place == 1), own[1] + sign * step * (place == 2))
                sides.append(equations.smooth_surrogate(case.weights, upstream, *own, fixed, at))
            slope = (sides[0] - sides[1]) / (2 * step)
            size = max(abs(slope), abs(float(found[0])), 1e-3 * float(np.abs(upstream).max()) * 1e-3)
            error = abs(float(found[0]) - slope) / size
            signs += float(found[0]) * slope < 0
            if error > worst:
                worst, where = error, f"{case.text}: {float(found[0]):.4g} for {slope:.4g}"
    if not where:
        raise NotApplicable("no logit is learned, or the values are not CoDeQ's: see quantized values")
    ok = worst < DIFFERENCES
    measured = f"relative error {worst:.1g}" + ("" if ok else f", {signs} of other sign ({where})")
    likely = [] if ok else list(_outcome(pipeline, (1, 2), "logit-gradient-wrong", "").likely)
    return Outcome(
        f"the surrogate's slope, within {100 * DIFFERENCES:g}%", measured, ok, [*likely, "logit-gradient-wrong"]
    )


def _outcome(pipeline: Pipeline, parts: tuple[int, ...], other: str, expected: str) -> Outcome:
    worst = _worst(pipeline, parts)
    ok = worst.error <= worst.tolerated
    measured = f"relative error {worst.error:.1g}" + ("" if ok else f" ({worst.case.text})")
    likely = [] if ok else _rank(pipeline, worst, other)
    return Outcome(expected, measured, ok, likely, worst.error / worst.tolerated)


def _rank(pipeline: Pipeline, miss: Miss, other: str) -> list[str]:
    """Mistakes whose gradient is much nearer to the one found than the right one is, nearest first."""
    settings = promised_quantizer(pipeline)

    def off(wrong: str) -> float:
        meant = _expected(miss.case, settings, miss.upstream, wrong)
        return sum(_error(f, m) or 0.0 for f, m in zip(miss.answer.gradients, meant, strict=True))

    misfits = {wrong: off(wrong) for wrong in ("", *equations.MISTAKES)}
    nearer = sorted((w for w in equations.MISTAKES if misfits[w] < 0.98 * misfits[""]), key=lambda w: misfits[w])
    keys = [wrong.partition(" ")[0] for wrong in nearer]
    if not nearer or misfits[nearer[0]] > 0.5:  # none explains it well
        return [other, *keys]
    return [*keys[:3], other]

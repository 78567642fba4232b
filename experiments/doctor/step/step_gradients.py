"""A step's gradients against the expected objective's, part by part: task, squared logits, penalty."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from experiments.doctor.core import objective
from experiments.doctor.expected import LOGITS
from experiments.doctor.pipeline import Pipeline
from experiments.doctor.runner import NotApplicable, Outcome, names, preserve_state
from experiments.doctor.step.optimizer_checks import kind_of
from experiments.doctor.step.penalty_diagnosis import as_parameters, factor_of, misfit
from experiments.doctor.training.steps_taken import (
    Steps,
    done,
    expected_squares,
    gradients_of,
    labels_are_mixed,
    of_weights,
    other_images,
    own_task,
)
from utils_quantization import quantized_layers, shared_quantized_weights

GRADIENT_CLOSE = {torch.float32: 2e-2, torch.bfloat16: 1e-1}


def every_gradient(steps: Steps, pipeline: Pipeline) -> Outcome:
    """Every trainable parameter gets a non-zero, finite gradient in one step."""
    seen = done(steps.plain)
    missing = [n for n, g in seen.gradients.items() if g is None or not float(g.abs().max()) > 0]
    broken = [n for n, g in seen.gradients.items() if g is not None and not torch.isfinite(g).all()]
    missing = [n for n in missing if n not in broken]
    quantized = [n for n in missing if n.endswith("parametrizations.weight.original")]
    logits = [n for n in missing if kind_of(n) != "weights"]
    likely: list[str | None] = ["gradient-not-finite" if broken else None]
    likely += ["no-ste-round"] if quantized and len(quantized) == len(missing) - len(logits) else []
    likely += ["logits-detached"] if logits and len(logits) == len(missing) else []
    likely += ["bits-frozen"] if logits and all("logit_bit" in n for n in logits) else []
    likely += ["quantizers-off-in-training"] if logits else []
    likely += ["gradient-missing", "no-update" if not seen.updates else None]
    count = len(seen.gradients)
    measured = f"{count - len(missing) - len(broken)} of {count}"
    measured += f"; none for {names(missing)}" if missing else ""
    measured += f"; not finite for {names(broken)}" if broken else ""
    return Outcome(f"all {count}", measured, not missing and not broken, likely)


def task_gradient_fits(steps: Steps, pipeline: Pipeline) -> Outcome:
    """The weights' gradient: nothing but the task loss reaches them while the coefficient is 0."""
    seen = done(steps.plain)
    if steps.task_gradient is None or pipeline.expected.lambda_dz is None:
        raise NotApplicable("the task loss is not expected", "expected.lambda_dz")
    close = GRADIENT_CLOSE[pipeline.precision]
    found, meant = of_weights(gradients_of(seen)), of_weights(steps.task_gradient)
    miss = misfit(found, meant)
    likely: list[str | None] = []
    if miss > close:
        likely = _task_gradient_diagnosis(pipeline, steps, found, meant, miss)
    measured = f"differs by {100 * miss:.2g}%"
    return Outcome(
        f"the gradient of the batch's cross entropy, within {100 * close:g}%",
        measured,
        miss <= close,
        likely,
        miss / close,
    )


def _task_gradient_diagnosis(
    pipeline: Pipeline, steps: Steps, found: objective.Gradients, meant: objective.Gradients, miss: float
) -> list[str | None]:
    seen = done(steps.plain)
    off: dict[str, float] = {}
    with preserve_state(pipeline):
        pipeline.model.train()
        if quantized_layers(pipeline.model):
            off["quantizers-off-in-training"] = misfit(found, of_weights(own_task(pipeline, steps, quantized=False)[1]))
        pipeline.model.eval()
        off["batchnorm-in-eval"] = misfit(found, of_weights(own_task(pipeline, steps)[1]))
    dot = sum(float((found[n] * meant[n]).sum()) for n in found)
    size = sum(float(g.square().sum()) for g in meant.values())
    scale = dot / size if size else 0.0
    off["gradients-scaled"] = misfit(found, {n: scale * g for n, g in meant.items()})
    if scale < 0 and off["gradients-scaled"] < 0.1:
        off["ascent"] = off.pop("gradients-scaled")
    near = sorted((key for key in off if off[key] < 0.5 * miss), key=lambda key: off[key])
    reported = float(seen.losses.total) - expected_squares(pipeline) if seen.losses is not None else math.nan
    if near[:1] == ["gradients-scaled"] and abs(reported - scale * steps.task) < 0.05 * abs(reported):
        near = ["loss-wrong", "gradients-scaled"]
    if seen.images is not None and other_images(seen.images, steps.images):
        near = ["step-images-wrong"]
    if not near and not labels_are_mixed(pipeline, steps):
        near = ["loss-wrong"]
    if not any(float(g.abs().max()) > 0 for g in found.values()):
        near = ["gradient-missing"]
    near += ["batchnorm-in-eval"] if seen.norms_in_eval else []
    near += ["quantizers-off-in-training"] if seen.quantizers_off else []
    zero = [n for n, g in found.items() if n.endswith("original") and not float(g.abs().max()) > 0]
    near += ["no-ste-round"] if zero else []
    return [*near, "step-labels-wrong", "step-gradient-wrong"]


def squared_logits(steps: Steps, pipeline: Pipeline) -> Outcome:
    """What the step adds to the task's gradient of the logits is 2 lambda theta."""
    lambdas = {"logit_dz": pipeline.expected.lambda_dz, "logit_bit": pipeline.expected.lambda_bit}
    if steps.task_gradient is None or lambdas["logit_dz"] is None:
        raise NotApplicable("no weights of the squared logits are expected")
    parts, likely, worst = list[str](), list[str](), 0.0
    for leaf, fitted in fitted_lambdas(pipeline, steps).items():
        weight = lambdas[leaf] or 0.0
        slope = _slopes(pipeline, leaf)
        size = sum(float(g.square().sum()) for g in slope.values())
        # bf16 makes the task's own gradient of a logit, a sum over a whole layer, uncertain
        spread = sum(float(steps.task_gradient[n].square().sum()) for n in slope) / size
        close = 2e-2 * weight + (0.1 if pipeline.precision != torch.float32 else 0.02) * math.sqrt(spread) + 1e-5
        parts.append(f"{leaf} {fitted:.3g} for {weight:g}")
        worst = max(worst, abs(fitted - weight) / close)
        if abs(fitted - weight) > close:
            missing = weight and abs(fitted) < 0.05 * weight + close
            likely += ["logit-squares-missing"] if missing else ["lambda-wrong"]
    if not parts:
        raise NotApplicable("no logit is learned")
    likely += ["lambda-wrong", "logit-squares-missing"]
    expected = ", ".join(f"{leaf} {weight:g}" for leaf, weight in lambdas.items())
    return Outcome(f"lambda of {expected}", "; ".join(parts), worst <= 1, likely, worst)


def _slopes(pipeline: Pipeline, leaf: str) -> objective.Gradients:
    """2 theta of every trainable logit called `leaf`."""
    found = objective.squares(pipeline.model, leaf)[1]
    return {n: g for n, g in found.items() if n.rpartition(".")[2] == leaf}


def fitted_lambdas(pipeline: Pipeline, steps: Steps) -> dict[str, float]:
    """lambda where the step's gradient is the task's + lambda 2 theta, by least squares, for each kind of logit."""
    found, fitted = gradients_of(done(steps.plain)), {}
    for leaf in LOGITS:
        slope = _slopes(pipeline, leaf)
        size = sum(float(g.square().sum()) for g in slope.values())
        if size and steps.task_gradient is not None:
            rest = {n: found[n] - steps.task_gradient[n] for n in slope}
            fitted[leaf] = sum(float((rest[n] * slope[n]).sum()) for n in slope) / size
    return fitted


def penalty_gradient_fits(steps: Steps, pipeline: Pipeline) -> Outcome:
    """(gradient of C - gradient of A) / coefficient is the penalty's gradient, and is not zero for any live group."""
    if steps.penalised is None or not steps.coefficient:
        raise NotApplicable("there is no penalty")
    plain, penalised = of_weights(gradients_of(done(steps.plain))), of_weights(gradients_of(steps.penalised))
    extra = {n: (penalised[n] - plain[n]) / steps.coefficient for n in plain}
    size = math.sqrt(sum(float(g.square().sum()) for g in extra.values()))
    if not pipeline.expected.penalty:
        return Outcome("a gradient", f"norm {size:.3g}", size > 0, ["penalty-detached", "penalty-not-in-loss"])
    grouping = objective.channel_grouping(pipeline)
    weights = grouping.weights(pipeline.model)
    slopes = of_weights(through_quantizers(pipeline, grouping.lasso(weights)[1]))
    total = sum(float(g.square().sum()) for g in slopes.values())
    fitted = sum(float((extra[n] * slopes[n]).sum()) for n in slopes if n in extra) / max(total, 1e-30)
    miss = misfit(extra, slopes)
    reached = _reached(pipeline, grouping, extra)
    # the difference of two gradients carries the rounding of both
    noise = math.sqrt(sum(float(g.square().sum()) for g in plain.values()) / max(total, 1e-30)) / steps.coefficient
    close = 0.02 + 1e-4 * noise
    measured = (
        f"{fitted:.3g} times the penalty's, off by {100 * miss:.2g}%; reaches {reached} of {grouping.count} groups"
    )
    ok = miss < close and reached == grouping.count
    likely: list[str | None] = []
    if size == 0:
        likely += ["penalty-detached", "penalty-not-in-loss"]
    elif abs(fitted - 1) > 0.05 and factor_of(extra, slopes) is not None:
        likely += ["penalty-sign"] if fitted < 0 else ["coefficient-too-large"] if fitted > 5 else []
        likely += ["coefficient-not-applied", "penalty-scaled", "coefficient-wrong"]
    elif not ok:
        likely += _shape(pipeline, grouping, extra)
    return Outcome(f"once the penalty's, reaching all {grouping.count} groups", measured, ok, likely, miss / close)


def _shape(pipeline: Pipeline, grouping: objective.Grouping, extra: objective.Gradients) -> list[str]:
    """The other grouping whose gradient is nearest."""
    off: dict[str, float] = {}
    for key, guess in {"penalty-on-latent": grouping, **objective.other_groupings(pipeline)}.items():
        latent = key == "penalty-on-latent"
        slopes = guess.lasso(guess.weights(pipeline.model, latent))[1]
        slopes = as_parameters(pipeline.model, slopes) if latent else through_quantizers(pipeline, slopes)
        plain_key = key.partition(" ")[0]
        off[plain_key] = min(off.get(plain_key, math.inf), misfit(extra, of_weights(slopes)))
    return [*sorted(off, key=lambda key: off[key])[:2], "penalty-wrong"]


def through_quantizers(pipeline: Pipeline, slopes: dict[str, Tensor]) -> objective.Gradients:
    """Gradients of the weights that the network reads as gradients of the parameters behind them, by the quantizers'
    own backward: another check says whether that is right."""
    total: Tensor = next(pipeline.model.parameters()).new_zeros(())
    with shared_quantized_weights(pipeline.model):
        for key, slope in slopes.items():
            module, _, parameter = key.rpartition(".")
            weight = getattr(pipeline.model.get_submodule(module), parameter)
            total = total + (weight * slope.to(weight)).sum()
        return objective.gradients(total, pipeline.model)


def _reached(pipeline: Pipeline, grouping: objective.Grouping, extra: objective.Gradients) -> int:
    """Groups of which some member gets a gradient, or that are all zero already."""
    by_tensor = {}
    for member in grouping.members:
        name = next(iter(as_parameters(pipeline.model, {f"{member.module}.{member.parameter}": torch.zeros(1)})))
        by_tensor[f"{member.module}.{member.parameter}"] = extra.get(name, torch.zeros(1))
    zero = grouping.norms_squared(grouping.weights(pipeline.model)) == 0
    weights = grouping.weights(pipeline.model)
    shaped = {k: g if g.shape == weights[k].shape else torch.zeros_like(weights[k]) for k, g in by_tensor.items()}
    return int(((grouping.norms_squared(shaped) > 0) | zero).sum())


def fresh_gradients(steps: Steps) -> Outcome:
    """The same step made twice gives the same gradients: none is left over from the step before."""
    first, second = gradients_of(done(steps.plain)), gradients_of(done(steps.again))
    miss = misfit(second, first)
    measured = f"the second step's gradient differs by {100 * miss:.2g}%"
    return Outcome(
        "the same gradient on the same batch", measured, miss < 0.2, ["gradients-accumulate", "step-gradient-wrong"]
    )

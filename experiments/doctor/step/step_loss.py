"""Whether a step runs at all, in which mode, and with which loss."""

from __future__ import annotations

import math

from experiments.doctor.pipeline import Pipeline
from experiments.doctor.runner import NotApplicable, Outcome, preserve_state
from experiments.doctor.step.penalty_diagnosis import misfit
from experiments.doctor.step.step_gradients import GRADIENT_CLOSE, fitted_lambdas, penalty_gradient_fits
from experiments.doctor.training.steps_taken import (
    LOSS_CLOSE,
    Steps,
    done,
    expected_squares,
    gradients_of,
    is_norm,
    labels_are_mixed,
    loss_value,
    objective_penalty,
    of_weights,
    other_images,
)
from utils_quantization import quantized_layers

NOTHING = 1e-3  # share of the expected penalty below which none was added


def step_runs(steps: Steps, pipeline: Pipeline) -> Outcome:
    """A step ends without an error, with a finite loss."""
    if steps.error is not None:
        return Outcome("a finite loss", str(steps.error), False, [steps.error.cause])
    seen = done(steps.plain)
    assert seen.losses is not None
    loss = float(seen.losses.total)
    ok = math.isfinite(loss)
    return Outcome("a finite loss", f"{loss:.4g}", ok, ["loss-not-finite"])


def modes_of_network(steps: Steps, pipeline: Pipeline) -> Outcome:
    """During a step quantizers are on, and normalisation layers are in training mode."""
    seen = done(steps.plain)
    quantizers, norms = quantized_layers(pipeline.model), [m for m in pipeline.model.modules() if is_norm(m)]
    if not quantizers and not norms:
        raise NotApplicable("the network has neither BatchNorm nor quantizers")
    parts = [f"BatchNorm in training mode in {len(seen.means)} of {len(norms)} layers"]
    parts += [f"quantizers on in {len(seen.quantizers_seen - seen.quantizers_off)} of {len(quantizers)}"]
    unread = [name for name in quantizers if name not in seen.quantizers_seen]
    off = sorted(seen.quantizers_off | set(unread))
    likely = ["batchnorm-in-eval" if seen.norms_in_eval else None, "quantizers-off-in-training" if off else None]
    likely += ["quantizers-off"] if off else []
    ok = not seen.norms_in_eval and not off
    return Outcome("all of them", "; ".join(parts), ok, likely)


def step_loss(steps: Steps, pipeline: Pipeline) -> Outcome:
    """The returned loss is task loss + lambda_dz sum theta_dz^2 + lambda_bit sum theta_bit^2 (coefficient 0)."""
    seen = done(steps.plain)
    if pipeline.expected.lambda_dz is None or steps.task_gradient is None or seen.losses is None:
        raise NotApplicable("the parts of the loss are not expected", "expected.lambda_dz")
    close = LOSS_CLOSE[pipeline.precision]
    squares = expected_squares(pipeline)
    meant, found = steps.task + squares, float(seen.losses.total)
    parts = [f"{found:.4f} for {meant:.4f} without the penalty"]
    errors = [abs(found - meant) / max(abs(meant), 1e-9)]
    likely: list[str | None] = []
    if errors[0] > close:
        likely += _loss_diagnosis(pipeline, steps, found, squares)
    if steps.penalised is not None and steps.penalised.losses is not None and pipeline.expected.penalty:
        weighted = steps.coefficient * objective_penalty(pipeline)
        more = float(steps.penalised.losses.total) - found
        errors.append(abs(more - weighted) / max(weighted, abs(meant), 1e-9))
        parts.append(f"the penalty adds {more:.4f} for {weighted:.4f}")
        if errors[-1] > close:
            misreported = _penalty_gradient_is_right(pipeline, steps)
            likely += ["loss-misreported"] if misreported else ["penalty-sign"] if more < 0 else []
            likely += [
                "coefficient-not-applied" if more > NOTHING * weighted else "penalty-not-in-loss",
                "penalty-wrong",
            ]
    ok = max(errors) <= close
    return Outcome("task + squared logits + coefficient x penalty", "; ".join(parts), ok, likely, max(errors) / close)


def _loss_diagnosis(pipeline: Pipeline, steps: Steps, found: float, squares: float) -> list[str | None]:
    """Why a step reports another loss than the expected one."""
    seen = done(steps.plain)
    gradient = gradients_of(seen)
    assert steps.task_gradient is not None
    right = misfit(of_weights(gradient), of_weights(steps.task_gradient)) < GRADIENT_CLOSE[pipeline.precision]
    rest = found - steps.task
    if right and squares and abs(rest) < 0.02 * squares:
        held = max(fitted_lambdas(pipeline, steps).values(), default=0.0) > 0
        return ["loss-misreported" if held else "logit-squares-missing", "logit-squares-missing"]
    if right and rest > 0:
        return ["lambda-wrong", "loss-misreported"]
    if right:
        return ["loss-misreported", "loss-wrong"]
    return [*_task_diagnosis(pipeline, steps, found - squares), "loss-wrong"]


def _penalty_gradient_is_right(pipeline: Pipeline, steps: Steps) -> bool:
    try:
        return penalty_gradient_fits(steps, pipeline).ok
    except NotApplicable:
        return False


def _task_diagnosis(pipeline: Pipeline, steps: Steps, found: float) -> list[str]:
    """What gives the task loss that was reported: another network, other images, other labels, another loss."""
    seen = done(steps.plain)
    if seen.images is not None and other_images(seen.images, steps.images):
        return ["step-images-wrong"]
    guesses: dict[str, float] = {}
    with preserve_state(pipeline):
        pipeline.model.train()
        if quantized_layers(pipeline.model):
            guesses["quantizers-off-in-training"] = loss_value(pipeline, steps, quantized=False)
        pipeline.model.eval()
        guesses["batchnorm-in-eval"] = loss_value(pipeline, steps, quantized=True)
    near = [key for key in guesses if abs(guesses[key] - found) < 0.3 * abs(steps.task - found)]
    if near:
        return sorted(near, key=lambda key: abs(guesses[key] - found))
    return ["step-labels-wrong", "loss-wrong"] if labels_are_mixed(pipeline, steps) else ["loss-wrong"]

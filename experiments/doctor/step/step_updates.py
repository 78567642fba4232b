"""What a step moves: by the optimizer's rule, not too far, nothing else, downhill; and one batch overfitted."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from experiments.doctor.core import objective
from experiments.doctor.network.network_checks import batch_of
from experiments.doctor.observe import StepTrace
from experiments.doctor.pipeline import Pipeline
from experiments.doctor.runner import RAISED, NotApplicable, Outcome, PartFailed, names, preserve_state
from experiments.doctor.step.optimizer_checks import groups_by_parameter, kind_of
from experiments.doctor.step.update_rules import expected_update
from experiments.doctor.training.steps_taken import Steps, done, gradients_of, is_norm
from src.training import autocast

OVERFIT_IMAGES = 32


OVERFIT_STEPS = 24


FLOAT32 = 2.4e-7  # relative rounding of one update


LARGEST_STEP = 0.7  # of a layer's own root mean square; the presets' first steps stay below 0.1


def update_by_rule(steps: Steps, pipeline: Pipeline) -> Outcome:
    """Every parameter moves as the optimizer's own rule says, computed from its gradient in float64."""
    seen = done(steps.plain)
    learnables = _kept(pipeline, seen)
    moved = {n: seen.after[n] - seen.before[n] for n in learnables}
    if not any(float(m.abs().max()) > 0 for m in moved.values()):
        foreign = "foreign-parameter" if len(_absent(pipeline, list(moved))) == len(moved) else None
        none = "no-update" if not seen.updates else "learning-rate-zero"
        return Outcome("the optimizer's update", "nothing moved at all", False, [foreign, none, "no-update"])
    if seen.updates > 1:
        return Outcome("one update", f"{seen.updates} updates in one step", False, ["update-wrong"])
    meant = {n: expected_update(pipeline, n, p, seen) for n, p in learnables.items()}
    known = {n: m for n, m in meant.items() if m is not None}
    if not known:
        return Outcome(
            "a movement; the rule is not known here", f"{_movers(moved)} of {len(moved)} parameters moved", True
        )
    misses = {n: _relative(moved[n], known[n], seen.before[n]) for n in known}
    odd = sorted((n for n in misses if misses[n] > 0.02), key=lambda n: -misses[n])
    still = _absent(pipeline, [n for n in odd if not float(moved[n].abs().max()) > 0])
    measured = f"as the rule says for {len(known) - len(odd)} of {len(known)}"
    if odd:
        measured += f"; {names(odd)} off by up to {100 * misses[odd[0]]:.2g}%"
    logits = [n for n in still if kind_of(n) != "weights"]
    likely: list[str | None] = ["logits-not-in-optimizer" if logits else None]
    likely += ["parameter-not-in-optimizer" if still else None]
    zero = [n for n in odd if not float(moved[n].abs().max()) > 0 and n not in still]
    likely += ["learning-rate-zero" if zero and len(zero) == len(odd) and _rate_is_zero(pipeline, zero[0]) else None]
    likely += ["update-wrong", "changes-too-much"]
    return Outcome("the optimizer's rule for every parameter", measured, not odd, likely, max(misses.values()) / 0.02)


def _kept(pipeline: Pipeline, seen: StepTrace) -> dict[str, nn.Parameter]:
    """The learnables that were there before the step and after it."""
    both = seen.before.keys() & seen.after.keys()
    return {n: p for n, p in objective.trainable(pipeline.model).items() if n in both}


def _absent(pipeline: Pipeline, members: list[str]) -> list[str]:
    """Those of these parameters that the optimizer does not hold."""
    try:
        holding = groups_by_parameter(pipeline.optimizer)
    except NotApplicable:
        return []
    own = dict(pipeline.model.named_parameters())
    return [name for name in members if id(own[name]) not in holding]


def _rate_is_zero(pipeline: Pipeline, name: str) -> bool:
    p = dict(pipeline.model.named_parameters())[name]
    return any(group.get("lr") == 0 for group in groups_by_parameter(pipeline.optimizer).get(id(p), []))


def _movers(moved: objective.Gradients) -> int:
    return sum(bool(m.abs().max() > 0) for m in moved.values())


def _relative(found: Tensor, meant: Tensor, p: Tensor) -> float:
    """Relative error of a movement, beyond what float32 rounds of a parameter that hardly moves."""
    rounded = FLOAT32 * float(p.norm())
    return max(0.0, float((found - meant).norm()) - rounded) / max(float(meant.norm()), 1e-6)


def _too_small(pipeline: Pipeline, seen: StepTrace, name: str, p: nn.Parameter) -> bool:
    """Whether the parameter's movement is lost in the rounding of float32 (a bias before BatchNorm, for instance)."""
    meant, gradient = expected_update(pipeline, name, p, seen), seen.gradients.get(name)
    if meant is not None:
        return bool((meant.abs() <= FLOAT32 * seen.before[name].abs().max() + 1e-12).all()) and bool(meant.any())
    largest = max((float(g.abs().max()) for g in seen.gradients.values() if g is not None), default=0.0)
    return gradient is not None and 0 < float(gradient.abs().max()) < 1e-6 * largest


def size_of_step(steps: Steps, pipeline: Pipeline) -> Outcome:
    """The update of every weight tensor is below LARGEST_STEP of its size, both as root mean squares."""
    seen = done(steps.plain)
    if seen.inside:
        raise NotApplicable("the optimizer calls backward itself, so that one update may be many")
    ratios: dict[str, float] = {}
    for name, p in _kept(pipeline, seen).items():
        if p.dim() > 1:
            rms = float(seen.before[name].square().mean().sqrt())
            ratios[name] = float((seen.after[name] - seen.before[name]).square().mean().sqrt()) / max(rms, 1e-9)
    if not ratios:
        raise NotApplicable("no weight has more than one dimension")
    worst = max(ratios, key=lambda name: ratios[name])
    measured = f"at most {100 * ratios[worst]:.2g}% of its size" + (
        "" if ratios[worst] < LARGEST_STEP else f" ({worst})"
    )
    ok = ratios[worst] < LARGEST_STEP
    return Outcome(
        f"below {100 * LARGEST_STEP:g}%", measured, ok, ["learning-rate-too-large"], ratios[worst] / LARGEST_STEP
    )


def only_what_it_should(steps: Steps, pipeline: Pipeline) -> Outcome:
    """A step changes every learnable parameter and BatchNorm's statistics (to the batch's), and nothing else."""
    seen = done(steps.plain)
    learnables = _kept(pipeline, seen)
    changed = {n for n in seen.before if not torch.equal(seen.before[n], seen.after.get(n, seen.before[n]))}
    still = [n for n, p in learnables.items() if n not in changed and not _too_small(pipeline, seen, n, p)]
    norms = {n: m for n, m in pipeline.model.named_modules() if is_norm(m)}
    statistics = {f"{n}.{b}" for n in norms for b in ("running_mean", "running_var", "num_batches_tracked")}
    frozen_norms = [n for n in norms if f"{n}.running_mean" not in changed]
    off = [
        n for n, m in norms.items() if not seen.inside and n not in frozen_norms and _statistic_miss(seen, n, m) > 0.05
    ]
    extra = sorted((changed | (seen.after.keys() ^ seen.before.keys())) - set(learnables) - statistics)
    parts = [f"{len(learnables) - len(still)} of {len(learnables)} learnables moved"]
    parts += [f"not moved: {names(still)}"] if still else []
    parts += [f"statistics of {names(frozen_norms)} stood still"] if frozen_norms else []
    parts += [f"statistics of {names(off)} are not the batch's"] if off else []
    parts += [f"also changed: {names(extra)}"] if extra else []
    parts += ["the network's mode changed"] if seen.modes_changed else []
    absent = _absent(pipeline, still)
    logits = [n for n in absent if kind_of(n) != "weights"]
    likely: list[str | None] = ["batchnorm-in-eval" if frozen_norms or seen.modes_changed else None]
    likely += ["foreign-parameter" if absent and len(absent) == len(learnables) else None]
    likely += ["no-update" if still and len(still) == len(learnables) else None]
    likely += ["logits-not-in-optimizer" if logits else None, "parameter-not-in-optimizer" if absent else None]
    likely += ["batchnorm-in-eval" if off else None, "changes-too-much", "update-wrong" if still else None]
    ok = not (still or frozen_norms or off or extra or seen.modes_changed)
    return Outcome("all learnables, BatchNorm's statistics", "; ".join(parts), ok, likely)


def _statistic_miss(seen: StepTrace, name: str, module: nn.Module) -> float:
    """How far the running mean is from (1 - momentum) old + momentum batch, as a share of what it moved."""
    momentum = cast(Any, module).momentum
    if momentum is None or name not in seen.means:
        return 0.0
    before, after = seen.before[f"{name}.running_mean"], seen.after[f"{name}.running_mean"]
    meant = momentum * (seen.means[name] - before)
    return float((after - before - meant).norm() / max(float(meant.norm()), 1e-6))


def downhill(steps: Steps, pipeline: Pipeline) -> Outcome:
    """A step of the same direction, 1/100 of its length, as the task loss with the expected squares sees it."""
    seen = done(steps.plain)
    if steps.task_gradient is None:
        raise NotApplicable("the loss is not known")
    grads = gradients_of(seen)
    slope = sum(float((grads[n] * (seen.after[n] - seen.before[n])).sum()) for n in grads if n in seen.after)
    ok = slope < 0
    return Outcome("downhill", f"slope along the update {slope:.3g}", ok, ["ascent", "no-update", "update-wrong"])


def overfit_one_batch(pipeline: Pipeline) -> Outcome:
    """Some steps on one small batch lower its cross entropy to below 0.7 of what it was (0.98 for an unknown rate)."""
    images, labels = batch_of(pipeline, OVERFIT_IMAGES)
    with preserve_state(pipeline):
        pipeline.model.train()
        first = _batch_loss(pipeline, images, labels)
        losses = [first]
        for _ in range(OVERFIT_STEPS):
            try:
                pipeline.take_step(images, labels, 0.0)
            except RAISED as error:
                raise PartFailed("step-raises", error) from error
        losses.append(_batch_loss(pipeline, images, labels))
    last = losses[-1]
    if not math.isfinite(last):
        likely = ["learning-rate-too-large", "loss-not-finite"]
    elif last == first:
        likely = ["no-update", "foreign-parameter"]
    else:
        likely = ["learning-rate-too-large"] if last > first else ["step-labels-wrong"]
        likely += ["stuck-at-chance", "step-gradient-wrong"]
    share = 0.7 if pipeline.expected.groups is not None else 0.98  # a learning rate of one's own may be small
    ok = last < share * first
    expected = f"below {share * first:.2f} after {OVERFIT_STEPS} steps"
    return Outcome(expected, f"{first:.2f} -> {last:.2f}", ok, likely)


def _batch_loss(pipeline: Pipeline, images: Tensor, labels: Tensor) -> float:
    """Cross entropy of the batch with BatchNorm on the batch's statistics, which are put back."""
    with preserve_state(pipeline), torch.no_grad(), autocast(images.device, pipeline.precision):
        pipeline.model.train()
        scores = pipeline.model(images)
        if scores.dim() != 2:
            raise NotApplicable("the network does not return one score a class")
        return float(objective.cross_entropy(scores, labels))

"""The first steps: does one real step minimise the promised objective, move what it should, and nothing else?

Steps are taken from the same state on the same batch: A without the penalty, B again with the gradients that A left,
C with the penalty. What differs between them is what the part that differs contributes. Everything is put back.
Axis letters: N batch, G groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from experiments.diagnosis import objective
from experiments.diagnosis.grid_checks import finite_differences
from experiments.diagnosis.network_checks import batch_of
from experiments.diagnosis.optimizer_checks import groups_by_parameter, kind_of
from experiments.diagnosis.penalty_checks import as_parameters, factor_of, misfit
from experiments.diagnosis.probe import Watched, watched_step
from experiments.diagnosis.promise import LOGITS
from experiments.diagnosis.subject import Subject
from experiments.diagnosis.update_rules import expected_update
from experiments.diagnosis.ward import Broken, NotApplicable, Outcome, Ward, names, undisturbed
from src.devices import autocast
from utils_quantization import quantized_layers, shared_quantized_weights

IMAGES = 64
OVERFIT_IMAGES, OVERFIT_STEPS = 32, 24
LOSS_CLOSE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}  # relative; bf16 has 8 bits of mantissa
GRADIENT_CLOSE = {torch.float32: 2e-2, torch.bfloat16: 1e-1}
FLOAT32 = 2.4e-7  # relative rounding of one update
LARGEST_STEP = 0.7  # of a layer's own root mean square; the presets' first steps stay below 0.1


@dataclass
class Steps:
    """The watched steps, or the error that the first one raised, and the objective's parts computed a second time."""

    images: Tensor
    labels: Tensor
    plain: Watched | None = None
    again: Watched | None = None
    penalised: Watched | None = None
    error: Broken | None = None
    coefficient: float = 0.0
    task: float = 0.0
    task_gradient: objective.Gradients | None = None


def step_checks(ward: Ward, subject: Subject) -> None:
    """Take the steps and add their findings."""
    try:
        steps = take_steps(subject)
    except (NotApplicable, Broken) as reason:
        text = f"no step could be taken: {reason}"
        likely = [reason.cause] if isinstance(reason, Broken) else ["loader-shapes"]
        ward.add("a step runs", "the step function works on a batch", Outcome("no error", text, False, likely))
        return
    ward.check("a step runs", "the step function works on a batch", _runs, steps, subject, blame="step-raises")
    if steps.plain is None:
        return
    ward.check("mode of the network", "BatchNorm and quantizers are on while training", _modes, steps, subject)
    ward.check("loss of a step", "the step reports and minimises the promised parts", _loss, steps, subject)
    ward.check("gradients", "every learnable gets a finite gradient that is not zero", _gradients, steps, subject)
    ward.check("finite differences", "each logit's gradient has the right sign and size", finite_differences, subject)
    ward.check("gradient of the task", "the step's gradient is that of the cross entropy", _task, steps, subject)
    ward.check("squared logits", "lambda theta^2 of every logit is in the loss", _squares, steps, subject)
    ward.check("gradient of the penalty", "coefficient x penalty reaches every group", _penalty, steps, subject)
    ward.check("fresh gradients", "a step forgets the gradients of the step before", _fresh, steps)
    ward.check("update", "parameters move as the optimizer's rule says", _update, steps, subject)
    ward.check("size of a step", "no weight moves by more than a fraction of its layer's size", _size, steps, subject)
    ward.check(
        "only what it should", "a step moves all learnables and BatchNorm's statistics, no more", _only, steps, subject
    )
    ward.check("direction of a step", "a small step along the update lowers the loss", _descent, steps, subject)
    ward.check("one batch", "a few steps on one batch lower its loss clearly", _overfit, subject)


def take_steps(subject: Subject) -> Steps:
    """Steps A, B and C. Raises NotApplicable without a usable batch."""
    images, labels = batch_of(subject, IMAGES)
    steps = Steps(images, labels)
    penalised = subject.objective.penalty is not None
    steps.coefficient = (subject.promise.peak or 0.01) if penalised else 0.0
    with undisturbed(subject):
        subject.model.train()
        try:
            with undisturbed(subject):
                steps.task, steps.task_gradient = _own_task(subject, steps)
        except Exception:  # the step itself will say what is wrong
            steps.task_gradient = None
        try:
            with undisturbed(subject):
                for p in subject.model.parameters():
                    p.grad = None
                steps.plain = watched_step(subject, images, labels, 0.0)
                left = {name: p.grad for name, p in subject.model.named_parameters()}
            with undisturbed(subject):
                for name, p in subject.model.named_parameters():
                    kept = left.get(name)
                    p.grad = None if kept is None else kept.clone()
                steps.again = watched_step(subject, images, labels, 0.0)
            if penalised:
                with undisturbed(subject):
                    for p in subject.model.parameters():
                        p.grad = None
                    steps.penalised = watched_step(subject, images, labels, steps.coefficient)
        except Broken as error:
            steps.error = error
    return steps


def _own_task(subject: Subject, steps: Steps, *, quantized: bool = True) -> tuple[float, objective.Gradients]:
    loss = objective.task_loss(subject, steps.images, steps.labels, quantized=quantized)
    return float(loss.detach()), objective.gradients(loss, subject.model)


def done(seen: Watched | None) -> Watched:
    if seen is None:
        raise NotApplicable("the step did not run")
    return seen


def _runs(steps: Steps, subject: Subject) -> Outcome:
    if steps.error is not None:
        return Outcome("a finite loss", str(steps.error), False, [steps.error.cause])
    seen = done(steps.plain)
    assert seen.losses is not None
    loss = float(seen.losses.total)
    ok = math.isfinite(loss)
    return Outcome("a finite loss", f"{loss:.4g}", ok, ["loss-not-finite"])


def _modes(steps: Steps, subject: Subject) -> Outcome:
    seen = done(steps.plain)
    quantizers, norms = quantized_layers(subject.model), [m for m in subject.model.modules() if _is_norm(m)]
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


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats


def _loss(steps: Steps, subject: Subject) -> Outcome:
    seen = done(steps.plain)
    if subject.promise.lambda_dz is None or steps.task_gradient is None or seen.losses is None:
        raise NotApplicable("the parts of the loss are not promised")
    close = LOSS_CLOSE[subject.precision]
    squares = _promised_squares(subject)
    meant, found = steps.task + squares, float(seen.losses.total)
    parts = [f"{found:.4f} for {meant:.4f} without the penalty"]
    errors = [abs(found - meant) / max(abs(meant), 1e-9)]
    likely: list[str | None] = []
    if errors[0] > close:
        likely += _loss_diagnosis(subject, steps, found, squares)
    if steps.penalised is not None and steps.penalised.losses is not None and subject.promise.penalty:
        weighted = steps.coefficient * objective_penalty(subject)
        more = float(steps.penalised.losses.total) - found
        errors.append(abs(more - weighted) / max(weighted, abs(meant), 1e-9))
        parts.append(f"the penalty adds {more:.4f} for {weighted:.4f}")
        if errors[-1] > close:
            misreported = _penalty_gradient_is_right(subject, steps)
            likely += ["loss-misreported"] if misreported else ["penalty-sign"] if more < 0 else []
            likely += ["coefficient-not-applied" if more > 0.02 * weighted else "penalty-not-in-loss", "penalty-wrong"]
    ok = max(errors) <= close
    return Outcome("task + squared logits + coefficient x penalty", "; ".join(parts), ok, likely, max(errors) / close)


def _loss_diagnosis(subject: Subject, steps: Steps, found: float, squares: float) -> list[str | None]:
    """Why a step reports another loss than the promised one."""
    seen = done(steps.plain)
    gradient = _found(seen)
    assert steps.task_gradient is not None
    right = misfit(_weights(gradient), _weights(steps.task_gradient)) < GRADIENT_CLOSE[subject.precision]
    rest = found - steps.task
    if right and squares and abs(rest) < 0.02 * squares:
        held = max(_fitted_lambdas(subject, steps).values(), default=0.0) > 0
        return ["loss-misreported" if held else "logit-squares-missing", "logit-squares-missing"]
    if right and rest > 0:
        return ["lambda-wrong", "loss-misreported"]
    if right:
        return ["loss-misreported", "loss-wrong"]
    return [*_task_diagnosis(subject, steps, found - squares), "loss-wrong"]


def _penalty_gradient_is_right(subject: Subject, steps: Steps) -> bool:
    try:
        return _penalty(steps, subject).ok
    except NotApplicable:
        return False


def _promised_squares(subject: Subject) -> float:
    weights = {"logit_dz": subject.promise.lambda_dz or 0.0, "logit_bit": subject.promise.lambda_bit or 0.0}
    return sum(weight * objective.squares(subject.model, leaf)[0] for leaf, weight in weights.items())


def objective_penalty(subject: Subject) -> float:
    """The promised penalty, by its definition."""
    grouping = objective.channel_grouping(subject)
    return grouping.lasso(grouping.weights(subject.model))[0]


def _task_diagnosis(subject: Subject, steps: Steps, found: float) -> list[str]:
    """What gives the task loss that was reported: another network, other images, other labels, another loss."""
    seen = done(steps.plain)
    if seen.images is not None and _other_images(seen.images, steps.images):
        return ["step-images-wrong"]
    guesses: dict[str, float] = {}
    with undisturbed(subject):
        subject.model.train()
        if quantized_layers(subject.model):
            guesses["quantizers-off-in-training"] = _value(subject, steps, quantized=False)
        subject.model.eval()
        guesses["batchnorm-in-eval"] = _value(subject, steps, quantized=True)
    near = [key for key in guesses if abs(guesses[key] - found) < 0.3 * abs(steps.task - found)]
    if near:
        return sorted(near, key=lambda key: abs(guesses[key] - found))
    return ["step-labels-wrong", "loss-wrong"] if _labels_are_mixed(subject, steps) else ["loss-wrong"]


def _other_images(seen: Tensor, given: Tensor) -> bool:
    return seen.shape != given.shape or not torch.equal(seen.float().cpu(), given.float().cpu())


def _labels_are_mixed(subject: Subject, steps: Steps) -> bool:
    """With one label for all images a permutation changes nothing: is the loss then right?"""
    same = torch.full_like(steps.labels, int(steps.labels[0]))
    one = replace(steps, labels=same)
    squares = _promised_squares(subject)
    with undisturbed(subject):
        subject.model.train()
        with undisturbed(subject):
            meant = _value(subject, one, quantized=True)
        seen = watched_step(subject, steps.images, same, 0.0)
    assert seen.losses is not None
    return abs(float(seen.losses.total) - squares - meant) < LOSS_CLOSE[subject.precision] * max(meant, 1.0)


def _value(subject: Subject, steps: Steps, *, quantized: bool) -> float:
    with torch.no_grad():
        return float(objective.task_loss(subject, steps.images, steps.labels, quantized=quantized))


def _gradients(steps: Steps, subject: Subject) -> Outcome:
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


def _found(seen: Watched) -> objective.Gradients:
    return {n: torch.zeros_like(seen.before[n]) if g is None else g for n, g in seen.gradients.items()}


def _weights(grads: objective.Gradients) -> objective.Gradients:
    return {name: g for name, g in grads.items() if kind_of(name) == "weights"}


def _task(steps: Steps, subject: Subject) -> Outcome:
    """The weights' gradient: nothing but the task loss reaches them while the coefficient is 0."""
    seen = done(steps.plain)
    if steps.task_gradient is None or subject.promise.lambda_dz is None:
        raise NotApplicable("the task loss is not promised")
    close = GRADIENT_CLOSE[subject.precision]
    found, meant = _weights(_found(seen)), _weights(steps.task_gradient)
    miss = misfit(found, meant)
    likely: list[str | None] = []
    if miss > close:
        likely = _task_gradient_diagnosis(subject, steps, found, meant, miss)
    measured = f"differs by {100 * miss:.2g}%"
    return Outcome(
        f"the gradient of the batch's cross entropy, within {100 * close:g}%",
        measured,
        miss <= close,
        likely,
        miss / close,
    )


def _task_gradient_diagnosis(
    subject: Subject, steps: Steps, found: objective.Gradients, meant: objective.Gradients, miss: float
) -> list[str | None]:
    seen = done(steps.plain)
    off: dict[str, float] = {}
    with undisturbed(subject):
        subject.model.train()
        if quantized_layers(subject.model):
            off["quantizers-off-in-training"] = misfit(found, _weights(_own_task(subject, steps, quantized=False)[1]))
        subject.model.eval()
        off["batchnorm-in-eval"] = misfit(found, _weights(_own_task(subject, steps)[1]))
    dot = sum(float((found[n] * meant[n]).sum()) for n in found)
    size = sum(float(g.square().sum()) for g in meant.values())
    scale = dot / size if size else 0.0
    off["gradients-scaled"] = misfit(found, {n: scale * g for n, g in meant.items()})
    if scale < 0 and off["gradients-scaled"] < 0.1:
        off["ascent"] = off.pop("gradients-scaled")
    near = sorted((key for key in off if off[key] < 0.5 * miss), key=lambda key: off[key])
    reported = float(seen.losses.total) - _promised_squares(subject) if seen.losses is not None else math.nan
    if near[:1] == ["gradients-scaled"] and abs(reported - scale * steps.task) < 0.05 * abs(reported):
        near = ["loss-wrong", "gradients-scaled"]
    if seen.images is not None and _other_images(seen.images, steps.images):
        near = ["step-images-wrong"]
    if not near and not _labels_are_mixed(subject, steps):
        near = ["loss-wrong"]
    if not any(float(g.abs().max()) > 0 for g in found.values()):
        near = ["gradient-missing"]
    near += ["batchnorm-in-eval"] if seen.norms_in_eval else []
    near += ["quantizers-off-in-training"] if seen.quantizers_off else []
    zero = [n for n, g in found.items() if n.endswith("original") and not float(g.abs().max()) > 0]
    near += ["no-ste-round"] if zero else []
    return [*near, "step-labels-wrong", "step-gradient-wrong"]


def _squares(steps: Steps, subject: Subject) -> Outcome:
    """What the step adds to the task's gradient of the logits is 2 lambda theta."""
    lambdas = {"logit_dz": subject.promise.lambda_dz, "logit_bit": subject.promise.lambda_bit}
    if steps.task_gradient is None or lambdas["logit_dz"] is None:
        raise NotApplicable("no weights of the squared logits are promised")
    parts, likely, worst = list[str](), list[str](), 0.0
    for leaf, fitted in _fitted_lambdas(subject, steps).items():
        weight = lambdas[leaf] or 0.0
        slope = _slopes(subject, leaf)
        size = sum(float(g.square().sum()) for g in slope.values())
        # bf16 makes the task's own gradient of a logit, a sum over a whole layer, uncertain
        spread = sum(float(steps.task_gradient[n].square().sum()) for n in slope) / size
        close = 2e-2 * weight + (0.1 if subject.precision != torch.float32 else 0.02) * math.sqrt(spread) + 1e-5
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


def _slopes(subject: Subject, leaf: str) -> objective.Gradients:
    """2 theta of every trainable logit called `leaf`."""
    found = objective.squares(subject.model, leaf)[1]
    return {n: g for n, g in found.items() if n.rpartition(".")[2] == leaf}


def _fitted_lambdas(subject: Subject, steps: Steps) -> dict[str, float]:
    """lambda where the step's gradient is the task's + lambda 2 theta, by least squares, for each kind of logit."""
    found, fitted = _found(done(steps.plain)), {}
    for leaf in LOGITS:
        slope = _slopes(subject, leaf)
        size = sum(float(g.square().sum()) for g in slope.values())
        if size and steps.task_gradient is not None:
            rest = {n: found[n] - steps.task_gradient[n] for n in slope}
            fitted[leaf] = sum(float((rest[n] * slope[n]).sum()) for n in slope) / size
    return fitted


def _penalty(steps: Steps, subject: Subject) -> Outcome:
    """(gradient of C - gradient of A) / coefficient is the penalty's gradient, and is not zero for any live group."""
    if steps.penalised is None or not steps.coefficient:
        raise NotApplicable("there is no penalty")
    plain, penalised = _weights(_found(done(steps.plain))), _weights(_found(steps.penalised))
    extra = {n: (penalised[n] - plain[n]) / steps.coefficient for n in plain}
    size = math.sqrt(sum(float(g.square().sum()) for g in extra.values()))
    if not subject.promise.penalty:
        return Outcome("a gradient", f"norm {size:.3g}", size > 0, ["penalty-detached", "penalty-not-in-loss"])
    grouping = objective.channel_grouping(subject)
    weights = grouping.weights(subject.model)
    slopes = _weights(_through_quantizers(subject, grouping.lasso(weights)[1]))
    total = sum(float(g.square().sum()) for g in slopes.values())
    fitted = sum(float((extra[n] * slopes[n]).sum()) for n in slopes if n in extra) / max(total, 1e-30)
    miss = misfit(extra, slopes)
    reached = _reached(subject, grouping, extra)
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
        likely += _shape(subject, grouping, extra)
    return Outcome(f"once the penalty's, reaching all {grouping.count} groups", measured, ok, likely, miss / close)


def _shape(subject: Subject, grouping: objective.Grouping, extra: objective.Gradients) -> list[str]:
    """The other grouping whose gradient is nearest."""
    off: dict[str, float] = {}
    for key, guess in {"penalty-on-latent": grouping, **objective.other_groupings(subject)}.items():
        latent = key == "penalty-on-latent"
        slopes = guess.lasso(guess.weights(subject.model, latent))[1]
        slopes = as_parameters(subject.model, slopes) if latent else _through_quantizers(subject, slopes)
        plain_key = key.partition(" ")[0]
        off[plain_key] = min(off.get(plain_key, math.inf), misfit(extra, _weights(slopes)))
    return [*sorted(off, key=lambda key: off[key])[:2], "penalty-wrong"]


def _through_quantizers(subject: Subject, slopes: dict[str, Tensor]) -> objective.Gradients:
    """Gradients of the weights that the network reads as gradients of the parameters behind them, by the quantizers'
    own backward: another check says whether that is right."""
    total: Tensor = next(subject.model.parameters()).new_zeros(())
    with shared_quantized_weights(subject.model):
        for key, slope in slopes.items():
            module, _, parameter = key.rpartition(".")
            weight = getattr(subject.model.get_submodule(module), parameter)
            total = total + (weight * slope.to(weight)).sum()
        return objective.gradients(total, subject.model)


def _reached(subject: Subject, grouping: objective.Grouping, extra: objective.Gradients) -> int:
    """Groups of which some member gets a gradient, or that are all zero already."""
    by_tensor = {}
    for member in grouping.members:
        name = next(iter(as_parameters(subject.model, {f"{member.module}.{member.parameter}": torch.zeros(1)})))
        by_tensor[f"{member.module}.{member.parameter}"] = extra.get(name, torch.zeros(1))
    zero = grouping.norms_squared(grouping.weights(subject.model)) == 0
    weights = grouping.weights(subject.model)
    shaped = {k: g if g.shape == weights[k].shape else torch.zeros_like(weights[k]) for k, g in by_tensor.items()}
    return int(((grouping.norms_squared(shaped) > 0) | zero).sum())


def _fresh(steps: Steps) -> Outcome:
    first, second = _found(done(steps.plain)), _found(done(steps.again))
    miss = misfit(second, first)
    measured = f"the second step's gradient differs by {100 * miss:.2g}%"
    return Outcome(
        "the same gradient on the same batch", measured, miss < 0.2, ["gradients-accumulate", "step-gradient-wrong"]
    )


def _update(steps: Steps, subject: Subject) -> Outcome:
    seen = done(steps.plain)
    learnables = objective.trainable(subject.model)
    moved = {n: seen.after[n] - seen.before[n] for n in learnables}
    if not any(float(m.abs().max()) > 0 for m in moved.values()):
        foreign = "foreign-parameter" if len(_absent(subject, list(moved))) == len(moved) else None
        none = "no-update" if not seen.updates else "learning-rate-zero"
        return Outcome("the optimizer's update", "nothing moved at all", False, [foreign, none, "no-update"])
    if seen.updates > 1:
        return Outcome("one update", f"{seen.updates} updates in one step", False, ["update-wrong"])
    meant = {n: expected_update(subject, n, p, seen) for n, p in learnables.items()}
    known = {n: m for n, m in meant.items() if m is not None}
    if not known:
        return Outcome(
            "a movement; the rule is not known here", f"{_movers(moved)} of {len(moved)} parameters moved", True
        )
    misses = {n: _relative(moved[n], known[n], seen.before[n]) for n in known}
    odd = sorted((n for n in misses if misses[n] > 0.02), key=lambda n: -misses[n])
    still = _absent(subject, [n for n in odd if not float(moved[n].abs().max()) > 0])
    measured = f"as the rule says for {len(known) - len(odd)} of {len(known)}"
    if odd:
        measured += f"; {names(odd)} off by up to {100 * misses[odd[0]]:.2g}%"
    logits = [n for n in still if kind_of(n) != "weights"]
    likely: list[str | None] = ["logits-not-in-optimizer" if logits else None]
    likely += ["parameter-not-in-optimizer" if still else None]
    zero = [n for n in odd if not float(moved[n].abs().max()) > 0 and n not in still]
    likely += ["learning-rate-zero" if zero and len(zero) == len(odd) and _rate_is_zero(subject, zero[0]) else None]
    likely += ["update-wrong", "changes-too-much"]
    return Outcome("the optimizer's rule for every parameter", measured, not odd, likely, max(misses.values()) / 0.02)


def _absent(subject: Subject, members: list[str]) -> list[str]:
    """Those of these parameters that the optimizer does not hold."""
    try:
        holding = groups_by_parameter(subject.optimizer)
    except NotApplicable:
        return []
    own = dict(subject.model.named_parameters())
    return [name for name in members if id(own[name]) not in holding]


def _rate_is_zero(subject: Subject, name: str) -> bool:
    p = dict(subject.model.named_parameters())[name]
    return any(group.get("lr") == 0 for group in groups_by_parameter(subject.optimizer).get(id(p), []))


def _movers(moved: objective.Gradients) -> int:
    return sum(bool(m.abs().max() > 0) for m in moved.values())


def _relative(found: Tensor, meant: Tensor, p: Tensor) -> float:
    """Relative error of a movement, beyond what float32 rounds of a parameter that hardly moves."""
    rounded = FLOAT32 * float(p.norm())
    return max(0.0, float((found - meant).norm()) - rounded) / max(float(meant.norm()), 1e-6)


def _too_small(subject: Subject, seen: Watched, name: str, p: nn.Parameter) -> bool:
    """Whether the parameter's movement is lost in the rounding of float32 (a bias before BatchNorm, for instance)."""
    meant, gradient = expected_update(subject, name, p, seen), seen.gradients.get(name)
    if meant is not None:
        return bool((meant.abs() <= FLOAT32 * seen.before[name].abs().max() + 1e-12).all()) and bool(meant.any())
    largest = max((float(g.abs().max()) for g in seen.gradients.values() if g is not None), default=0.0)
    return gradient is not None and 0 < float(gradient.abs().max()) < 1e-6 * largest


def _size(steps: Steps, subject: Subject) -> Outcome:
    seen = done(steps.plain)
    ratios: dict[str, float] = {}
    for name, p in objective.trainable(subject.model).items():
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


def _only(steps: Steps, subject: Subject) -> Outcome:
    seen = done(steps.plain)
    learnables = objective.trainable(subject.model)
    changed = {n for n in seen.before if not torch.equal(seen.before[n], seen.after.get(n, seen.before[n]))}
    still = [n for n, p in learnables.items() if n not in changed and not _too_small(subject, seen, n, p)]
    norms = {n: m for n, m in subject.model.named_modules() if _is_norm(m)}
    statistics = {f"{n}.{b}" for n in norms for b in ("running_mean", "running_var", "num_batches_tracked")}
    frozen_norms = [n for n in norms if f"{n}.running_mean" not in changed]
    off = [n for n, m in norms.items() if n not in frozen_norms and _statistic_miss(seen, n, m) > 0.05]
    extra = sorted(changed - set(learnables) - statistics)
    parts = [f"{len(learnables) - len(still)} of {len(learnables)} learnables moved"]
    parts += [f"not moved: {names(still)}"] if still else []
    parts += [f"statistics of {names(frozen_norms)} stood still"] if frozen_norms else []
    parts += [f"statistics of {names(off)} are not the batch's"] if off else []
    parts += [f"also changed: {names(extra)}"] if extra else []
    parts += ["the network's mode changed"] if seen.modes_changed else []
    absent = _absent(subject, still)
    logits = [n for n in absent if kind_of(n) != "weights"]
    likely: list[str | None] = ["batchnorm-in-eval" if frozen_norms or seen.modes_changed else None]
    likely += ["foreign-parameter" if absent and len(absent) == len(learnables) else None]
    likely += ["no-update" if still and len(still) == len(learnables) else None]
    likely += ["logits-not-in-optimizer" if logits else None, "parameter-not-in-optimizer" if absent else None]
    likely += ["batchnorm-in-eval" if off else None, "changes-too-much", "update-wrong" if still else None]
    ok = not (still or frozen_norms or off or extra or seen.modes_changed)
    return Outcome("all learnables, BatchNorm's statistics", "; ".join(parts), ok, likely)


def _statistic_miss(seen: Watched, name: str, module: nn.Module) -> float:
    """How far the running mean is from (1 - momentum) old + momentum batch, as a share of what it moved."""
    momentum = cast(Any, module).momentum
    if momentum is None or name not in seen.means:
        return 0.0
    before, after = seen.before[f"{name}.running_mean"], seen.after[f"{name}.running_mean"]
    meant = momentum * (seen.means[name] - before)
    return float((after - before - meant).norm() / max(float(meant.norm()), 1e-6))


def _descent(steps: Steps, subject: Subject) -> Outcome:
    """A step of the same direction, 1/100 of its length, as the task loss with the promised squares sees it."""
    seen = done(steps.plain)
    if steps.task_gradient is None:
        raise NotApplicable("the loss is not known")
    grads = _found(seen)
    slope = sum(float((grads[n] * (seen.after[n] - seen.before[n])).sum()) for n in grads if n in seen.after)
    ok = slope < 0
    return Outcome("downhill", f"slope along the update {slope:.3g}", ok, ["ascent", "no-update", "update-wrong"])


def _overfit(subject: Subject) -> Outcome:
    images, labels = batch_of(subject, OVERFIT_IMAGES)
    with undisturbed(subject):
        subject.model.train()
        first = _batch_loss(subject, images, labels)
        losses = [first]
        for _ in range(OVERFIT_STEPS):
            try:
                subject.take_step(images, labels, 0.0)
            except Exception as error:
                raise Broken("step-raises", error) from error
        losses.append(_batch_loss(subject, images, labels))
    last = losses[-1]
    if not math.isfinite(last):
        likely = ["learning-rate-too-large", "loss-not-finite"]
    elif last == first:
        likely = ["no-update", "foreign-parameter"]
    else:
        likely = ["learning-rate-too-large"] if last > first else ["step-labels-wrong"]
        likely += ["stuck-at-chance", "step-gradient-wrong"]
    share = 0.7 if subject.promise.groups is not None else 0.98  # a learning rate of one's own may be small
    ok = last < share * first
    expected = f"below {share * first:.2f} after {OVERFIT_STEPS} steps"
    return Outcome(expected, f"{first:.2f} -> {last:.2f}", ok, likely)


def _batch_loss(subject: Subject, images: Tensor, labels: Tensor) -> float:
    """Cross entropy of the batch with BatchNorm on the batch's statistics, which are put back."""
    with undisturbed(subject), torch.no_grad(), autocast(images.device, subject.precision):
        subject.model.train()
        scores = subject.model(images)
        if scores.dim() != 2:
            raise NotApplicable("the network does not return one score a class")
        return float(objective.cross_entropy(scores, labels))

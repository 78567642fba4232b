"""The first steps: does one real step minimise the expected objective, move what it should, and nothing else?

What was seen of the steps (observe.py) is held against the reference; causes/step_mutants.py says which mistake
explains a difference. Axis letters: N batch, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from experiments.doctor.causes.explain import MUCH_NEARER, Observables, distance, explain
from experiments.doctor.causes.step_mutants import (
    DETACHED,
    EXACT,
    PENALTY,
    TASK,
    UPDATE,
    fitted_gradients,
    fitted_penalty,
    fitted_update,
    ranked,
    scale_by_tensor,
)
from experiments.doctor.checks.optimizer import groups_by_parameter, listed
from experiments.doctor.checks.quantizers import weights_of_steps
from experiments.doctor.expected import LOGITS, kind_of
from experiments.doctor.observe import (
    Steps,
    StepTrace,
    compute_again,
    done,
    equal_tensors,
    full_rates_,
    gradients_of,
    grouping_of,
    objective_of,
    other_images,
    take_steps,
    watched_step,
)
from experiments.doctor.pipeline import Pipeline, step_losses
from experiments.doctor.reference.objective import (
    Gradients,
    Objective,
    gradients,
    plain,
    trainable,
)
from experiments.doctor.reference.update import RULES, UNKNOWN, Moved, Update
from experiments.doctor.runner import RAISED, CheckRunner, NotApplicable, Outcome, PartFailed, names, preserve_state
from utils_quantization import quantized_layers, shared_quantized_weights

LOSS_CLOSE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}  # relative; bf16 has 8 bits of mantissa
GRADIENT_CLOSE = {torch.float32: 2e-2, torch.bfloat16: 1e-1}
FLOAT32 = 2.4e-7  # relative rounding of one update
LARGEST_STEP = 0.7  # of a layer's own root mean square; the presets' first steps stay below 0.1
SMALLEST_STEP = 1e-5  # the same; below it 24 steps change a weight by less than a thousandth
OVERFIT_IMAGES, OVERFIT_STEPS = 32, 24
ALWAYS_WRONG = ("step-labels-wrong", "ascent", "softmax-twice", "gradient-missing", "batchnorm-in-eval")
"""Of what explains a step whose objective is not promised: wrong under any intention."""


def step_checks(runner: CheckRunner, pipeline: Pipeline) -> None:
    """Take the steps and add their findings."""
    proves = "the step function works on a batch"
    try:
        steps = take_steps(pipeline)
    except RAISED as error:
        cause = "loader-shapes" if isinstance(error, NotApplicable) else getattr(error, "cause", "model-raises")
        text = f"no step could be taken: {type(error).__name__}: {error}"
        runner.add("a step runs", proves, Outcome("no error", text, False, [cause, "step-raises"]))
        return
    runner.check("a step runs", proves, _runs, steps, blame="step-raises")
    for name, proves, check in CHECKS if steps.plain is not None else ():
        runner.check(name, proves, check, steps, pipeline)


def _runs(steps: Steps) -> Outcome:
    """A step ends without an error, with a finite loss."""
    if steps.error is not None:
        return Outcome("a finite loss", str(steps.error), False, [steps.error.cause])
    losses = done(steps.plain).losses
    assert losses is not None
    loss = float(losses.total)
    often = f"; {steps.calls} calls for one update" if steps.calls > 1 else ""
    return Outcome("a finite loss", f"{loss:.4g}{often}", math.isfinite(loss), ["loss-not-finite"])


def modes_of_network(steps: Steps, pipeline: Pipeline) -> Outcome:
    """During a step quantizers are on, and normalisation layers are in training mode."""
    seen, quantizers = done(steps.plain), quantized_layers(pipeline.model)
    if not quantizers and not any(map(is_norm, pipeline.model.modules())):
        raise NotApplicable("the network has neither BatchNorm nor quantizers")
    off = sorted(seen.quantizers_off | (quantizers.keys() - seen.quantizers_seen))
    parts = listed({"BatchNorm in eval mode": sorted(seen.norms_in_eval), "quantizers off": off})
    likely = ["batchnorm-in-eval" if seen.norms_in_eval else None]
    likely += ["quantizers-off-in-training", "quantizers-off"] if off else []
    frozen = not seen.model_in_eval and not off and pipeline.expected.groups is None  # as for fine-tuning
    return Outcome("all on and in training mode", "; ".join(parts) or "all", not parts, likely, unusual=frozen)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm that keeps running statistics."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats


def loss_fits(steps: Steps, pipeline: Pipeline) -> Outcome:
    """The returned loss is task loss + squared logits (+ coefficient x penalty)."""
    right, seen, promised = _right(steps), done(steps.plain), pipeline.expected.lambda_dz is not None
    assert seen.losses is not None
    found, meant = float(seen.losses.total), float(right["total"])
    close = LOSS_CLOSE[pipeline.precision] * (1 if promised else 20)
    error = abs(found - meant) / max(abs(meant), 1e-9) / close
    likely: list[str] = []
    if not error <= 1:
        fits = _miss(steps, "weights") <= GRADIENT_CLOSE[pipeline.precision]
        likely = [*_explained(steps, pipeline), *(["loss-misreported"] if fits else []), "loss-wrong"]
    measured = f"{found:.4f} for {meant:.4f}" + (f" with coefficient {steps.given:g}" if steps.given else "")
    unusual = not promised and _may_be_meant(steps, likely)
    return Outcome("the expected parts, added", measured, error <= 1, likely, error, unusual)


def gradient_fits(steps: Steps, pipeline: Pipeline) -> Outcome:
    """The weights' gradient is the reference's; the logits' is looked at by `squared_logits`."""
    _right(steps)
    promised = pipeline.expected.lambda_dz is not None
    close = GRADIENT_CLOSE[torch.bfloat16 if not promised else pipeline.precision]
    miss = _miss(steps, "weights")
    likely = [] if miss <= close else [*_explained(steps, pipeline), "step-gradient-wrong"]
    text = f"the gradient of the expected objective, within {100 * close:g}%"
    unusual = not promised and _may_be_meant(steps, likely)
    return Outcome(text, f"differs by {100 * miss:.2g}%", miss <= close, likely, miss / close, unusual)


def _may_be_meant(steps: Steps, likely: list[str]) -> bool:
    """Whether somebody may want what explains the step best. Labels in another order belong to images in that order."""
    wrong = set(likely[:1]) & set(ALWAYS_WRONG)
    return not wrong or (wrong == {"step-labels-wrong"} and not _reads_what_it_is_given(steps))


def _reads_what_it_is_given(steps: Steps) -> bool:
    seen = done(steps.plain)
    return bool(seen.passes) and not other_images(seen.passes[0], steps.images)


def _right(steps: Steps) -> Observables:
    if steps.right is not None:
        return steps.right
    expected = steps.bare.expected
    if expected.objective == "open":
        raise NotApplicable("the objective is left open")
    if expected.lambda_dz is None and steps.calls > 1:
        raise NotApplicable(f"{steps.calls} calls make one update", "expected.lambda_dz")
    if expected.lambda_dz is None and len(done(steps.plain).passes) != 1:
        raise NotApplicable("the network does not run once a step", "expected.lambda_dz")
    raise NotApplicable("the loss could not be computed again")


def _found(steps: Steps) -> Observables:
    """What was seen of the plain step; what agrees with the reference within what is tolerated is the reference's."""
    right, seen = _right(steps), done(steps.plain)
    assert seen.losses is not None
    precision = steps.bare.precision
    found = {"total": plain(seen.losses.total)}
    found |= {f"gradient of {name}": g for name, g in gradients_of(seen).items() if f"gradient of {name}" in right}
    return settled(found, right, LOSS_CLOSE[precision], GRADIENT_CLOSE[precision])


def settled(found: Observables, right: Observables, number: float, tensor: float) -> Observables:
    """`found` with what is close to `right` replaced by it: numbers to `number`, tensors to `tensor` of their size."""
    sizes = {name: float(value.norm()) for name, value in right.items()}
    largest = max((size for name, size in sizes.items() if right[name].dim()), default=0.0)

    def near(name: str) -> bool:
        close = number * sizes[name] if not right[name].dim() else tensor * max(sizes[name], 0.01 * largest)
        return distance(found[name], right[name]) <= close

    return {name: right[name] if near(name) else value for name, value in found.items() if name in right}


def _miss(steps: Steps, kind: str) -> float:
    """Relative error of the gradient of the parameters of a kind."""
    right, found = _right(steps), gradients_of(done(steps.plain))
    both = {n: right[f"gradient of {n}"] for n in found if f"gradient of {n}" in right and kind_of(n) == kind}
    return relative({n: found[n] for n in both}, both)


def relative(found: Gradients, meant: Gradients) -> float:
    """||found - meant|| / ||meant|| over all parameters of either; what one lacks is 0."""
    keys = found.keys() | meant.keys()
    zero = torch.zeros(())
    square = sum(float((found.get(k, zero) - meant.get(k, zero)).square().sum()) for k in keys)
    size = sum(float(value.square().sum()) for value in meant.values())
    return math.sqrt(square / size) if size else math.sqrt(square)


def _explained(steps: Steps, pipeline: Pipeline) -> list[str]:
    """The mistakes that explain the plain step, best first. What was measured directly goes before."""
    if steps.explained is None:
        seen, promised = done(steps.plain), steps.bare.expected.lambda_dz is not None
        found, right = _found(steps), _right(steps)
        mutants, fitted = [*TASK, *((DETACHED, *PENALTY) if steps.given else ())], fitted_gradients(found, right)
        assert steps.reference is not None
        near = MUCH_NEARER if promised else EXACT
        keys = ranked(found, steps.reference, mutants, fitted, steps.predict, near)
        if not any(g.any() for g in gradients_of(seen).values()):
            keys = ["gradient-missing"]
        if promised and not _reads_what_it_is_given(steps):
            keys = ["step-images-wrong", *keys]
        if not keys and _reads_what_it_is_given(steps) and _labels_are_mixed(steps, pipeline):
            keys = ["step-labels-wrong"]
        zero = [n for n, g in gradients_of(seen).items() if n.endswith("original") and not float(g.abs().max()) > 0]
        steps.explained = [*keys, *(["no-ste-round"] if zero else [])]
    return steps.explained


def _labels_are_mixed(steps: Steps, pipeline: Pipeline) -> bool:
    """With one label for all images a permutation changes nothing: are loss and gradient then right?"""
    same = torch.zeros_like(steps.labels) + steps.labels[0]
    one = replace(steps, labels=same, right=None, explained=None, given=0.0)
    with preserve_state(pipeline):
        pipeline.model.train()
        with preserve_state(pipeline):
            one.plain = watched_step(pipeline, steps.images, same, 0.0)
        compute_again(one)
    if one.right is None or one.plain.losses is None:
        return False
    off = abs(float(one.plain.losses.total) - float(one.right["total"]))
    loss = off < LOSS_CLOSE[pipeline.precision] * max(float(one.right["total"]), 1.0)
    return loss and _miss(one, "weights") <= GRADIENT_CLOSE[pipeline.precision]


def every_gradient(steps: Steps, pipeline: Pipeline) -> Outcome:
    """Every trainable parameter gets a non-zero, finite gradient in one step."""
    found = done(steps.plain).gradients
    broken = [n for n, g in found.items() if g is not None and not torch.isfinite(g).all()]
    missing = [n for n, g in found.items() if g is None or not g.any()]
    asleep = [] if steps.right is None or pipeline.expected.groups is not None else missing
    asleep = [n for n in asleep if found[n] is not None and not n.endswith("original") and _is_silent(steps, n)]
    missing = [n for n in missing if n not in asleep]
    quantized = [n for n in missing if n.endswith("parametrizations.weight.original")]
    logits = [n for n in missing if kind_of(n) != "weights"]
    likely = [
        "gradient-not-finite" if broken else None,
        "no-ste-round" if quantized and len(quantized) == len(missing) - len(logits) else None,
        "logits-detached" if logits and logits == missing else None,
        "bits-frozen" if logits and all("logit_bit" in n for n in logits) else None,
        "quantizers-off-in-training" if logits else None,
        *("gradient-missing", "no-update"),
    ]
    behind = "none yet, behind weights that start at 0"
    parts = listed({"none": missing, "not finite": broken, behind: asleep})
    count = len(found)
    measured = "; ".join([f"{count - len(missing) - len(broken) - len(asleep)} of {count}", *parts])
    return Outcome(f"all {count}", measured, not missing and not broken, likely)


def _is_silent(steps: Steps, name: str) -> bool:
    """Whether the parameter should have a gradient of 0 now, as a branch has whose scale starts at 0."""
    return not _right(steps)[f"gradient of {name}"].any()


def squared_logits(steps: Steps, pipeline: Pipeline) -> Outcome:
    """The logits' gradient is the task's + 2 lambda theta."""
    lambdas = {"logit_dz": pipeline.expected.lambda_dz, "logit_bit": pipeline.expected.lambda_bit}
    if lambdas["logit_dz"] is None:
        raise NotApplicable("no weights of the squared logits are expected", "expected.lambda_dz")
    _right(steps)
    misses = {leaf: _miss(steps, leaf) for leaf in LOGITS if any(n.endswith(leaf) for n in trainable(pipeline.model))}
    if not misses:
        raise NotApplicable("no logit is learned")
    close = GRADIENT_CLOSE[pipeline.precision]
    worst = max(misses.values()) / close
    measured = ", ".join(f"{leaf} off by {100 * miss:.2g}%" for leaf, miss in misses.items())
    likely = [] if worst <= 1 else [*_explained(steps, pipeline), "lambda-wrong", "logit-squares-missing"]
    expected = ", ".join(f"{leaf} {weight:g}" for leaf, weight in lambdas.items())
    return Outcome(f"lambda of {expected}, within {100 * close:g}%", measured, worst <= 1, likely, worst)


def penalty_added(steps: Steps, pipeline: Pipeline) -> Outcome:
    """What the step with the penalty has more, in loss and gradient, is coefficient x the penalty's."""
    if steps.penalised is None or not steps.coefficient:
        raise NotApplicable("there is no penalty")
    alone, more = done(steps.plain), done(steps.penalised)
    slopes = [gradients_of(seen) for seen in (alone, more)]
    found = _weights({n: (slopes[1][n] - g) / steps.coefficient for n, g in slopes[0].items()})
    size = relative(found, {})
    if not pipeline.expected.penalty:
        return Outcome("a gradient", f"norm {size:.3g}", size > 0, ["penalty-detached", "penalty-not-in-loss"])
    assert alone.losses is not None
    assert more.losses is not None
    value = (more.losses.total - alone.losses.total) / steps.coefficient
    grouping = grouping_of(pipeline)
    reference = objective_of(pipeline, grouping)

    def predict(objective: Objective) -> Observables:
        """By the quantizers' own backward, which another check looks at."""
        with shared_quantized_weights(pipeline.model):
            factor = objective.coefficient(steps.coefficient) / steps.coefficient
            total = factor * objective.penalty(objective, pipeline.model)
            return {"value": plain(total), **_weights(gradients(total, pipeline.model))}

    # the difference of two gradients carries the rounding of both
    noise = relative(_weights(slopes[0]), {}) / max(relative(tensors(predict(reference)), {}), 1e-15)
    close = 0.02 + 1e-4 * noise / steps.coefficient
    out = compare_penalty({"value": plain(value), **found}, reference, predict, close)
    absent = [] if size or value else ["penalty-not-in-loss"]
    return replace(out, likely=[*absent, *out.likely[:-1], "coefficient-not-applied", *out.likely[-1:]])


def compare_penalty(
    found: Observables, reference: Objective, predict: Callable[[Objective], Observables], close: float
) -> Outcome:
    """A penalty's value and gradients against the reference's, within `close`; and which mistake explains them."""
    assert reference.grouping is not None
    right = predict(reference)
    value, meant = float(found["value"]), float(right["value"])
    slopes = tensors(found)
    broken = [name for name, g in slopes.items() if not torch.isfinite(g).all()]
    silent = not any(g.any() for g in slopes.values())
    off, miss = abs(value - meant) / max(meant, 1e-12), relative(slopes, tensors(right))
    ok = max(off, miss) < close and not broken
    likely = ["penalty-not-differentiable"] if broken else ["penalty-detached"] if silent else []
    if not ok and not broken:
        likely += ["loss-misreported"] if miss < close else []
        found = settled(found, right, close, close)
        fitted = [*fitted_penalty(found, right), *scale_by_tensor(found, right)]
        likely += ranked(found, reference, PENALTY, fitted, predict)
    measured = f"value {value:.5g} for {meant:.5g}; gradient "
    measured += f"not finite for {names(broken)}" if broken else "missing" if silent else f"off by {100 * miss:.2g}%"
    wanted = f"sum of the 2-norms of {reference.grouping.count} groups"
    return Outcome(wanted, measured, ok, [*likely, "penalty-wrong"], max(off, miss) / close)


def tensors(observed: Observables) -> Gradients:
    """The observables that are no single numbers."""
    return {name: value for name, value in observed.items() if value.dim()}


def _weights(grads: Gradients) -> Gradients:
    return {name: g for name, g in grads.items() if kind_of(name) == "weights"}


def fresh_gradients(steps: Steps, pipeline: Pipeline) -> Outcome:
    """The same step made twice gives the same gradients: none is left over from the step before."""
    if steps.calls > 1:
        raise NotApplicable(f"gradients are added up over {steps.calls} calls")
    if done(steps.plain).inside:
        raise NotApplicable("the optimizer calls backward itself")
    first, again = gradients_of(done(steps.plain)), gradients_of(done(steps.again))
    absent = _absent(pipeline, list(first))  # what the optimizer does not hold, it cannot clear
    miss = relative(
        {n: g for n, g in again.items() if n not in absent}, {n: first[n] for n in first if n not in absent}
    )
    measured = f"the second step's gradient differs by {100 * miss:.2g}%"
    likely = ["gradients-accumulate", "step-gradient-wrong"]
    return Outcome("the same gradient on the same batch", measured, miss < 0.2, likely)


def update_by_rule(steps: Steps, pipeline: Pipeline) -> Outcome:
    """Every parameter moves as the optimizer's own rule says, computed from its gradient in float64."""
    seen = done(steps.plain)
    moved = _movements(pipeline, seen)
    open_ = pipeline.expected.groups is None
    if not any(float(m.abs().max()) > 0 for m in moved.values()):
        foreign = "foreign-parameter" if len(_absent(pipeline, list(moved))) == len(moved) else None
        rates = [float(settings.get("lr", 1.0)) for settings in seen.settings.values()]
        zero = "learning-rate-zero" if seen.updates else None
        warm = open_ and bool(rates) and not any(rates)
        text = "nothing moved at all" + (" at a rate of 0" if warm else "")
        return Outcome("the optimizer's update", text, False, [foreign, zero, "no-update"], unusual=warm)
    if seen.updates > 1:
        return Outcome("one update", f"{seen.updates} updates in one step", False, ["update-wrong"])
    rule = None if open_ and type(pipeline.optimizer) not in RULES else _rule(pipeline.optimizer)
    held = {n: of for n in moved if rule is not None and (of := _moved(pipeline, n, seen)) is not None}
    if not held or rule is None:
        movers = sum(bool(m.abs().max() > 0) for m in moved.values())
        text = f"{movers} of {len(moved)} parameters moved"
        return Outcome("a movement; the rule is not known here", text, True)

    def predict(update: Update) -> Observables:
        return {n: update.movement(of) for n, of in held.items()}

    right, found = predict(Update(rule)), {n: moved[n] for n in held}
    misses = {n: _beyond_rounding(found[n], right[n], held[n].p) for n in held}
    odd = sorted((n for n in misses if misses[n] > 0.02), key=lambda n: -misses[n])
    measured = f"as the rule says for {len(held) - len(odd)} of {len(held)}"
    likely: list[str | None] = []
    if odd:
        measured += f"; {names(odd)} off by up to {100 * misses[odd[0]]:.2g}%"
        still = _absent(pipeline, [n for n in odd if not float(moved[n].abs().max()) > 0])
        likely += ["logits-not-in-optimizer" if any(kind_of(n) != "weights" for n in still) else None]
        likely += ["parameter-not-in-optimizer" if still else None]
        at_rest = all(seen.settings.get(n, {}).get("lr") == 0 for n in odd)
        likely += ["learning-rate-zero" if at_rest else None]
        found = {n: value if n in odd else right[n] for n, value in found.items()}
        fitted = fitted_update(found, right, {n: of.p for n, of in held.items()})
        likely += explain(found, Update(rule), [*UPDATE, *fitted], predict)
        likely += ["update-wrong", "changes-too-much"]
    return Outcome("the optimizer's rule for every parameter", measured, not odd, likely, max(misses.values()) / 0.02)


def _movements(pipeline: Pipeline, seen: StepTrace) -> Gradients:
    """By how much every learnable moved that was there before the step and after it."""
    both = seen.before.keys() & seen.after.keys()
    return {n: seen.after[n] - seen.before[n] for n in trainable(pipeline.model) if n in both}


def _rule(optimizer: Any) -> Callable[[Moved], Tensor] | None:
    return next((rule for kind, rule in RULES.items() if isinstance(optimizer, kind)), None)


def _moved(pipeline: Pipeline, name: str, seen: StepTrace) -> Moved | None:
    """What the update of a parameter started from; None where the rule is not known here.

    The optimizer is as it was before the step. Of a fresh one the expected rates and decays count.
    """
    settings = dict(seen.settings.get(name, {}))
    if pipeline.expected.groups is not None and not pipeline.optimizer.state:
        expected = pipeline.expected.groups[kind_of(name)]
        settings |= {"lr": expected.learning_rate, "weight_decay": expected.decay}
    if "lr" not in settings or name not in seen.gradients or any(settings.get(key) for key in UNKNOWN):
        return None
    gradient = seen.gradients[name]
    if gradient is None:
        settings, gradient = {"lr": 0.0}, torch.zeros_like(seen.before[name])
    state = pipeline.optimizer.state.get(dict(pipeline.model.named_parameters())[name], {})
    return Moved(seen.before[name], gradient, settings, state)


def _absent(pipeline: Pipeline, members: list[str]) -> list[str]:
    """Those of these parameters that the optimizer does not hold."""
    try:
        holding = groups_by_parameter(pipeline.optimizer)
    except NotApplicable:
        return []
    own = dict(pipeline.model.named_parameters())
    return [name for name in members if id(own[name]) not in holding]


def _beyond_rounding(found: Tensor, meant: Tensor, p: Tensor) -> float:
    """Relative error of a movement, beyond what float32 rounds of a parameter that hardly moves."""
    rounded = FLOAT32 * float(p.norm())
    return max(0.0, float((found - meant).norm()) - rounded) / max(float(meant.norm()), 1e-6)


def size_of_step(steps: Steps, pipeline: Pipeline) -> Outcome:
    """The update of every weight tensor is below LARGEST_STEP of its size, both as root mean squares."""
    seen = done(steps.plain)
    if seen.inside:
        raise NotApplicable("the optimizer calls backward itself, so that one update may be many")
    moved = {n: m for n, m in _movements(pipeline, seen).items() if m.dim() > 1 and seen.before[n].any()}
    if not moved:
        raise NotApplicable("no weight has more than one dimension")
    ratios = {n: float(m.norm() / seen.before[n].norm()) for n, m in moved.items()}
    worst = max(ratios, key=lambda name: ratios[name])
    ok = ratios[worst] < LARGEST_STEP
    measured = f"at most {100 * ratios[worst]:.2g}% of its size" + ("" if ok else f" ({worst})")
    likely = ["learning-rate-too-large"]
    return Outcome(f"below {100 * LARGEST_STEP:g}%", measured, ok, likely, ratios[worst] / LARGEST_STEP)


def only_what_it_should(steps: Steps, pipeline: Pipeline) -> Outcome:
    """A step changes every learnable parameter and BatchNorm's statistics (to the batch's), and nothing else.

    Where intentions are open, other buffers may change too (observers, averages), and BatchNorm may be frozen.
    """
    seen, open_ = done(steps.plain), pipeline.expected.groups is None
    learnables = _movements(pipeline, seen)
    changed = {n for n in seen.before if not equal_tensors(seen.before[n], seen.after.get(n, seen.before[n]))}
    still = [n for n in learnables if n not in changed and not _may_stand_still(pipeline, seen, n)]
    norms = {n: m for n, m in pipeline.model.named_modules() if is_norm(m) and not (open_ and n in seen.norms_in_eval)}
    statistics = {f"{n}.{b}" for n in norms for b in ("running_mean", "running_var", "num_batches_tracked")}
    frozen = [n for n in norms if f"{n}.running_mean" not in changed]
    once = not seen.inside and len(seen.passes) == 1
    off = [n for n, m in norms.items() if once and n not in frozen and _statistic_miss(seen, n, m) > 0.05]
    legal = set(learnables) | statistics | (dict(pipeline.model.named_buffers()).keys() if open_ else set())
    extra = sorted((changed - legal) | (seen.after.keys() ^ seen.before.keys()))
    modes = ["of the network"] if seen.modes_changed and not (open_ and not seen.model_in_eval) else []
    odd = {
        "not moved": still,
        "statistics stood still": frozen,
        "statistics are not the batch's": off,
        "also changed": extra,
        "the mode changed": modes,
    }
    absent = _absent(pipeline, still)
    all_ = len(learnables)
    likely = [
        "batchnorm-in-eval" if frozen or modes else None,
        "foreign-parameter" if absent and len(absent) == all_ else None,
        "no-update" if still and len(still) == all_ else None,
        "logits-not-in-optimizer" if any(kind_of(n) != "weights" for n in absent) else None,
        "parameter-not-in-optimizer" if absent else None,
        "batchnorm-in-eval" if off else None,
        *("changes-too-much", "update-wrong" if still else None),
    ]
    measured = "; ".join([f"{all_ - len(still)} of {all_} learnables moved", *listed(odd)])
    return Outcome("all learnables, BatchNorm's statistics", measured, not any(odd.values()), likely)


def _may_stand_still(pipeline: Pipeline, seen: StepTrace, name: str) -> bool:
    """Whether the parameter's movement is lost in the rounding of float32 (a bias before BatchNorm, for instance), or
    intentions are open and it has no gradient yet or a rate of 0, which other checks look at."""
    gradient = seen.gradients.get(name)
    if gradient is None:
        return False
    if pipeline.expected.groups is None and (not gradient.any() or seen.settings.get(name, {}).get("lr") == 0):
        return True
    rule = RULES.get(type(pipeline.optimizer))
    of = _moved(pipeline, name, seen) if rule else None
    if rule and of:
        meant = Update(rule).movement(of).abs()
        return bool((meant <= FLOAT32 * of.p.abs().max() + 1e-12).all()) and bool(meant.any())
    largest = max(float(g.abs().max()) for g in seen.gradients.values() if g is not None)
    return 0 < float(gradient.abs().max()) < 1e-6 * largest


def _statistic_miss(seen: StepTrace, name: str, module: nn.Module) -> float:
    """How far the running mean is from (1 - momentum) old + momentum batch, as a share of what it moved."""
    momentum = cast(Any, module).momentum
    if momentum is None or name not in seen.means:
        return 0.0
    before, after = seen.before[f"{name}.running_mean"], seen.after[f"{name}.running_mean"]
    meant = momentum * (seen.means[name] - before)
    return float((after - before - meant).norm() / max(float(meant.norm()), 1e-6))


def downhill(steps: Steps, pipeline: Pipeline) -> Outcome:
    """The slope of the loss along the update, by the gradient that the update was made of."""
    seen = done(steps.plain)
    grads, moved = gradients_of(seen), _movements(pipeline, seen)
    if not any(m.any() for m in moved.values()):
        raise NotApplicable("nothing moved")
    slope = sum(float((grads[n] * moved[n]).sum()) for n in grads if n in moved)
    return Outcome(
        "downhill", f"slope along the update {slope:.3g}", slope < 0, ["ascent", "no-update", "update-wrong"]
    )


def overfit_one_batch(steps: Steps, pipeline: Pipeline) -> Outcome:
    """Some steps on one small batch lower its loss to below 0.7 of what it was (0.98 for an unknown rate).

    The loss is the reference's, or what the steps return where that is not known. A rate that is not known may also be
    that of a warm-up: any fall is then legal.
    """
    images, labels = steps.images[:OVERFIT_IMAGES], steps.labels[:OVERFIT_IMAGES]
    known, open_ = steps.right is not None and _reads_what_it_is_given(steps), pipeline.expected.groups is None
    losses: list[float] = []
    with preserve_state(pipeline):
        pipeline.model.train()
        full_rates_(pipeline)
        start = {n: plain(p) for n, p in trainable(pipeline.model).items() if p.dim() > 1}
        first = _task_loss(steps, pipeline, images, labels) if known else math.nan
        for _ in range(OVERFIT_STEPS * steps.calls):
            try:
                losses.append(float(step_losses(pipeline.take_step(images, labels, 0.0)).total))
            except RAISED as error:
                raise PartFailed("step-raises", error) from error
        last = _task_loss(steps, pipeline, images, labels) if known else losses[-1]
        far = relative({n: plain(p) for n, p in trainable(pipeline.model).items() if n in start}, start)
    first = first if known else losses[0]
    share = 0.98 if open_ else 0.7
    ok = last < share * first if first > 0 else last < first
    likely = list(steps.explained or [])
    if not last < first:
        likely += ["no-update"] if last == first else ["learning-rate-too-large", "loss-not-finite"]
    likely += ["learning-rate-too-small"] if last < first and far < OVERFIT_STEPS * SMALLEST_STEP else []
    likely += ["stuck-at-chance", "step-gradient-wrong"]
    wanted = f"below {share * first:.2f} after {OVERFIT_STEPS} steps"
    return Outcome(wanted, f"{first:.2f} -> {last:.2f}", ok, likely, unusual=open_ and last < first)


def _task_loss(steps: Steps, pipeline: Pipeline, images: Tensor, labels: Tensor) -> float:
    """The reference's task loss of a batch with BatchNorm on the batch's statistics, which are put back."""
    assert steps.reference is not None
    with preserve_state(pipeline), torch.no_grad():
        pipeline.model.train()
        return float(steps.reference.losses(pipeline.model, (images, labels), 0.0, pipeline.precision).task)


Check = Callable[[Steps, Pipeline], Outcome]
CHECKS: tuple[tuple[str, str, Check], ...] = (
    ("mode of the network", "BatchNorm and quantizers are on while training", modes_of_network),
    ("weights of a step", "a step reads the latent weights of now, quantized", weights_of_steps),
    ("loss of a step", "the step reports and minimises the expected parts", loss_fits),
    ("gradients", "every learnable gets a finite gradient that is not zero", every_gradient),
    ("gradient of the task", "the step's gradient is that of the cross entropy", gradient_fits),
    ("squared logits", "lambda theta^2 of every logit is in the loss", squared_logits),
    ("gradient of the penalty", "coefficient x penalty reaches every group", penalty_added),
    ("fresh gradients", "a step forgets the gradients of the step before", fresh_gradients),
    ("update", "parameters move as the optimizer's rule says", update_by_rule),
    ("size of a step", "no weight moves by more than a fraction of its layer's size", size_of_step),
    ("only what it should", "a step moves learnables and BatchNorm's statistics, no more", only_what_it_should),
    ("direction of a step", "a small step along the update lowers the loss", downhill),
    ("one batch", "a few steps on one batch lower its loss clearly", overfit_one_batch),
)

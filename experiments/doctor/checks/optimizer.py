"""Before training: is every trainable parameter in the optimizer once, in the right group, with the right settings?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from experiments.doctor.expected import ExpectedGroup, kind_of
from experiments.doctor.pipeline import Pipeline
from experiments.doctor.runner import CheckRunner, NotApplicable, Outcome, names

ADAM_DEFAULTS = {"betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False, "maximize": False}
CLOSE = 1e-6
Group = dict[str, Any]


def optimizer_checks(runner: CheckRunner, pipeline: Pipeline) -> None:
    """Add the findings about the optimizer."""
    for name, proves, check in (
        ("kind of optimizer", "the update rule is the expected one", _kind),
        ("every parameter once", "all that should learn is in the optimizer, exactly once", _members),
        ("rates and decays", "each group has the learning rate and the decay meant for it", _settings),
        ("learning-rate schedule", "the weights' learning rate follows the expected shape", _schedule),
    ):
        runner.check(name, proves, check, pipeline)


def groups_by_parameter(optimizer: Any) -> dict[int, list[Group]]:
    """The groups that hold each parameter, by its id. Raises NotApplicable for an optimizer without groups."""
    groups = getattr(optimizer, "param_groups", None)
    if not isinstance(groups, list):
        raise NotApplicable(f"{type(optimizer).__name__} has no param_groups to look into")
    found: dict[int, list[Group]] = {}
    for group in groups:
        for p in group["params"]:
            found.setdefault(id(p), []).append(group)
    return found


def listed(found: Mapping[str, list[str]]) -> list[str]:
    """`what: the first names` for each list that is not empty."""
    return [f"{what}: {names(members)}" for what, members in found.items() if members]


def _kind(pipeline: Pipeline) -> Outcome:
    optimizer, expected = pipeline.optimizer, pipeline.expected.optimizer
    kind = type(optimizer).__name__
    if expected is None:
        if isinstance(optimizer, torch.optim.Optimizer):
            return Outcome("any; none is expected", kind, True)
        raise NotApplicable(f"{kind} is not torch's and none is expected: what it does is judged by its steps")
    if not isinstance(optimizer, getattr(torch.optim, expected)):
        return Outcome(expected, kind, False, ["other-optimizer"])
    odd = {
        f"{name}={group.get(name)!r}"
        for group in optimizer.param_groups
        for name, default in ADAM_DEFAULTS.items()
        if expected.startswith("Adam") and group.get(name, default) != default
    }
    likely = ["ascent" if "maximize=True" in odd else None, "other-optimizer"]
    return Outcome(f"{expected} with torch's defaults", "; ".join([kind, *sorted(odd)]), not odd, likely)


def _members(pipeline: Pipeline) -> Outcome:
    holding = groups_by_parameter(pipeline.optimizer)
    own = dict(pipeline.model.named_parameters())
    trainable = [name for name, p in own.items() if p.requires_grad]
    missing = [name for name in trainable if id(own[name]) not in holding]
    twice = [name for name, p in own.items() if len(holding.get(id(p), [])) > 1]
    foreign = len(holding.keys() - {id(p) for p in own.values()})
    frozen = _frozen(pipeline)
    parts = [f"{len(trainable) - len(missing)} of {len(trainable)} trainable parameters"]
    parts += listed({"missing": missing, "more than once": twice, "not trainable": frozen})
    parts += [f"{foreign} that are not the network's"] if foreign else []
    logits = [name for name in missing if kind_of(name) != "weights"]
    early = missing and foreign and len(missing) < len(trainable)  # built for what the network held before
    likely = [
        "foreign-parameter" if foreign and len(missing) == len(trainable) else None,
        "optimizer-built-before-quantizers" if early else None,
        "logits-not-in-optimizer" if logits and (early or logits == missing) else None,
        "optimizer-built-before-quantizers" if logits and logits == missing else None,
        "parameter-twice" if twice else None,
        "parameter-frozen" if frozen else None,
        "bits-frozen" if any("logit_bit" in name for name in frozen) else None,
        "parameter-not-in-optimizer" if missing else None,
        "foreign-parameter" if foreign else None,
    ]
    ok = not (missing or twice or foreign or frozen)
    return Outcome(f"all {len(trainable)}, each once", "; ".join(parts), ok, likely)


def _frozen(pipeline: Pipeline) -> list[str]:
    """Parameters that should be trained and do not require a gradient."""
    config, settings = pipeline.expected.config, pipeline.expected.quantizer
    if pipeline.expected.groups is None or (config and config.stem_bits):  # the logits of such a stem are not trained
        return []
    learns = {
        "weights": True,
        "logit_dz": settings is None or settings.learns_dead_zone,
        "logit_bit": settings is None or settings.learns_bits,
    }
    return [n for n, p in pipeline.model.named_parameters() if not p.requires_grad and learns[kind_of(n)]]


def _settings(pipeline: Pipeline) -> Outcome:
    expected, holding = pipeline.expected.groups, groups_by_parameter(pipeline.optimizer)
    held = {n: holding[id(p)][0] for n, p in pipeline.model.named_parameters() if p.requires_grad and id(p) in holding}
    if expected is None:
        return _sensible(list(held.values()))
    wrong: dict[str, str] = {}
    likely: Counter[str] = Counter()
    for name, group in held.items():
        kind, decay = kind_of(name), float(group.get("weight_decay", 0.0))
        rate = float(group[("base_lr" if pipeline.optimizer.state and "base_lr" in group else "lr")])
        odd = _compare(kind, group.get("name"), rate, decay, expected)
        likely.update(odd)
        if odd:
            label = group.get("name", "a group without a name")
            wrong.setdefault(kind, f"{kind} ({name}) in {label}: rate {rate:g}, decay {decay:g}")
    kinds = dict.fromkeys(map(kind_of, held))
    wanted = ", ".join(f"{kind}: {expected[kind].learning_rate:g} / {expected[kind].decay:g}" for kind in kinds)
    ranked = [key for key, _ in likely.most_common()]
    ranked.sort(key=lambda key: key not in ("wrong-group", "added-later"))  # they explain the wrong numbers
    measured = "; ".join(wrong.values()) or "as expected"
    return Outcome(f"learning rate / decay of {wanted}", measured, not wrong, ranked)


def _compare(
    kind: str, label: str | None, rate: float, decay: float, expected: Mapping[str, ExpectedGroup]
) -> list[str]:
    """Keys of what is wrong with one parameter's group, which is called `label`."""
    odd: list[str] = []
    meant = expected[kind]
    off_rate, off_decay = not _same(rate, meant.learning_rate), not _same(decay, meant.decay)
    if label in expected and label != kind:
        odd.append("wrong-group")
    elif label not in expected and kind != "weights" and (off_rate or off_decay):
        odd.append("added-later")
    if off_rate:
        large = meant.learning_rate and rate / meant.learning_rate > 9
        odd += ["learning-rate-too-large"] if large else []
        odd.append("wrong-learning-rate" if rate else "learning-rate-zero")
    if off_decay:
        misplaced = kind == "weights" or decay in {p.decay for k, p in expected.items() if k != kind and p.decay}
        odd += ["decay-on-wrong-group", "wrong-decay"] if misplaced else ["wrong-decay", "decay-on-wrong-group"]
    return odd


def _sensible(groups: list[Group]) -> Outcome:
    """Where none is expected: rates above 0, but at the start of a torch scheduler's warm-up."""
    if not groups:
        raise NotApplicable("no trainable parameter is in the optimizer")
    shown = ", ".join(f"{rate:g}" for rate in sorted({float(group.get("lr", math.nan)) for group in groups}))
    resting = [group for group in groups if group.get("lr") == 0.0]
    ok = all(group.get("initial_lr") for group in resting)
    shown += " at the start of a warm-up" if resting and ok else ""
    return Outcome("learning rates above 0; none is expected", shown, ok, ["learning-rate-zero"])


def _schedule(pipeline: Pipeline) -> Outcome:
    expected, epochs = pipeline.expected.lr_factors, pipeline.expected.epochs
    if expected is None or not epochs:
        raise NotApplicable("no learning-rate schedule is expected")
    found = [float(pipeline.lr_lambda(epoch / epochs)) for epoch in range(epochs)]
    odd = [e for e, (a, b) in enumerate(zip(found, expected, strict=True)) if abs(a - b) > CLOSE]
    measured = "as expected in every epoch"
    if odd:
        measured = f"epoch {odd[0] + 1}: {found[odd[0]]:g} instead of {expected[odd[0]]:g} ({len(odd)} epochs differ)"
    zero = "learning-rate-zero" if not any(found) else None
    large = "learning-rate-too-large" if max(found, default=0.0) > 9 * max(expected, default=1.0) else None
    return Outcome("the configuration's factor", measured, not odd, [zero, large, "learning-rate-schedule"])


def _same(found: float, meant: float) -> bool:
    return abs(float(found) - meant) <= CLOSE * max(abs(meant), 1e-12) + 1e-15

"""Mistakes in a step: in its task loss, its penalty, its gradients and its update, each as a change of the reference.

Where a mistake has a free number (a scale, a threshold), it is fitted to what was found. Axis letters: N batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.doctor.causes.explain import MUCH_NEARER, Mutant, Observables, Reference, distance, explain
from experiments.doctor.expected import LOGITS
from experiments.doctor.reference.objective import (
    Gradients,
    Grouping,
    Objective,
    cross_entropy,
    group_lasso,
    read_weight,
    smoothed,
)
from experiments.doctor.reference.update import Moved, Update, adam, sgd
from src.pruning import Member, Op
from utils_quantization import latent_weight

ObjectiveMutant = Mutant[Objective]
EXACT = 0.05  # misfit of a mistake that explains all but the rounding


def piece(key: str, **pieces: Any) -> ObjectiveMutant:
    """The mistake of having other `pieces`."""
    return Mutant(key, lambda right: replace(right, **pieces))


def labels_as(change: Callable[[Tensor], Tensor]) -> ObjectiveMutant:
    """The step reads other labels."""
    return piece("step-labels-wrong", batch=lambda images, labels: (images, change(labels)))


def task_as(loss: Callable[[Tensor, Tensor], Tensor], key: str = "loss-wrong") -> ObjectiveMutant:
    """Another task loss of scores (N, K) and labels (N,)."""
    return piece(key, task=loss)


def _half(scores: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(scores[: len(scores) // 2], labels[: len(labels) // 2])


def _one_hot(scores: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.one_hot(labels, scores.shape[1]).to(scores)


def _focal(scores: Tensor, labels: Tensor) -> Tensor:
    right = scores.log_softmax(1).gather(1, labels[:, None])[:, 0]
    return (-((1 - right.exp()) ** 2) * right).mean()


def times(by: float, *leaves: str) -> Callable[[Objective], Objective]:
    """lambda of these logits times a number."""

    def change(right: Objective) -> Objective:
        return replace(right, lambdas={k: v * (by if k in leaves else 1.0) for k, v in right.lambdas.items()})

    return change


TASK: tuple[ObjectiveMutant, ...] = (
    labels_as(lambda y: y.roll(1, 0)),
    labels_as(lambda y: y.roll(-1, 0)),
    labels_as(lambda y: y.flip(0)),
    labels_as(lambda y: (y + 1) % (y.max() + 1)),
    labels_as(lambda y: (y - 1) % (y.max() + 1)),
    labels_as(torch.zeros_like),
    labels_as(lambda y: y.sort()[0]),
    piece("quantizers-off-in-training", quantized=False),
    piece("batchnorm-in-eval", training=False),
    piece("softmax-twice", transform=lambda scores: scores.softmax(1)),
    piece("loss-wrong", transform=lambda scores: scores.sigmoid()),
    *(piece("loss-wrong", transform=lambda scores, by=by: scores / by) for by in (2.0, 4.0, 0.5)),
    task_as(lambda scores, labels: len(labels) * cross_entropy(scores, labels)),
    task_as(lambda scores, labels: cross_entropy(scores, labels) / len(labels)),
    task_as(_half),
    *(task_as(smoothed(share)) for share in (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)),
    task_as(lambda scores, labels: -scores.gather(1, labels[:, None]).mean()),
    task_as(lambda scores, labels: -scores.softmax(1).gather(1, labels[:, None]).mean()),
    task_as(lambda scores, labels: (scores - _one_hot(scores, labels)).square().mean()),
    task_as(lambda s, y: nn.functional.binary_cross_entropy_with_logits(s, _one_hot(s, y))),
    task_as(lambda scores, labels: nn.functional.multi_margin_loss(scores, labels)),
    task_as(_focal),
    piece("ascent", total=lambda task, squares, groups: -(task + squares + groups)),
    piece("loss-misreported", report=lambda losses: losses._replace(total=losses.task)),
    piece("loss-misreported", report=lambda losses: losses._replace(total=losses.task + losses.logits)),
    piece("loss-misreported", report=lambda losses: losses._replace(total=0 * losses.total)),
    *(Mutant("logit-squares-missing", times(0.0, *leaves)) for leaves in (LOGITS, *zip(LOGITS))),
    *(
        Mutant("lambda-wrong", times(by, *leaves))
        for by in (-1.0, 0.1, 0.5, 2.0, 10.0)
        for leaves in (LOGITS, *zip(LOGITS))
    ),
)


def latent(layer: nn.Module, parameter: str) -> Tensor:
    """A parameter as the optimizer holds it, behind any quantizer."""
    return latent_weight(layer) if parameter == "weight" else read_weight(layer, parameter)


def grouped(key: str, change: Callable[[Grouping], Grouping]) -> ObjectiveMutant:
    """The mistake of penalising other groups."""

    def other(right: Objective) -> Objective:
        assert right.grouping is not None
        return replace(right, grouping=change(right.grouping))

    return Mutant(key, other)


def only(*roles: str) -> Callable[[Grouping], Grouping]:
    """The members of these roles alone."""
    return lambda groups: replace(groups, members=tuple(m for m in groups.members if m.role in roles))


def rolled(by: int, *roles: str) -> Callable[[Grouping], Grouping]:
    """Members of these roles in the group of the channel `by` further on."""

    def change(m: Member) -> Member:
        return replace(m, groups=np.roll(m.groups, by)) if m.role in roles else m

    return lambda groups: replace(groups, members=tuple(map(change, groups.members)))


def turned(*roles: str) -> Callable[[Grouping], Grouping]:
    """Members of these roles read along the other axis, where the weight has as many of both."""
    other = {"filter": "slice", "slice": "filter"}

    def change(groups: Grouping) -> Grouping:
        sizes = {(m.module, m.role): len(m.groups) for m in groups.members}
        square = {m.module for m in groups.members if sizes.get((m.module, other.get(m.role, ""))) == len(m.groups)}
        turn = [m.role in roles and m.module in square for m in groups.members]
        pairs = zip(groups.members, turn, strict=True)
        return replace(groups, members=tuple(replace(m, dim=1 - m.dim) if odd else m for m, odd in pairs))

    return change


def layerwise(dim: int) -> Callable[[Grouping], Grouping]:
    """One group per row (dim 0) or column (dim 1) of every convolution, each layer by itself."""

    def change(groups: Grouping) -> Grouping:
        members, count = [], 0
        for name, module in groups.modules.items():
            if isinstance(module, nn.Conv2d):
                size = latent_weight(module).shape[dim]
                members.append(Member(name, "weight", ("filter", "slice")[dim], dim, np.arange(count, count + size)))
                count += size
        return replace(groups, members=tuple(members), count=count)

    return change


def retied(change: Callable[[Op], Op]) -> Callable[[Grouping], Grouping]:
    """The groups of a network with other operations."""
    return lambda groups: Grouping.of([change(op) for op in groups.ops], groups.modules)


def one_branch(side: int) -> Callable[[Op], Op]:
    """An addition passes on one of its inputs alone."""
    return lambda op: replace(op, kind="pass", inputs=(op.inputs[side],)) if op.kind == "add" else op


def cut_add(op: Op) -> Op:
    """An addition starts new channels: what reads it is tied to nothing before it."""
    return replace(op, kind="input", inputs=()) if op.kind == "add" else op


def pads_at_the_end(op: Op) -> Op:
    """Channels that a shortcut pads all come after the others."""
    if op.kind != "select":
        return op
    return replace(op, settings={"channels": sorted(op.settings["channels"], key=lambda channel: channel < 0)})


def by_block(groups: Grouping) -> Grouping:
    """Every block (first part of a module's name) has groups of its own, as if nothing ran past it."""
    blocks = list(dict.fromkeys(m.module.partition(".")[0] for m in groups.members))

    def apart(m: Member) -> Member:
        offset = groups.count * blocks.index(m.module.partition(".")[0])
        return replace(m, groups=np.where(m.groups < 0, -1, m.groups + offset))

    return replace(groups, members=tuple(map(apart, groups.members)), count=groups.count * len(blocks))


def _weights(objective: Objective, model: nn.Module) -> list[Tensor]:
    """All that is in some group, once."""
    assert objective.grouping is not None
    names = dict.fromkeys((m.module, m.parameter) for m in objective.grouping.members)
    return [objective.read(model.get_submodule(module), parameter).cpu().double() for module, parameter in names]


def _kernels(model: nn.Module) -> list[Tensor]:
    return [m.weight.cpu().double() for m in model.modules() if isinstance(m, nn.Conv2d)]


GROUPS: tuple[ObjectiveMutant, ...] = (
    grouped("penalty-without-batchnorm", only("filter", "slice", "bias")),
    grouped("penalty-without-batchnorm", only("filter", "slice")),
    grouped("penalty-without-batchnorm", only("filter", "slice", "bias", "scale")),
    grouped("penalty-without-slices", only("filter", "scale", "shift", "bias")),
    grouped("penalty-wrong", only("filter")),
    grouped("penalty-wrong", only("slice")),
    grouped("penalty-wrong", only("scale", "shift")),
    *(
        grouped("penalty-groups-shifted", rolled(by, *roles))
        for by in (1, -1)
        for roles in (("slice",), ("filter",), ("scale", "shift"))
    ),
    grouped("penalty-groups-shifted", retied(pads_at_the_end)),
    grouped("penalty-wrong-axis", turned("filter", "slice")),
    grouped("penalty-wrong-axis", turned("slice")),
    grouped("penalty-wrong-axis", turned("filter")),
    grouped("penalty-wrong-axis", layerwise(1)),
    grouped("penalty-ignores-shortcut", layerwise(0)),
    grouped("penalty-ignores-shortcut", retied(one_branch(0))),
    grouped("penalty-ignores-shortcut", retied(one_branch(1))),
    grouped("penalty-ignores-shortcut", retied(cut_add)),
    grouped("penalty-ignores-shortcut", by_block),
)


def _of_latent(mutant: ObjectiveMutant) -> ObjectiveMutant:
    return Mutant(mutant.key, lambda right: replace(mutant.change(right), read=latent))


DETACHED = piece("penalty-detached", penalty=lambda objective, model: group_lasso(objective, model).detach())
PENALTY: tuple[ObjectiveMutant, ...] = (
    piece("penalty-on-latent", read=latent),
    *GROUPS,
    *map(_of_latent, GROUPS),
    piece("penalty-not-lasso", norm=lambda sums: sums),
    piece("penalty-not-lasso", norm=lambda sums: sums / 2),
    piece("penalty-not-lasso", norm=lambda sums: sums.sum().sqrt()),
    piece(
        "penalty-not-lasso", penalty=lambda o, model: torch.stack([w.square().sum() for w in _weights(o, model)]).sum()
    ),
    piece("penalty-not-lasso", penalty=lambda o, model: torch.stack([w.abs().sum() for w in _weights(o, model)]).sum()),
    piece("penalty-not-lasso", penalty=lambda o, model: torch.stack([w.abs().sum() for w in _kernels(model)]).sum()),
    *(piece("penalty-smoothed", norm=lambda sums, by=by: (sums + by).sqrt()) for by in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)),
    piece("coefficient-not-applied", coefficient=lambda given: given * given),
    piece("coefficient-not-applied", coefficient=lambda given: 1.0),
)


def ranked(
    found: Observables,
    reference: Reference,
    mutants: Sequence[Mutant[Reference]],
    fitted: Sequence[Mutant[Reference]],
    predict: Callable[[Reference], Observables],
    near: float = MUCH_NEARER,
) -> list[str]:
    """`explain`; a mistake whose number is fitted to what was found is heard where no other fits."""
    exact = explain(found, reference, mutants, predict, near=EXACT)
    return exact or explain(found, reference, [*mutants, *fitted], predict, near=near)


def scale_of(found: Observables, right: Observables) -> float | None:
    """k for which k x right is nearest to what was found, over all gradients and movements; None where right is 0."""
    tensors = [name for name in right if name in found and right[name].dim()]
    size = sum(float(right[name].square().sum()) for name in tensors)
    return sum(float((found[name] * right[name]).sum()) for name in tensors) / size if size else None


def fitted_penalty(found: Observables, right: Observables) -> list[ObjectiveMutant]:
    """The penalty times the number that fits best."""
    k = scale_of(found, right)
    if k is None or not k:
        return []
    return [piece("penalty-sign" if k < 0 else "penalty-scaled", coefficient=lambda given: k * given)]


def scale_by_tensor(found: Observables, right: Observables) -> list[ObjectiveMutant]:
    """Every tensor's gradient times a number of its own, as hooks do, where the loss is right."""
    if any(distance(found[name], right[name]) for name in ("total", "value") if name in found):
        return []
    by_name = {n: scale_of({n: v.reshape(-1)}, {n: right[n].reshape(-1)}) or 0.0 for n, v in found.items()}

    def each(g: Gradients) -> Gradients:
        return {n: v * by_name.get(n, by_name.get(f"gradient of {n}", 1.0)) for n, v in g.items()}

    return [piece("gradients-scaled", gradients=each)]


def fitted_gradients(found: Observables, right: Observables) -> list[ObjectiveMutant]:
    """Gradients scaled, all alike or each tensor by itself, or clipped; and a task loss times a number."""
    k = scale_of(found, right)
    if not k:
        return []
    largest = max(float(value.abs().max()) for value in found.values() if value.dim())
    loss = float(found["total"] / right["total"])
    return [
        piece("gradients-scaled" if k > 0 else "ascent", gradients=lambda g: {n: k * v for n, v in g.items()}),
        piece("gradients-scaled", gradients=lambda g: {n: v.clamp(-largest, largest) for n, v in g.items()}),
        *scale_by_tensor(found, right),
        task_as(lambda scores, labels: loss * cross_entropy(scores, labels)),
    ]


def changed(key: str, change: Callable[[Tensor, Tensor], Tensor]) -> Mutant[Update]:
    """The mistake of moving p by change(p, the rule's movement)."""
    return Mutant(key, lambda right: replace(right, change=change))


def _signs(of: Moved) -> Tensor:
    return -float(of.settings["lr"]) * of.gradient.sign()


def _decay(by: float) -> Callable[[Update], Update]:
    return lambda right: replace(right, settings=lambda settings: {**settings, "weight_decay": by})


UPDATE: tuple[Mutant[Update], ...] = (
    Mutant("ascent", lambda right: replace(right, gradient=lambda g: -g)),
    changed("update-wrong", lambda p, movement: 2 * movement),
    Mutant("other-optimizer", lambda right: replace(right, rule=sgd)),
    Mutant("other-optimizer", lambda right: replace(right, rule=_signs)),
    Mutant("other-optimizer", lambda right: replace(right, rule=adam)),
    *(Mutant("wrong-decay", _decay(by)) for by in (0.0, 1e-4, 1e-3, 0.01, 0.1)),
)


def fitted_update(found: Observables, right: Observables, before: Observables) -> list[Mutant[Update]]:
    """Every movement times one number; every parameter shrunk besides. before: the parameters, by the same names."""
    k = scale_of(found, right)
    shrunk = scale_of({name: found[name] - right[name] for name in found}, before)
    mutants = [changed("update-wrong", lambda p, movement: movement + (shrunk or 0.0) * p)]
    if k is not None and 0 < k < 1:
        keys: Sequence[str] = ("weights-averaged", "learning-rate-too-small")
    else:
        keys = ("update-wrong",)
    return mutants + [changed(key, lambda p, movement: (k or 0.0) * movement) for key in keys]

"""The objective of a step a second time, part by part: task loss, squared logits, coupled group lasso.

    total = cross entropy + lambda_dz sum theta_dz^2 + lambda_bit sum theta_bit^2 + coefficient x sum_g ||group g||_2

Axis letters: N batch, K classes, O output channels, I input channels, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from experiments.doctor.pipeline import Pipeline
from experiments.doctor.runner import NotApplicable
from src.pruning import GraphError, Member, Op, groups_of, trace
from src.training import autocast
from utils_quantization import latent_weight, quantization, quantized_layers, shared_quantized_weights

Gradients = dict[str, Tensor]
"""By the parameter's name; float64 on the CPU."""


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(loss: Tensor, model: nn.Module) -> Gradients:
    """d loss / d parameter for every trainable parameter; zeros where the loss does not depend on it."""
    params = trainable(model)
    if not loss.requires_grad:
        return {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in params.items()}
    found = torch.autograd.grad(loss, list(params.values()), allow_unused=True, retain_graph=True)
    pairs = zip(params.items(), found, strict=True)
    return {n: plain(g) if g is not None else torch.zeros(p.shape, dtype=torch.float64) for (n, p), g in pairs}


def plain(tensor: Tensor) -> Tensor:
    """A detached copy in float64 on the CPU."""
    return tensor.detach().double().cpu().clone()


def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """mean over N of logsumexp(scores) - scores[label]."""
    scores = scores.float()
    right = scores.gather(1, labels[:, None])[:, 0]
    return (torch.logsumexp(scores, 1) - right).mean()


def task_loss(pipeline: Pipeline, images: Tensor, labels: Tensor, *, quantized: bool = True) -> Tensor:
    """The task loss as the network stands, with its quantizers on or off, in the pipeline's precision."""
    model = pipeline.model
    switch = quantization(model, enabled=quantized) if quantized_layers(model) else nullcontext()
    with switch, shared_quantized_weights(model), autocast(images.device, pipeline.precision):
        return cross_entropy(model(images), labels)


def squares(model: nn.Module, leaf: str) -> tuple[float, Gradients]:
    """sum of the squares of the trainable logits called `leaf`, and its gradient, 2 theta."""
    members = {name: plain(p) for name, p in trainable(model).items() if name.rpartition(".")[2] == leaf}
    total = sum(float(value.square().sum()) for value in members.values())
    zero = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in trainable(model).items()}
    return total, {**zero, **{name: 2 * value for name, value in members.items()}}


@dataclass(frozen=True)
class Grouping:
    """Groups of parameters by their members; what a group lasso over them would be."""

    members: tuple[Member, ...]
    count: int

    def weights(self, model: nn.Module, latent: bool = False) -> dict[str, Tensor]:
        """The members' tensors by "module.parameter", in float64; quantized weights, or the latent ones."""
        found: dict[str, Tensor] = {}
        with torch.no_grad(), shared_quantized_weights(model):
            for member in self.members:
                module = model.get_submodule(member.module)
                value = (
                    latent_weight(module)
                    if latent and member.parameter == "weight"
                    else getattr(module, member.parameter)
                )
                found[f"{member.module}.{member.parameter}"] = plain(value)
        return found

    def lasso(self, weights: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        """sum_g ||group g||_2 and its gradient, w / ||its groups||, for every tensor; 0 where a group is all zero."""
        totals = torch.zeros(self.count, dtype=torch.float64)
        for member in self.members:
            sums, index, inside = self._sums(member, weights)
            totals.index_add_(0, index[inside], sums[inside])
        norms = totals.sqrt()
        inverse = torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))
        slopes = {key: torch.zeros_like(value) for key, value in weights.items()}
        for member in self.members:
            key = f"{member.module}.{member.parameter}"
            _, index, inside = self._sums(member, weights)
            factor = torch.where(inside, inverse[index.clamp(min=0)], torch.zeros(len(index), dtype=torch.float64))
            shape = [1] * weights[key].dim()
            shape[member.dim] = -1
            slopes[key] += weights[key] * factor.view(shape)
        return float(norms.sum()), slopes

    def norms_squared(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Sum of squares of every group, (groups,), float64."""
        totals = torch.zeros(self.count, dtype=torch.float64)
        for member in self.members:
            sums, index, inside = self._sums(member, weights)
            totals.index_add_(0, index[inside], sums[inside])
        return totals

    @staticmethod
    def _sums(member: Member, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        value = weights[f"{member.module}.{member.parameter}"]
        others = [dim for dim in range(value.dim()) if dim != member.dim]
        sums = value.square().sum(others) if others else value.square()
        index = torch.from_numpy(member.groups)
        return sums, index, index >= 0


def channel_grouping(pipeline: Pipeline) -> Grouping:
    """The groups of removable channels. Raises NotApplicable where the network cannot be followed."""
    return _grouping(pipeline, lambda ops: ops)


def other_groupings(pipeline: Pipeline) -> dict[str, Grouping]:
    """Groupings that are usually taken by mistake, by the key of their cause."""
    right = channel_grouping(pipeline)
    slices = [m for m in right.members if m.role == "slice"]
    found = {
        "penalty-without-batchnorm": _only(right, ("filter", "slice")),
        "penalty-without-slices": _only(right, ("filter", "scale", "shift", "bias")),
        "penalty-wrong": _only(right, ("filter",)),
        "penalty-groups-shifted": _changed(right, lambda m: m.role == "slice", lambda g: np.roll(g, 1)),
        "penalty-groups-shifted 2": _changed(right, lambda m: m.role == "slice", lambda g: np.roll(g, -1)),
        "penalty-groups-shifted 3": _changed(right, lambda m: m.role == "filter", lambda g: np.roll(g, 1)),
        "penalty-groups-shifted 4": _changed(right, lambda m: m.role == "filter", lambda g: np.roll(g, -1)),
        "penalty-groups-shifted 5": _changed(right, lambda m: m.role in ("scale", "shift"), lambda g: np.roll(g, 1)),
        "penalty-groups-shifted 6": _changed(right, lambda m: m.role in ("scale", "shift"), lambda g: np.roll(g, -1)),
        "penalty-wrong-axis": _rows_for_columns(right, ("filter", "slice")),
        "penalty-wrong-axis 2": _rows_for_columns(right, ("slice",)),
        "penalty-wrong-axis 3": _rows_for_columns(right, ("filter",)),
        "penalty-wrong-axis 4": _layerwise(pipeline, 1),
        "penalty-ignores-shortcut 3": _layerwise(pipeline, 0),
        "penalty-wrong 2": Grouping(tuple(slices), right.count),
    }
    for key, side in (("penalty-ignores-shortcut", 0), ("penalty-ignores-shortcut 2", 1)):
        found[key] = _grouping(pipeline, _one_branch(side))
    found["penalty-ignores-shortcut 4"] = _grouping(pipeline, _cut_adds)
    found["penalty-groups-shifted 7"] = _grouping(pipeline, lambda ops: [_unpadded(op) for op in ops])
    return found


def _grouping(pipeline: Pipeline, change: Callable[[list[Op]], list[Op]]) -> Grouping:
    size = pipeline.expected.input_size or (3, 32, 32)
    try:
        ops = trace(pipeline.model, size)
    except GraphError as error:
        raise NotApplicable(str(error)) from error
    groups = groups_of(change(ops), dict(pipeline.model.named_modules()))
    if not len(groups):
        raise NotApplicable("the network has no removable channel")
    return Grouping(groups.members, len(groups))


def _one_branch(side: int) -> Callable[[list[Op]], list[Op]]:
    """Every addition passes on one of its inputs alone."""

    def change(ops: list[Op]) -> list[Op]:
        return [replace(op, kind="pass", inputs=(op.inputs[side],)) if op.kind == "add" else op for op in ops]

    return change


def _cut_adds(ops: list[Op]) -> list[Op]:
    """Every addition starts new channels: what reads it is tied to nothing before it."""
    return [replace(op, kind="input", inputs=()) if op.kind == "add" else op for op in ops]


def _unpadded(op: Op) -> Op:
    """Channels that a shortcut pads all come after the others."""
    if op.kind != "select":
        return op
    return replace(op, settings={"channels": sorted(op.settings["channels"], key=lambda channel: channel < 0)})


def _only(groups: Grouping, roles: Sequence[str]) -> Grouping:
    return replace(groups, members=tuple(m for m in groups.members if m.role in roles))


def _changed(groups: Grouping, which: Callable[[Member], bool], change: Callable[[np.ndarray], np.ndarray]) -> Grouping:
    members = tuple(replace(m, groups=change(m.groups)) if which(m) else m for m in groups.members)
    return replace(groups, members=members)


def _rows_for_columns(groups: Grouping, roles: Sequence[str]) -> Grouping:
    """Members of these roles read along the other axis, where the weight has as many of both."""
    sizes = {(m.module, m.role): len(m.groups) for m in groups.members}

    def turned(member: Member) -> Member:
        other = {"filter": "slice", "slice": "filter"}.get(member.role)
        square = other is not None and sizes.get((member.module, other)) == len(member.groups)
        return replace(member, dim=1 - member.dim) if member.role in roles and square else member

    return replace(groups, members=tuple(turned(m) for m in groups.members))


def _layerwise(pipeline: Pipeline, dim: int) -> Grouping:
    """One group per row (dim 0) or column (dim 1) of every convolution, each layer by itself."""
    members, count = [], 0
    for name, module in pipeline.model.named_modules():
        if isinstance(module, nn.Conv2d):
            size = latent_weight(module).shape[dim]
            members.append(Member(name, "weight", ("filter", "slice")[dim], dim, np.arange(count, count + size)))
            count += size
    return Grouping(tuple(members), count)

"""The objective of one step of training as it should be, in pieces that can each be exchanged.

    scores     of the network in training mode, its quantizers on               (N, K)
    task       mean over N of logsumexp(scores) - scores[label]
    squares    lambda_dz sum theta_dz^2 + lambda_bit sum theta_bit^2
    groups     sum over groups g of ||g||_2, of the weights that the network reads
    total      task + squares + coefficient x groups
    gradients  d total / d parameter, as the optimizer gets them

The network itself, quantizers included, is taken as it stands; all that is made of its scores and weights is float64.
Axis letters: N batch, K classes, C channels of a member, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from src.pruning import Member, Op, groups_of, trace
from src.training import autocast
from utils_quantization import latent_weight, quantization, quantized_layers, shared_quantized_weights

Batch = tuple[Tensor, Tensor]
Gradients = dict[str, Tensor]
"""By the parameter's name; float64 on the CPU."""


def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """mean over N of logsumexp(scores) - scores[label]; labels (N,), or the classes' shares (N, K)."""
    scores = scores.double()
    right = (scores * labels).sum(1) if labels.is_floating_point() else scores.gather(1, labels[:, None].long())[:, 0]
    return (torch.logsumexp(scores, 1) - right).mean()


def smoothed(share: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The cross entropy with (1 - share) of each image's weight on its label and the rest spread over all K classes."""

    def loss(scores: Tensor, labels: Tensor) -> Tensor:
        whole = labels if labels.is_floating_point() else nn.functional.one_hot(labels.long(), scores.shape[1])
        return cross_entropy(scores, (1 - share) * whole.double() + share / scores.shape[1])

    return loss


def root(sums: Tensor) -> Tensor:
    """sqrt(x) for x >= 0, with the gradient 0 at 0: a group that is all zero stays so."""
    positive = sums > 0
    return torch.where(positive, sums, 1).sqrt() * positive


def read_weight(layer: nn.Module, parameter: str) -> Tensor:
    """A parameter as the network reads it: quantized where a quantizer is on."""
    return cast(Tensor, getattr(layer, parameter))


@dataclass(frozen=True)
class Grouping:
    """Groups of parameters that are removed together. ops: the traced network that they were read off."""

    members: tuple[Member, ...]
    count: int
    ops: tuple[Op, ...] = field(default=(), repr=False)
    modules: Mapping[str, nn.Module] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, ops: Iterable[Op], modules: Mapping[str, nn.Module]) -> Grouping:
        """The groups of removable channels of a traced network."""
        kept = list(ops)
        groups = groups_of(kept, dict(modules))
        return cls(groups.members, len(groups), tuple(kept), modules)

    def squared_norms(self, model: nn.Module, read: Callable[[nn.Module, str], Tensor] = read_weight) -> Tensor:
        """Sum of the squares of all that a group holds, (G,), float64 on the CPU, differentiable."""
        totals = torch.zeros(self.count, dtype=torch.float64)
        for member in self.members:
            value = read(model.get_submodule(member.module), member.parameter).cpu().double()
            sums = value.square().movedim(member.dim, 0).reshape(value.shape[member.dim], -1).sum(1)  # (C,)
            index = torch.from_numpy(member.groups)
            totals = totals.index_add(0, index[index >= 0], sums[index >= 0])
        return totals


class Losses(NamedTuple):
    """The parts of one step's loss, differentiable scalars in float64, and the network's scores (N, K)."""

    total: Tensor
    task: Tensor
    logits: Tensor
    groups: Tensor
    scores: Tensor


def _add(task: Tensor, squares: Tensor, weighted: Tensor) -> Tensor:
    return task + squares + weighted


@dataclass(frozen=True)
class Objective:
    """What one step minimises, in pieces.

    batch: what the network is given. training, quantized: its mode. transform: of the scores before the loss. lambdas:
    weights of the squared logits by the logit's own name. grouping, read, norm: whose norms, of which weights, and how
    a sum of squares becomes a norm. coefficient: made of the one that the step is given. total: of the three parts.
    gradients: what is done to them before the update. report: what the step returns of its losses. penalty: fn(this
    objective, network), the whole of it.
    """

    lambdas: Mapping[str, float] = field(default_factory=dict)
    grouping: Grouping | None = None
    batch: Callable[[Tensor, Tensor], Batch] = lambda images, labels: (images, labels)
    training: bool = True
    quantized: bool = True
    transform: Callable[[Tensor], Tensor] = lambda scores: scores
    task: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    read: Callable[[nn.Module, str], Tensor] = read_weight
    norm: Callable[[Tensor], Tensor] = root
    coefficient: Callable[[float], float] = lambda given: given
    total: Callable[[Tensor, Tensor, Tensor], Tensor] = _add
    gradients: Callable[[Gradients], Gradients] = lambda found: found
    report: Callable[[Losses], Losses] = lambda losses: losses
    penalty: Callable[[Objective, nn.Module], Tensor] = lambda objective, model: group_lasso(objective, model)

    def squares(self, model: nn.Module) -> Tensor:
        """lambda_dz sum theta_dz^2 + lambda_bit sum theta_bit^2 over the trainable logits."""
        total = torch.zeros((), dtype=torch.float64)
        for name, p in trainable(model).items():
            weight = self.lambdas.get(name.rpartition(".")[2], 0.0)
            total = total + weight * p.cpu().double().square().sum() if weight else total
        return total

    def losses(self, model: nn.Module, batch: Batch, coefficient: float, precision: torch.dtype) -> Losses:
        """All parts for a batch, with the network in the mode that it is in."""
        images, labels = self.batch(*batch)
        switch = quantization(model, enabled=self.quantized) if quantized_layers(model) else nullcontext()
        with switch, shared_quantized_weights(model):
            with autocast(images.device, precision):
                scores = model(images)
            task = self.task(self.transform(scores.double()), labels).cpu()
            squares = self.squares(model)
            weight = self.coefficient(coefficient) if coefficient else 0.0
            groups = self.penalty(self, model) if weight and self.grouping else torch.zeros_like(task)
            return Losses(self.total(task, squares, weight * groups), task, squares, groups, scores)


def group_lasso(objective: Objective, model: nn.Module) -> Tensor:
    """sum over G of the groups' norms."""
    assert objective.grouping is not None
    return objective.norm(objective.grouping.squared_norms(model, objective.read)).sum()


def channel_grouping(model: nn.Module, input_size: tuple[int, int, int]) -> Grouping:
    """The groups of removable channels. Raises GraphError for a network that cannot be followed."""
    return Grouping.of(trace(model, input_size), dict(model.named_modules()))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(loss: Tensor, model: nn.Module, leaves: Mapping[str, Tensor] | None = None) -> Gradients:
    """d loss / d parameter for every trainable parameter; zeros where the loss does not depend on it.

    leaves: tensors that stand for parameters, by their names, and whose gradients are added to those.
    """
    found = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in trainable(model).items()}
    wanted = [*trainable(model).items(), *(leaves or {}).items()]
    if loss.requires_grad:
        slopes = torch.autograd.grad(loss, [p for _, p in wanted], allow_unused=True, retain_graph=True)
        for (name, _), slope in zip(wanted, slopes, strict=True):
            if slope is not None:
                found[name] = found.get(name, 0) + plain(slope)
    return found


def plain(tensor: Tensor) -> Tensor:
    """A detached copy in float64 on the CPU."""
    return tensor.detach().double().cpu().clone()


def parameter_name(model: nn.Module, module: str, parameter: str) -> str:
    """The parameter behind `module.parameter`: the latent weight of a quantized layer."""
    layer = model.get_submodule(module)
    quantized = parameter == "weight" and latent_weight(layer) is not getattr(layer, "weight", None)
    tail = "parametrizations.weight.original" if quantized and hasattr(layer, "parametrizations") else parameter
    return f"{module}.{tail}" if module else tail

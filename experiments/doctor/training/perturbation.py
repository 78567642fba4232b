"""A network in which no mistake is hidden by equal values, and quantized weights that are leaves of the graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from experiments.doctor.core import objective
from experiments.doctor.pipeline import Pipeline
from experiments.doctor.step.penalty_diagnosis import parameter_name
from utils_quantization import quantized_layers

STRESS = (0.6, 0.4)  # theta_dz, theta_bit: a wide dead zone and few bits, so that quantized and latent weights differ


@torch.no_grad()
def perturb_(pipeline: Pipeline) -> None:
    """Make every parameter differ from channel to channel and the quantized weights from the latent ones, so that no
    mistake is hidden by equal values. Only inside `preserve_state`."""
    generator = torch.Generator().manual_seed(3)
    for name, p in pipeline.model.named_parameters():
        leaf = name.rpartition(".")[2]
        if leaf in ("logit_dz", "logit_bit"):
            p.fill_(STRESS[leaf == "logit_bit"])
        else:
            p.mul_(0.5 + torch.rand(p.shape, generator=generator).to(p))
            if p.dim() == 1:
                p.add_(0.2 * torch.rand(p.shape, generator=generator).to(p))


def zero_groups_(pipeline: Pipeline, grouping: objective.Grouping) -> int:
    """Set every third group to zero, all its members; returns how many. Only inside `preserve_state`."""
    chosen = torch.arange(grouping.count) % 3 == 0
    with torch.no_grad():
        for member in grouping.members:
            p = pipeline.model.get_parameter(parameter_name(pipeline.model, member.module, member.parameter))
            index = torch.from_numpy(member.groups)
            rows = torch.nonzero((index >= 0) & chosen[index.clamp(min=0)]).flatten()
            p.index_fill_(member.dim, rows.to(p.device), 0.0)
    return int(chosen.sum())


@contextmanager
def quantized_leaves(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Inside, every quantized weight is a leaf of its own: gradients stop there and do not pass the quantizers.

    A layer's weight is then read from where `shared_quantized_weights` keeps it.
    """
    layers = quantized_layers(model)
    with torch.no_grad():
        leaves = {name: cast(Tensor, layer.weight).detach().clone().requires_grad_() for name, layer in layers.items()}
    switches = {name: cast(Any, layer).parametrizations.weight[0] for name, layer in layers.items()}
    before = {name: switch._shared for name, switch in switches.items()}
    try:
        for name, switch in switches.items():
            switch._shared = leaves[name]
        yield leaves
    finally:
        for name, switch in switches.items():
            switch._shared = before[name]


def at_leaves(
    model: nn.Module, value: Tensor, leaves: dict[str, Tensor], found: objective.Gradients
) -> objective.Gradients:
    """The gradients with those of the quantized weights added to those of the latent ones, which should have none."""
    if not value.requires_grad:
        return found
    grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, retain_graph=True)
    for name, g in zip(leaves, grads, strict=True):
        if g is not None:
            key = parameter_name(model, name, "weight")
            found[key] = found.get(key, torch.zeros(g.shape, dtype=torch.float64)) + objective.plain(g)
    return found

"""What a quantizer is examined on: weights and logits, and what it makes of them, values and gradients.

Each quantizer is examined on a copy, in float64 where it can, and gets its weights in the layer's own shape, so that a
range per filter shows. Axis letters: T weights of a layer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from experiments.doctor.pipeline import Pipeline
from experiments.doctor.quantizer import equations
from experiments.doctor.quantizer.quantizer_checks import SINGLE, flat, logits
from utils_quantization import latent_weight, quantized_layers, quantizer_of

OTHER_LOGITS = ((0.5, 0.3), (1.2, 0.9), (0.8, -0.62), (-0.9, 1.6))
"""(theta_dz, theta_bit): small and large dead zones, 2 to 8 bits, both signs."""
TOLERANCE = 1e-6  # float64 against float64


@dataclass(frozen=True)
class Case:
    """A layer's weights, (T,) and their shape in the layer, and the logits with which its quantizer is examined."""

    layer: str
    theta_dz: float
    theta_bit: float
    weights: equations.Values
    shape: tuple[int, ...]
    quantizer: nn.Module
    training: bool = True

    @property
    def text(self) -> str:
        """The case in words: layer, logits, mode."""
        mode = "" if self.training else ", eval mode"
        return f"{self.layer} at theta_dz {self.theta_dz:.2g}, theta_bit {self.theta_bit:.2g}{mode}"


@dataclass(frozen=True)
class Answer:
    """What a quantizer made of a case: values (T,), gradients of the weights and the two logits (None: not learned)."""

    values: equations.Values
    gradients: tuple[equations.Values | None, ...]
    tolerance: float


def cases_of(pipeline: Pipeline) -> Iterator[Case]:
    """Every layer at its own logits; some layers, and one of every kind of quantizer, at other logits too."""
    layers = list(quantized_layers(pipeline.model).items())
    spread = {round(place) for place in np.linspace(0, len(layers) - 1, 3)}
    kinds: set[type] = set()
    for place, (name, layer) in enumerate(layers):
        quantizer = quantizer_of(layer)
        w, shape = flat(latent_weight(layer)), tuple(latent_weight(layer).shape)
        if not w.any():
            continue  # no range, no grid
        yield Case(name, *logits(layer), w, shape, quantizer)
        if place in spread or type(quantizer) not in kinds:
            kinds.add(type(quantizer))
            yield Case(name, *logits(layer), w, shape, quantizer, training=False)
            for theta_dz, theta_bit in OTHER_LOGITS:
                yield Case(name, theta_dz, theta_bit, w, shape, quantizer)


def answer_to(case: Case, upstream: equations.Values | None = None, *, after_others: bool = False) -> Answer:
    """The quantizer's values, and its gradients for `upstream`, (T,). after_others: it saw larger weights before."""
    for dtype, tolerance in ((torch.float64, TOLERANCE), (torch.float32, SINGLE)):
        try:
            twin = cast(Any, copy.deepcopy(case.quantizer).cpu().to(dtype).train(case.training))
            with torch.no_grad():
                twin.logit_dz.fill_(case.theta_dz)
                twin.logit_bit.fill_(case.theta_bit)
            w = torch.tensor(case.weights, dtype=dtype).view(case.shape).requires_grad_()
            if after_others:
                with torch.no_grad():
                    twin(-3 * w)
            values = twin(w)
            if upstream is None:
                return Answer(flat(values), (), tolerance)
            learnables = [w, twin.logit_dz, twin.logit_bit]
            wanted = [p for p in learnables if p.requires_grad]
            loss = (values * torch.tensor(upstream, dtype=values.dtype).view(values.shape)).sum()
            grads = torch.autograd.grad(loss, wanted, allow_unused=True) if loss.requires_grad else [None] * len(wanted)
            by_id = dict(zip(map(id, wanted), grads, strict=True))
            found = [_or_zeros(by_id[id(p)], p) if id(p) in by_id else None for p in learnables]
            return Answer(flat(values), tuple(found), tolerance)
        except RuntimeError:
            if dtype == torch.float32:
                raise
    raise AssertionError  # the loop returns or raises


@torch.no_grad()
def stands_still(case: Case) -> bool:
    """Whether the quantizer answers -3 w as it has answered w: it keeps a result."""
    twin = copy.deepcopy(case.quantizer).cpu().train(case.training)
    w = torch.tensor(case.weights, dtype=torch.float32).view(case.shape)
    return torch.equal(twin(w), twin(-3 * w))


def _or_zeros(gradient: torch.Tensor | None, p: torch.Tensor) -> equations.Values:
    return np.zeros(p.numel()) if gradient is None else flat(gradient)

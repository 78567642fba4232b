"""Before training: do the quantized weights follow the latent ones, each alone and all layers computed at once?

A step computes all layers together (`shared_quantized_weights`), a reader of one layer's weight computes it alone. Both
must give the same values and the same gradients. So that a mix-up of layers shows, every layer gets other latent
weights and other logits first. Axis letters: L layers.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from experiments.doctor.pipeline import Pipeline
from experiments.doctor.quantizer.quantizer_checks import SINGLE
from experiments.doctor.runner import CheckRunner, NotApplicable, Outcome, names, preserve_state
from utils_quantization import latent_weight, quantization, quantized_layers, quantizer_of, shared_quantized_weights

GRADIENT_CLOSE = 1e-2  # relative, of one tensor; float32 sums over a layer in another order are good to 1e-4
LOGITS = ("logit_dz", "logit_bit")
Learnables = dict[str, list[Tensor]]


def joint_checks(runner: CheckRunner, pipeline: Pipeline) -> None:
    """Add the findings about quantized weights, one at a time and all together."""
    runner.check("weights follow", "a latent weight that moves moves the quantized one", _follow, pipeline)
    runner.check("all layers at once", "together, layers get what each gets alone", _together, pipeline)


@torch.no_grad()
def _scatter(layers: dict[str, nn.Module]) -> None:
    """Other latent weights and other logits in every layer. Only inside `preserve_state`."""
    generator = torch.Generator().manual_seed(11)
    for place, layer in enumerate(layers.values()):
        latent, quantizer = latent_weight(layer), quantizer_of(layer)
        latent.copy_(torch.randn(latent.shape, generator=generator).to(latent) * 0.3)
        for leaf, theta in (("logit_dz", 0.6 + 0.17 * (place % 5)), ("logit_bit", 0.3 + 0.25 * (place % 6))):
            if isinstance(getattr(quantizer, leaf, None), Tensor):
                getattr(quantizer, leaf).fill_(theta)


def _layers(pipeline: Pipeline) -> dict[str, nn.Module]:
    layers = quantized_layers(pipeline.model)
    if not layers:
        raise NotApplicable("the network has no quantizer")
    return layers


@torch.no_grad()
def _follow(pipeline: Pipeline) -> Outcome:
    layers = _layers(pipeline)
    with preserve_state(pipeline), quantization(pipeline.model, enabled=True):
        before = {name: cast(Tensor, layer.weight).clone() for name, layer in layers.items()}
        _scatter(layers)
        still = [name for name, layer in layers.items() if torch.equal(before[name], cast(Tensor, layer.weight))]
    measured = f"{names(still)} stood still" if still else "all of them follow"
    return Outcome("other latent weights, other quantized weights", measured, not still, ["weights-stale"])


def _together(pipeline: Pipeline) -> Outcome:
    """Values, and gradients of sum(c v) for the latent weights and logits, one layer at a time and all at once."""
    layers = _layers(pipeline)
    generator = torch.Generator().manual_seed(12)
    with preserve_state(pipeline), quantization(pipeline.model, enabled=True):
        _scatter(layers)
        upstream = [
            torch.randn(latent_weight(layer).shape, generator=generator).to(pipeline.device)
            for layer in layers.values()
        ]
        alone = [cast(Tensor, layer.weight) for layer in layers.values()]
        slopes = _slopes(layers, alone, upstream)
        with shared_quantized_weights(pipeline.model):
            together = [cast(Tensor, layer.weight) for layer in layers.values()]
        joint = _slopes(layers, together, upstream)
        tops = [float(latent_weight(layer).detach().abs().max()) for layer in layers.values()]
    # a few weights on a threshold may fall on its other side
    pairs = zip(layers, alone, together, tops, strict=True)
    off = [n for n, a, b, top in pairs if float((a - b).detach().norm()) > SINGLE * top * a.numel() ** 0.5]
    wrong = [key for key in slopes if _miss(slopes[key], joint[key]) > GRADIENT_CLOSE]
    parts = [f"other values in {names(off)}"] if off else []
    parts += [f"other gradients of {names(wrong)}"] if wrong and not off else []
    likely: list[str] = ["joint-quantization"]
    if not off and wrong and all(key.rpartition(".")[2] in LOGITS for key in wrong):
        silent = all(float(joint[key].abs().max()) == 0 for key in wrong)
        likely += ["logits-detached"] if silent else ["logit-gradient-wrong"]
    elif not off and wrong:
        likely += ["weight-gradient-wrong"]
    measured = "; ".join(parts) or f"{len(layers)} layers, values and gradients agree"
    return Outcome("the same values and gradients, together and alone", measured, not parts, likely)


def _slopes(layers: dict[str, nn.Module], values: list[Tensor], upstream: list[Tensor]) -> dict[str, Tensor]:
    """The gradients of the latent weight and the logits of every layer, by "layer.weight", "layer.logit_dz", ..."""
    learnables: dict[str, Tensor] = {}
    for name, layer in layers.items():
        quantizer = cast(Any, quantizer_of(layer))
        owned = {"weight": latent_weight(layer), **{leaf: getattr(quantizer, leaf, None) for leaf in LOGITS}}
        learnables |= {f"{name}.{leaf}": p for leaf, p in owned.items() if isinstance(p, Tensor) and p.requires_grad}
    loss = torch.stack([(v * c).sum() for v, c in zip(values, upstream, strict=True)]).sum()
    if not loss.requires_grad or not learnables:
        return {key: torch.zeros_like(p) for key, p in learnables.items()}
    found = torch.autograd.grad(loss, list(learnables.values()), allow_unused=True)
    pairs = zip(learnables.items(), found, strict=True)
    return {key: torch.zeros_like(p) if g is None else g.detach() for (key, p), g in pairs}


def _miss(alone: Tensor, together: Tensor) -> float:
    """Relative difference; a gradient that is nothing in both is no difference."""
    size = max(float(alone.norm()), float(together.norm()))
    return float((alone - together).norm()) / size if size > 1e-9 else 0.0

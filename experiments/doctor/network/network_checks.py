"""Before training: does the untrained network run, know nothing, and change by quantization as little as it should?

Axis letters: N batch, K classes.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from experiments.doctor.checks.quantizers import expected_weight
from experiments.doctor.data.loader_checks import good_batches
from experiments.doctor.pipeline import Pipeline
from experiments.doctor.reference.objective import cross_entropy, plain
from experiments.doctor.runner import CheckRunner, NotApplicable, Outcome, PartFailed, names, preserve_state
from src.training import autocast
from utils_quantization import latent_weight, quantization, quantized_layers, quantizer_of

IMAGES = 128
HIGHEST_START, PER_LAYER = 5.0, 0.15  # above ln K; over 40 seeds resnet20 (20 layers) starts up to 3.1 above it
LOWEST_START = 0.5  # below ln K; measured: never below it
LARGEST_MOMENTUM = 0.5  # above it a statistic is little more than the last batch's; Keras writes 0.9 for 0.1
NOISE_RATIO = 4.0  # quantization error over random noise of the same size; 0.57 to 1.32 over 120 networks


def network_checks(runner: CheckRunner, pipeline: Pipeline) -> None:
    """Add the findings about the untrained network."""
    runner.check("tensors", "all weights are there and finite, on one device", _tensors, pipeline)
    runner.check("network", "it runs, gives the same outputs twice, and uses all of its layers", _network, pipeline)
    runner.check("loss at the start", "the untrained network knows nothing: ln(classes)", _first_loss, pipeline)
    runner.check(
        "quantization error", "quantizing changes the outputs as noise of the grid's size does", _output_error, pipeline
    )


def batch_of(pipeline: Pipeline, count: int = IMAGES) -> tuple[Tensor, Tensor]:
    """At most `count` images of the first batch, on the network's device."""
    images, labels = good_batches(pipeline, 1)[0]
    return images[:count].to(pipeline.device), labels[:count].to(pipeline.device)


def scores_of(pipeline: Pipeline, images: Tensor, *, enabled: bool | None = None) -> Tensor:
    """The network's outputs in float32, without gradient. Raises PartFailed where the network does."""
    try:
        with torch.no_grad():
            if enabled is None or not quantized_layers(pipeline.model):
                return cast(Tensor, pipeline.model(images)).float()
            with quantization(pipeline.model, enabled=enabled):
                return cast(Tensor, pipeline.model(images)).float()
    except Exception as error:
        raise PartFailed(_why_it_raises(pipeline, images), error) from error


def _why_it_raises(pipeline: Pipeline, images: Tensor) -> str:
    """Whether images and network are of different types or on different devices."""
    tensors = [*pipeline.model.parameters(), *pipeline.model.buffers()]
    if len({t.device for t in (images, *tensors)}) > 1 or any(t.is_meta for t in tensors):
        return "device-mismatch"
    kinds = {t.dtype for t in (images, *tensors) if t.is_floating_point()}
    return "dtype-mismatch" if len(kinds) > 1 else "model-raises"


def _tensors(pipeline: Pipeline) -> Outcome:
    tensors = dict(pipeline.model.named_parameters()) | dict(pipeline.model.named_buffers())
    devices = sorted({str(tensor.device) for tensor in tensors.values()})
    lost = [name for name, tensor in tensors.items() if not tensor.is_meta and not torch.isfinite(tensor).all()]
    parts = [f"{len(tensors)} tensors on {', '.join(devices) or 'no device'}"]
    parts += [f"not finite: {names(lost)}"] if lost else []
    mixed = len(devices) > 1 or "meta" in devices
    likely = ["device-mismatch" if mixed else None, "weights-not-finite"]
    return Outcome("finite, on one device that holds data", "; ".join(parts), not lost and not mixed, likely)


@torch.no_grad()
def _network(pipeline: Pipeline) -> Outcome:
    """Forward twice in eval mode, noting which layers run; and the weights it starts with."""
    images, _ = batch_of(pipeline, 16)
    used: set[str] = set()
    layers = {n: m for n, m in pipeline.model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    hooks = [m.register_forward_pre_hook(lambda *_, name=n: used.add(name)) for n, m in layers.items()]
    with preserve_state(pipeline):
        pipeline.model.eval()
        try:
            first, second = scores_of(pipeline, images), scores_of(pipeline, images)
        finally:
            for hook in hooks:
                hook.remove()
    unused = [name for name in layers if name not in used]
    noisy = not torch.equal(first, second)
    flat = [name for name, m in layers.items() if float(latent_weight(m).float().std(correction=0)) == 0]
    norms = nn.modules.batchnorm._BatchNorm
    momentum = [
        name
        for name, m in pipeline.model.named_modules()
        if isinstance(m, norms) and m.momentum is not None and not 0 < m.momentum <= LARGEST_MOMENTUM
    ]
    chances = first.dim() == 2 and bool(torch.allclose(first.sum(1), torch.ones(len(first)).to(first), atol=1e-3))
    chances = chances and bool((first >= 0).all()) and first.shape[1] > 1
    parts = [f"not used: {names(unused)}"] if unused else []
    parts += ["the same images give other outputs"] if noisy else []
    parts += [f"constant weights in {names(flat)}"] if flat else []
    parts += [f"BatchNorm's momentum is {pipeline.model.get_submodule(momentum[0]).momentum}"] if momentum else []
    parts += ["the outputs are probabilities"] if chances else []
    parts += ["outputs that are not finite"] if not torch.isfinite(first).all() else []
    likely = ["layer-unused" if unused else None, "evaluation-not-repeatable" if noisy else None]
    likely += ["initial-weights" if flat else None, "batchnorm-momentum" if momentum else None]
    likely += ["softmax-twice" if chances else None, "gradient-not-finite"]
    measured = "; ".join(parts) or f"{len(layers)} layers used, the same outputs twice"
    return Outcome("all layers used, one output for one image", measured, not parts, likely)


def _first_loss(pipeline: Pipeline) -> Outcome:
    if getattr(pipeline.optimizer, "state", None):
        raise NotApplicable("the network has been trained already")
    images, labels = batch_of(pipeline)
    with preserve_state(pipeline), autocast(images.device, pipeline.precision):
        pipeline.model.train()
        scores = scores_of(pipeline, images)
    classes = pipeline.expected.num_classes
    if scores.dim() != 2:
        raise NotApplicable(f"the network returns {tuple(scores.shape)}, not one score a class")
    if classes is not None and scores.shape[1] != classes:
        measured = f"{scores.shape[1]} outputs for {classes} classes"
        return Outcome(f"{classes} outputs", measured, False, ["classes-mismatch"])
    loss, chance = float(cross_entropy(scores, labels)), math.log(scores.shape[1])
    layers = sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in pipeline.model.modules())
    above = HIGHEST_START + PER_LAYER * layers  # a residual stream grows with every block that is added to it
    ok = chance - LOWEST_START < loss < chance + above
    likely = ["head-badly-scaled", "wrong-normalisation"] if loss > chance else ["stuck-at-chance", "labels-shuffled"]
    return Outcome(f"ln {scores.shape[1]} = {chance:.2f}, at most {above:.1f} more", f"{loss:.2f}", ok, likely)


def _output_error(pipeline: Pipeline) -> Outcome:
    """Beside the real error, that of the latent weights with the same error shuffled within each layer."""
    layers = quantized_layers(pipeline.model)
    if not layers:
        raise NotApplicable("the network has no quantizer")
    if pipeline.expected.config and pipeline.expected.config.stem_bits:
        raise NotApplicable("the stem has a grid of its own, which is not expected")
    images, _ = batch_of(pipeline, 64)
    generator = torch.Generator().manual_seed(0)
    with preserve_state(pipeline), torch.no_grad():
        pipeline.model.train()  # BatchNorm's own statistics mean nothing yet
        off = scores_of(pipeline, images, enabled=False)
        on = scores_of(pipeline, images, enabled=True)
        for layer in layers.values():
            latent = latent_weight(layer)
            error = _grid_error(pipeline, layer)
            order = torch.randperm(error.numel(), generator=generator)
            latent += error.flatten()[order].view_as(error).to(latent)
        noisy = scores_of(pipeline, images, enabled=False)
    real, noise = float((on - off).norm() / off.norm()), float((noisy - off).norm() / off.norm())
    ratio = real / max(noise, 1e-6)
    measured = f"outputs change by {100 * real:.2g}%, by {100 * noise:.2g}% under such noise"
    likely = ["grid-wrong", "range-wrong", "quantizers-off"]
    ok = ratio < NOISE_RATIO and math.isfinite(real)
    return Outcome(f"less than {NOISE_RATIO:g} times the noise's", measured, ok, likely, ratio / NOISE_RATIO)


def _grid_error(pipeline: Pipeline, layer: nn.Module) -> Tensor:
    """quantized - latent weight that the bit width explains: by the equations, or uniform noise of the grid's step."""
    latent = latent_weight(layer).detach()
    settings = pipeline.expected.quantizer
    if settings is not None:
        return expected_weight(settings, layer)[0] - plain(latent)
    quantizer = cast(Any, quantizer_of(layer))
    bits = float(quantizer.get_bitwidth()) if hasattr(quantizer, "get_bitwidth") else 4.0
    step = 2 * float(latent.abs().max()) / 2.0**bits
    return (torch.rand(latent.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.5) * step

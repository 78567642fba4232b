"""The network: does it run, start as a network should, equal its baseline, and fall into groups of channels?

Axis letters: N batch, K classes, C channels, G groups.
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from experiments.doctor.checks.data import good_batches
from experiments.doctor.checks.quantizers import expected_weight
from experiments.doctor.observe import grouping_of, hard_labels, network_batch, perturb_
from experiments.doctor.pipeline import Pipeline
from experiments.doctor.reference.objective import Grouping, cross_entropy, parameter_name, plain
from experiments.doctor.runner import CheckRunner, NotApplicable, Outcome, PartFailed, names, preserve_state
from src.training import autocast
from utils_quantization import latent_weight, quantization, quantized_layers, quantizer_of

HIGHEST_START, PER_LAYER = 5.0, 0.15  # above ln K; over 40 seeds resnet20 (20 layers) starts up to 3.1 above it
LOWEST_START = 0.5  # below ln K; measured: never below it
LARGEST_START = 8.0  # rms of a weight x sqrt(fan); 1.4 by Kaiming, 0.6 by torch's own, whichever fan they take
HEAD_COST = 0.25  # nats that the head's bias may cost against none
LARGEST_MOMENTUM = 0.5  # above it a statistic is little more than the last batch's; Keras writes 0.9 for 0.1
NOISE_RATIO = 4.0  # quantization error over random noise of the same size; 0.57 to 1.32 over 120 networks
CLOSE = 1e-3  # relative; float32 in another memory layout is good to 1e-5
LAYERS = (nn.Conv2d, nn.Linear)


def network_checks(runner: CheckRunner, pipeline: Pipeline) -> None:
    """Add the findings about the untrained network."""
    runner.check("tensors", "all weights are there and finite, on one device", _tensors, pipeline)
    runner.check("network", "it runs, gives the same outputs twice, and uses all of its layers", _network, pipeline)
    runner.check("starting weights", "filters differ, none is huge, the head favours no class", _starts, pipeline)
    runner.check("loss at the start", "the untrained network knows nothing: ln(classes)", _first_loss, pipeline)
    runner.check(
        "quantization error", "quantizing changes the outputs as noise of the grid's size does", _output_error, pipeline
    )
    proves = "with quantizers off it is the baseline with the same weights"
    runner.check("network and baseline", proves, _same_network, pipeline, blame="baseline-wrong")
    runner.check(
        "channel groups", "zeroing a group makes its channel zero for all who read it, and no other", _groups, pipeline
    )


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
    # An observer's range is infinite until it has seen a batch.
    ranges = {n for n, _ in pipeline.model.named_buffers() if n.endswith(("min_val", "max_val"))}
    held = {name: tensor for name, tensor in tensors.items() if not tensor.is_meta and name not in ranges}
    lost = [name for name, tensor in held.items() if not torch.isfinite(tensor).all()]
    parts = [f"{len(tensors)} tensors on {', '.join(devices) or 'no device'}"]
    parts += [f"not finite: {names(lost)}"] if lost else []
    mixed = len(devices) > 1 or "meta" in devices
    likely = ["device-mismatch" if mixed else None, "weights-not-finite"]
    return Outcome("finite, on one device that holds data", "; ".join(parts), not lost and not mixed, likely)


@torch.no_grad()
def _network(pipeline: Pipeline) -> Outcome:
    """Forward twice in eval mode, noting which layers run."""
    images, _ = network_batch(pipeline, 16)
    model, used = pipeline.model, set[str]()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LAYERS)}
    hooks = [m.register_forward_pre_hook(lambda *_, name=n: used.add(name)) for n, m in layers.items()]
    with preserve_state(pipeline):
        model.eval()
        try:
            first, second = scores_of(pipeline, images), scores_of(pipeline, images)
            unused = [name for name in layers if name not in used]
            unused = [name for name in unused if not _is_read(model, layers[name], images)]
        finally:
            for hook in hooks:
                hook.remove()
    norms = {n: m.momentum for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    momentum = [value for value in norms.values() if value is not None and not 0 < value <= LARGEST_MOMENTUM]
    chances = first.dim() == 2 and first.shape[1] > 1 and bool((first >= 0).all())
    chances = chances and torch.allclose(first.sum(1), torch.ones(len(first)).to(first), atol=1e-3)
    found = {
        f"not used: {names(unused)}": ("layer-unused", bool(unused)),
        "the same images give other outputs": ("evaluation-not-repeatable", not torch.equal(first, second)),
        f"BatchNorm's momentum is {momentum[:1]}": ("batchnorm-momentum", bool(momentum)),
        "the outputs are probabilities": ("softmax-twice", chances),
        "outputs that are not finite": ("gradient-not-finite", not bool(torch.isfinite(first).all())),
    }
    likely = [key for key, wrong in found.values() if wrong]
    measured = "; ".join(text for text, (_, wrong) in found.items() if wrong)
    passed = f"{len(layers)} layers used, the same outputs twice"
    return Outcome("all layers used, one output for one image", measured or passed, not likely, likely)


def _is_read(model: nn.Module, layer: nn.Module, images: Tensor) -> bool:
    """Whether the output depends on a layer that is never called: attention reads the weights of its own."""
    own = [p for p in layer.parameters() if p.requires_grad]
    with torch.enable_grad():
        output = model(images).float().sum()
        found = torch.autograd.grad(output, own, allow_unused=True) if own and output.requires_grad else ()
    return any(slope is not None for slope in found)


def _untrained(pipeline: Pipeline) -> None:
    if getattr(pipeline.optimizer, "state", None):
        raise NotApplicable("the network has been trained already")


def _starts(pipeline: Pipeline) -> Outcome:
    """Filters that are alike and stay so, filters far too large, and a bias of the head that costs more than none."""
    _untrained(pipeline)
    quantized, model = quantized_layers(pipeline.model), pipeline.model
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LAYERS)}
    weights = {n: latent_weight(m) if n in quantized else m.weight for n, m in layers.items()}
    head = next(reversed(weights), "")
    alike = [name for name, w in weights.items() if name != head and len(w) > 1 and _alike(w)]
    zero = [name for name, w in weights.items() if len(w) > 1 and not w.any()]
    alike = [name for name in alike if name not in zero]
    alike += zero if zero and _stay_alike(pipeline, {name: weights[name] for name in zero}) else []
    plain = [name for name, m in layers.items() if getattr(m, "groups", 1) == 1]
    large = {name: _scale(weights[name].detach()) for name in plain}
    worst = max(large, key=lambda name: large[name], default="")
    cost = _head_cost(pipeline, layers[head]) if head else 0.0
    parts = [f"filters are all alike in {names(alike)}"] if alike else []
    parts += [f"{worst} starts {large[worst] / math.sqrt(2):.3g} times as large as usual"] if _huge(large) else []
    parts += [f"the head's bias costs {cost:.2f} nats"] if cost > HEAD_COST else []
    likely = ["initial-weights" if alike else None, "weights-too-large" if _huge(large) else None]
    likely += ["head-bias-wrong"] if cost > HEAD_COST else []
    return Outcome(
        "as initialised", "; ".join(parts) or f"{len(layers)} layers differ in all filters", not parts, likely
    )


def _alike(weight: Tensor) -> bool:
    weight = weight.detach()
    return bool((weight - weight[:1]).abs().max() <= 1e-6 * weight.abs().max())


def _stay_alike(pipeline: Pipeline, weights: dict[str, Tensor]) -> bool:
    """Whether the loss gives filters that are zero nothing that tells them apart. A zero branch alone learns."""
    images, labels = network_batch(pipeline, 32)
    with preserve_state(pipeline), torch.enable_grad():
        pipeline.model.train()
        loss = cross_entropy(pipeline.model(images), labels)
        found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    return any(slope is None or not torch.isfinite(slope).all() or _alike(slope) for slope in found)


def _scale(weight: Tensor) -> float:
    """rms x sqrt of the smaller fan."""
    fan = weight[0].numel() * min(1.0, len(weight) / weight.shape[1])
    return float(weight.float().square().mean().sqrt()) * math.sqrt(fan)


def _huge(scales: dict[str, float]) -> bool:
    return any(not scale <= LARGEST_START for scale in scales.values())


def _head_cost(pipeline: Pipeline, head: nn.Module) -> float:
    """How many nats the head's bias alone costs more than none: -mean log softmax(bias)[label] - ln K."""
    bias, classes = cast(Tensor | None, head.bias), pipeline.expected.num_classes
    labels = torch.cat([hard_labels(labels) for _, labels in good_batches(pipeline, 4)])
    if bias is None or len(bias) != classes:
        return 0.0
    scores = bias.detach().double().cpu().log_softmax(0)
    return -float(scores[labels.cpu()].mean()) - math.log(len(bias))


def _first_loss(pipeline: Pipeline) -> Outcome:
    _untrained(pipeline)
    images, labels = network_batch(pipeline)
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
    images, _ = network_batch(pipeline, 64)
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


def _same_network(pipeline: Pipeline) -> Outcome:
    if pipeline.baseline is None:
        raise NotApplicable("there is no baseline", "baseline")
    with preserve_state(pipeline):
        baseline = pipeline.baseline().to(pipeline.device)
        own = _float_state(pipeline.model)
        theirs = baseline.state_dict()
        odd = sorted(own.keys() ^ theirs.keys())
        odd += [name for name in own.keys() & theirs.keys() if own[name].shape != theirs[name].shape]
        if odd:
            if pipeline.expected.config is None:
                raise NotApplicable("the baseline is another architecture")
            return Outcome("the baseline's tensors", f"not those: {names(odd)}", False, ["network-differs"])
        baseline.load_state_dict(own)
        images, _ = network_batch(pipeline, 32)
        off = {f"in {mode} mode": _difference(pipeline, baseline, images, mode) for mode in ("training", "eval")}
        before, after = _float_state(pipeline.model), baseline.state_dict()
        moved = [n for n in before if before[n].is_floating_point() and _relative(before[n], after[n]) > CLOSE]
    parts = [f"outputs differ by {100 * miss:.2g}% {mode}" for mode, miss in off.items() if not miss <= CLOSE]
    parts += [f"other statistics in {names(moved)}"] if moved else []
    statistics_alone = bool(moved) and off["in training mode"] <= CLOSE
    likely = ["batchnorm-momentum" if statistics_alone else None, "network-differs"]
    measured = "; ".join(parts) or f"outputs differ by {100 * max(off.values()):.1g}%"
    return Outcome("the same outputs and statistics", measured, not parts, likely, max(off.values()) / CLOSE)


def _float_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under the names that they have without quantizers."""
    inside = tuple(f"{name}.parametrizations." for name in quantized_layers(model))
    found = {name: value for name, value in model.state_dict().items() if not name.startswith(inside or ("\0",))}
    return found | {f"{n}.weight": latent_weight(layer).detach() for n, layer in quantized_layers(model).items()}


def _difference(pipeline: Pipeline, baseline: nn.Module, images: Tensor, mode: str) -> float:
    """||model - baseline|| / ||baseline|| of the outputs; both see the same random numbers."""
    for network in (pipeline.model, baseline):
        network.train(mode == "training")
    state = torch.get_rng_state()
    found = scores_of(pipeline, images, enabled=False)
    torch.set_rng_state(state)
    with torch.no_grad():
        meant = baseline(images).float()
    return _relative(found, meant) if found.shape == meant.shape else float("inf")


def _relative(found: Tensor, meant: Tensor) -> float:
    return float((found - meant).norm() / meant.norm().clamp(min=1e-9))


def _groups(pipeline: Pipeline) -> Outcome:
    """Zero all that makes the channels of random groups, but not the slices: those read zeros there, and no others."""
    if pipeline.expected.penalty is None:
        raise NotApplicable("no penalty on channel groups is expected")
    grouping = grouping_of(pipeline)
    images, _ = network_batch(pipeline, 8)
    random = np.random.default_rng(0)
    live, unheld = set[str](), set[str]()
    with preserve_state(pipeline):
        perturb_(pipeline)
        pipeline.model.eval()
        _keep_positive(pipeline.model, grouping)
        for _ in range(4):
            with preserve_state(pipeline):
                for name, (zero, sliced) in _intervene(pipeline, grouping, random.random(grouping.count) < 0.5, images):
                    live |= {name} if bool((sliced & ~zero).any()) else set()
                    unheld |= {name} if bool((zero & ~sliced).any()) else set()
    covered = {m.module for m in grouping.members if m.role == "filter" and (m.groups >= 0).all()}
    uncovered = [n for n, m in pipeline.model.named_modules() if isinstance(m, nn.Conv2d) and n not in covered]
    parts = [f"not zero where {names(sorted(live))} read them"] if live else []
    parts += [f"in no group: the slices of {names(sorted(unheld))} that read them"] if unheld else []
    parts += [f"in no group: channels of {names(uncovered)}"] if uncovered else []
    likely = ["penalty-without-slices"] if unheld and not live else []
    likely += ["penalty-ignores-shortcut", "penalty-groups-shifted", "penalty-wrong"]
    return Outcome("zero at every reader", "; ".join(parts) or f"{grouping.count} groups hold", not parts, likely)


@torch.no_grad()
def _keep_positive(model: nn.Module, grouping: Grouping) -> None:
    """Small filters and scales and large shifts, so that no ReLU holds a channel at zero."""
    for member in grouping.members:
        p = model.get_parameter(parameter_name(model, member.module, member.parameter))
        if member.role in ("filter", "scale"):
            p.mul_(0.01)
        elif member.role in ("shift", "bias"):
            p.add_(10.0)


def _intervene(pipeline: Pipeline, grouping: Grouping, chosen: np.ndarray, images: Tensor) -> Any:
    """Of each layer its name, which of its inputs are zero for all images and which the chosen groups hold, (C,)."""
    model = pipeline.model
    sliced: dict[str, Tensor] = {}
    for member in grouping.members:
        held = torch.from_numpy((member.groups >= 0) & chosen[member.groups])
        if member.role == "slice":
            sliced[member.module] = held
            continue
        p = model.get_parameter(parameter_name(model, member.module, member.parameter))
        with torch.no_grad():
            p.index_fill_(member.dim, held.nonzero().flatten().to(p.device), 0.0)
    zero: dict[str, Tensor] = {}

    def keep(name: str, layer: nn.Module, x: Tensor) -> None:
        axis = 1 if isinstance(layer, nn.Conv2d) else -1
        zero[name] = ~x.detach().transpose(0, axis).flatten(1).any(1).cpu()

    plain_layers = {n: m for n, m in model.named_modules() if isinstance(m, LAYERS) and getattr(m, "groups", 1) == 1}
    hooks = [m.register_forward_pre_hook(lambda m, inputs, n=n: keep(n, m, inputs[0])) for n, m in plain_layers.items()]
    try:
        scores_of(pipeline, images)
    finally:
        for hook in hooks:
            hook.remove()
    return [(name, (flags, sliced.get(name, torch.zeros_like(flags)))) for name, flags in zero.items()]

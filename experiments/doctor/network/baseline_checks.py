"""Before training: is the network, with its quantizers off, the full-precision baseline that it is compared with?

The baseline is built again, gets the network's latent weights and statistics, and must then give the same outputs and
move its statistics in the same way. That shows what no weight shows: a shortcut or an activation left out, another
stride, another momentum or eps of BatchNorm, a hook that changes what passes. Axis letters: N batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from experiments.doctor.network.network_checks import batch_of, scores_of
from experiments.doctor.pipeline import Pipeline
from experiments.doctor.runner import CheckRunner, NotApplicable, Outcome, names, preserve_state
from utils_quantization import latent_weight, quantized_layers

IMAGES = 32
CLOSE = 1e-3  # relative; float32 in another memory layout is good to 1e-5


def baseline_checks(runner: CheckRunner, pipeline: Pipeline) -> None:
    """Add the finding about network and baseline."""
    proves = "with quantizers off it is the baseline with the same weights"
    runner.check("network and baseline", proves, _same_network, pipeline, blame="baseline-wrong")


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
        images, _ = batch_of(pipeline, IMAGES)
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

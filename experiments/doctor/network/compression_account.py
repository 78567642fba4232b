"""A network's MACs and BOPs a second time: zeros by the equations, bits from the logits, MACs by torch's counter.

MACs of the network that exact removal builds are counted by torch.utils.flop_counter; BOPs are MACs x weight bits x 32,
a layer at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from experiments.doctor.checks.quantizers import bits_in_use, expected_weight, logits
from experiments.doctor.pipeline import Pipeline
from experiments.doctor.reference.objective import plain
from experiments.doctor.reference.quantizer import near_a_threshold
from experiments.doctor.runner import Outcome, names
from experiments.evaluator import EvalResult
from metrics import LayerStats, ModelStats
from src.pruning import compact
from utils_quantization import eval_mode, latent_weight, quantized_layers

ACTIVATION_BITS = 32


@dataclass(frozen=True)
class Cost:
    """A layer's cost, counted a second time: MACs per image of all weights and of those that are not zero, and bits.

    unsure: MACs of weights so close to the dead zone's border that float32 may count them otherwise.
    """

    dense: int
    nonzero: int
    bits: float
    unsure: int = 0


def costs(pipeline: Pipeline) -> dict[str, Cost]:
    """Every convolution and linear layer of the network, by name: output pixels by hooks, zeros by the equations."""
    model, settings = pipeline.model, pipeline.expected.quantizer
    pixels: dict[str, int] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            hooks.append(module.register_forward_hook(_pixel_hook(pixels, name)))
    size = pipeline.expected.input_size or (3, 32, 32)
    try:
        with torch.no_grad(), eval_mode(model):
            model(torch.zeros(1, *size, device=pipeline.device))
    finally:
        for hook in hooks:
            hook.remove()
    quantized = quantized_layers(model)
    found = {}
    for name, count in pixels.items():
        layer = model.get_submodule(name)
        total, unsure = latent_weight(layer).numel(), 0
        if name in quantized and settings is not None:
            values, grid = expected_weight(settings, layer)
            bits = bits_in_use(settings, logits(layer)[1])
            weights = plain(latent_weight(layer))
            border = weights.abs() < grid.shift + grid.step
            nonzero, unsure = int((values != 0).sum()), int((border & near_a_threshold(weights, grid)).sum())
        elif name in quantized:
            with torch.no_grad():
                nonzero = int(cast(Tensor, layer.weight).count_nonzero())
            bits = float(cast(Any, layer).parametrizations.weight[0].quantizer.get_bitwidth())
        else:
            nonzero, bits = int(latent_weight(layer).count_nonzero()), 32.0
        found[name] = Cost(total * count, nonzero * count, bits, unsure * count)
    return found


def _pixel_hook(pixels: dict[str, int], name: str) -> Any:
    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        pixels[name] = output[0, 0].numel() if output.dim() > 2 else 1

    return count


def flops_macs(network: nn.Module, size: tuple[int, int, int], device: torch.device) -> int:
    """MACs for one image by torch.utils.flop_counter, which counts two operations a MAC."""
    counter = FlopCounterMode(display=False)
    with eval_mode(network), torch.no_grad(), counter:
        network(torch.zeros(1, *size, device=device))
    return int(counter.get_total_flops()) // 2


def compare_compression(pipeline: Pipeline, result: EvalResult) -> Outcome:
    """A result against the costs counted a second time, for the network as it is now."""
    meant = costs(pipeline)
    dense = sum(cost.dense for cost in meant.values())
    full = dense * 32.0 * ACTIVATION_BITS
    macs = sum(cost.nonzero for cost in meant.values())
    bops = sum(cost.nonzero * cost.bits * ACTIVATION_BITS for cost in meant.values())
    found = result.unstructured_stats
    close = max(sum(cost.unsure for cost in meant.values()), 0.5)
    wrong: list[str] = []
    likely: list[str] = []
    odd_bits = [s.name for s in found.layers if s.name in meant and abs(s.bitwidth - meant[s.name].bits) > 1e-6]
    if odd_bits:
        wrong.append(f"other bits in {names(odd_bits)}")
        likely += ["bops-wrong-bits", "bits-misreported"]
    odd_zeros = [s.name for s in (*found.layers, *result.structured_stats.layers) if _zeros_off(s, meant)]
    if odd_zeros:
        wrong.append(f"another share of zeros in {names(odd_zeros)}")
        likely += ["sparsity-wrong", "report-wrong"]
    if abs(found.total_macs - macs) > close:
        wrong.append(f"{found.total_macs:,} MACs of non-zero weights, {macs:,} counted")
        likely += ["bops-dense-density" if abs(found.total_macs - dense) < close else "macs-wrong"]
    unsure_bops = sum(cost.unsure * cost.bits * ACTIVATION_BITS for cost in meant.values())
    if abs(found.total_bops - bops) > max(unsure_bops, 1e-6 * bops):
        wrong.append(f"{found.total_bops:.4g} BOPs, {bops:.4g} counted")
        likely += _bops_diagnosis(meant, found.total_bops, bops)
    fault, keys = _ratio_fault(result, dense)
    if fault:
        wrong.append(fault)
        likely += keys
    _structured(pipeline, result, meant, wrong, likely)
    measured = "; ".join(wrong[:2]) or f"{macs:,} MACs, {full / max(bops, 1):.2f} times fewer BOPs"
    return Outcome("as counted from weights, bits and a built network", measured, not wrong, [*likely, "bops-wrong"])


def _zeros_off(stats: LayerStats, meant: dict[str, Cost]) -> bool:
    cost = meant.get(stats.name)
    if cost is None or not cost.dense:
        return False
    return abs(stats.pruning_ratio - (1 - cost.nonzero / cost.dense)) > cost.unsure / cost.dense + 1e-6


def _bops_diagnosis(meant: dict[str, Cost], found: float, right: float) -> list[str]:
    """Which other formula gives the BOPs that were reported."""
    layers = meant.values()
    mean_bits = sum(cost.bits for cost in layers) / len(layers)
    quantized = [cost for cost in layers if cost.bits < 32]
    plain_mean = sum(cost.bits for cost in quantized) / max(len(quantized), 1)
    guesses: dict[str, list[float]] = {
        "bops-dense-density": [sum(c.dense * c.bits * ACTIVATION_BITS for c in layers)],
        "bops-wrong-bits": [
            *(sum(c.nonzero * (b if c.bits < 32 else 32) * ACTIVATION_BITS for c in layers) for b in (32, 16, 8, 4, 2)),
            sum(c.nonzero * mean_bits * ACTIVATION_BITS for c in layers),
            sum(c.nonzero * (plain_mean if c.bits < 32 else 32) * ACTIVATION_BITS for c in layers),
            *(sum(c.nonzero * b * ACTIVATION_BITS for c in layers) for b in (8, 4)),
        ],
        "bops-activation-bits": [sum(c.nonzero * c.bits * b for c in layers) for b in (1, 4, 8, 16)]
        + [sum(c.nonzero * c.bits * c.bits for c in layers)],
    }
    off = {key: min(abs(found - guess) / max(guess, 1.0) for guess in values) for key, values in guesses.items()}
    return [key for key in sorted(off, key=lambda key: off[key]) if off[key] < 0.002] or [
        "bops-wrong",
        "bops-wrong-bits",
    ]


def _ratio_fault(result: EvalResult, dense: int) -> tuple[str, list[str]]:
    """A ratio that is not the dense FP32 network's cost over the compressed one's, and what it is instead.

    dense: MACs of the dense network. Each ratio times its own denominator is the baseline that was meant; where the
    ratios agree on another one, the baseline is wrong, and else the formula.
    """
    full = {"BOPs": dense * 32.0 * ACTIVATION_BITS, "MACs": float(dense)}
    reported = [
        ("BOPs", result.unstructured_bops_ratio, result.unstructured_stats.total_bops),
        ("MACs", result.unstructured_mac_ratio, result.unstructured_stats.total_macs),
        ("BOPs", result.structured_bops_ratio, result.structured_stats.total_bops),
        ("MACs", result.structured_mac_ratio, result.structured_stats.total_macs),
    ]
    meant = [(kind, ratio, full[kind] / cost, ratio * cost) for kind, ratio, cost in reported if cost]
    off = [(kind, ratio, right, used) for kind, ratio, right, used in meant if abs(ratio - right) > 1e-3 * right]
    if not off:
        return "", []
    kind, ratio, right, _ = off[0]
    baselines = [used / full[kind] for kind, _, _, used in meant if any(kind == other for other, *_ in off)]
    agree = len(baselines) > 1 and max(baselines) - min(baselines) < 1e-3 * max(baselines)
    keys = ["baseline-wrong", "ratio-wrong"] if agree else ["ratio-wrong", "baseline-wrong"]
    return f"{ratio:.4g} times fewer {kind}, {right:.4g} counted", keys


def _structured(
    pipeline: Pipeline, result: EvalResult, meant: dict[str, Cost], wrong: list[str], likely: list[str]
) -> None:
    """The network that exact removal leaves, built and counted."""
    size = pipeline.expected.input_size or (3, 32, 32)
    found = result.structured_stats
    with eval_mode(pipeline.model):
        try:
            built = flops_macs(compact(pipeline.model, size), size, pipeline.device)
        except ValueError:  # a network that removal does not know or leaves nothing of
            return
    if abs(found.total_macs - built) > 0.5:
        wrong.append(f"{found.total_macs:,} MACs after removal, {built:,} in the network that is left")
        likely += ["dead-counted-as-removed", "macs-wrong"]
    bops = sum(s.macs * (meant[s.name].bits if s.name in meant else 32.0) * ACTIVATION_BITS for s in found.layers)
    if abs(found.total_bops - bops) > 1e-4 * bops:
        wrong.append(f"{found.total_bops:.4g} BOPs after removal, {bops:.4g} counted")
        likely += ["bops-wrong-bits", "bops-wrong"]
    odd = [s.name for s in found.layers if s.name in meant and not _channels_fit(s, meant[s.name])]
    if odd:
        wrong.append(f"the channels left in {names(odd)} do not give its MACs")
        likely += ["report-wrong", "macs-wrong"]
    _dead(pipeline, found, wrong, likely)


def _channels_fit(stats: LayerStats, cost: Cost) -> bool:
    """Whether a layer's MACs are those of its channels left: out x (in, or in and one of ones) x kernel x pixels."""
    outputs, inputs = stats.null_out.total, stats.null_in.total
    if not outputs or not inputs:
        return True
    each = cost.dense / (outputs * inputs)
    left = [(outputs - stats.null_out.count) * (inputs - stats.null_in.count + more) * each for more in (0, 1)]
    return any(abs(stats.macs - macs) < 0.5 for macs in left)


def _dead(pipeline: Pipeline, found: ModelStats, wrong: list[str], likely: list[str]) -> None:
    settings = pipeline.expected.quantizer
    layers = quantized_layers(pipeline.model)
    for stats in found.layers:
        if stats.name not in layers or settings is None:
            continue
        layer = layers[stats.name]
        values = expected_weight(settings, layer)[0]
        dead = {int(i) for i in torch.nonzero((values == 0).flatten(1).all(1)).flatten()}
        inputs = {int(i) for i in torch.nonzero((values == 0).transpose(0, 1).flatten(1).all(1)).flatten()}
        if set(stats.dead_out) != dead:
            wrong.append(f"{stats.name}: {len(stats.dead_out)} dead filters, {len(dead)} counted")
            by_input = set(stats.dead_out) == inputs
            likely += ["dead-per-input", "dead-wrong"] if by_input else ["dead-wrong", "dead-per-input"]
            return

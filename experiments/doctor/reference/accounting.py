"""What a network costs and which channels it needs, by brute force on the network itself.

Nothing of the analysis in src/pruning is used: hooks see what passes, autograd says what the output depends on, and
torch's own counter counts.

    a channel is needed   it differs between images or pixels, and d output / d channel is not 0
    zeros                 share of the weights that are exactly 0, as the network reads them
    dead                  a filter W[o] of which all weights are 0
    MACs, dense           weights x output pixels; unstructured: non-zero weights x output pixels
    BOPs                  MACs x weight bits x 32
    ratio                 cost of the dense FP32 network / cost of the compressed one

Axis letters: N images, L layers, O output channels, I input channels, k kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from experiments.doctor.expected import ExpectedQuantizer
from utils_quantization import eval_mode, latent_weight, quantized_layers, shared_quantized_weights

FLOAT_BITS = ACTIVATION_BITS = 32.0
KINDS = (nn.modules.conv._ConvNd, nn.Linear)
VARIES, DEPENDS = 1e-5, 1e-7  # relative; float32's rounding is below, a channel that lives far above


@dataclass(frozen=True)
class Layer:
    """One convolution or linear layer as the network reads it.

    weight: quantized, (O, I, k...); latent: before the quantizer. rough_bits: before rounding; most_bits: the largest
    that its quantizer has. dead_zone: d / (2 R). pixels: how often each weight is used for one image. left: MACs of the
    layer in the network that removal leaves.
    """

    name: str
    weight: Tensor
    latent: Tensor
    quantized: bool = False
    bits: float = FLOAT_BITS
    rough_bits: float = FLOAT_BITS
    most_bits: float = FLOAT_BITS
    dead_zone: float = math.nan
    pixels: int = 0
    left: float = 0.0

    @property
    def dense(self) -> int:
        """MACs of all weights, for one image."""
        return self.weight.numel() * self.pixels


@dataclass(frozen=True)
class Account:
    """The figures of a network, piece by piece.

    weight: of which zeros are counted. dead: flags (O,) of a weight. bits: that are reported; cost_bits, activation:
    that BOPs are counted with. nonzero, left: MACs without and after removal; paid: the MACs of these that BOPs are
    counted of. dense: bits of the baseline's weights. share: the network's figure from those of its layers.
    """

    weight: Callable[[Layer], Tensor] = lambda layer: layer.weight
    dead: Callable[[Tensor], Tensor] = lambda weight: (weight == 0).flatten(1).all(1)
    bits: Callable[[Layer], float] = lambda layer: layer.bits
    cost_bits: Callable[[Layer], float] = lambda layer: layer.bits
    activation: Callable[[Layer], float] = lambda layer: ACTIVATION_BITS
    nonzero: Callable[[Layer], float] = lambda layer: float(layer.weight.count_nonzero()) * layer.pixels
    left: Callable[[Layer], float] = lambda layer: layer.left
    paid: Callable[[Layer, float], float] = lambda layer, macs: macs
    dense: Callable[[Layer], float] = lambda layer: float(layer.dense)
    dense_bits: Callable[[Layer], float] = lambda layer: FLOAT_BITS
    ratio: Callable[[float, float], float] = lambda dense, cost: dense / cost if cost else math.inf
    share: Callable[[Tensor, Tensor], Tensor] = lambda values, sizes: (values * sizes).sum() / sizes.sum()

    def figures(self, layers: Sequence[Layer]) -> dict[str, Tensor]:
        """All figures of these layers, (L,), the ratios of the network, (2,), after removal last, and its own, (1,)."""
        weights = [self.weight(x) for x in layers]
        sizes, zeros = _numbers(w.numel() for w in weights), _numbers((w == 0).double().mean() for w in weights)
        dead, bits = torch.cat([self.dead(w).double().cpu() for w in weights]), _numbers(map(self.bits, layers))
        macs = {"non-zero weights": _numbers(map(self.nonzero, layers)), "removal": _numbers(map(self.left, layers))}
        cost = _numbers(self.cost_bits(x) * self.activation(x) for x in layers)
        bops = {key: cost * _numbers(map(self.paid, layers, each.tolist())) for key, each in macs.items()}
        dense = _numbers(map(self.dense, layers))
        dense_bops = dense * _numbers(map(self.dense_bits, layers)) * ACTIVATION_BITS
        return {
            "zeros": zeros,
            "dead filters": dead,
            "bits": bits,
            "dead zones": _numbers(x.dead_zone for x in layers),
            "sparsity": self.share(zeros, sizes).view(1),
            "dead share": dead.mean().view(1),
            "mean bits": bits.mean().view(1),
            **{f"MACs of {key}": each for key, each in macs.items()},
            **{f"BOPs of {key}": each for key, each in bops.items()},
            "mac ratios": self._ratios(dense, macs),
            "bops ratios": self._ratios(dense_bops, bops),
        }

    def _ratios(self, dense: Tensor, costs: dict[str, Tensor]) -> Tensor:
        """NaN where pixels were not counted."""
        whole = float(dense.sum())
        return _numbers(self.ratio(whole, float(each.sum())) if whole else math.nan for each in costs.values())


def _numbers(values: Any) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)


@torch.no_grad()
def layers_of(
    model: nn.Module, settings: ExpectedQuantizer | None, size: Sequence[int] | None = None
) -> tuple[Layer, ...]:
    """Every convolution and linear layer, with its quantizer as it is switched. size: of an image, to count pixels.

    settings: b = round(|tanh theta_bit| (b_max - b_min) + b_min); without them the quantizers are asked.
    """
    quantized, found = quantized_layers(model), []
    pixels = {} if size is None else _pixels(model, torch.zeros(1, *size, device=next(model.parameters()).device))
    with shared_quantized_weights(model):
        for name, module in model.named_modules():
            if not isinstance(module, KINDS) or (size is not None and name not in pixels):
                continue
            layer = Layer(name, module.weight.detach(), latent_weight(module).detach(), pixels=pixels.get(name, 0))
            bits = _bits(quantized[name], settings) if name in quantized else {}
            found.append(Layer(**{**vars(layer), **bits, "quantized": name in quantized}))
    return tuple(found)


def _bits(layer: nn.Module, settings: ExpectedQuantizer | None) -> dict[str, float]:
    quantizer = cast(Any, layer).parametrizations.weight[0].quantizer
    theta = {leaf: float(getattr(quantizer, leaf, math.nan)) for leaf in ("logit_dz", "logit_bit")}
    zone = {"dead_zone": 1 - abs(math.tanh(theta["logit_dz"]))}
    if settings is None or math.isnan(theta["logit_bit"]):
        bits = float(quantizer.get_bitwidth()) if hasattr(quantizer, "get_bitwidth") else math.nan
        return {**zone, "bits": bits, "rough_bits": bits, "most_bits": bits}
    if not settings.learns_bits:
        bits = float(settings.fixed_bits)
        return {**zone, "bits": bits, "rough_bits": bits, "most_bits": float(settings.max_bits)}
    rough = abs(math.tanh(theta["logit_bit"])) * (settings.max_bits - settings.min_bits) + settings.min_bits
    return {**zone, "bits": float(round(rough)), "rough_bits": rough, "most_bits": float(settings.max_bits)}


def _pixels(model: nn.Module, images: Tensor) -> dict[str, int]:
    """How often each layer's weights are used for one image, in all calls together."""
    found: dict[str, int] = {}

    def count(name: str, layer: Any, output: Tensor) -> None:
        outputs = getattr(layer, "out_channels", None) or layer.out_features
        found[name] = found.get(name, 0) + output[0].numel() // outputs

    named = [(name, module) for name, module in model.named_modules() if isinstance(module, KINDS)]
    hooks = [m.register_forward_hook(lambda layer, _, out, n=name: count(n, layer, out)) for name, m in named]
    try:
        with eval_mode(model):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def macs_of(network: nn.Module, size: Sequence[int]) -> dict[str, int]:
    """MACs for one image by module, "" for all of them, by torch.utils.flop_counter: it counts two operations a MAC."""
    counter = FlopCounterMode(display=False)
    with eval_mode(network), counter:
        network(torch.zeros(1, *size, device=next(network.parameters()).device))
    found = {path.partition(".")[2]: sum(each.values()) // 2 for path, each in counter.get_flop_counts().items()}
    return {**found, "": counter.get_total_flops() // 2}


@torch.enable_grad()
def needed_channels(model: nn.Module, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Which outputs (O,) and inputs (I,) of every layer are needed, by name; in eval mode, on images of noise.

    Each input is read through a copy of its own, so that its derivative is that by way of this layer alone.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    copies: dict[str, Tensor] = {}

    def read(name: str, inputs: Any) -> Any:
        copies[name] = inputs[0].clone()
        return (copies[name], *inputs[1:])

    def made(name: str, output: Tensor) -> Tensor:
        seen[name] = (output, copies[name])
        return output.clone()

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, KINDS):
            hooks.append(module.register_forward_pre_hook(lambda _, inputs, n=name: read(n, inputs)))
            hooks.append(module.register_forward_hook(lambda _, inputs, output, n=name: made(n, output)))
    try:
        with eval_mode(model):
            scores = model(images.clone().requires_grad_())
    finally:
        for hook in hooks:
            hook.remove()
    random = torch.rand(scores.shape, generator=torch.Generator().manual_seed(1)).to(scores) + 0.5
    tensors = [tensor for pair in seen.values() for tensor in pair]
    slopes = iter(torch.autograd.grad((scores * random).sum(), tensors, allow_unused=True))
    axis = {name: 1 if isinstance(model.get_submodule(name), nn.modules.conv._ConvNd) else -1 for name in seen}
    return {
        name: (_needed(output, next(slopes), axis[name]), _needed(source, next(slopes), axis[name]))
        for name, (output, source) in seen.items()
    }


def _needed(value: Tensor, slope: Tensor | None, axis: int) -> Tensor:
    value = value.detach().transpose(0, axis).flatten(1)  # (C, N x pixels)
    low, high = value.amin(1), value.amax(1)
    varies = high - low > VARIES * torch.maximum(low.abs(), high.abs())
    if slope is None:
        return torch.zeros_like(varies).cpu()
    slope = slope.transpose(0, axis).flatten(1).abs().amax(1)
    return (varies & (slope > DEPENDS * slope.max())).cpu()


@torch.no_grad()
def disturb_(model: nn.Module, images: Tensor) -> None:
    """Make `model` one in which no two figures are equal by chance, and every mistake in removal shows.

    Each quantized layer gets its own bit width and a wide dead zone; each convolution dead filters, two of them the
    same in all layers, so that both branches of an addition are constant there, and inputs that nothing reads.
    BatchNorm keeps about half of every channel above zero, and shifts what a dead filter gives.
    """
    random = torch.Generator().manual_seed(5)
    for place, layer in enumerate(quantized_layers(model).values()):
        quantizer = cast(Any, layer).parametrizations.weight[0].quantizer
        for leaf, theta in (("logit_dz", 0.5 + 0.15 * (place % 5)), ("logit_bit", 0.25 + 0.3 * (place % 6))):
            if isinstance(getattr(quantizer, leaf, None), Tensor):
                getattr(quantizer, leaf).fill_(theta)
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            latent = latent_weight(module)
            outputs, inputs = latent.shape[:2]
            if outputs > 5:
                latent[[0, 1]] = 0.0
                latent[torch.randperm(outputs, generator=random)[: 1 + outputs // 5]] = 0.0
            latent[:, torch.randperm(inputs, generator=random)[: inputs // 3]] = 0.0
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for norm in norms:
        for p, low in ((norm.weight, 0.5), (norm.bias, -0.5)):
            if p is not None:
                p.copy_(torch.rand(p.shape, generator=random) + low)

    def calibrate(norm: Any, inputs: Any) -> None:
        values = inputs[0].transpose(0, 1).flatten(1)  # (C, N x pixels)
        variance = values.var(1, correction=0)
        variance = torch.where(variance < 1e-6 * variance.mean(), variance.mean(), variance)  # of a dead filter
        norm.running_var.copy_(variance)
        shift = 0.3 * torch.randn(variance.shape, generator=random).to(variance)
        norm.running_mean.copy_(values.mean(1) + shift * variance.sqrt())

    hooks = [norm.register_forward_pre_hook(calibrate) for norm in norms]
    with eval_mode(model):
        model(images)
    for hook in hooks:
        hook.remove()

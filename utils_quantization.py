"""Attach quantizers to a network, switch them on and off, and walk the quantized layers.

A quantizer is attached as a parametrization of the layer's weight (`torch.nn.utils.parametrize`), so that
`layer.weight` is the quantized tensor wherever the network reads it, the latent weight stays a parameter
(`layer.parametrizations.weight.original`), and the state dictionary has the keys of the paper's public code.
"""

from __future__ import annotations

import difflib
import fnmatch
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

CANDIDATES = (nn.modules.conv._ConvNd, nn.Linear)
NORMALISATION_PATTERN = "bn"
WRAPPERS = (nn.DataParallel, DistributedDataParallel, AveragedModel)


class AttachmentError(ValueError):
    """A pattern that names nothing, or a network that no quantizer can be attached to."""


class FakeQuantParametrization(nn.Module):
    """The parametrization put on a layer's weight: `quantizer(w)` while `enabled`, `w` itself otherwise."""

    def __init__(self, quantizer: nn.Module, enabled: bool = True) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.enabled = enabled
        self._shared: Tensor | None = None  # this step's quantized weight, see `shared_quantized_weights`

    def forward(self, w: Tensor) -> Tensor:
        """The weight that the network reads, same shape as the latent weight `w`."""
        if not self.enabled:
            return w
        return cast(Tensor, self.quantizer(w)) if self._shared is None else self._shared

    def right_inverse(self, w: Tensor) -> Tensor:
        """Assigning to `layer.weight` sets the latent weight."""
        return w


def attach_weight_quantizers(
    model: nn.Module,
    exclude_layers: Sequence[str],
    quantizer: Callable[..., nn.Module],
    quantizer_kwargs: Mapping[str, Any] | None = None,
    enabled: bool = True,
) -> list[str]:
    """Attach one `quantizer(**quantizer_kwargs)` to the weight of every convolution and linear layer not excluded.

    Each is made with float32 and its weight's device as torch's defaults, and takes the mode (training or eval) of its
    layer. Attention's `out_proj` is a linear layer; embeddings, recurrent layers and attention's `in_proj_weight` are
    never quantized. A wrapper (`unwrapped`) is looked through: names and patterns are the network's own.

    exclude_layers: patterns. A pattern names a module path from the root by whole components and includes everything
        below it: "conv1" is the stem and not layer1.0.conv1, "layer1" is the whole first stage. Shell wildcards are
        allowed ("layer*.conv1", "*.downsample"). "bn" stands for the normalisation layers, which are never quantized.
    enabled: whether the quantizers are on.

    Returns the names of the layers it attached to, in the network's order. Raises AttachmentError, before anything is
    changed, for a pattern that matches no module, where no layer is left, and for a layer whose weight is no parameter
    of its own yet or any more (lazy, pruned, parametrized), or that `quantizer` refuses; for a ScriptModule, and for
    DistributedDataParallel, which would not synchronise the new parameters.
    """
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise AttachmentError(
            "DistributedDataParallel synchronises only the parameters that it was built with: attach to the network "
            "first, then model = DistributedDataParallel(model)"
        )
    model = unwrapped(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise AttachmentError(
            f"{model.original_name} is a ScriptModule, whose layers are compiled: attach to the network it was made "
            "from, before torch.jit.script or torch.jit.trace"
        )
    if isinstance(exclude_layers, str):
        raise AttachmentError(f"exclude_layers={exclude_layers!r} is one string: give a list, [{exclude_layers!r}]")
    modules = {name: module for name, module in model.named_modules() if name and ".parametrizations" not in name}
    candidates = {name: module for name, module in modules.items() if isinstance(module, CANDIDATES)}
    for pattern in exclude_layers:
        _check_pattern(pattern, list(modules), list(candidates))
    excluded = {name for name in candidates for pattern in exclude_layers if matches(name, pattern)}
    chosen = {name: module for name, module in candidates.items() if name not in excluded}
    if not chosen:
        raise AttachmentError(
            f"nothing to quantize: the network's convolution and linear layers are {_listing(list(candidates))} and "
            f"exclude_layers={list(exclude_layers)} leaves none of them; exclude less"
            if candidates
            else f"nothing to quantize: {type(model).__name__} has no convolution and no linear layer, and no other "
            "layer (embedding, recurrent, normalisation) is quantized"
        )
    fake_quants: dict[str, FakeQuantParametrization] = {}
    for name, module in chosen.items():
        if obstacle := _obstacle(module):
            raise AttachmentError(f"layer {name!r} {obstacle}, or exclude it")
        try:
            with default_tensors(module.weight.device):
                made = FakeQuantParametrization(quantizer(**(quantizer_kwargs or {})), enabled)
            parametrize.ParametrizationList([made], module.weight)  # all that registering checks; changes nothing
        except Exception as error:  # whatever a quantizer raises
            raise AttachmentError(f"layer {name!r} cannot be quantized: {error}; change that, or exclude it") from error
        fake_quants[name] = made
    for name, module in chosen.items():
        parametrize.register_parametrization(module, "weight", fake_quants[name])
        cast(nn.Module, module.parametrizations).train(module.training)
    return list(chosen)


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside DataParallel, DistributedDataParallel, AveragedModel or torch.compile's module, or `model`."""
    inner = model.module if isinstance(model, WRAPPERS) else getattr(model, "_orig_mod", None)
    return model if inner is None else unwrapped(cast(nn.Module, inner))


@contextmanager
def default_tensors(device: torch.device | str = "cpu") -> Iterator[None]:
    """Inside, new tensors are float32 on `device`, whatever torch.set_default_dtype and set_default_device said."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def toggle_quantization(model: nn.Module, enabled: bool) -> None:
    """Switch all quantizers on or off. Raises AttachmentError where the network has none."""
    fake_quants = _fake_quants(model)
    if not fake_quants:
        raise AttachmentError(
            f"{type(model).__name__} has no quantizer to switch; attach some with attach_weight_quantizers first"
        )
    for fake_quant in fake_quants.values():
        fake_quant.enabled = enabled


@contextmanager
def quantization(model: nn.Module, enabled: bool) -> Iterator[None]:
    """`with quantization(model, enabled=False): ...` switches, and restores what was there, also after an exception."""
    with _restored(_fake_quants(model).values(), "enabled"):
        toggle_quantization(model, enabled)
        yield


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is in eval mode; afterwards every module is in the mode it was in, also after an exception."""
    with _restored(model.modules(), "training"):
        model.eval()
        yield


@contextmanager
def shared_quantized_weights(model: nn.Module) -> Iterator[None]:
    """Inside, every quantized weight is computed once, all layers together, and shared by all who read it.

    A parametrized weight is otherwise recomputed at every access: by the forward pass, by the penalty, by each metric.
    Gradients flow as usual. The weights must not change inside. Without quantizers this does nothing.
    """
    enabled = {layer: fake_quant for layer, fake_quant in _fake_quants(model).items() if fake_quant.enabled}
    quantizers = [fake_quant.quantizer for fake_quant in enabled.values()]
    latent = [latent_weight(layer) for layer in enabled]
    kinds = {type(quantizer) for quantizer in quantizers}
    with _restored(enabled.values(), "_shared"):
        if len(kinds) == 1 and hasattr(kind := kinds.pop(), "quantize_many"):
            values = kind.quantize_many(quantizers, latent)
        else:
            values = [quantizer(w) for quantizer, w in zip(quantizers, latent, strict=True)]
        for fake_quant, value in zip(enabled.values(), values, strict=True):
            fake_quant._shared = value
        yield


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with a quantizer on their weight, by name, in the network's order; a wrapper is looked through."""
    return {name: layer for name, layer in unwrapped(model).named_modules() if _fake_quant(layer) is not None}


def quantizer_of(layer: nn.Module) -> nn.Module:
    """The quantizer of a quantized layer. Raises AttachmentError where it has none."""
    fake_quant = _fake_quant(layer)
    if fake_quant is None:
        raise AttachmentError(f"{type(layer).__name__} has no quantizer; attach one with attach_weight_quantizers")
    return fake_quant.quantizer


def latent_weight(layer: nn.Module) -> Tensor:
    """The full-precision weight behind a layer: what the optimizer moves, parametrized or not.

    A weight that is made of several tensors, as weight norm's, is its own.
    """
    if parametrize.is_parametrized(layer, "weight"):
        held: Any = layer.parametrizations.weight  # type: ignore[union-attr]
        return cast(Tensor, held.original if hasattr(held, "original") else layer.weight)
    return cast(Tensor, layer.weight)


def matches(name: str, pattern: str) -> bool:
    """Whether `pattern` names the module path `name` or one above it, by whole components."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


@contextmanager
def _restored(modules: Iterable[nn.Module], attribute: str) -> Iterator[None]:
    before = {module: getattr(module, attribute) for module in modules}
    try:
        yield
    finally:
        for module, value in before.items():
            setattr(module, attribute, value)


def _fake_quant(layer: nn.Module) -> FakeQuantParametrization | None:
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    first = layer.parametrizations.weight[0]  # type: ignore[union-attr, index]
    return first if isinstance(first, FakeQuantParametrization) else None


def _fake_quants(model: nn.Module) -> dict[nn.Module, FakeQuantParametrization]:
    found = {layer: _fake_quant(layer) for layer in model.modules()}
    return {layer: fake_quant for layer, fake_quant in found.items() if fake_quant is not None}


def _obstacle(layer: nn.Module) -> str:
    """Why no quantizer can be put on the layer's weight, and what to do about it; "" where one can."""
    if parametrize.is_parametrized(layer, "weight"):
        if _fake_quant(layer) is not None:
            return "has a quantizer already; attach once to a fresh network"
        kinds = ", ".join(type(each).__name__ for each in layer.parametrizations.weight)  # type: ignore[union-attr]
        return (
            f"has a weight that is parametrized already ({kinds}); make it permanent first, with "
            "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
        )
    weight = dict(layer.named_parameters(recurse=False)).get("weight")
    if weight is None:
        return (
            "has a weight that is computed from others (torch.nn.utils.prune, weight_norm, spectral_norm); make it "
            "permanent first, with prune.remove, remove_weight_norm or remove_spectral_norm"
        )
    return "is lazy and has no weight yet; run the network once first" if is_lazy(weight) else ""


def _check_pattern(pattern: str, modules: Sequence[str], candidates: Sequence[str]) -> None:
    if pattern == NORMALISATION_PATTERN or any(matches(name, pattern) for name in modules):
        return
    nested = sorted((name for name in modules if name.endswith("." + pattern)), key=lambda name: name.count("."))
    outermost = [name for name in nested if name.count(".") == nested[0].count(".")]
    meant = sorted((name for name in modules if pattern.endswith("." + name)), key=len, reverse=True)
    meant += outermost if len(outermost) == 1 else [f"*.{pattern}"] if nested else []
    meant += nested or difflib.get_close_matches(pattern, modules, n=len(modules) or 1, cutoff=0)
    left_out = {hint: sum(matches(name, hint) for name in candidates) for hint in meant}
    nearest = next((hint for hint, count in left_out.items() if count < max(len(candidates) / 2, 2)), "none")
    raise AttachmentError(
        f"exclude_layers pattern {pattern!r} matches no module; did you mean {nearest!r}? "
        f"A pattern is a path from the root; the modules are {_listing(modules)}"
    )


def _listing(names: Sequence[str]) -> str:
    return textwrap.shorten(", ".join(names) or "none", 800, placeholder=" and more")

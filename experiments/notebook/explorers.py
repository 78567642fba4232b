"""The explorers: controls and a figure that follows them, for a run that is in memory or was read back from its folder.

Each shows its controls and one figure; where no kernel answers the controls, the figure of the starting values stays.
A redraw takes well under half a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from experiments import figures
from experiments.notebook import lessons, live
from experiments.notebook.controls import widgets
from experiments.notebook.image_trace import ThreeNetworks
from experiments.pipeline import load_run
from src.data import ImageData
from src.runs import Snapshots
from utils_quantization import latent_weight, quantized_layers

__all__ = ["images", "kernels", "layers", "load_run", "quantizer", "quantizer_figure", "weight_samples"]

SAMPLE = 18_432  # as many weights as a 64 x 32 layer of 3 x 3 kernels
FRESH = "a fresh layer (Kaiming)"
WIDE = {"width": "min(34em, 95%)"}  # of a control: room to aim at one of hundreds of epochs or images


def weight_samples(seed: int = 0, model: nn.Module | None = None) -> dict[str, Tensor]:
    """Weights to try the quantizer on, by name: three textbook distributions, a fresh layer, the layers of `model`."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(SAMPLE, generator=generator) - 0.5
    samples = {
        FRESH: torch.randn(SAMPLE, generator=generator) * (2 / (32 * 9)) ** 0.5,
        "normal": torch.randn(SAMPLE, generator=generator),
        "Laplace (long tails)": -share.sign() * torch.log1p(-2 * share.abs()),
        "uniform (no tails)": 2 * share,
    }
    if model is not None:
        for name, layer in quantized_layers(model).items():
            samples[f"trained: {name}"] = latent_weight(layer).detach().float().cpu().flatten()
    return samples


def quantizer_figure(weights: Tensor, dead_zone: float, bits: int, *, subtitle: str = "") -> Figure:
    """The staircase and the histogram of `weights`, in units of their range R, and what the quantizer does to them.

    dead_zone: d / (2 R), its half width as a share of the range; bits: 2 to 16.
    """
    fixed = lessons.fixed_quantizer(dead_zone, bits)
    range_ = float(fixed.grid(weights).range) or 1.0
    with torch.no_grad():
        quantized = fixed(weights) / range_
    curve = lessons.staircase_curve("", dead_zone, bits)
    return figures.staircase_explorer_figure(
        curve, (weights / range_).numpy(), quantized.numpy(), bits, dead_zone, subtitle=subtitle
    )


def quantizer(samples: Mapping[str, Tensor], weights: str = "", dead_zone: float = 0.25, bits: int = 4) -> None:
    """Explore the quantizer: which weights, how wide a dead zone, how many bits. `weights`: the name to start with."""
    ipywidgets = widgets()

    def draw(weights: str, dead_zone: float, bits: int) -> Figure:
        note = f"{weights}; error: RMS of q(w) − w, over the RMS of w"  # one line, whatever the weights
        return quantizer_figure(samples[weights], dead_zone, bits, subtitle=note)

    live.explorer(
        draw,
        weights=_dropdown("weights", list(samples), weights or next(iter(samples))),
        dead_zone=ipywidgets.FloatSlider(
            value=dead_zone, min=0.01, max=0.95, step=0.01, description="dead zone", layout=WIDE
        ),
        bits=ipywidgets.IntSlider(value=bits, min=2, max=8, description="bits", layout=WIDE),
    )


def layers(snapshots: Snapshots, subtitle: str = "", layer: str = "") -> None:
    """Explore any quantized layer through the epochs. `layer`: the one to start with, by default the most pruned."""
    ipywidgets = widgets()

    def draw(layer: str, epoch: int) -> Figure:
        return figures.layer_figure(snapshots.view(layer, epoch), list(snapshots.through(layer)), subtitle=subtitle)

    newest = snapshots.epochs[-1] if len(snapshots) else 0
    first = layer or max(snapshots.layer_names, key=lambda name: int(snapshots.view(name, newest).dead.sum()))
    live.explorer(
        draw,
        layer=_dropdown("layer", snapshots.layer_names, first),
        epoch=ipywidgets.SelectionSlider(options=snapshots.epochs, value=newest, description="epoch", layout=WIDE),
    )


def kernels(model: nn.Module, layer: str = "") -> None:
    """Explore the kernels of any quantized convolution. `layer`: the one to start with, by default the most pruned."""
    weights: dict[str, Any] = {}
    with torch.no_grad():
        for name, module in quantized_layers(model).items():
            if isinstance(module, nn.Conv2d):
                weights[name] = module.weight.float().cpu().numpy()
    dead = {name: int((~weight.any(axis=(1, 2, 3))).sum()) for name, weight in weights.items()}

    def draw(layer: str) -> Figure:
        return figures.sparsity_map(weights[layer], layer)

    live.explorer(draw, layer=_dropdown("layer", list(weights), layer or max(dead, key=lambda name: dead[name])))


def images(model: nn.Module, data: ImageData, number: int = 0, layer: str = "") -> None:
    """Explore test images on their way through the float, the quantized and the compacted network."""
    ipywidgets = widgets()

    networks = ThreeNetworks(model, data)
    last = len(data.test_labels) - 1

    def draw(image: int, layer: str) -> Figure:
        return figures.image_figure(networks.trace(image, layer), subtitle=networks.missing)

    most = max(networks.stages.values(), key=lambda stage: np.float64(1 - len(stage.kept) / stage.channels))
    live.explorer(
        draw,
        image=ipywidgets.IntSlider(value=number, min=0, max=last, description="test image", layout=WIDE),
        layer=_dropdown("layer", list(networks.stages), layer or most.layer),
    )


def _dropdown(label: str, names: Any, first: str) -> Any:
    ipywidgets = widgets()

    return ipywidgets.Dropdown(options=list(names), value=first, description=label, layout=WIDE)

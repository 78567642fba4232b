"""The explorers: controls and what follows them, for a run that is in memory or was read back from its folder.

Each shows its controls and its displays; where no kernel answers the controls, the starting values stay.
"""

from __future__ import annotations

import functools
import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from experiments import figures
from experiments.doctor import Report, report_figure, report_table
from experiments.notebook import lessons, live
from experiments.notebook.image_trace import ThreeNetworks
from experiments.pipeline import SavedRun, comparison, contents
from src.data import ImageData
from src.runs import REACH, RunError, Snapshots
from utils_quantization import default_tensors, latent_weight, quantized_layers

SAMPLE = 18_432  # as many weights as a 64 x 32 layer of 3 x 3 kernels
QUANTILES = 801  # of each sample, for a page
MOST_SNAPSHOTS = 800  # layers times epochs, for a page: about 400 kB
PICTURES = 8  # for a page, of an explorer that has no numbers for it: each takes 0.1 s
WIDE = {"width": "min(48em, 98%)"}  # of a control: room to aim at one of hundreds of epochs or images, or for a fault
layer_menus: dict[str, tuple[widgets.Dropdown, str]] = {}  # by explorer: its menu, what stands before a layer's name


@default_tensors()
def weight_samples(seed: int = 0, model: nn.Module | None = None) -> dict[str, Tensor]:
    """Weights to try the quantizer on, by name: three textbook distributions, a fresh layer, the layers of `model`."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(SAMPLE, generator=generator) - 0.5
    samples = {
        "a fresh layer (Kaiming)": torch.randn(SAMPLE, generator=generator) * (2 / (32 * 9)) ** 0.5,
        "normal": torch.randn(SAMPLE, generator=generator),
        "Laplace (long tails)": -share.sign() * torch.log1p(-2 * share.abs()),
        "uniform (no tails)": 2 * share,
    }
    trained = quantized_layers(model) if model is not None else {}
    for name, layer in trained.items():
        samples[f"trained: {name}"] = latent_weight(layer).detach().float().cpu().flatten()
    return samples


def quantizer(samples: Mapping[str, Tensor], weights: str = "") -> None:
    """Explore the quantizer: which weights, how wide a dead zone, how many bits. `weights`: the name to start with.

    All is drawn in units of the range R of the weights; the dead zone is d / (2 R).
    """

    @torch.no_grad()
    def draw(weights: str, dead_zone: float, bits: int) -> Figure:
        fixed, values = lessons.fixed_quantizer(dead_zone, bits), samples[weights]
        range_ = float(fixed.grid(values).range) or 1.0
        curve = lessons.staircase_curve("", dead_zone, bits)
        shown = (values / range_).numpy(), (fixed(values) / range_).numpy()
        note = f"{weights}; error: RMS of q(w) − w, over the RMS of w"  # one line, whatever the weights
        return figures.staircase_explorer_figure(curve, *shown, bits, dead_zone, subtitle=note)

    start = weights or next(iter(samples))
    live.explorer(
        draw,
        page={"kind": "quantizer", "start": start, "samples": {name: _shape(one) for name, one in samples.items()}},
        weights=_layer_menu(
            "quantizer", _dropdown("weights", samples, start, "Which weights to quantize"), "trained: "
        ),
        dead_zone=widgets.FloatSlider(
            0.25,
            min=0.01,
            max=0.95,
            step=0.01,
            description="dead zone",
            layout=WIDE,
            tooltip="Half the width of the dead zone, as a share of the range R",
        ),
        bits=widgets.IntSlider(
            4, min=2, max=8, description="bits", layout=WIDE, tooltip="Bits of a weight: 2 bits leave −R, 0 and R"
        ),
    )


@torch.no_grad()
def _shape(weights: Tensor) -> list[int]:
    """Weights in a page: their quantiles in ten thousandths of their range R, from the smallest to the largest.

    The shares of which they are the quantiles are (1 - cos pi t) / 2, t from 0 to 1: the tails need most of them.
    """
    range_ = float(lessons.fixed_quantizer(0.25, 4).grid(weights).range) or 1.0
    found = np.quantile(weights.numpy() / range_, (1 - np.cos(np.linspace(0, np.pi, QUANTILES))) / 2)
    return [round(10_000 * value) for value in found.tolist()]


def layers(snapshots: Snapshots, subtitle: str = "") -> None:
    """Explore any quantized layer through the epochs, from the most pruned one after the last."""

    def draw(layer: str, epoch: int) -> Figure:
        return figures.layer_figure(snapshots.view(layer, epoch), list(snapshots.through(layer)), subtitle=subtitle)

    newest = snapshots.epochs[-1]
    most = max(snapshots.layer_names, key=lambda name: int(snapshots.view(name, newest).dead.sum()))
    tooltip = "The epoch that is shown; 0 is before training"
    epochs = widgets.SelectionSlider(
        options=snapshots.epochs, value=newest, description="epoch", layout=WIDE, tooltip=tooltip
    )
    play = widgets.Play(
        max=len(snapshots.epochs) - 1, interval=500, show_repeat=False, tooltip="Run through the epochs"
    )
    widgets.jslink((play, "value"), (epochs, "index"))
    menu = _layer_menu("layers", _dropdown("layer", snapshots.layer_names, most))
    live.explorer(draw, page=_courses(snapshots, most), helpers=[play], layer=menu, epoch=epochs)


def _courses(snapshots: Snapshots, start: str) -> dict[str, Any]:
    """The snapshots in a page, of a long run some epochs: the first, the last, and others evenly between them."""
    most = max(2, MOST_SNAPSHOTS // len(snapshots.layer_names))
    kept = {snapshots.epochs[i] for i in np.linspace(0, len(snapshots.epochs) - 1, most).round().astype(int)}
    return {
        "kind": "layers",
        "start": start,
        "reach": REACH,
        "layers": {
            layer: [
                {
                    "epoch": one.epoch,
                    "counts": one.counts.tolist(),
                    "zone": round(one.zone_share, 5),
                    "bits": one.bits,
                    "zeros": round(one.sparsity, 5),
                    "dead": "".join(map(str, one.dead.astype(int))),
                }
                for one in snapshots.through(layer)
                if one.epoch in kept
            ]
            for layer in snapshots.layer_names
        },
    }


@torch.no_grad()
def kernels(model: nn.Module) -> None:
    """Explore the kernels of any quantized convolution, from the most pruned one."""
    convolutions = {name: one for name, one in quantized_layers(model).items() if isinstance(one, nn.Conv2d)}
    weights = {name: one.weight.float().cpu().numpy() for name, one in convolutions.items()}
    dead = {name: int((~weight.any(axis=(1, 2, 3))).sum()) for name, weight in weights.items()}
    by_dead = sorted(weights, key=lambda name: -dead[name])
    menu = _layer_menu("kernels", _dropdown("layer", weights, by_dead[0]))
    kept = sorted(by_dead[:PICTURES], key=list(weights).index)
    live.explorer(lambda layer: figures.sparsity_map(weights[layer], layer), pictures=("layer", kept), layer=menu)


def images(model: nn.Module, data: ImageData) -> None:
    """Explore test images on their way through the float, the quantized and the compacted network."""
    networks = ThreeNetworks(model, data)

    def draw(image: int, layer: str) -> Figure:
        return figures.image_figure(networks.trace(image, layer), subtitle=networks.missing)

    most = min(networks.stages.values(), key=lambda stage: len(stage.kept) / stage.channels)
    images = len(data.test_labels)
    tooltip = f"One of the {images:,} test images"
    image = widgets.IntSlider(0, max=images - 1, description="test image", layout=WIDE, tooltip=tooltip)
    button = widgets.Button(description="next misclassified image", layout={"width": "auto"})
    button.tooltip = "Go to the next test image that the quantized network gets wrong"

    def jump(_: object) -> None:
        wrong = networks.misclassified
        image.value = next((number for number in wrong if number > image.value), wrong[0] if wrong else image.value)

    button.on_click(jump)
    menu = _layer_menu("images", _dropdown("layer", networks.stages, most.layer))
    live.explorer(draw, pictures=("image", range(min(images, PICTURES))), image=image, layer=menu, helpers=[button])


def faults(breaks: Mapping[str, str], diagnose: Callable[[str], Report]) -> None:
    """Choose a fault: what the doctor says of a pipeline that has it, and the checks as a figure. Starts at the second.

    breaks: one sentence on each fault, by its name. diagnose: the report on a pipeline with the fault of that name; it
    may take seconds.
    """
    report_on = functools.cache(diagnose)

    def answer(fault: str) -> live.Bundle:
        report = report_on(fault)
        table = report_table(report, only_failed=True).to_html() if report.faulty else ""
        page = (
            f"<p><b>What was broken:</b> {html.escape(breaks[fault])}</p><p><b>{html.escape(report.headline)}</b></p>"
        )
        return {"text/html": page + table, "text/plain": f"{breaks[fault]}\n{report.text(passed=False)}"}, {}

    live.explorer(
        answer,
        lambda fault: report_figure(report_on(fault)),
        busy="The doctor examines a pipeline with this fault; what is below is still about the one before ...",
        fault=_dropdown("fault", breaks, list(breaks)[1], "What is broken in the pipeline that the doctor examines"),
    )


def runs(folder: str | Path) -> None:
    """Choose among the runs around `folder`, at first six of them; curves, plane and tables follow.

    A run alone has no curves: those are the ones of its diagnostic plots.
    Raises RunError where no run can be read.
    """
    known: dict[str, SavedRun] = {}
    refused: list[str] = []
    for label, path in comparison.find_runs(folder).items():
        try:
            known[label] = comparison.read_run(path, label)
        except ValueError as error:
            refused.append(f"Not read: {label}: {error}")
    if not known:
        raise RunError(f"no run to compare around {str(folder)!r}: {contents(Path(folder))}")

    def chosen(runs: Sequence[str]) -> list[SavedRun]:
        return [known[label] for label in runs or list(known)[:1]]

    def tables(runs: Sequence[str]) -> live.Bundle:
        page = []
        for heading, rows in comparison.tables(chosen(runs)).items():
            shown = figures.plain_table(rows).to_html() if rows else "<p>None: all settings are the same.</p>"
            page.append(f"<p><b>{heading}</b></p>{shown}")
        page += [f"<p>{html.escape(line)}</p>" for line in [*comparison.notices(chosen(runs)), *refused]]
        text = [comparison.as_text(chosen(runs)), *refused]
        return {"text/html": "\n".join(page), "text/plain": "\n\n".join(text)}, {}

    def curves(runs: Sequence[str]) -> Figure:
        return figures.run_curves([comparison.series(run) for run in chosen(runs)])

    live.explorer(
        *([curves] if len(known) > 1 else []),
        lambda runs: figures.run_plane([comparison.series(run) for run in chosen(runs)]),
        tables,
        runs=widgets.SelectMultiple(
            options=list(known), value=tuple(known)[:6], rows=min(len(known), 8), description="runs", layout=WIDE
        ),
    )


def _dropdown(
    label: str, names: Iterable[str], first: str, tooltip: str = "The layer that is shown"
) -> widgets.Dropdown:
    return widgets.Dropdown(options=list(names), value=first, description=label, layout=WIDE, tooltip=tooltip)


def _layer_menu(explorer: str, menu: widgets.Dropdown, before: str = "") -> widgets.Dropdown:
    """`menu` shows the layer that is chosen in another explorer, and the others the one that is chosen in it."""
    layer_menus[explorer] = menu, before

    def follow(change: Any) -> None:
        if change["new"].startswith(before) and (menu, before) in layer_menus.values():
            for other, prefix in layer_menus.values():
                wanted = prefix + change["new"].removeprefix(before)
                if wanted in other.options:
                    other.value = wanted

    menu.observe(follow, names="value")
    return menu

"""From a configuration to a trained, evaluated run: the steps that the script and the notebook share.

data -> network -> quantizers -> optimizer -> epochs -> evaluation. Each step is a function that can be called alone:
the notebook does so, the script runs them one after another.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from experiments import figures
from experiments.evaluator import EvalResult, Evaluator
from experiments.pipeline.budget import BudgetControl
from experiments.pipeline.config import RunConfig, suited_to
from experiments.pipeline.run import Baseline, Run
from experiments.pipeline.verdict import Verdict, judge
from experiments.sparsity import coupled_group_lasso
from resnet import NETWORKS, ResNet
from src import runs, training
from src.data import ImageData, load_data, steps_per_epoch
from src.quantizer import DeadZoneLDZCompander
from src.runs import RunFolder
from src.storage import Notify
from src.training import History, keep_freed_memory, repeatable
from utils_quantization import attach_weight_quantizers, default_tensors, quantized_layers


def prepare_data(config: RunConfig, notify: Notify = lambda line: None) -> tuple[RunConfig, ImageData]:
    """Load the data, and return it with the configuration that suits it; `notify` is told what was changed.

    Raises DataError or TrainingError. Also prepares this process: torch's own default type and device,
    `keep_freed_memory`, `repeatable`.
    """
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    keep_freed_memory()
    device = training.pick_device(config.device)
    repeatable(device)
    data = load_data(config.data, config.data_root, config.limit, notify)
    suited, count = suited_to(config, data.name), len(data.train_labels)
    if suited != config:
        batches = f"batches of {suited.batch_size}, {suited.epochs} epochs"
        notify(f"preset {config.preset!r} becomes {suited.preset!r} on the {data.name}: {batches}")
    if suited.batch_size > count:
        suited = replace(suited, batch_size=max(2, count))
        notify(f"batch size lowered to {count}: there are no more training images")
    return suited, data.to(device)


def build_network(config: RunConfig, data: ImageData, device: torch.device) -> ResNet:
    """The full-precision network, from `config.seed`, laid out for speed."""
    torch.manual_seed(config.seed)
    return _network(config, data).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


@default_tensors()
def _network(config: RunConfig, data: ImageData) -> ResNet:
    return NETWORKS[config.model](data.num_classes, config.shortcut)


def attach(config: RunConfig, model: nn.Module) -> list[str]:
    """Attach the quantizers `config` describes and return the layers' names."""
    quantizer, kwargs = DeadZoneLDZCompander, config.quantizer_kwargs
    if config.stem_bits is None:
        return attach_weight_quantizers(model, config.exclude_layers, quantizer, kwargs)
    stem, *others = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    attached = attach_weight_quantizers(model, [*config.exclude_layers, stem], quantizer, kwargs)
    kwargs |= {"fixed_bit_val": config.stem_bits, "learnable_bit": False, "learnable_deadzone": False}
    return attach_weight_quantizers(model, others, quantizer, kwargs) + attached


def expected_layers(config: RunConfig, model: nn.Module) -> list[str]:
    """The layers that should have a quantizer: every convolution, the first one only where it has a bit width of its
    own; with patterns of one's own, theirs."""
    if config.exclude_layers != RunConfig("").exclude_layers:
        return list(quantized_layers(model))
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    return convolutions if config.stem_bits else convolutions[1:]


def build_optimizer(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with the three groups: weights, dead-zone logits, bit-width logits."""
    return training.make_optimizer(training.parameter_groups(model, **config.group_kwargs))


def build_run(config: RunConfig, data: ImageData) -> Run:
    """All of the above, in order, for a configuration and data from `prepare_data`."""
    device = data.train_images.device
    model = build_network(config, data, device)
    attached = attach(config, model)
    control = BudgetControl(config, model, _network(config, data)) if config.target else None
    penalty = coupled_group_lasso(model) if config.peak > 0 else None
    return Run(
        config=config,
        data=data,
        device=device,
        precision=training.pick_precision(config.precision, device),
        model=model,
        attached=attached,
        optimizer=build_optimizer(config, model),
        objective=control.objective if control else config.objective(penalty),
        history=History(config.epochs),
        control=control,
    )


def evaluate_run(run: Run) -> tuple[EvalResult, float]:
    """Compression against the dense FP32 network, and the test accuracy computed in float32."""
    result = Evaluator(_network(run.config, run.data)).evaluate(run.model)
    return result, training.evaluate(run.model, run.data)[1]


def judge_run(run: Run, accuracy: float | None = None, baseline: Baseline | None = None) -> Verdict:
    """The verdict on a finished run. accuracy: in float32, compared with that of its baseline."""
    steps = len(run.history) * steps_per_epoch(run.data, run.config.batch_size)
    accuracies = (accuracy, baseline.accuracy) if baseline and accuracy is not None else None
    layers = expected_layers(run.config, run.model)
    return judge(run.history, run.config, run.data.num_classes, layers, steps, accuracies)


def save_figures(run: Run, folder: RunFolder, baseline: Baseline | None = None) -> None:
    """Write the four diagnostic plots. One that cannot be drawn or written is a warning."""
    history, shown = run.history, {"subtitle": run.subtitle}
    chance, plain = 1 / run.data.num_classes, baseline.history if baseline else None
    budget = run.config.budget.share if run.config.budget else None
    drawings: dict[str, Callable[[], Figure]] = {
        "accuracy_curve.png": partial(figures.accuracy_curve, history, chance=chance, baseline=plain, **shown),
        "sparsity_curves.png": partial(figures.sparsity_curves, history, budget=budget, **shown),
        "channel_liveness.png": partial(figures.channel_liveness, history.last.layers, **shown),
        "per_layer_channels.png": partial(figures.per_layer_channels, history.last.layers, **shown),
    }
    for name, draw in drawings.items():
        try:
            data = figures.png_bytes(draw())
        except Exception as error:  # whatever a drawing library can raise: no picture is worth a run
            text = f"{name} could not be drawn: {type(error).__name__}: {error}; the run continues"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        else:
            folder.try_write(name, data)


def described(config: RunConfig, data: ImageData, device: torch.device, precision: torch.dtype) -> dict[str, Any]:
    """What a run is, before it has any result: configuration, data, machine, versions."""
    return {
        "config": asdict(config),
        "data": {
            "name": data.name,
            "title": data.title,
            "notice": data.notice,
            "train_images": len(data.train_labels),
            "test_images": len(data.test_labels),
            "classes": list(data.class_names),
            "sha256": data.digest,
        },
        "machine": runs.machine(device, precision),
        "versions": runs.versions(),
    }


def summary(
    run: Run,
    result: EvalResult,
    accuracy: float,
    judged: Verdict,
    diagnosis: Mapping[str, Any] | None = None,
    baseline: Baseline | None = None,
    packed_ratio: float | None = None,
    time_ratio: float | None = None,
) -> dict[str, Any]:
    """What run.json holds: what the run is, results, verdict, and the doctor's report where there is one.

    packed_ratio: FP32 state over packed file, in bytes. time_ratio: of the unpacked network over the dense one's.
    """
    last, structured = run.history.last, result.structured_stats
    baseline_bops = structured.total_bops * result.structured_bops_ratio
    results = {
        "epochs": len(run.history),
        "accuracy": last.accuracy,
        "accuracy_float32": accuracy,
        **({"baseline_accuracy": baseline.accuracy} if baseline else {}),
        **({"budget_cost": last.cost} if last.cost is not None else {}),
        **({"packed_ratio": packed_ratio} if packed_ratio else {}),
        **({"time_ratio": time_ratio} if time_ratio else {}),
        "unstructured_sparsity": last.unstructured_sparsity,
        "structured_sparsity": last.structured_sparsity,
        "mean_bits": last.mean_bits,
        "structured_macs": structured.total_macs,
        "structured_mac_ratio": result.structured_mac_ratio,
        "structured_bops_ratio": result.structured_bops_ratio,
        "unstructured_macs": result.unstructured_stats.total_macs,
        "unstructured_mac_ratio": result.unstructured_mac_ratio,
        "unstructured_bops_ratio": result.unstructured_bops_ratio,
        "relative_bops": result.unstructured_stats.total_bops / baseline_bops if baseline_bops else 0.0,
        "seconds": sum(record.seconds for record in run.history),
    }
    return {
        **described(run.config, run.data, run.device, run.precision),
        "quantized_layers": run.attached,
        # A network of which nothing is left has ratios that JSON cannot hold.
        "results": {name: value if math.isfinite(value) else None for name, value in results.items()},
        "in_words": in_words(results),
        "verdict": judged.to_json(),
        **({"doctor": dict(diagnosis)} if diagnosis is not None else {}),
    }


def compression_table(result: EvalResult, accuracy: float) -> str:
    """Compression a layer at a time, and in total, as text. accuracy: a share, of the network in float32."""
    row = "{:<16} {:>4} {:>7} {:>8} {:>8} {:>14} {:>13}"
    header = row.format("layer", "bits", "zeros", "dead", "left", "MACs non-zero", "MACs removed")
    structured, unstructured = result.structured_stats, result.unstructured_stats
    lines = [header, "-" * len(header)]
    quantized, _ = result.totals()
    for layer in [*result.rows(), quantized]:
        dead, left = (f"{layer[name]:>3.0f}/{layer['channels']:<4.0f}" for name in ("dead filters", "channels left"))
        macs = (f"{layer[name]:,.0f}" for name in ("MACs, non-zero weights", "MACs, after removal"))
        lines.append(row.format(layer["layer"], f"{layer['bits']:.1f}", f"{layer['zeros']:.1%}", dead, left, *macs))
    lines.insert(-1, "-" * len(header))
    lines.append(row.format("network", "", "", "", "", f"{unstructured.total_macs:,}", f"{structured.total_macs:,}"))
    for kind, macs_ratio, bops_ratio, meaning in (
        ("Unstructured:", result.unstructured_mac_ratio, result.unstructured_bops_ratio, "every non-zero weight"),
        ("Structured:", result.structured_mac_ratio, result.structured_bops_ratio, "after exact channel removal"),
    ):
        ratios = f"{macs_ratio:.2f}x fewer MACs, {bops_ratio:.2f}x fewer BOPs than dense FP32"
        lines.append(f"{kind:<13} {ratios} ({meaning})")
    lines.append("BOPs = MACs x weight bits x 32-bit activations; layers without quantizer have 32-bit weights")
    return "\n".join([*lines, f"Accuracy of the quantized network in float32: {100 * accuracy:.2f}%"])


def in_words(results: Mapping[str, float]) -> list[str]:
    """What the compression cost and gained, in sentences. results: those of `summary`."""
    accuracy, uncompressed = results["accuracy_float32"], results.get("baseline_accuracy")
    right = f"The compressed network classifies {accuracy:.1%} of the test images correctly"
    if uncompressed is None:
        sentences = [f"{right}; what the uncompressed one reaches was not measured."]
    else:
        points = 100 * (uncompressed - accuracy)
        change = f"{points:.1f} points less" if points > 0 else f"{-points:.1f} points more"
        sentences = [f"{right}, {change} than the uncompressed one ({uncompressed:.1%})."]
    work = f"needs {1 / results['structured_mac_ratio']:.0%} of the multiply-adds"
    packed, time = results.get("packed_ratio"), results.get("time_ratio")
    sentences.append(f"Its file is {packed:.0f} times smaller, and it {work}." if packed else f"It {work}.")
    if time:
        sentences.append(
            f"Read back from that file, it takes {time:.0%} of the uncompressed network's time on this machine."
        )
    return sentences

"""What the pipeline costs: one training step of ResNet-20 on synthetic images of CIFAR-10's shape, in three variants.

    plain_float32  the network alone: float32, contiguous, a batch that is ready
    plain_fast     the same in the fastest mode the machine has: channels_last, and bfloat16 where it multiplies that
    full           the pipeline in that mode, through src.training.train_epoch: augmentation, quantizers, squared
                   logits, coupled group lasso at the debug preset's peak

Time: all variants take turns in one process, one step each a round, so that a machine that slows down slows all of
them; the order rotates. Printed are the median and the quartiles of the rounds; a ratio is the median of the ratios
within a round. Two steps of each come first, uncounted. On a GPU a turn is 20 steps between two synchronisations.

Memory: a process of its own for each variant. It builds everything and then takes three steps. The rise counts:
activations, gradients, optimizer state and all scratch memory, but neither Python nor the images.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from experiments import pipeline
from experiments.pipeline import RunConfig, Take, spread, synchronize, time_in_turns
from src import training
from src.data import CIFAR10_MEAN, CIFAR10_STD, ImageData, normalize
from src.runs import machine, versions

LIMITS = {"full_over_plain": 1.15, "peak_memory_full_over_plain": 1.2}


def synthetic_data(images: int) -> ImageData:
    """Random bytes with CIFAR-10's shape, statistics and number of classes."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (images,), generator=generator)
    parts = (pixels, labels, pixels[:10], labels[:10])
    return ImageData("synthetic", "random images", *parts, tuple("0123456789"), CIFAR10_MEAN, CIFAR10_STD)


def plain(config: RunConfig, data: ImageData, device: torch.device, fast: bool) -> Take:
    """A step of the network alone, on one batch; fast: channels_last and the fastest precision."""
    layout = torch.channels_last if fast else torch.contiguous_format
    precision = training.pick_precision(config.precision, device) if fast else torch.float32
    model = pipeline.build_network(config, data, device).to(memory_format=layout)
    optimizer, objective = pipeline.build_optimizer(config, model), training.Objective()
    images = normalize(data.train_images[: config.batch_size], data.mean, data.std).to(device, memory_format=layout)
    labels = data.train_labels[: config.batch_size].to(device)
    step = training.GraphedStep() if device.type == "cuda" else training.train_step
    return lambda: step(model, optimizer, images, labels, objective, 0.0, precision)


def full(config: RunConfig, data: ImageData, device: torch.device) -> Take:
    """A step of the pipeline as it is: the run that the script builds, and its own loop over epochs."""
    run = pipeline.build_run(config, data.to(device))
    means = training.EpochMeans()

    def steps() -> Iterator[training.Step]:
        for epoch in itertools.count():
            settings = pipeline.epoch_settings(config, epoch, run.precision)
            # every step with the penalty on, as most of a run is, and with rates that never fall
            settings |= {"epochs": epoch + 1, "coefficient": config.peak, "lr_lambda": lambda done: 1.0}
            yield from training.train_epoch(
                run.model, run.optimizer, run.data, run.objective, step=run.step_fn, **settings
            )

    endless = steps()
    return lambda: means.add(next(endless))


VARIANTS: dict[str, tuple[str, Callable[[RunConfig, ImageData, torch.device], Take]]] = {
    "plain_float32": ("plain, float32, contiguous", partial(plain, fast=False)),
    "plain_fast": ("plain, fastest mode", partial(plain, fast=True)),
    "full": ("full pipeline, fastest mode", full),
}
RATIOS = {
    "full_over_plain": ("full", "plain_fast"),
    "plain_float32_over_fast": ("plain_float32", "plain_fast"),
}


def bench_training(config: RunConfig, images: int, rounds: int, memory: bool = True) -> dict[str, Any]:
    """Time the variants, measure their memory, and return the figures that `--json` writes.

    config: batch size, device and precision count. images: size of the synthetic training set.
    """
    device = training.pick_device(config.device)
    precision = training.pick_precision(config.precision, device)
    training.keep_freed_memory()  # for all variants, as the pipeline does it for itself
    training.repeatable(device)
    data = synthetic_data(max(images, config.batch_size))
    step_fns = {name: build(config, data, device) for name, (_, build) in VARIANTS.items()}
    seconds = time_in_turns(step_fns, rounds, device)
    step_fns.clear()
    variants: dict[str, Any] = {}
    for name, (label, _) in VARIANTS.items():
        figures = spread(seconds[name])
        variants[name] = {
            "label": label,
            "seconds_per_step": figures,
            "images_per_second": config.batch_size / figures["median"],
            "memory": memory_of(name, config) if memory else None,
        }
    ratios: dict[str, Any] = {
        name: spread([a / b for a, b in zip(seconds[over], seconds[under], strict=True)])
        for name, (over, under) in RATIOS.items()
    }
    if memory:
        used, least = (variants[name]["memory"]["step_bytes"] for name in ("full", "plain_fast"))
        ratios["peak_memory_full_over_plain"] = used / max(least, 1)
    return {
        "benchmark": "training",
        "network": config.model,
        "batch_size": config.batch_size,
        "images": images,
        "rounds": rounds,
        "machine": {**machine(device, precision), "cores": os.cpu_count()},
        "versions": versions(),
        "variants": variants,
        "ratios": ratios,
        "limits": LIMITS,
    }


def training_table(result: Mapping[str, Any]) -> str:
    """The figures of `bench_training` as text."""
    host = result["machine"]
    lines = [
        f"One training step of {result['network']}, batch {result['batch_size']}, {result['rounds']} rounds in turns",
        f"{host['device_name']} ({host['device']}), {host['threads']} threads, fastest mode {host['precision']}, "
        f"torch {result['versions']['torch']}",
        "",
        f"{'variant':<30} {'seconds':>9} {'quartiles':>17} {'images/s':>9} {'step memory':>12}",
    ]
    for variant in result["variants"].values():
        time_, memory = variant["seconds_per_step"], variant["memory"]
        used = f"{memory['step_bytes'] / 2**20:,.0f} MiB" if memory else "-"
        quartiles, rate = f"{time_['low']:.4f}..{time_['high']:.4f}", variant["images_per_second"]
        lines.append(f"{variant['label']:<30} {time_['median']:>9.4f} {quartiles:>17} {rate:>9,.0f} {used:>12}")
    lines.append("")
    for name, ratio in result["ratios"].items():
        value, quartiles = ratio, ""
        if isinstance(ratio, dict):
            value, quartiles = ratio["median"], f"{ratio['low']:.3f}..{ratio['high']:.3f}"
        limit = f"at most {LIMITS[name]:g}" if name in LIMITS else ""
        lines.append(f"{name.replace('_', ' '):<30} {value:>9.3f} {quartiles:>17} {limit:>15}".rstrip())
    return "\n".join(lines)


def peak_memory(step_fn: Take, device: torch.device) -> dict[str, int]:
    """Bytes before and at the highest point of three steps; meant for a process that does nothing else.

    The high-water mark of resident memory is VmHWM on Linux, because ru_maxrss of a child starts at its parent's, and
    ru_maxrss elsewhere; on CUDA it is the allocator's own.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts again from here
        before = _high_water_bytes()
    for _ in range(3):
        step_fn()
    synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _high_water_bytes()
    return {"before_bytes": before, "peak_bytes": peak, "step_bytes": peak - before}


def memory_of(variant: str, config: RunConfig) -> dict[str, int]:
    """`peak_memory` of one variant, in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure_memory, variant, config, torch.get_num_threads()).result()


def _measure_memory(variant: str, config: RunConfig, threads: int) -> dict[str, int]:
    torch.set_num_threads(threads)
    training.keep_freed_memory()
    device, data = training.pick_device(config.device), synthetic_data(4 * config.batch_size)
    return peak_memory(VARIANTS[variant][1](config, data, device), device)


def _high_water_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS

"""What the pipeline costs: one training step of ResNet-20 on synthetic images of CIFAR-10's shape, in three variants.

    plain_float32  the network alone: float32, contiguous, a batch that is ready
    plain_fast     the same in the fastest mode the machine has: channels_last, and bfloat16 where it multiplies that
    full           the pipeline in that mode, through src.training.train_epoch: augmentation, quantizers, squared
                   logits, coupled group lasso at the debug preset's peak

Time: all variants take turns in one process, one step each a round, so that a machine that slows down slows all of
them; the order rotates. Printed are the median and the quartiles of the rounds; a ratio is the median of the ratios
within a round. Three steps of each come first, uncounted; the time of the very first is told: it holds the compilation.
On a GPU a turn is 20 steps between two synchronisations.

Modes: on a GPU a step is a replayed CUDA graph. "eager" and "compile" time the plain and the full variant once more,
started by Python, or compiled first (src/training/compiled.py).

At once: several runs on one device, a process each, as many steps as each can take within the same seconds.

Memory: a process of its own for each variant. It builds everything and then takes three steps. The rise counts:
activations, gradients, optimizer state and all scratch memory, but neither Python nor the images.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch

from experiments import pipeline
from experiments.pipeline import STEPS_A_TURN, RunConfig, Take, spread, synchronize, time_in_turns
from src import training
from src.data import CIFAR10_MEAN, CIFAR10_STD, ImageData, normalize
from src.runs import machine, versions
from src.storage import log_info

MODES = {"eager": "started by Python", "compile": "compiled"}
SECONDS_AT_ONCE, SECONDS_TO_START = 10.0, 300.0
LIMITS = {"full_over_plain": 1.15, "peak_memory_full_over_plain": 1.2}


def synthetic_data(images: int) -> ImageData:
    """Random bytes with CIFAR-10's shape, statistics and number of classes."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (images,), generator=generator)
    parts = (pixels, labels, pixels[:10], labels[:10])
    return ImageData("synthetic", "random images", *parts, tuple("0123456789"), CIFAR10_MEAN, CIFAR10_STD)


def step_in(mode: str, device: torch.device) -> training.StepFunction:
    """What a step does in one of `MODES`; "" is a run's own."""
    fast = None if mode == "eager" else training.fast_step(device, mode == "compile", log_info)
    return fast or training.train_step


def plain(config: RunConfig, data: ImageData, device: torch.device, fast: bool, mode: str = "") -> Take:
    """A step of the network alone, on one batch; fast: channels_last and the fastest precision."""
    layout = torch.channels_last if fast else torch.contiguous_format
    precision = training.pick_precision(config.precision, device) if fast else torch.float32
    model = pipeline.build_network(config, data, device).to(memory_format=layout)
    optimizer, objective = pipeline.build_optimizer(config, model), training.Objective()
    images = normalize(data.train_images[: config.batch_size], data.mean, data.std).to(device, memory_format=layout)
    labels = data.train_labels[: config.batch_size].to(device)
    step = step_in(mode, device)
    return lambda: step(model, optimizer, images, labels, objective, 0.0, precision)


def full(config: RunConfig, data: ImageData, device: torch.device, mode: str = "") -> Take:
    """A step of the pipeline as it is: the run that the script builds, and its own loop over epochs."""
    run = pipeline.build_run(config, data.to(device))
    step = step_in(mode, device) if mode else run.step_fn
    means = training.EpochMeans()

    def steps() -> Iterator[training.Step]:
        for epoch in itertools.count():
            settings = pipeline.epoch_settings(config, epoch, run.precision)
            # every step with the penalty on, as most of a run is, and with rates that never fall
            settings |= {"epochs": epoch + 1, "coefficient": config.peak, "lr_lambda": lambda done: 1.0}
            yield from training.train_epoch(run.model, run.optimizer, run.data, run.objective, step=step, **settings)

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


def bench_training(
    config: RunConfig,
    images: int,
    rounds: int,
    memory: bool = True,
    modes: Sequence[str] = (),
    at_once: Sequence[int] = (),
) -> dict[str, Any]:
    """Time the variants, measure their memory, and return the figures that `--json` writes.

    config: batch size, device and precision count. images: size of the synthetic training set. modes: of `MODES`,
    beside a run's own. at_once: how many runs to train together.
    """
    device = training.pick_device(config.device)
    precision = training.pick_precision(config.precision, device)
    training.keep_freed_memory()  # for all variants, as the pipeline does it for itself
    training.repeatable(device)
    data = synthetic_data(max(images, config.batch_size))
    timed, compared = dict(VARIANTS), dict(RATIOS)
    for mode in modes:
        timed[f"plain_{mode}"] = f"plain, {MODES[mode]}", partial(plain, fast=True, mode=mode)
        timed[f"full_{mode}"] = f"full pipeline, {MODES[mode]}", partial(full, mode=mode)
        compared[f"full_over_plain_{mode}"] = f"full_{mode}", f"plain_{mode}"
    step_fns = {name: build(config, data, device) for name, (_, build) in timed.items()}
    first = {name: seconds_of_a_step(step_fn, device) for name, step_fn in step_fns.items()}
    seconds = time_in_turns(step_fns, rounds, device)
    step_fns.clear()
    variants: dict[str, Any] = {}
    for name, (label, _) in timed.items():
        figures = spread(seconds[name])
        variants[name] = {
            "label": label,
            "seconds_per_step": figures,
            "images_per_second": config.batch_size / figures["median"],
            "first_step_seconds": first[name],
            "memory": memory_of(name, config) if memory and name in VARIANTS else None,
        }
    ratios: dict[str, Any] = {
        name: spread([a / b for a, b in zip(seconds[over], seconds[under], strict=True)])
        for name, (over, under) in compared.items()
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
        "images_per_second_at_once": {count: images_at_once(config, images, count) for count in at_once},
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
        f"{'variant':<30} {'seconds':>9} {'quartiles':>17} {'images/s':>9} {'step memory':>12} {'first step':>11}",
    ]
    for variant in result["variants"].values():
        time_, memory = variant["seconds_per_step"], variant["memory"]
        used = f"{memory['step_bytes'] / 2**20:,.0f} MiB" if memory else "-"
        quartiles, rate = f"{time_['low']:.4f}..{time_['high']:.4f}", variant["images_per_second"]
        first = f"{variant['first_step_seconds']:.1f} s"
        row = f"{variant['label']:<30} {time_['median']:>9.4f} {quartiles:>17} {rate:>9,.0f} {used:>12} {first:>11}"
        lines.append(row)
    lines.append("")
    for name, ratio in result["ratios"].items():
        value, quartiles = ratio, ""
        if isinstance(ratio, dict):
            value, quartiles = ratio["median"], f"{ratio['low']:.3f}..{ratio['high']:.3f}"
        limit = f"at most {LIMITS[name]:g}" if name in LIMITS else ""
        lines.append(f"{name.replace('_', ' '):<30} {value:>9.3f} {quartiles:>17} {limit:>15}".rstrip())
    for count, rate in result["images_per_second_at_once"].items():
        lines.append(f"{f'runs at once: {count}':<30} {rate:>9,.0f} images/s together")
    return "\n".join(lines)


def seconds_of_a_step(step_fn: Take, device: torch.device) -> float:
    """Until the device has done it."""
    began = time.perf_counter()
    step_fn()
    synchronize(device)
    return time.perf_counter() - began


def images_at_once(config: RunConfig, images: int, count: int) -> float:
    """Images a second of `count` runs together, each in a process of its own, on one device."""
    context = multiprocessing.get_context("spawn")
    start, threads = context.Barrier(count), torch.get_num_threads()
    with ProcessPoolExecutor(count, context, _know_start, (start,)) as pool:
        runs = [pool.submit(_images_per_second, config, images, threads) for _ in range(count)]
        return sum(run.result() for run in runs)


_start: Barrier  # of a process that `images_at_once` has begun


def _know_start(start: Barrier) -> None:
    global _start
    _start = start


def _images_per_second(config: RunConfig, images: int, threads: int) -> float:
    """Of one of the runs, from the moment when all of them are ready."""
    torch.set_num_threads(threads)
    training.keep_freed_memory()
    device = training.pick_device(config.device)
    training.repeatable(device)
    step_fn = full(config, synthetic_data(images), device)
    step_fn()
    synchronize(device)
    _start.wait(SECONDS_TO_START)
    began, steps = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < SECONDS_AT_ONCE:
        for _ in range(STEPS_A_TURN[device.type]):
            step_fn()
            steps += 1
        synchronize(device)
    return steps * config.batch_size / passed


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

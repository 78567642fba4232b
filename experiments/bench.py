"""What the pipeline costs: one training step of ResNet-20 on synthetic images of CIFAR-10's shape, in four variants.

    python -m experiments.bench [training] [--rounds 15] [--threads N] [--device auto] [--no-naive] [--json F]
    python -m experiments.bench inference RUN          (experiments/inference.py)

    plain_float32  the network alone: float32, contiguous, a batch that is ready
    plain_fast     the same in the fastest mode the machine has: channels_last, and bfloat16 where it multiplies that
    full           the pipeline in that mode, through src.training.train_epoch: augmentation, quantizers, squared
                   logits, coupled group lasso at the debug preset's peak
    naive          the same objective as it is written down first: float32, contiguous, torchvision's transforms image
                   by image, a quantizer that runs again for every reader of a weight (the forward pass, the penalty),
                   a Python loop over the channels of the penalty

Time: all variants live in one process and take turns, one step each a round, so that a machine that slows down slows
all of them; the order rotates. Printed are the median and the quartiles of the rounds; a ratio is the median of the
ratios within a round. Two steps of each come first, uncounted. On a GPU a turn is 20 steps between two
synchronisations.

Memory: a process of its own for each variant. It builds everything, resets the high-water mark of its resident memory,
reads it, takes three steps and reads it again (experiments/peak_memory.py). The difference counts: activations,
gradients, optimizer state and all scratch memory, but neither Python nor the images.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from experiments import pipeline
from experiments.benchmarks import (
    NaiveQuantizer,
    group_parts,
    inference,
    naive_loader,
    naive_penalty,
    naive_step,
    peak_memory,
)
from experiments.pipeline import DEBUG, RunConfig, Take, at_least, spread, time_in_turns
from resnet import NETWORKS
from src import training
from src.data import CIFAR10_MEAN, CIFAR10_STD, ImageData, normalize
from src.runs import RunError, machine, versions
from src.storage import check_writable, write_atomic
from src.training import GraphedStep, keep_freed_memory, repeatable
from utils_quantization import attach_weight_quantizers

LIMITS = {"full_over_plain": 1.15, "peak_memory_full_over_plain": 1.2}


@dataclass(frozen=True)
class Setting:
    """What all variants share. images: size of the synthetic training set, as large as CIFAR-10's by default."""

    batch_size: int = 512
    images: int = 50_000
    device: str = "auto"
    precision: str = "auto"

    @property
    def config(self) -> RunConfig:
        return replace(DEBUG, batch_size=self.batch_size, device=self.device, precision=self.precision)


def synthetic_data(images: int, device: torch.device) -> ImageData:
    """Random bytes with CIFAR-10's shape, statistics and number of classes."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (images,), generator=generator)
    names = tuple(str(label) for label in range(10))
    statistics_ = (CIFAR10_MEAN, CIFAR10_STD)
    data = ImageData("synthetic", "random images", pixels, labels, pixels[:10], labels[:10], names, *statistics_)
    return data.to(device)


def plain_float32(setting: Setting) -> Take:
    return _plain(setting, torch.float32, torch.contiguous_format)


def plain_fast(setting: Setting) -> Take:
    device = training.pick_device(setting.device)
    return _plain(setting, training.pick_precision(setting.precision, device), torch.channels_last)


def full(setting: Setting) -> Take:
    """The pipeline as it is: the run that the script builds, and its own loop over epochs."""
    config, device = setting.config, training.pick_device(setting.device)
    run = pipeline.build_run(config, synthetic_data(max(setting.images, setting.batch_size), device))
    means = training.EpochMeans()

    def steps() -> Iterator[training.Step]:
        for epoch in itertools.count():
            settings = pipeline.epoch_settings(config, epoch, run.precision)
            # every step with the penalty on, as most of a run is, and with rates that never fall
            settings |= {"epochs": epoch + 1, "coefficient": config.peak, "lr_lambda": lambda done: 1.0}
            yield from training.train_epoch(
                run.model, run.optimizer, run.data, run.objective, step=run.step, **settings
            )

    endless = steps()
    return lambda: means.add(next(endless))


def naive(setting: Setting) -> Take:
    """The slow pipeline, with the same network, objective, rates and batches' distribution."""
    config, device = setting.config, training.pick_device(setting.device)
    torch.manual_seed(config.seed)
    model = NETWORKS[config.model]().to(device)
    attach_weight_quantizers(model, config.exclude_layers, NaiveQuantizer, config.quantizer_kwargs)
    parts = group_parts(model)
    optimizer = torch.optim.AdamW(training.parameter_groups(model, **config.group_kwargs), foreach=False)
    data = synthetic_data(max(setting.images, setting.batch_size), torch.device("cpu"))
    loader = naive_loader(data, setting.batch_size, config.crop_padding, config.flip)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    objective = config.objective(lambda network: naive_penalty(network, parts))

    def take() -> None:
        images, labels = next(batches)
        naive_step(model, optimizer, images.to(device), labels.to(device), objective, config.peak)

    return take


VARIANTS: dict[str, tuple[str, Callable[[Setting], Take]]] = {
    "plain_float32": ("plain, float32, contiguous", plain_float32),
    "plain_fast": ("plain, fastest mode", plain_fast),
    "full": ("full pipeline, fastest mode", full),
    "naive": ("naive pipeline, float32", naive),
}
RATIOS = {
    "full_over_plain": ("full", "plain_fast"),
    "naive_over_full": ("naive", "full"),
    "plain_float32_over_fast": ("plain_float32", "plain_fast"),
}


def bench_training(setting: Setting, rounds: int, memory: bool = True, leave_out: Sequence[str] = ()) -> dict[str, Any]:
    """Time all variants, measure their memory, and return the figures that `--json` writes."""
    device = training.pick_device(setting.device)
    precision = training.pick_precision(setting.precision, device)
    keep_freed_memory()  # for all variants, as the pipeline does it for itself
    repeatable(device)
    chosen = {name: variant for name, variant in VARIANTS.items() if name not in leave_out}
    takes = {name: build(setting) for name, (_, build) in chosen.items()}
    seconds = time_in_turns(takes, rounds, device)
    takes.clear()
    variants = {}
    for name, (label, _) in chosen.items():
        figures = spread(seconds[name])
        variants[name] = {
            "label": label,
            "seconds_per_step": figures,
            "images_per_second": setting.batch_size / figures["median"],
            "memory": _memory_of(name, setting) if memory else None,
        }
    ratios: dict[str, Any] = {
        name: spread([a / b for a, b in zip(seconds[over], seconds[under], strict=True)])
        for name, (over, under) in RATIOS.items()
        if over in chosen and under in chosen
    }
    used = [variants[name]["memory"] for name in ("full", "plain_fast")]
    ratios["peak_memory_full_over_plain"] = used[0]["step_bytes"] / max(used[1]["step_bytes"], 1) if all(used) else None
    return {
        "benchmark": "training",
        "network": DEBUG.model,
        "batch_size": setting.batch_size,
        "images": setting.images,
        "rounds": rounds,
        "machine": {**machine(device, precision), "cores": os.cpu_count()},
        "versions": versions(),
        "variants": variants,
        "ratios": ratios,
        "limits": LIMITS,
    }


def table(result: Mapping[str, Any]) -> str:
    """The figures as text."""
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
        if ratio is None:
            continue
        value = ratio if isinstance(ratio, float) else ratio["median"]
        spread = "" if isinstance(ratio, float) else f"{ratio['low']:.3f}..{ratio['high']:.3f}"
        limit = f"at most {LIMITS[name]:g}" if name in LIMITS else ""
        lines.append(f"{name.replace('_', ' '):<30} {value:>9.3f} {spread:>17} {limit:>15}".rstrip())
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one benchmark and return the exit status: 0 done, 2 bad input, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = given.pop(0) if given and not given[0].startswith("-") else "training"
    try:
        if name not in COMMANDS:
            shown = ", ".join(command for command in COMMANDS if not command.startswith("_"))
            raise ValueError(f"unknown benchmark {name!r}: choose one of {shown}")
        return COMMANDS[name](given)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _training(arguments: Sequence[str]) -> int:
    parser = _parser("training", "Time one training step in four variants (see the module's text).")
    parser.add_argument("--rounds", type=at_least(1), default=15, help="turns of every variant (default: 15)")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave the peak memory out")
    parser.add_argument("--no-naive", action="store_true", help="leave out the naive pipeline, which takes the longest")
    parser.add_argument("--json", metavar="F", help="write the figures to this file")
    options = parser.parse_args(arguments)
    if options.json:
        if Path(options.json).is_dir():
            raise RunError(f"--json {options.json!r} is a folder; name a file in it")
        check_writable(Path(options.json).parent)
    leave_out = ["naive"] if options.no_naive else []
    result = bench_training(_setting(options), options.rounds, options.memory, leave_out)
    print(table(result))
    if options.json:
        write_atomic(options.json, (json.dumps(result, indent=2) + "\n").encode())
    return 0


def _memory(arguments: Sequence[str]) -> int:
    """Run by `_memory_of` in a process of its own: print one variant's memory as JSON."""
    parser = _parser("_memory", "Measure the peak memory of one variant.")
    parser.add_argument("variant", choices=list(VARIANTS))
    options = parser.parse_args(arguments)
    setting = _setting(options)
    keep_freed_memory()
    take = VARIANTS[options.variant][1](setting)
    print(json.dumps(peak_memory(take, training.pick_device(setting.device))))
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "training": _training,
    "inference": inference.run_command,
    "_memory": _memory,
}


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m experiments.bench {name}", description=description)
    parser.add_argument("--batch-size", type=at_least(2), default=512, help="images a step (default: 512)")
    parser.add_argument("--images", type=at_least(2), default=50_000, help="synthetic images (default: 50000)")
    parser.add_argument("--threads", type=at_least(1), help="CPU threads (default: torch's own choice)")
    parser.add_argument("--device", default="auto", help=f"one of {', '.join(training.DEVICES)} (default: auto)")
    parser.add_argument("--precision", default="auto", help="of the fastest mode: auto, fp32 or bf16 (default: auto)")
    return parser


def _setting(options: argparse.Namespace) -> Setting:
    if options.threads:
        torch.set_num_threads(options.threads)
    return Setting(options.batch_size, options.images, options.device, options.precision)


def _plain(setting: Setting, precision: torch.dtype, layout: torch.memory_format) -> Take:
    config, device = setting.config, training.pick_device(setting.device)
    torch.manual_seed(config.seed)
    model = NETWORKS[config.model]().to(device, memory_format=layout)  # type: ignore[call-overload]
    optimizer = training.make_optimizer(training.parameter_groups(model, **config.group_kwargs))
    data = synthetic_data(setting.batch_size, device)
    images = normalize(data.train_images, data.mean, data.std).contiguous(memory_format=layout)

    step = GraphedStep() if device.type == "cuda" else training.train_step
    nothing = training.Objective()
    return lambda: step(model, optimizer, images, data.train_labels, nothing, 0.0, precision)


def _memory_of(variant: str, setting: Setting) -> dict[str, int]:
    options = {
        "--batch-size": setting.batch_size,
        "--images": min(setting.images, 4 * setting.batch_size),  # the images do not count, see above
        "--threads": torch.get_num_threads(),
        "--device": setting.device,
        "--precision": setting.precision,
    }
    command = [sys.executable, "-m", "experiments.bench", "_memory", variant]
    command += [str(word) for option in options.items() for word in option]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {variant!r} failed ({done.returncode}): {done.stderr[-500:]}")
    found: dict[str, int] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    sys.exit(main())

"""What the pipeline costs, and what a compressed network gains, timed on this machine.

    python -m experiments.bench training --rounds 15 --device cpu --json training.json
    python -m experiments.bench training --modes eager compile --at-once 1 2 4
    python -m experiments.bench inference debug_output --batch-sizes 1 256 --multiple-of 4 8

training: one step of ResNet-20 in three variants, and in other modes (experiments/benchmarks/training.py). inference: a
forward pass of a run's network in seven forms (experiments/benchmarks/inference.py). Exit status: 0 done, 2 bad input,
130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from experiments.benchmarks import MODES, bench_inference, bench_training, inference_table, training_table
from experiments.pipeline import DEBUG
from src.quantizer import check_range
from src.storage import CommandParser, check_output, fail, write_output
from src.training import DEVICES

BENCHMARKS = {
    "training": "Time one training step in three variants.",
    "inference": "Time one run's network in seven forms.",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one benchmark and return the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = given.pop(0) if given and not given[0].startswith("-") else "training"
    try:
        if name not in BENCHMARKS:
            raise ValueError(f"unknown benchmark {name!r}: choose one of {', '.join(BENCHMARKS)}")
        options = _parser(name).parse_args(given)
        check_range("--rounds", options.rounds, 1)
        if options.json:
            check_output(options.json)
        if options.threads:
            torch.set_num_threads(options.threads)
        if name == "training":
            config = replace(DEBUG, batch_size=options.batch_size, device=options.device, precision=options.precision)
            more = options.memory, options.modes, options.at_once
            result = bench_training(config, options.images, options.rounds, *more)
            print(training_table(result))
        else:
            result = bench_inference(options.run, options.batch_sizes, options.rounds, options.multiple_of)
            print(inference_table(result))
        if options.json:
            write_output(options.json, (json.dumps(result, indent=2) + "\n").encode(), force=True)
    except ValueError as error:
        return fail(str(error))
    except KeyboardInterrupt:
        return 130
    return 0


def _parser(name: str) -> argparse.ArgumentParser:
    parser = CommandParser(f"experiments.bench {name}", __doc__)
    add = parser.add_argument
    if name == "training":
        add("--rounds", type=int, default=15, help="turns of every variant (default: 15)")
        add("--batch-size", type=int, default=512, help="images a step (default: 512)")
        add("--images", type=int, default=50_000, help="synthetic images (default: 50000)")
        add("--device", default="auto", help=f"one of {', '.join(DEVICES)} (default: auto)")
        add("--precision", default="auto", help="of the fastest mode: auto, fp32 or bf16 (default: auto)")
        add(
            "--modes", nargs="+", default=[], choices=list(MODES), help=f"also time steps {' or '.join(MODES.values())}"
        )
        add("--at-once", type=int, nargs="+", default=[], metavar="RUNS", help="time so many together, too: 1 2 4, say")
        add("--no-memory", dest="memory", action="store_false", help="leave the peak memory out")
    else:
        add("run", metavar="RUN", help="output folder of experiments.debug_run")
        add("--batch-sizes", type=int, nargs="+", default=[1, 256], help="default: 1 256")
        add("--rounds", type=int, default=30, help="turns of every form (default: 30)")
        add("--multiple-of", type=int, nargs="+", default=[], help="also round numbers of channels up to these")
    add("--threads", type=int, help="CPU threads (default: torch's own choice)")
    add("--json", metavar="F", help="write the figures to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""Turn a finished run into a packed file and an ONNX file, and check that both compute what was evaluated.

    python -m experiments.export RUN [--packed F] [--onnx F] [--data-root DIR] [--force]

RUN is the output folder of experiments.debug_run. Both files go into it (model.cdq, model.onnx) unless named. Checks:
the packed file is read again and held against the compacted network, bit for bit; on the run's test set, where it can
be had without a download, the unpacked network must be right on the same images as the network that was evaluated, and
ONNX Runtime must predict the same as PyTorch with logits within 1e-3; otherwise on images of noise.
Exit status: 0 written and equal, 1 a check failed, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from experiments import pipeline
from experiments.pipeline import ConfigError, RunConfig
from src.data import ImageData, load_data, normalize
from src.export import check_onnx, export_onnx, pack, unpack
from src.pruning import CompactNetwork, compact
from src.runs import CHECKPOINT, SUMMARY, RunFolder, load_checkpoint, load_model_state
from src.storage import OutputError, RunError, check_output, fail, say
from src.training import predict

EQUAL, DIFFERENT = 0, 1
PACKED, ONNX = "model.cdq", "model.onnx"
NOISE_IMAGES = 256


@dataclass(frozen=True)
class _Classes:
    """All that building the network asks of the data."""

    num_classes: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = _parser().parse_args(arguments)
    run = Path(options.run)
    try:
        packed, onnx = Path(options.packed or run / PACKED), Path(options.onnx or run / ONNX)
        config, model = load_run(run, options.data_root)
        _check_outputs(packed, onnx, options.force)
        return _export(run, config, model, packed, onnx, options.force)
    except ValueError as error:  # every error of the library that bad input can cause is one
        return fail(str(error))
    except OSError as error:
        return fail(f"{error.filename or options.run!r}: {error.strerror or error}")


def load_run(run: str | Path, data_root: str | None = None) -> tuple[RunConfig, nn.Module]:
    """The configuration of a run and its network, with its quantizers, on the CPU, in eval mode.

    Raises RunError where the folder holds no checkpoint, or one that does not fit its own configuration.
    """
    folder = Path(run)
    if not RunFolder(folder).has_checkpoint():
        raise RunError(
            f"{str(run)!r} holds no {CHECKPOINT}: name the output folder of a run, which "
            "`python -m experiments.debug_run --output FOLDER` writes"
        )
    state = load_checkpoint(folder / CHECKPOINT)
    config = _config(folder, state["config"], data_root)
    bias = state["model"].get("linear.bias")
    if not isinstance(bias, Tensor) or bias.dim() != 1:
        raise RunError(
            f"the checkpoint in {str(run)!r} is of no network in resnet.py; train with experiments.debug_run"
        )
    model = pipeline.build_network(config, cast(ImageData, _Classes(len(bias))), torch.device("cpu"))
    pipeline.attach(config, model)
    load_model_state(model, state["model"])
    return config, model.eval()


def _export(run: Path, config: RunConfig, model: nn.Module, packed: Path, onnx: Path, force: bool) -> int:
    report = pack(model, packed, force=force)
    print(report.text(), end="\n\n")
    written = export_onnx(model, onnx, force=force)
    print(written.text(), end="\n\n")
    network, smaller = unpack(packed), compact(model)
    checks = {"the packed file, read again, holds the compacted network bit for bit": _same_state(network, smaller)}
    data = _test_data(run, config)
    if data is None:
        images = torch.randn(NOISE_IMAGES, *network.input_size, generator=torch.Generator().manual_seed(0))
        say(f"the run's test set is not here: checking on {NOISE_IMAGES} images of noise")
    else:
        images = normalize(data.test_images, data.mean, data.std)
        before, after = (predict(each, data)[0] for each in (model, network))
        right = [int((each == data.test_labels).sum()) for each in (before, after)]
        differing, count = int((before != after).sum()), len(before)
        name = f"test set, {data.title}: quantized network {right[0]:,} of {count:,} right, unpacked {right[1]:,}"
        checks[f"{name}, {differing} predictions differ"] = differing == 0
    compared = check_onnx(onnx, network, images)
    checks[compared.text()] = compared.passed
    for words, passed in checks.items():
        print(f"[{'ok' if passed else 'FAILED'}] {words}")
    return EQUAL if all(checks.values()) else DIFFERENT


def _same_state(network: CompactNetwork, other: CompactNetwork) -> bool:
    """Whether two networks have the same description and, byte for byte, the same state."""
    mine, theirs = network.state_dict(), other.state_dict()
    return (
        network.description == other.description
        and list(mine) == list(theirs)
        and all(
            mine[name].dtype == theirs[name].dtype
            and mine[name].contiguous().numpy().tobytes() == theirs[name].cpu().contiguous().numpy().tobytes()
            for name in mine
        )
    )


def _config(folder: Path, saved: Mapping[str, Any], data_root: str | None) -> RunConfig:
    known = {field.name for field in fields(RunConfig)}
    values: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in saved.items()}
    if data_root is not None:
        values["data_root"] = data_root
    try:
        return RunConfig(**values)
    except (ConfigError, TypeError) as error:
        strange = sorted(set(values) - known)
        reason = f"unknown settings {strange}" if strange else str(error)
        raise RunError(
            f"the configuration in {str(folder / CHECKPOINT)!r} does not fit this version ({reason}); export it with "
            "the version that trained it"
        ) from error


def _test_data(run: Path, config: RunConfig) -> ImageData | None:
    """The data the run was tested on, where it is here: the same, by its digest, if run.json knows that."""
    # "auto" takes CIFAR-10 where it is and never downloads it: a check is no reason to
    source = "auto" if config.data == "cifar10" else config.data
    try:
        data = load_data(source, config.data_root, config.limit)
    except (ValueError, OSError) as error:
        say(f"the run's data cannot be loaded: {error}")
        return None
    recorded = _summary(run).get("data", {}).get("sha256", data.digest)  # an interrupted run has no summary
    wanted = "cifar10" if config.data == "cifar10" else data.name
    return data if data.digest == recorded and data.name == wanted else None


def _summary(run: Path) -> dict[str, Any]:
    try:
        found = json.loads((run / SUMMARY).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("data"), dict) else {}


def _check_outputs(packed: Path, onnx: Path, force: bool) -> None:
    if packed.absolute() == onnx.absolute():
        raise OutputError(f"--packed and --onnx are both {str(packed)!r}; name two files")
    for option, path in (("--packed", packed), ("--onnx", onnx)):
        try:
            check_output(path, force)
        except OutputError as error:
            raise OutputError(f"{error} ({option}; --force overwrites)") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.export",
        description="Write a finished run as a packed file and as ONNX, and check both against the trained network.",
        epilog="exit status: 0 written and equal, 1 a check failed, 2 bad input",
    )
    parser.add_argument("run", metavar="RUN", help="output folder of experiments.debug_run")
    parser.add_argument("--packed", metavar="F", help=f"the packed file (default: {PACKED} in RUN)")
    parser.add_argument("--onnx", metavar="F", help=f"the ONNX file (default: {ONNX} in RUN)")
    parser.add_argument("--data-root", help="where the run's data is (default: where it was when the run was trained)")
    parser.add_argument("--force", action="store_true", help="write over existing files")
    return parser


if __name__ == "__main__":
    sys.exit(main())

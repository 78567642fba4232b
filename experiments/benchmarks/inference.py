"""What a compressed network gains when it runs: one run's network in seven forms, timed in turns in one process.

    dense       the float32 network with all channels and no zeros, as it was before training
    masked      the trained network, its quantized weights written out: the same sizes, zeros in place
    compacted   after exact removal of channels (src/pruning)
    onnx_dense  the dense network in ONNX Runtime
    onnx_fp32   the compacted network in ONNX Runtime, float32 weights
    onnx_int    the same with whole-number weights and DequantizeLinear
    onnx_int8   the same in 8-bit integer arithmetic (src/export/int8.py), calibrated on the images that are timed

All run on the CPU, all but the last in float32: the whole-number weights of onnx_int make the file smaller; they are
turned into floats before they are multiplied, and the time may well be longer. RUN is the output folder of
experiments.debug_run. Printed are medians and quartiles of the rounds; a ratio is the median of the ratios within a
round.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from experiments.pipeline import SavedRun, Take, spread, time_in_turns
from resnet import NETWORKS
from src import runs
from src.export import compact_with_indices, export_onnx, int8_instructions, open_session, quantized_onnx, run_onnx
from utils_quantization import quantized_layers, shared_quantized_weights

CPU = torch.device("cpu")
FORMS = {
    "dense": "PyTorch, dense float32",
    "masked": "PyTorch, zeros in place",
    "compacted": "PyTorch, compacted",
    "onnx_dense": "ONNX Runtime, dense float32",
    "onnx_fp32": "ONNX Runtime, compacted, float32",
    "onnx_int": "ONNX Runtime, compacted, integers",
    "onnx_int8": "ONNX Runtime, compacted, int8",
}


def forms(
    model: nn.Module, dense: nn.Module, images: Tensor, folder: Path, multiples: Sequence[int] = ()
) -> dict[str, Take]:
    """One forward pass of `images` in each form, and compacted to each of `multiples`. ONNX files go to `folder`."""
    masked = copy.deepcopy(dense)
    with shared_quantized_weights(model):
        weights = {f"{name}.weight": cast(Tensor, layer.weight) for name, layer in quantized_layers(model).items()}
    others = {name: value for name, value in model.state_dict().items() if ".parametrizations." not in name}
    masked.load_state_dict(others | weights)
    compacted = compact_with_indices(model)
    networks = {"dense": dense.eval(), "masked": masked.eval(), "compacted": compacted.network}
    takes: dict[str, Take] = {name: partial(network, images) for name, network in networks.items()}
    files: dict[str, Path | bytes] = {name: folder / f"{name}.onnx" for name in ("onnx_dense", "onnx_fp32", "onnx_int")}
    export_onnx(dense, folder / "onnx_dense.onnx")
    export_onnx(compacted, folder / "onnx_fp32.onnx", integer_weights=False)
    export_onnx(compacted, folder / "onnx_int.onnx")
    for multiple in multiples:
        smaller = compact_with_indices(model, multiple_of=multiple)
        takes[f"PyTorch, multiples of {multiple}"] = partial(smaller.network, images)
        files[f"ONNX Runtime, multiples of {multiple}"] = path = folder / f"{multiple}.onnx"
        export_onnx(smaller, path, integer_weights=False)
        files[f"ONNX Runtime, int8, multiples of {multiple}"] = quantized_onnx(smaller, images)
    files["onnx_int8"] = quantized_onnx(compacted, images)
    return takes | {name: partial(run_onnx, open_session(file), images, len(images)) for name, file in files.items()}


def bench_inference(
    run: str | Path, batch_sizes: Sequence[int], rounds: int, multiples: Sequence[int] = ()
) -> dict[str, Any]:
    """Time every form at every batch size and return the figures that `--json` writes.

    multiples: also time networks whose numbers of channels are rounded up to these (`multiple_of` in src.pruning).
    """
    saved = SavedRun.open(run)
    config, model = saved.config, saved.network()
    dense = NETWORKS[config.model](saved.classes, config.shortcut)
    dense = dense.to(memory_format=torch.channels_last)
    result: dict[str, Any] = {}
    for batch_size in batch_sizes:
        images = torch.randn(batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        images = images.contiguous(memory_format=torch.channels_last)
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            seconds = time_in_turns(forms(model, dense, images, Path(folder), multiples), rounds, CPU)
        result[str(batch_size)] = {
            name: {
                "label": FORMS.get(name, name),
                "seconds": spread(times),
                "dense_over_this": spread([a / b for a, b in zip(seconds["dense"], times, strict=True)]),
                "onnx_dense_over_this": spread([a / b for a, b in zip(seconds["onnx_dense"], times, strict=True)]),
            }
            for name, times in seconds.items()
        }
    return {
        "benchmark": "inference",
        "run": {"preset": config.preset, "network": config.model},
        "rounds": rounds,
        "machine": {**runs.machine(CPU, torch.float32), "int8_instructions": int8_instructions()},
        "versions": runs.versions(),
        "batch_sizes": result,
    }


def inference_table(result: Mapping[str, Any]) -> str:
    """The figures of `bench_inference` as text."""
    host = result["machine"]
    instructions = (
        ", ".join(host["int8_instructions"]) or "none found, on x86 int8 needs VNNI (avx512_vnni or avx_vnni)"
    )
    lines = [
        f"One forward pass of {result['run']['network']}, {result['rounds']} rounds in turns",
        f"{host['device_name']} ({host['device']}), {host['threads']} threads, torch {result['versions']['torch']}",
        f"instructions for 8-bit integers: {instructions}",
        "dense / this: median of the ratios within each round, which is not the ratio of the medians",
    ]
    for batch_size, found in result["batch_sizes"].items():
        head = f"batch of {batch_size:<26} {'milliseconds':>12} {'quartiles':>17} {'dense / this':>13}"
        lines += ["", f"{head} {'in ONNX Runtime':>16}"]
        for form in found.values():
            time_, ratio, onnx_ratio = form["seconds"], form["dense_over_this"], form["onnx_dense_over_this"]
            quartiles = f"{1000 * time_['low']:.2f}..{1000 * time_['high']:.2f}"
            lines.append(
                f"{form['label']:<35} {1000 * time_['median']:>12.2f} {quartiles:>17} {ratio['median']:>13.2f} "
                f"{onnx_ratio['median']:>16.2f}"
            )
    return "\n".join(lines)

"""From zeros to a smaller network: the stages of compression, every figure of each measured here and now.

FP32        the dense network, of which the baseline says the accuracy where one was trained
quantized   the trained network with its quantizers on: zeros in place, computed as a dense network
compacted   the same function in an ordinary, smaller network (src/pruning/compaction.py)
packed      that network in one file of compressed integers (src/export/packing.py), read back
"""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pandas.io.formats.style import Styler
from torch import Tensor, nn

from experiments.evaluator import EvalResult
from experiments.figures import names_left
from experiments.pipeline.run import Baseline, Run
from metrics import QuantizationComparison
from src.data import test_batches
from src.export import PackReport, pack, unpack
from src.pruning import CompactNetwork, compact
from src.runs import RunFolder
from src.training import predict

Take = Callable[[], object]
BATCH, ROUNDS, WARM_UP, STEPS_A_TURN = 64, 15, 2, {"cpu": 1, "mps": 5, "cuda": 20}


@dataclass(frozen=True)
class Compression:
    """The stages of one run, the smaller network, and the proofs that it computes the same.

    stages: one row each, by name; costs per image, times over the dense network's in the same round (see `spread`);
        NaN where a figure does not apply.
    largest_difference: of the logits of 256 test images between the quantized and the compacted network, relative to
        the largest logit, in float64 and float32.
    same_predictions: compacted and unpacked give the quantized network's class for every test image.
    """

    stages: pd.DataFrame
    network: CompactNetwork
    packed: PackReport
    largest_difference: Mapping[str, float]
    same_predictions: bool

    @property
    def time_ratio(self) -> float:
        """Time of the network that was read back from the packed file, over the dense one's: the median."""
        return float(self.stages["time / FP32's"]["packed"]["median"])

    def table(self) -> Styler:
        """The stages as a table; a dash where a figure does not apply."""
        styled = self.stages.rename_axis("stage").reset_index().style.hide(axis="index")
        formats: dict[str, Any] = dict.fromkeys(("parameters", "MACs", "bytes"), "{:,}") | {"accuracy": "{:.2%}"}
        formats |= {"BOPs": lambda number: f"{number / 1e9:.2f} G", "time / FP32's": _ratio}
        styled = styled.format(formats, na_rep="-").set_caption(
            f"Time: batches of {BATCH} images, {torch.get_num_threads()} CPU threads"
        )
        return names_left(styled.set_properties(**{"text-align": "right", "white-space": "nowrap"}))

    def proof(self) -> str:
        """The equality checks in words."""
        differences = ", ".join(f"{value:.1e} in {name}" for name, value in self.largest_difference.items())
        classes = "the same class for every" if self.same_predictions else "OTHER CLASSES FOR SOME"
        return f"largest relative difference of a logit: {differences}\n{classes} test image"


def compress(
    run: Run, dense: nn.Module, result: EvalResult, path: str | Path | None = None, baseline: Baseline | None = None
) -> Compression:
    """Compact and pack the trained network of `run`, and measure every stage.

    dense: the network the run started from; result: from `evaluate_run`; path: of the packed file, in the run's folder,
    None to keep none; baseline: gives the first row its accuracy. Raises what `compact` and `pack` raise.
    """
    model = run.model.eval()
    network = compact(model)
    with RunFolder(Path(path).parent).lock() if path else tempfile.TemporaryDirectory() as temporary:
        file = Path(path or f"{temporary}/model.cdq")
        report, unpacked = pack(model, file, force=True), unpack(file).to(run.device)
    trained = {"quantized": model, "compacted": network, "packed": unpacked}
    images = next(test_batches(run.data, BATCH))[0]
    takes = {name: partial(each, images) for name, each in {"FP32": dense.eval(), **trained}.items()}
    with torch.inference_mode():
        seconds = time_in_turns(takes, ROUNDS, run.device)
    predictions = [predict(each, run.data)[0] for each in trained.values()]
    full = QuantizationComparison().set_baseline(dense)
    in_place = QuantizationComparison().set_baseline(model)  # the same MACs with the learned bits
    costs = [full, in_place, result.structured_stats, result.structured_stats]
    columns = {
        "parameters": [
            sum(p.numel() for p in each.parameters()) for each in (dense, dense, network, trained["packed"])
        ],
        "MACs": [cost.total_macs for cost in costs],
        "BOPs": [cost.total_bops for cost in costs],
        "bytes": [report.fp32_state_bytes, report.fp32_state_bytes, report.compact_state_bytes, report.file_bytes],
        "accuracy": [
            baseline.accuracy if baseline else math.nan,
            *(int((found == run.data.test_labels).sum()) / len(found) for found in predictions),
        ],
        "time / FP32's": [
            spread([a / b for a, b in zip(times, seconds["FP32"], strict=True)]) for times in seconds.values()
        ],
    }
    same = all(torch.equal(found, predictions[0]) for found in predictions)
    stages = pd.DataFrame(columns, index=list(seconds))
    kept = str(path or "a temporary file; `python -m experiments.export` writes one to keep")
    change = differences(model, network, next(test_batches(run.data, 256))[0])
    return Compression(stages, network, replace(report, path=kept), change, same)


def differences(model: nn.Module, network: CompactNetwork, images: Tensor) -> dict[str, float]:
    """Largest |difference| of logits, relative to the largest logit, in both precisions."""
    wide = copy.deepcopy(model).to("cpu", torch.float64)  # MPS has no float64
    pairs = {"float64": (wide, compact(wide), images.cpu().double()), "float32": (model, network, images)}
    found = {}
    for name, (original, smaller, batch) in pairs.items():
        with torch.no_grad():
            reference = original(batch)
            found[name] = ((smaller(batch) - reference).abs().max() / reference.abs().max()).item()
    return found


def time_in_turns(takes: Mapping[str, Take], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds a step of every variant, one number a round.

    The variants take turns in one process, so that a machine that slows down slows all of them alike.
    """
    count, names = STEPS_A_TURN[device.type], list(takes)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for take in [*takes.values()] * WARM_UP:
        take()
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            synchronize(device)
            start = time.perf_counter()
            for _ in range(count):
                takes[name]()
            synchronize(device)
            seconds[name].append((time.perf_counter() - start) / count)
    return seconds


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and the values themselves."""
    low, median, high = np.percentile(values, [25, 50, 75]).tolist()
    return {"median": median, "low": low, "high": high, "samples": list(values)}


def _ratio(figures: Mapping[str, Any]) -> str:
    if figures["low"] == figures["high"]:
        return f"{figures['median']:.2f}"
    return f"{figures['median']:.2f} ({figures['low']:.2f}–{figures['high']:.2f})"

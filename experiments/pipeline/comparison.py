"""Saved runs side by side: where they are, what differs in their settings, what they cost and what they reached.

BOPs as the paper counts them: density x dense MACs x weight bits x 32-bit activations, for each quantized layer; layers
without a quantizer keep all their weights at 32 bits. Relative to the dense FP32 network, all layers included.
Axis letters: E epochs, L quantized layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments.figures import Series
from experiments.pipeline.config import RunConfig
from experiments.pipeline.saved_run import SavedRun
from metrics import FULL_PRECISION_BITS, QuantizationComparison
from resnet import NETWORKS
from src.runs import NOT_SHAPING, PREVIOUS, RunError, RunFolder
from src.training import History

# What `over_seeds` takes of run.json's results, all as shares but the bits. BOPs both ways: of the non-zero weights,
# and after exact channel removal; file: the packed one over the FP32 state.
QUANTITIES: Mapping[str, Callable[[Mapping[str, float]], float]] = {
    "accuracy": lambda results: results["accuracy_float32"],
    "zeros": lambda results: results["unstructured_sparsity"],
    "dead filters": lambda results: results["structured_sparsity"],
    "bits": lambda results: results["mean_bits"],
    "relative BOPs": lambda results: results["relative_bops"],
    "BOPs after removal": lambda results: 1 / results["structured_bops_ratio"],
    "file": lambda results: 1 / results["packed_ratio"],
}
# Accuracy and relative BOPs on CIFAR-10, stem and head and all activations at 32 bits: docs/compression.md.
PUBLISHED: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "resnet20": {"CoDeQ": (0.9186, 0.0261), "CoDeQ, 4 bits": (0.9188, 0.0295)}
}


def read_run(folder: str | Path, label: str = "") -> SavedRun:
    """`SavedRun.open`; raises RunError also for a run that has not finished an epoch."""
    run = SavedRun.open(folder, label)
    if not len(run.history):
        raise RunError(f"the run in {str(folder)!r} has not finished an epoch: there is nothing to compare yet")
    return run


def find_runs(folder: str | Path) -> dict[str, Path]:
    """Runs around a run's folder, by label: itself, earlier ones in its `previous/`, folders beside it and theirs."""
    here = Path(folder).resolve()
    found: dict[str, Path] = {}
    for place in [here, *sorted(entry for entry in here.parent.iterdir() if entry != here)]:
        earlier = sorted((place / PREVIOUS).glob("*"), key=lambda entry: (len(entry.name), entry.name), reverse=True)
        runs = [entry for entry in (place, *earlier) if RunFolder(entry).has_checkpoint()]
        found |= {entry.relative_to(here.parent).as_posix(): entry for entry in runs}
    return found


def tables(runs: Sequence[SavedRun]) -> dict[str, list[dict[str, str]]]:
    """Rows of the tables by heading; a single run has no settings that differ."""
    settings = {"Settings that differ": differing_settings(runs)} if len(runs) > 1 else {}
    repeated = len(by_setting(runs)) < len(runs)
    seeds = {"Over seeds": over_seeds_text(over_seeds(runs))} if repeated else {}
    return {**settings, "Results": results(runs), **seeds}


def differing_settings(runs: Sequence[SavedRun]) -> list[dict[str, str]]:
    """Rows of a table: each setting that is not the same in all runs, and its value in each."""
    settings = {run.label: {**vars(run.config), "data": run.data_name} for run in runs}
    same_data = len({run.data_digest or run.label for run in runs}) == 1  # whatever it was called
    left_out = NOT_SHAPING if same_data else NOT_SHAPING - {"data"}
    rows = []
    for name in settings[runs[0].label]:
        values = {label: str(setting[name]) for label, setting in settings.items()}
        if name not in left_out and len(set(values.values())) > 1:
            rows.append({"setting": name, **values})
    return rows


def notices(runs: Sequence[SavedRun]) -> list[str]:
    """What a reader must know before comparing the runs: that they were not trained on the same images."""
    if len({run.data_digest or run.data_name for run in runs}) < 2:
        return []
    on = ", ".join(f"{run.label} on {run.data_name}" for run in runs)
    return [f"NOTICE: these runs were trained on different images ({on}): their accuracies cannot be compared"]


def results(runs: Sequence[SavedRun]) -> list[dict[str, str]]:
    """Rows of a table: what each run reached, at its last epoch."""
    return [
        {
            "run": run.label,
            "epochs": f"{len(run.history)} of {run.history.epochs}",
            "accuracy": f"{run.history.last.accuracy:.1%}",
            "zeros": f"{run.history.last.unstructured_sparsity:.1%}",
            "dead filters": f"{run.history.last.structured_sparsity:.1%}",
            "bits": f"{run.history.last.mean_bits:.1f}",
            "relative BOPs": f"{series(run).relative_bops[-1]:.1%}",
            "verdict": run.verdict,
        }
        for run in runs
    ]


def by_setting(runs: Sequence[SavedRun]) -> dict[str, list[SavedRun]]:
    """Runs that differ in the seed alone, by the settings that tell them from the others."""
    differing = [row for row in differing_settings(runs) if row["setting"] != "seed"]
    groups: dict[str, list[SavedRun]] = {}
    for run in runs:
        name = ", ".join(f"{row['setting']}={row[run.label]}" for row in differing)
        groups.setdefault(name or run.config.preset, []).append(run)
    return groups


def over_seeds(runs: Sequence[SavedRun]) -> pd.DataFrame:
    """Mean and standard deviation (n - 1; NaN for one run) of every setting's finished runs, a row each."""
    rows = []
    for name, members in by_setting(runs).items():
        found = [run.summary["results"] for run in members if run.summary]
        row: dict[str, object] = {"setting": name, "n": len(found)}
        for quantity, read in QUANTITIES.items():
            values = pd.Series([read(results) for results in found], dtype=float)
            row |= {f"{quantity} mean": values.mean(), f"{quantity} sd": values.std()}
        rows.append(row)
    return pd.DataFrame(rows)


def over_seeds_text(table: pd.DataFrame) -> list[dict[str, str]]:
    """Rows of the table of `over_seeds` for a reader: mean ± standard deviation."""
    rows = []
    for _, found in table.iterrows():
        row = {"setting": str(found["setting"]), "n": str(found["n"])}
        for quantity in QUANTITIES:
            mean, deviation = found[f"{quantity} mean"], found[f"{quantity} sd"]
            unit, factor = ("", 1) if quantity == "bits" else (" %", 100)
            spread = "" if np.isnan(deviation) else f" ± {factor * deviation:.2f}"
            row[quantity] = f"{factor * mean:.2f}{spread}{unit}"
        rows.append(row)
    return rows


def points(runs: Sequence[SavedRun]) -> dict[str, list[tuple[float, float]]]:
    """Accuracy and relative BOPs of every finished run, by setting."""
    accuracy, cost = QUANTITIES["accuracy"], QUANTITIES["relative BOPs"]
    return {
        name: [(accuracy(run.summary["results"]), cost(run.summary["results"])) for run in members if run.summary]
        for name, members in by_setting(runs).items()
    }


def published(runs: Sequence[SavedRun]) -> Mapping[str, tuple[float, float]]:
    """Points of `PUBLISHED` that the runs can be compared with: of their network, where all are on CIFAR-10."""
    networks = {run.config.model for run in runs}
    same = len(networks) == 1 and {run.data_name for run in runs} == {"cifar10"}
    return PUBLISHED.get(networks.pop(), {}) if same else {}


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A table in Markdown."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([row[name] for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_text(runs: Sequence[SavedRun]) -> str:
    """All tables, and the notices below them, for a terminal or a file."""
    parts = []
    for heading, rows in tables(runs).items():
        parts.append(f"{heading}\n{pd.DataFrame(rows).to_string(index=False) if rows else '(none)'}")
    return "\n\n".join(parts + notices(runs))


def series(run: SavedRun) -> Series:
    """What the figures of a comparison draw of a run."""
    return Series(run.label, run.history, relative_bops(run.history, dense_macs(run.config, run.classes)))


def relative_bops(history: History, macs: Mapping[str, int]) -> NDArray[np.float64]:
    """BOPs after every epoch as a share of the dense FP32 network's, (E,). Activations cancel: 32 bits in both.

    macs: of every layer of the dense network.
    """
    dense = sum(macs.values()) * FULL_PRECISION_BITS
    quantized = np.array([macs[name] for name in history.layer_names], dtype=np.float64)  # (L,)
    untouched = dense - quantized.sum() * FULL_PRECISION_BITS
    density, bits = 1 - history.layer_column("sparsity"), history.layer_column("bits")
    return ((density * bits * quantized).sum(axis=1) + untouched) / dense


@lru_cache(maxsize=32)
def dense_macs(config: RunConfig, classes: int) -> Mapping[str, int]:
    """MACs of each layer of the dense network, for one image."""
    dense = QuantizationComparison().set_baseline(NETWORKS[config.model](classes, config.shortcut))
    return {layer.name: layer.macs for layer in dense.layers}

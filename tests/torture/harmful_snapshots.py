"""Snapshots files of a few kilobytes that stand for gigabytes, or whose arrays speak of others that are not there."""

from __future__ import annotations

import io
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from src.runs import SnapshotError, Snapshots
from tests.torture.damaged_files import small_network
from tests.torture.fault import Outcome, fault
from tests.torture.harmful import refused_cheaply


def _whole() -> dict[str, np.ndarray]:
    network = small_network()
    kept = Snapshots([name for name, module in network.named_modules() if hasattr(module, "parametrizations")])
    kept.add(network, 0)
    with np.load(io.BytesIO(kept.to_bytes()), allow_pickle=False) as file:
        return dict(file)


def _with_header(name: str, shape: tuple[int, ...], arrays: dict[str, np.ndarray]) -> bytes:
    """The file with one array that says it has `shape`, and brings nothing along."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, array in arrays.items():
            with archive.open(f"{entry}.npy", "w") as stream:
                if entry == name:
                    header = {"descr": array.dtype.str, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(stream, header)
                else:
                    np.save(stream, array)
    return out.getvalue()


def _absurd(rng: random.Random, arrays: dict[str, np.ndarray]) -> dict[str, bytes]:
    """A file in every way that the format knows of claiming more than it has."""
    large, layers = rng.randrange(10**7, 10**12), len(arrays["layers"])
    changed: dict[str, dict[str, Any]] = {
        "zeros that were compressed": {"count_bytes": np.zeros((4, rng.randrange(30_000, 50_000), layers, 123), "u1")},
        "names that were compressed": {"layers": np.zeros(layers, f"U{rng.randrange(5_000_000, 9_000_000)}")},
        "channels that are not there": {"channels": np.full(layers, large)},
        "channels below zero": {"channels": np.full(layers, -large)},
        "bits beyond all": {"bits": np.full_like(arrays["bits"], rng.randrange(17, 256))},
        "layers without a weight": {"sizes": np.zeros(layers, np.int64)},
    }
    files = {}
    for what, change in changed.items():
        out = io.BytesIO()
        np.savez_compressed(out, **{**arrays, **change})
        files[what] = out.getvalue()
    name = rng.choice([name for name in arrays if name != "format"])
    files[f"{name} that is not there"] = _with_header(name, (large, *arrays[name].shape[1:]), arrays)
    return files


@fault(
    "snapshots that claim giant arrays",
    survived="refused with the file's name, taking no more than a few megabytes",
    rounds=35,
    quick=7,
)
def absurd_snapshots(rng: random.Random, tmp: Path, rounds: int) -> Outcome:
    path, outcome, arrays = tmp / "snapshots.npz", Outcome(), _whole()
    cases: dict[str, bytes] = {}
    for _ in range(rounds):
        cases = cases or _absurd(rng, arrays)
        kind = next(iter(cases))
        path.write_bytes(cases.pop(kind))
        with outcome.trial(kind):
            refused_cheaply(Snapshots.load, path, SnapshotError)
    return outcome

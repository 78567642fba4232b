"""The file of a run's snapshots: plain arrays in a compressed .npz, read with care.

A few kilobytes of zeros can stand for gigabytes, and one array can say of another that it is larger than it is. So what
the file claims is looked at before anything is unpacked, and all shapes are held against each other afterwards.
Axis letters: E epochs kept, L layers, B bins, C output channels of all layers.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from src.quantizer import LARGEST_BITS, MIN_BITS

FORMAT = 1
COLUMNS = ("ranges", "dead_zones", "bits", "zeros")
NAMES = ("format", "layers", "sizes", "channels", "epochs", "count_bytes", "dead", *COLUMNS)
MOST_UNPACKED = 2**26  # bytes of all arrays; what is kept of the deepest network takes an eighth of it

Arrays = dict[str, NDArray[Any]]


def read_arrays(path: str | Path, bins: int) -> Arrays:
    """The arrays called NAMES, which fit each other. Takes at most a few times MOST_UNPACKED bytes.

    Raises ValueError where they do not fit, and whatever zipfile and numpy raise for a damaged file.
    """
    with zipfile.ZipFile(path) as archive:
        length = sum(entry.file_size for entry in archive.infolist())
    if length > MOST_UNPACKED:
        raise ValueError(f"it claims {length:,} bytes of arrays, at most {MOST_UNPACKED:,} are allowed")
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: np.asarray(file[name]) for name in NAMES}
    if int(arrays["format"]) != FORMAT:
        raise ValueError(f"format {int(arrays['format'])}, this version reads {FORMAT}")
    if len(arrays["epochs"]):  # there is nothing in the others before the first snapshot
        _check_shapes(arrays, bins)
    return arrays


def _check_shapes(arrays: Arrays, bins: int) -> None:
    epochs, layers = len(arrays["epochs"]), len(arrays["layers"])
    channels = [int(count) for count in arrays["channels"].reshape(-1)]
    wanted = {
        "epochs": (epochs,),
        "layers": (layers,),
        "sizes": (layers,),
        "channels": (layers,),
        "count_bytes": (4, epochs, layers, bins),
        "dead": (epochs, -(-sum(channels) // 8)),
        **dict.fromkeys(COLUMNS, (epochs, layers)),
    }
    for name, shape in wanted.items():
        if arrays[name].shape != shape:
            raise ValueError(f"{name} of shape {arrays[name].shape}, need {shape}")
    if min(channels, default=0) < 1 or (arrays["sizes"] < 1).any():
        raise ValueError("a layer without weights or channels")
    if not ((arrays["bits"] >= MIN_BITS) & (arrays["bits"] <= LARGEST_BITS)).all():
        raise ValueError(f"bits that no quantizer has: need {MIN_BITS} to {LARGEST_BITS}")

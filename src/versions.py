"""What a result's last digits depend on: libraries, device, arithmetic, threads and system."""

from __future__ import annotations

import platform
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

LIBRARIES = ("torch", "torchvision", "numpy", "matplotlib", "seaborn", "ipywidgets", "nbclient", "scikit-learn")


def versions() -> dict[str, str]:
    """Python and the libraries that shape a result, by name."""
    return dict(_versions())


def machine(device: torch.device, precision: torch.dtype) -> dict[str, Any]:
    """What a result's last digits depend on: device, arithmetic, threads and system."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": device.type,
        "device_name": name,
        "precision": str(precision).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
    }


@lru_cache(maxsize=1)  # it reads files, and every checkpoint asks
def _versions() -> tuple[tuple[str, str], ...]:
    found = [("python", platform.python_version())]
    for library in LIBRARIES:
        with suppress(PackageNotFoundError):
            found.append((library, version(library)))
    return tuple(found)

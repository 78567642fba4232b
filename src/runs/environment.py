"""What a result's last digits depend on: libraries, device, arithmetic, threads and system."""

from __future__ import annotations

import platform
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("torch", "torchvision", "numpy", "matplotlib", "seaborn", "ipywidgets", "nbclient", "scikit-learn")


def versions() -> dict[str, str]:
    """Python and the libraries that shape a result, by name."""
    return dict(_versions())


def machine(device: torch.device, precision: torch.dtype) -> dict[str, Any]:
    """What a result's last digits depend on: device, arithmetic, threads and system."""
    return {
        "device": device.type,
        "device_name": device_name(device),
        "precision": str(precision).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
    }


@lru_cache(maxsize=8)
def device_name(device: torch.device) -> str:
    """What the maker calls the device, where the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError, StopIteration):  # Linux has it here
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


@lru_cache(maxsize=1)  # it reads files, and every checkpoint asks
def _versions() -> tuple[tuple[str, str], ...]:
    found = [("python", platform.python_version())]
    for library in LIBRARIES:
        with suppress(PackageNotFoundError):
            found.append((library, version(library)))
    return tuple(found)

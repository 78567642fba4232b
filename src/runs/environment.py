"""What a result's last digits depend on: libraries, device, arithmetic, threads and system."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("torch", "torchvision", "numpy", "matplotlib", "seaborn", "ipywidgets", "nbclient", "scikit-learn")


def versions() -> dict[str, str]:
    """Python and the libraries that shape a result, by name."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[library] = version(library)
    return found


def machine(device: torch.device, precision: torch.dtype) -> dict[str, Any]:
    """Device, arithmetic, threads and system."""
    return {
        "device": device.type,
        "device_name": _device_name(device),
        "precision": str(precision).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
    }


def _device_name(device: torch.device) -> str:
    """The maker's name of the device, where the system knows it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError, StopIteration):  # Linux has it here
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()

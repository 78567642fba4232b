"""What a result's last digits depend on: libraries, device, arithmetic, threads and random generators."""

from __future__ import annotations

import platform
import random
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
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


def random_states() -> dict[str, Any]:
    """The states of torch (CPU and every CUDA device), numpy and Python, as a checkpoint can hold them.

    Training draws from a generator seeded by the epoch's number; these are for what a user adds, such as dropout.
    """
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002  (the global generator is meant)
    layout, numbers, carried = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss],
        "python": [layout, torch.tensor(numbers, dtype=torch.int64, device="cpu"), carried],
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Restore what `random_states` returned. CUDA devices that are not here, or were not there, are left out."""
    kind, keys, position, has_gauss, gauss = states["numpy"]
    layout, numbers, carried = states["python"]
    random.setstate((layout, tuple(numbers.tolist()), carried))
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    torch.set_rng_state(states["torch"].cpu())
    for device, state in zip(range(torch.cuda.device_count()), states["cuda"], strict=False):
        torch.cuda.set_rng_state(state.cpu(), device)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError, StopIteration):  # Linux has it here
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()

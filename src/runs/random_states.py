"""The states of all random generators of a process: torch's on the CPU and on every CUDA device, numpy's, Python's.

Training itself draws from a generator seeded by the epoch's number; these are for what a user adds, such as dropout.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def random_states() -> dict[str, Any]:
    """Every state as numbers, text and tensors, as a checkpoint can hold it."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002  (the global generator is meant)
    version, numbers, carried = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss],
        "python": [version, torch.tensor(numbers, dtype=torch.int64), carried],
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Restore all states. CUDA devices that are not here, or were not there, are left out.

    Raises ValueError where `states` is not from `random_states`; numpy and Python check theirs first.
    """
    try:
        kind, keys, position, has_gauss, gauss = states["numpy"]
        version, numbers, carried = states["python"]
        random.setstate((version, tuple(numbers.tolist()), carried))
        np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
        torch.set_rng_state(states["torch"].cpu())
        if torch.cuda.is_available():
            for device, state in zip(range(torch.cuda.device_count()), states["cuda"], strict=False):
                torch.cuda.set_rng_state(state.cpu(), device)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(f"not the states of random generators: {error}") from error

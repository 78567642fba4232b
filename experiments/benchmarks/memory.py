"""How much memory a few steps take at their highest point, in a process that does nothing else.

The high-water mark of resident memory is VmHWM on Linux, because ru_maxrss of a child starts at its parent's, and
ru_maxrss elsewhere; on CUDA it is the allocator's own.
"""

from __future__ import annotations

import gc
import sys
from contextlib import suppress
from pathlib import Path

import torch

from experiments.pipeline import Take, synchronize

MEMORY_STEPS = 3


def peak_memory(take: Take, device: torch.device) -> dict[str, int]:
    """Bytes before and at the highest point of a few steps; meant for a process that does nothing else."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts again from here
        before = _high_water_bytes()
    for _ in range(MEMORY_STEPS):
        take()
    synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _high_water_bytes()
    return {"before_bytes": before, "peak_bytes": peak, "step_bytes": peak - before}


def _high_water_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    import resource

    mark = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return mark if sys.platform == "darwin" else mark * 1024

"""Where and in what arithmetic a network is trained, and what to do where its memory does not suffice."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import AbstractContextManager
from typing import Any

import torch

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "fp32", "bf16")
CPU_SIGNS = ("not enough memory", "can't allocate memory", "cannot allocate memory", "DefaultCPUAllocator")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


class TrainingError(ValueError):
    """Training cannot continue: a device is absent, a loss is not finite, or memory ran out."""


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" takes MPS, then CUDA, then the CPU. Raises TrainingError for an absent one."""
    present = {"mps": torch.backends.mps.is_available(), "cuda": torch.cuda.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, here in present.items() if here))
    if not present.get(name):
        here = [kind for kind, found in present.items() if found]
        raise TrainingError(f"device {name!r} is not present here: use one of {', '.join(here)}, or auto")
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The arithmetic of forward and backward passes: torch.float32 or torch.bfloat16.

    "auto" takes bfloat16 where the hardware multiplies it (AVX512_BF16 or AMX on a CPU, CUDA devices that support it):
    elsewhere it is emulated and slower.
    """
    if name != "auto":
        return torch.bfloat16 if name == "bf16" else torch.float32
    if device.type == "cuda":
        multiplied = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        kinds = ("avx512_bf16", "amx_bf16", "bf16")
        multiplied = device.type == "cpu" and any(capabilities.get(kind) for kind in kinds)
    return torch.bfloat16 if multiplied else torch.float32


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[Any]:
    """Mixed precision on `device`, or nothing where `precision` is float32."""
    return torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)


def repeatable(device: torch.device) -> None:
    """Make this process compute the same bits every time on a CUDA device; elsewhere there is nothing to do.

    To be called before the first matrix product, which fixes cuBLAS's workspace.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid that costs a launch per tensor


def keep_freed_memory() -> None:
    """Set glibc's allocator, for this process, to keep freed blocks of up to 32 MB for the next allocation."""
    if sys.platform == "linux":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # glibc accepts no more
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # never


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out; on a CPU torch raises a plain RuntimeError for it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in CPU_SIGNS)

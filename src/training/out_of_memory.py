"""What to do when the memory does not hold a batch: which batch size would do. B images a batch."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from src.training.devices import autocast

CPU_SIGNS = ("not enough memory", "can't allocate memory", "cannot allocate memory", "DefaultCPUAllocator")
PROBE = 8  # images; few enough to fit nearly everywhere
SPARE = 0.8  # the share of what is free that a suggestion may use
SMALLEST = 2  # BatchNorm needs two images


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out; on a CPU torch raises a plain RuntimeError for it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in CPU_SIGNS)


def advice(batch_size: int, model: nn.Module, image_shape: tuple[int, ...], precision: torch.dtype) -> str:
    """One sentence that says which batch size would do.

    Where CUDA tells how much memory a few images take, forward and backward, it is the largest half, quarter, ... of
    `batch_size` that fits into what is free; elsewhere it is the half.
    """
    device = next(model.parameters()).device
    if batch_size <= SMALLEST:
        return (
            f"the memory of {device.type} does not hold {batch_size} images; end other programs, or use another device"
        )
    half, measured = max(SMALLEST, batch_size // 2), ""
    if device.type == "cuda":
        bytes_per_image, free = _measure(model, image_shape, precision, device)
        while bytes_per_image and half > SMALLEST and half * bytes_per_image > SPARE * free:
            half = max(SMALLEST, half // 2)
        measured = f" ({bytes_per_image / 2**20:.1f} MiB an image, {free / 2**30:.1f} GiB free)"
    return (
        f"the memory of {device.type} does not hold a batch of {batch_size} images; try batches of {half}{measured}: "
        f"--batch-size {half}, or BATCH_SIZE = {half}"
    )


def _measure(
    model: nn.Module, image_shape: tuple[int, ...], precision: torch.dtype, device: torch.device
) -> tuple[float, int]:
    """Bytes an image needs in a forward and backward pass, and the bytes that are free. 0 where it cannot be told."""
    model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0]
    try:
        probe = copy.deepcopy(model).train()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        with autocast(device, precision):
            scores = probe(torch.zeros(PROBE, *image_shape, device=device).to(memory_format=torch.channels_last))
        F.cross_entropy(scores.float(), torch.zeros(PROBE, dtype=torch.long, device=device)).backward()
        return (torch.cuda.max_memory_allocated(device) - before) / PROBE, free
    except (RuntimeError, MemoryError):
        return 0.0, free

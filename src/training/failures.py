"""Why training failed: the first tensor that is not finite, or memory that ran out. B images a batch.

A gradient that is not finite makes weights that are not, and one step later everything is. So gradients are checked
between backward pass and update, in the optimizer's own hook, where the weights are still those the step began with.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.training.devices import autocast

Named = Sequence[tuple[str, Tensor]]
DIVERGENCE_HINT = "lower the learning rate or the peak of the penalty"
CPU_SIGNS = ("not enough memory", "can't allocate memory", "cannot allocate memory", "DefaultCPUAllocator")
PROBE = 8  # images; few enough to fit nearly everywhere
SPARE = 0.8  # the share of the free memory that a suggestion may use
SMALLEST = 2  # BatchNorm needs two images


def not_finite(tensors: Iterable[tuple[str, object]]) -> list[str]:
    """The names of the floating-point tensors that hold NaN or Inf, in the order given. Waits for the device once."""
    floats = [(name, t) for name, t in tensors if isinstance(t, Tensor) and t.is_floating_point() and t.numel()]
    if not floats:
        return []
    finite = torch.stack([torch.isfinite(t).all().to(floats[0][1].device) for _, t in floats]).tolist()
    return [short_name(name) for (name, _), good in zip(floats, finite, strict=True) if not good]


@contextmanager
def watch_update(
    optimizer: torch.optim.Optimizer, parameters: Named, images: Tensor, enabled: bool = True
) -> Iterator[list[str]]:
    """Yield a list, to which an update of `optimizer` inside adds the first tensor that is not finite, if any.

    parameters: the network's, by name, in its order; images: the batch, (B, 3, H, W). Nothing is stopped or changed,
    and nothing is checked unless `enabled`.
    """
    found: list[str] = []

    def before_update(*_: Any) -> None:
        gradients = [(name, p.grad) for name, p in parameters if p.grad is not None]
        flat = [gradient.detach().reshape(-1) for _, gradient in gradients]
        # NaN and Inf survive a sum, so one sum tells whether there is anything to search for.
        if flat and not torch.isfinite(torch.cat(flat).sum()):
            found.extend(filter(None, [first_not_finite(images, parameters, gradients)]))

    hook = optimizer.register_step_pre_hook(before_update) if enabled else None
    try:
        yield found
    finally:
        if hook:
            hook.remove()


def first_not_finite(images: Tensor, weights: Named, gradients: Named = ()) -> str:
    """In the order of cause and effect: an input, else the first weight, else the gradient that backward reached first.

    Backward goes through the network from its end, so that is the last one in the network's order. Empty for none.
    """
    bad_images = int((~torch.isfinite(images)).flatten(1).any(1).sum())
    if bad_images:
        return f"input: {bad_images} of {len(images)} images of the batch"
    if bad := not_finite(weights):
        return f"weight {bad[0]}"
    if bad := not_finite(gradients):
        return f"gradient of {bad[-1]}"
    return ""


def short_name(name: str) -> str:
    """A parameter's name as the network has it, without the way through its quantizer."""
    name = name.replace(".parametrizations.weight.original", ".weight")
    return name.replace(".parametrizations.weight.0.quantizer", "")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out; on a CPU torch raises a plain RuntimeError for it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in CPU_SIGNS)


def batch_size_advice(batch_size: int, model: nn.Module, image_shape: tuple[int, ...], precision: torch.dtype) -> str:
    """One sentence that says which batch size would fit into memory.

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
    """Bytes per image of a forward and backward pass, 0 where that cannot be measured, and the bytes that are free."""
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

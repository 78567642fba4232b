"""Which tensor was the first to be no number: an input, a weight or a gradient.

A gradient that is not finite makes weights that are not, and after one more step everything is. So gradients are
looked at between backward pass and update, in the optimizer's own hook, where the weights are still those that the
step began with. B images a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Named = Sequence[tuple[str, Tensor]]


@dataclass
class Finding:
    """The first tensor that is not finite, in words; empty where all are."""

    text: str = ""


def not_finite(tensors: Iterable[tuple[str, object]]) -> list[str]:
    """The names of the floating-point tensors that hold NaN or Inf, in the order given. Waits for the device once."""
    floats = [(name, t) for name, t in tensors if isinstance(t, Tensor) and t.is_floating_point() and t.numel()]
    if not floats:
        return []
    finite = torch.stack([torch.isfinite(t).all().to(floats[0][1].device) for _, t in floats]).tolist()
    return [short_name(name) for (name, _), good in zip(floats, finite, strict=True) if not good]


@contextmanager
def watched_update(
    optimizer: torch.optim.Optimizer, parameters: Named, images: Tensor, look: bool = True
) -> Iterator[Finding]:
    """Inside, the first update of `optimizer` is preceded by a look at what it is made from, where `look` is set.

    parameters: the network's, by name, in its order; images: the batch, (B, 3, H, W). Nothing is stopped or changed.
    """
    finding = Finding()
    if not look:
        yield finding
        return

    def before_update(*_: Any) -> None:
        gradients = [(name, p.grad) for name, p in parameters if p.grad is not None]
        flat = [gradient.detach().reshape(-1) for _, gradient in gradients]
        # One sum finds out whether there is anything to look for: NaN and Inf survive it.
        if not finding.text and flat and not torch.isfinite(torch.cat(flat).sum()):
            finding.text = first_not_finite(images, parameters, gradients)

    hook = optimizer.register_step_pre_hook(before_update)
    try:
        yield finding
    finally:
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
    for inner, plain in (
        (".parametrizations.weight.original", ".weight"),
        (".parametrizations.weight.0.quantizer", ""),
    ):
        name = name.replace(inner, plain)
    return name

"""Sparsity penalties: differentiable scalars that draw groups of weights to zero together.

All of them read the weights as the network does (quantized where a quantizer is on), and all have a finite, zero
gradient where a group is entirely zero: sqrt has none there of its own.
Axis letters: O output channels, I input channels, k kernel, G groups.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from src.pruning import ChannelGroups, InputSize, channel_groups
from src.quantizer import at_least_float32, check_range
from src.training import Penalty
from utils_quantization import unwrapped


class PenaltyError(ValueError):
    """A penalty was given a network or an argument it has no meaning for."""


def coupled_group_lasso(model: nn.Module, input_size: InputSize = (3, 32, 32)) -> Penalty:
    """sum over channels g of || all parameters that removing channel g takes away ||_2.

    The groups come from src.pruning: the filters that make the channel, their BatchNorm scale and shift, and the
    slices that read it, over all layers that a residual connection ties together. Scale and shift belong in the group
    because a filter before BatchNorm is scale-free: without them nothing distinguishes an important channel from
    another, and none ever dies (docs/experiments.md). The groups are found once, here; the function returned computes
    the scalar for that network or one of the same structure. Raises PenaltyError where no channel is removable.
    """
    return group_lasso(channel_groups(model, input_size))


def group_lasso(groups: ChannelGroups) -> Penalty:
    """The penalty for groups that were found already. Raises PenaltyError where there is none."""
    norms = group_norms(groups)
    return lambda network: norms(network).sum()


def group_norms(groups: ChannelGroups) -> Callable[[nn.Module], Tensor]:
    """fn(network) -> the norm of every group, (G,), differentiable. Raises PenaltyError where there is no group."""
    if not len(groups):
        raise PenaltyError(
            "no removable channel was found: the network has no convolution followed by a layer that reads it, or an "
            "operation that cannot be followed stands in between; see src/pruning/operations.py for what is known"
        )
    index = torch.cat([torch.from_numpy(member.groups) for member in groups.members])
    index[index < 0] = len(groups)  # what is in no group is summed behind the last one
    on_device: dict[torch.device, Tensor] = {}

    def norms(network: nn.Module) -> Tensor:
        network = unwrapped(network)
        squares: dict[str, Tensor] = {}
        parts = []
        for member in groups.members:
            key = f"{member.module}.{member.parameter}"
            if key not in squares:
                parameter = getattr(network.get_submodule(member.module), member.parameter)
                squares[key] = at_least_float32(parameter).square()
            others = [dim for dim in range(squares[key].dim()) if dim != member.dim]
            parts.append(squares[key].sum(others) if others else squares[key])
        sums = torch.cat(parts)
        if sums.device not in on_device:
            on_device[sums.device] = index.to(sums.device)
        totals = sums.new_zeros(len(groups) + 1).index_add(0, on_device[sums.device], sums)
        return safe_sqrt(totals[:-1])

    return norms


def group_lasso_channels(model: nn.Module) -> Tensor:
    """sum over convolutions and their output channels o of ||W[o]||_2."""
    return _total(model, lambda weight: safe_sqrt(weight.square().flatten(1).sum(1)).sum())


def group_lasso_blocks(block_size: int = 4) -> Penalty:
    """Group lasso over blocks of `block_size` consecutive filters: sum of ||W[o : o + block_size]||_2.

    The last block of a layer is smaller where the size does not divide its filters. Raises PenaltyError for a size
    below 1.
    """
    check_range("block_size", block_size, 1, remedy="a number of filters", error=PenaltyError)

    def blocks(weight: Tensor) -> Tensor:
        filters = weight.square().flatten(1).sum(1)
        padded = nn.functional.pad(filters, (0, -len(filters) % block_size))
        return safe_sqrt(padded.view(-1, block_size).sum(1)).sum()

    return lambda model: _total(model, blocks)


def l1_kernel_sparsity(model: nn.Module) -> Tensor:
    """sum over all k x k kernels of the convolutions of ||W[o, i]||_1, which is the sum of all |w|."""
    return _total(model, lambda weight: weight.abs().sum())


def safe_sqrt(x: Tensor) -> Tensor:
    """sqrt(x) for x >= 0, with gradient 0 instead of infinity at 0."""
    positive = x > 0
    return torch.where(positive, x, 1).sqrt() * positive


def _total(model: nn.Module, penalty: Callable[[Tensor], Tensor]) -> Tensor:
    """The sum of `penalty` over the weights of all convolutions."""
    weights = [at_least_float32(module.weight) for module in model.modules() if isinstance(module, nn.Conv2d)]
    return torch.stack([penalty(weight) for weight in weights]).sum()

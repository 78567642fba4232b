"""The learnable dead-zone quantizer of CoDeQ (arXiv 2512.12981, section 3) and its straight-through pieces.

One quantizer per layer. With the layer's weights w, its range R (the 0.99-quantile of |w|, no gradient) and two
logits, both learned:

    dead zone   d = 2 R (1 - |tanh theta_dz|)                         |w| <= d / 2 becomes exactly 0
    bits        b = round(|tanh theta_bit| (b_max - b_min) + b_min)    b_min = 2
    levels      Q = 2^(b - 1) - 1                                      on each side of 0
    step        s = (R - d / 2) / (Q - 1/2) + 1e-8
    shift       delta = d / 2 - s / 2
    index       q = clip(round(sign(w) relu(|w| - delta) / s), -Q, Q)
    value       s q + delta sign(q)

Gradients pass straight through round, relu and clip, so that a pruned or saturated weight still moves, and not at
all through sign and R. A network in half precision is quantized in float32, and its values are rounded to its own type.
Axis letters: L layers, T weights of all layers together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

RANGE_QUANTILE = 0.99
STEP_EPSILON = 1e-8
MIN_BITS = 2
BATCH_LIMIT = 2**20  # weights; up to here, an operation costs more to start than to compute
LARGEST_BITS = 16  # beyond this, float32 no longer tells neighbouring levels apart reliably
BITS_REMEDY = "2 means ternary"
LOGIT_REMEDY = "3.0 starts at full width and almost no dead zone"


class QuantizerError(ValueError):
    """A quantizer was asked for something outside its range, or given a tensor it cannot quantize."""


class Grid(NamedTuple):
    """The grid a quantizer lays over its weights, in weight units; every field is () or (L,)."""

    range: Tensor
    dead_zone: Tensor
    levels: Tensor
    step: Tensor
    shift: Tensor


class DeadZoneLDZCompander(nn.Module):
    """Quantize a weight tensor of any shape: zeros inside a dead zone, a uniform grid outside (CoDeQ eq. 10 to 14).

    fixed_bit_val: bit width used where `learnable_bit` is False (2 to 16).
    max_bits: largest bit width that can be learned (2 to 16).
    init_bit_logit, init_deadzone_logit: starting points of theta_bit and theta_dz (any finite number; the sign is
        immaterial, 0 means 2 bits and a dead zone over the whole range).
    learnable_bit: learn the bit width from theta_bit; otherwise it is `fixed_bit_val`.
    learnable_deadzone: train theta_dz; otherwise it stays at `init_deadzone_logit`.

    Parameters and buffers carry the names of the paper's public code, so its checkpoints load; the two flags in a
    loaded checkpoint take effect. Raises QuantizerError for arguments out of range.
    """

    fixed_bit: Tensor
    max_bits: Tensor
    min_bits: Tensor
    learnable_bit: Tensor
    learnable_deadzone: Tensor

    def __init__(
        self,
        fixed_bit_val: int = 4,
        max_bits: int = 8,
        init_bit_logit: float = 3.0,
        init_deadzone_logit: float = 3.0,
        learnable_bit: bool = True,
        learnable_deadzone: bool = True,
    ) -> None:
        super().__init__()
        check_range("fixed_bit_val", fixed_bit_val, MIN_BITS, LARGEST_BITS, remedy=BITS_REMEDY)
        check_range("max_bits", max_bits, MIN_BITS, LARGEST_BITS, remedy=BITS_REMEDY)
        check_range("init_bit_logit", init_bit_logit, -math.inf, whole=False, remedy=LOGIT_REMEDY)
        check_range("init_deadzone_logit", init_deadzone_logit, -math.inf, whole=False, remedy=LOGIT_REMEDY)
        self.logit_dz = nn.Parameter(torch.tensor(float(init_deadzone_logit)), requires_grad=bool(learnable_deadzone))
        self.logit_bit = nn.Parameter(torch.tensor(float(init_bit_logit)), requires_grad=bool(learnable_bit))
        self.register_buffer("fixed_bit", torch.tensor(float(fixed_bit_val)))
        self.register_buffer("max_bits", torch.tensor(float(max_bits)))
        self.register_buffer("min_bits", torch.tensor(float(MIN_BITS)))
        self.register_buffer("learnable_bit", torch.tensor(float(learnable_bit)))
        self.register_buffer("learnable_deadzone", torch.tensor(float(learnable_deadzone)))
        # The flag is also kept as a Python bool: reading a buffer in the forward pass would wait for the device.
        self._learns_bits = bool(learnable_bit)
        self.register_load_state_dict_post_hook(DeadZoneLDZCompander._follow_loaded_flags)

    def forward(self, w: Tensor) -> Tensor:
        """Return the quantized weights, same shape and dtype. Raises QuantizerError on an empty or integer tensor."""
        return quantize([w], self.logit_dz[None], self.get_bitwidth()[None])[0]

    def get_bitwidth(self) -> Tensor:
        """The bit width b in use: (), a whole number, with a straight-through gradient to theta_bit."""
        if not self._learns_bits:
            return self.fixed_bit
        return round_ste(self.logit_bit.tanh().abs() * (self.max_bits - self.min_bits) + self.min_bits)

    def get_deadzone_logit(self) -> Tensor:
        """theta_dz, ()."""
        return self.logit_dz

    def get_bitwidth_logit(self) -> Tensor:
        """theta_bit, ()."""
        return self.logit_bit

    def dead_zone_share(self) -> Tensor:
        """d / (2 R) = 1 - |tanh theta_dz|: the dead zone's half width as a share of the layer's range, ()."""
        return 1 - self.logit_dz.tanh().abs()

    @torch.no_grad()
    def grid(self, w: Tensor) -> Grid:
        """The grid for the weights `w`: range, dead zone, step and shift in weight units, levels on each side of 0."""
        grid = lay_grids([w], self.logit_dz[None], self.get_bitwidth()[None])
        return Grid(*(field[0] for field in grid))

    @torch.no_grad()
    def indices(self, w: Tensor) -> Tensor:
        """The index q of every weight, int32, same shape; its value is s q + delta sign(q), see `dequantize`."""
        grid = self.grid(w)
        return grid_indices(at_least_float32(w), grid.levels, grid.step, grid.shift).to(torch.int32)

    @staticmethod
    def quantize_many(quantizers: Sequence[DeadZoneLDZCompander], weights: Sequence[Tensor]) -> list[Tensor]:
        """Quantize the weights of many layers in a few operations; same values as one call per layer."""
        logits = torch.stack([quantizer.logit_dz for quantizer in quantizers])
        bits = torch.stack([quantizer.get_bitwidth() for quantizer in quantizers])
        return quantize(weights, logits, bits)

    @staticmethod
    def _follow_loaded_flags(module: nn.Module, _: Any) -> None:
        quantizer = cast(DeadZoneLDZCompander, module)
        quantizer._learns_bits = bool(quantizer.learnable_bit.item())
        quantizer.logit_bit.requires_grad_(quantizer._learns_bits)
        quantizer.logit_dz.requires_grad_(bool(quantizer.learnable_deadzone.item()))

    def extra_repr(self) -> str:
        """What `print(model)` shows of the quantizer."""
        bits = f"2..{self.max_bits.item():.0f} learned" if self._learns_bits else f"{self.fixed_bit.item():.0f} fixed"
        return f"bits {bits}, dead zone {'learned' if self.logit_dz.requires_grad else 'fixed'}"


def quantize(weights: Sequence[Tensor], logit_dz: Tensor, bits: Tensor) -> list[Tensor]:
    """Quantize L weight tensors at once. logit_dz, bits: (L,). Returns tensors of the shapes and types given.

    Small layers are computed together, each large one alone (`_batches`). Raises QuantizerError on an empty or
    non-floating tensor.
    """
    grid = lay_grids(weights, logit_dz, bits)
    levels, steps, shifts = grid.levels.unbind(), grid.step.unbind(), grid.shift.unbind()
    values: dict[int, Tensor] = {}
    for batch in _batches(weights):
        of_batch = ([field[i] for i in batch] for field in (weights, levels, steps, shifts))
        values.update(zip(batch, _quantize_together(*of_batch), strict=True))
    return [values[i] for i in range(len(weights))]


def lay_grids(weights: Sequence[Tensor], logit_dz: Tensor, bits: Tensor) -> Grid:
    """The grids of L layers, every field (L,). Raises QuantizerError on an empty or non-floating tensor."""
    _check_quantizable(weights)
    range_, logit_dz, bits = weight_ranges(weights), at_least_float32(logit_dz), at_least_float32(bits)
    dead_zone = 2 * range_ * (1 - logit_dz.tanh().abs())
    levels = torch.exp2(bits - 1) - 1
    step = (range_ - dead_zone / 2) / (levels - 0.5) + STEP_EPSILON
    return Grid(range_, dead_zone, levels, step, dead_zone / 2 - step / 2)


def grid_indices(w: Tensor, levels: Tensor, step: Tensor, shift: Tensor) -> Tensor:
    """The index q of every weight, a whole number."""
    outside = w.sign() * relu_ste(w.abs() - shift)
    # + 0.0 makes -0.0 (a small negative weight) an ordinary zero, so that equal weights have equal bits
    return clip_ste(round_ste(outside / step), levels) + 0.0


def dequantize(q: Tensor, step: Tensor, shift: Tensor) -> Tensor:
    """value = s q + delta sign(q) (CoDeQ eq. 12)."""
    return step * q + shift * q.sign()


@torch.no_grad()
def weight_ranges(weights: Sequence[Tensor]) -> Tensor:
    """R of each tensor: the 0.99-quantile of |w| with linear interpolation, (L,). Not differentiated.

    Only the largest 1 % has to be put in order, which `topk` does for all layers of a batch at once.
    """
    ranges: dict[int, Tensor] = {}
    for batch in _batches(weights):
        ranges.update(zip(batch, _ranges_together([weights[i] for i in batch]).unbind(), strict=True))
    return torch.stack([ranges[i] for i in range(len(weights))])


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32 where it is in half precision, whose smallest numbers and steps are too coarse here; else x."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def round_ste(x: Tensor) -> Tensor:
    """round(x) forward (halves to even), the identity backward."""
    return cast(Tensor, _StraightThrough.apply(x, torch.round))


def relu_ste(x: Tensor) -> Tensor:
    """max(x, 0) forward, the identity backward."""
    return cast(Tensor, _StraightThrough.apply(x, torch.relu))


def clip_ste(x: Tensor, bound: Tensor) -> Tensor:
    """x limited to [-bound, bound] forward; backward the identity for x and nothing for the bound."""
    return cast(Tensor, _StraightThrough.apply(x, lambda x: torch.minimum(torch.maximum(x, -bound), bound)))


def check_range(
    name: str,
    value: Any,
    lowest: float,
    highest: float = math.inf,
    *,
    whole: bool = True,
    remedy: str = "",
    error: type[ValueError] = QuantizerError,
) -> None:
    """Raise `error` unless `value` is a finite number in lowest..highest, limits included; `whole`: an int.

    The message is "name=value: need lowest..highest; remedy". True and False are not numbers here.
    """
    is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if is_number and (isinstance(value, int) or math.isfinite(value)) and lowest <= value <= highest:
        return
    limits = f"{lowest} or more" if highest == math.inf else f"{lowest}..{highest}"
    need = "any finite number" if lowest == -math.inf else limits
    kind = ", a whole number" if whole else ""
    raise error(f"{name}={value!r:.80}: need {need}{kind}{'; ' if remedy else ''}{remedy}")


def _batches(weights: Sequence[Tensor]) -> list[list[int]]:
    """Which layers are computed together: as many of similar size as stay below BATCH_LIMIT when all are padded to the
    largest. A small network on a GPU is bound by launches, not by arithmetic; a large layer would pad all others."""
    batches: list[list[int]] = []
    for i in sorted(range(len(weights)), key=lambda i: weights[i].numel()):
        if not batches or (len(batches[-1]) + 1) * weights[i].numel() > BATCH_LIMIT:
            batches.append([])
        batches[-1].append(i)
    return batches


def _quantize_together(
    weights: Sequence[Tensor], levels: Sequence[Tensor], steps: Sequence[Tensor], shifts: Sequence[Tensor]
) -> list[Tensor]:
    """Quantize the layers of a batch, all weights laid end to end, (T,)."""
    sizes = [w.numel() for w in weights]

    def spread(field: Sequence[Tensor]) -> Tensor:
        """() a layer to (T,): its number for all of its weights. Backward sums layer by layer, in a fixed order."""
        return _end_to_end([number.expand(size) for number, size in zip(field, sizes, strict=True)])

    step, shift = spread(steps), spread(shifts)
    flat = _end_to_end([at_least_float32(w).flatten() for w in weights])
    values = dequantize(grid_indices(flat, spread(levels), step, shift), step, shift)
    return [part.view_as(w).to(w.dtype) for part, w in zip(values.split(sizes), weights, strict=True)]


def _end_to_end(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _ranges_together(weights: Sequence[Tensor]) -> Tensor:
    """The ranges of the layers of a batch, padded with zeros, which no |w| is below."""
    flat = [at_least_float32(w).flatten() for w in weights]
    magnitudes = flat[0].abs()[None] if len(flat) == 1 else pad_sequence(flat, batch_first=True).abs_()
    # what is not a plain tensor (FakeTensor) has numbers of its own kind, which nobody else may be given
    ranks = _kept_ranks if type(magnitudes) is Tensor else _quantile_ranks.__wrapped__
    most, low, high, fraction = ranks(tuple(w.numel() for w in weights), magnitudes.device, magnitudes.dtype)
    largest = magnitudes.topk(most, dim=1).values
    return torch.lerp(largest.gather(1, low)[:, 0], largest.gather(1, high)[:, 0], fraction)


# Asked for in every step with the same sizes; to build the tensors there would make a GPU wait for the copies.
@lru_cache(maxsize=256)
def _quantile_ranks(
    sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> tuple[int, Tensor, Tensor, Tensor]:
    """Where the range lies among a layer's weights in falling order: how many of them are needed at most, the ranks of
    the two that it lies between, (L, 1) each, and how far it is from the lower to the higher one, (L,)."""
    positions = [RANGE_QUANTILE * (size - 1) for size in sizes]
    below = [math.floor(position) for position in positions]
    ranks = [size - 1 - rank for size, rank in zip(sizes, below, strict=True)]
    low = torch.tensor(ranks, device=device)[:, None]
    fraction = torch.tensor([p - rank for p, rank in zip(positions, below, strict=True)], dtype=dtype, device=device)
    return max(ranks) + 1, low, (low - 1).clamp(min=0), fraction


@torch.compiler.assume_constant_result  # a compiled step would copy the numbers to its device every time
def _kept_ranks(sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> tuple[int, Tensor, Tensor, Tensor]:
    return _quantile_ranks(sizes, device, dtype)


def _check_quantizable(weights: Sequence[Tensor]) -> None:
    for w in weights:
        if w.numel() == 0 or not w.is_floating_point():
            raise QuantizerError(
                f"cannot quantize a tensor of shape {tuple(w.shape)} and dtype {w.dtype}: need at least one "
                "floating-point weight; leave this layer out with `exclude_layers`"
            )


class _StraightThrough(torch.autograd.Function):
    """function(x) forward, the identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None

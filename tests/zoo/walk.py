"""One network from the first quantizer to the ONNX file, with an oracle for every step.

    groups        which channels can be removed
    attach        a quantizer on every layer
    penalty       coupled group lasso: finite, with a finite gradient
    training      three steps of SGD: everything stays finite
    compaction    a third of the groups dead, half of these in their filters alone: outputs equal in float64
    removal       every filter of a group that is dead as a whole is gone
    MACs          calculate_stats' number is what torch.utils.flop_counter counts in the compacted network
    state         saved and read as a state dictionary: outputs equal, bit for bit
    second round  the smaller network with quantizers of its own, trained one step and compacted: outputs equal
    torch.export  exported: outputs equal
    packed file   read back, bit for bit
    ONNX          ONNX Runtime computes what PyTorch does

A step's outcome is "ok", "refused: ..." (an error of this project's own), "wrong: ..." or "error: ..." (any other
exception), and "-" where an earlier step left nothing to go on with.
"""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from experiments.sparsity import group_lasso
from metrics import ModelStats, QuantizationComparison
from src.export import check_onnx, compact_with_indices, export_onnx, pack, unpack
from src.pruning import ChannelGroups, CompactionError, channel_groups, compact
from src.quantizer import DeadZoneLDZCompander
from src.training import Penalty
from tests.zoo.cases import CLASSES, Case
from utils_quantization import CANDIDATES, attach_weight_quantizers, latent_weight

OWN = ("src", "experiments", "metrics", "utils_quantization")  # whose exceptions are refusals
LAYERS = ("convolution", "addmm", "mm")  # of what flop_counter counts; left out are attention's products
EXACT, CLOSE = 1e-8, 1e-3  # of the spread of an output over the images: in float64, in float32


class WrongError(AssertionError):
    """A step that ran, with a wrong result."""


class Walk:
    """A network on its way. Each step is a method that returns what it found, or raises."""

    def __init__(self, case: Case, folder: Path) -> None:
        torch.manual_seed(0)
        self.build, self.size, self.folder = case.build, case.size, folder
        self.network = case.build()
        self.images = torch.randn(4, *case.size)
        self.groups: ChannelGroups | None = None
        self.indexed: Any = None
        self.smaller: nn.Module | None = None

    @functools.cached_property
    def stats(self) -> ModelStats:
        return QuantizationComparison(self.size).calculate_stats(self.network)

    def found(self) -> str:
        groups = channel_groups(self.network.eval(), self.size)
        rows: dict[tuple[int, int], list[int]] = {}
        for member in groups.members:
            parameter = getattr(self.network.get_submodule(member.module), member.parameter)
            numbers = rows.setdefault((id(parameter), member.dim), member.groups.tolist())
            check(numbers == member.groups.tolist(), f"a row of {member.module}.{member.parameter} is in two groups")
        self.groups = groups
        return "ok"

    def attach(self) -> str:
        attach_weight_quantizers(self.network, [], DeadZoneLDZCompander, {"max_bits": 8})
        check(not any(module.training for module in self.network.modules()), "eval mode, but not of the quantizers")
        return "ok"

    def penalty(self) -> str:
        assert self.groups is not None
        penalty = group_lasso(self.groups)(self.network)
        penalty.backward()
        check(penalty.isfinite() and penalty > 0, f"the penalty is {penalty.item()}")
        check(finite(p.grad for p in self.network.parameters()), "a gradient of the penalty is not finite")
        return "ok"

    def training(self) -> str:
        train_(self.network, self.images, 3, group_lasso(self.groups) if self.groups else None)
        check(finite(self.network.state_dict().values()), "training left numbers that are not finite")
        return "ok"

    def compaction(self) -> str:
        settle_(self.network, self.images)
        if self.groups:
            zero_third_(self.network, self.groups)
        before = copy.deepcopy(self.network)
        compacted_exactly(self.network, self.size, self.images)
        indexed = compact_with_indices(self.network, self.size)
        check(same(before, self.network, self.images), "the network that was compacted is another one now")
        self.indexed, self.smaller = indexed, indexed.network
        return "ok"

    def removal(self) -> str:
        assert self.groups is not None
        gone = {layer.name: layer.null_out.indices for layer in self.stats.layers}
        for member in self.groups.members:
            if member.role == "filter":
                due = {row for row, group in enumerate(member.groups.tolist()) if group >= 0 and group % 6 == 0}
                kept = due - gone.get(member.module, frozenset())
                check(not kept, f"{len(kept)} of {len(due)} dead channels of {member.module!r} stay")
        return "ok"

    def macs(self) -> str:
        assert self.smaller is not None
        with FlopCounterMode(display=False) as counter:  # with gradients: attention's fast path is not counted
            self.smaller(self.images[:1])
        counts = counter.get_flop_counts()["Global"]
        flops = sum(count for operation, count in counts.items() if str(operation).split(".")[-1] in LAYERS)
        macs = self.stats.total_macs
        check(2 * macs == flops, f"{macs:,} said, {flops // 2:,} counted")
        return "ok"

    def state(self) -> str:
        assert self.smaller is not None
        other, file = copy.deepcopy(self.smaller), io.BytesIO()
        torch.save(self.smaller.state_dict(), file)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(1)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        check(same(self.smaller, other, self.images), "outputs differ")
        return "ok"

    def second(self) -> str:
        network = copy.deepcopy(self.smaller)
        assert network is not None
        attach_weight_quantizers(network, [], DeadZoneLDZCompander, {"max_bits": 8})
        train_(network, self.images, 1)
        QuantizationComparison(self.size).calculate_stats(network)
        compacted_exactly(network, self.size, self.images)
        return "ok"

    def export(self) -> str:
        assert self.smaller is not None
        exported = torch.export.export(self.smaller, (self.images,)).module()
        error = difference(self.smaller, exported, self.images)
        check(error < CLOSE, f"outputs differ by {error:.1e} of their spread")
        return "ok"

    def packed(self) -> str:
        assert self.smaller is not None
        path = self.folder / "network.cdq"
        pack(self.indexed, path, force=True)
        said = "ok"
        try:
            network = unpack(path)
        except CompactionError as error:
            if "like=" not in str(error):
                raise
            network, said = unpack(path, like=self.build()), "ok, with like="
        ours, theirs = self.smaller.state_dict(), network.state_dict()
        check(ours.keys() == theirs.keys(), "other keys")
        check(all(torch.equal(ours[key], theirs[key]) for key in ours), "other numbers")
        check(same(self.smaller, network, self.images), "outputs differ")
        return said

    def onnx(self) -> str:
        path = self.folder / "network.onnx"
        export_onnx(self.indexed, path, force=True)
        error = check_onnx(path, self.network, self.images).largest_difference
        with torch.no_grad():
            (logits,) = tensors(self.network(self.images))
        check(error < CLOSE * spread(logits), f"logits differ by {error:.1e}")
        return "ok"


STEPS: dict[str, Callable[[Walk], str]] = {
    "groups": Walk.found,
    "attach": Walk.attach,
    "penalty": Walk.penalty,
    "training": Walk.training,
    "compaction": Walk.compaction,
    "removal": Walk.removal,
    "MACs": Walk.macs,
    "state": Walk.state,
    "second round": Walk.second,
    "torch.export": Walk.export,
    "packed file": Walk.packed,
    "ONNX": Walk.onnx,
}


def walk(case: Case, folder: Path, steps: Iterable[str] = STEPS) -> tuple[Walk, dict[str, str]]:
    """The network at the end of its way, and the outcome of each step."""
    walker = Walk(case, folder)
    return walker, {step: outcome(walker, STEPS[step]) for step in steps}


def outcome(walker: Walk, step: Callable[[Walk], str]) -> str:
    if step in (Walk.penalty, Walk.removal) and walker.groups is None:
        return "-"
    if step in (Walk.macs, Walk.state, Walk.second, Walk.export, Walk.packed, Walk.onnx) and walker.smaller is None:
        return "-"
    try:
        return step(walker)
    except WrongError as error:
        return f"wrong: {error}"
    except Exception as error:
        kind = "refused" if type(error).__module__.split(".")[0] in OWN else f"error: {type(error).__name__}"
        return f"{kind}: {error}"


def check(condition: Tensor | bool, message: str) -> None:
    if not condition:
        raise WrongError(message)


def tensors(output: object) -> list[Tensor]:
    """The tensors of an output, whatever it is made of."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def finite(values: Iterable[Tensor | None]) -> bool:
    return all(value is None or bool(value.isfinite().all()) for value in values)


def task_loss(output: Tensor) -> Tensor:
    """Cross-entropy with classes 0, 1, 2, ...; of what is no score, the mean square."""
    if output.dim() != 2:
        return output.square().mean()
    return F.cross_entropy(output, torch.arange(len(output)) % output.shape[1])


def train_(network: nn.Module, images: Tensor, steps: int, penalty: Penalty | None = None) -> None:
    """Steps of SGD; in eval mode afterwards."""
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    network.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.stack([task_loss(output) for output in tensors(network(images))]).sum()
        (loss if penalty is None else loss + 1e-4 * penalty(network)).backward()
        optimizer.step()
    network.eval()


def compacted_exactly(network: nn.Module, size: tuple[int, int, int], images: Tensor) -> None:
    exact = copy.deepcopy(network).double()
    error = difference(exact, compact(exact, size), images.double())
    check(error < EXACT, f"outputs differ by {error:.1e} of their spread")


def spread(output: Tensor) -> float:
    """How far an output lies from its mean over the images."""
    return (output - output.mean(0)).abs().max().item()


@torch.no_grad()
def difference(one: nn.Module, other: nn.Module, images: Tensor) -> float:
    """The largest difference of two networks' outputs, as a share of the outputs' spread over the images."""
    pairs = list(zip(tensors(one(images)), tensors(other(images)), strict=True))
    check(all(a.shape == b.shape for a, b in pairs), "outputs of another shape")
    check(all(spread(a) > 0 for a, _ in pairs), "the outputs do not depend on the image")
    return max((a - b).abs().max().item() / spread(a) for a, b in pairs)


@torch.no_grad()
def same(one: nn.Module, other: nn.Module, images: Tensor) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(one(images)), tensors(other(images)), strict=True))


@torch.no_grad()
def settle_(network: nn.Module, images: Tensor) -> None:
    """What training would have done: BatchNorm with statistics, no bias of 0, nothing that begins at 0 or nearly so.

    Then a dead filter is a constant other than 0, and every branch reaches the output.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches, which is one
    network.train()(images)
    network.eval()
    for name, parameter in network.named_parameters():
        if name.endswith("bias") or parameter.abs().max() < 1e-3:
            parameter.normal_(0, 0.2)


@torch.no_grad()
def zero_third_(network: nn.Module, groups: ChannelGroups) -> None:
    """Zero every third group: groups 0, 6, 12 ... as a whole, groups 3, 9, 15 ... in their filters alone."""
    for member in groups.members:
        every = 3 if member.role == "filter" else 6
        dead = torch.from_numpy((member.groups >= 0) & (member.groups % every == 0))
        module = network.get_submodule(member.module)
        weights = member.parameter == "weight" and isinstance(module, CANDIDATES)
        tensor = latent_weight(module) if weights else getattr(module, member.parameter)
        tensor.index_fill_(member.dim, dead.nonzero().flatten(), 0)


def share(network: nn.Module, groups: ChannelGroups) -> float:
    """The share of the layers' output channels, those of the scores left out, that are in a group."""
    rows: dict[str, set[int]] = {}
    for member in groups.members:
        if member.role == "filter":
            rows.setdefault(member.module, set()).update((member.groups >= 0).nonzero()[0].tolist())
    return sum(map(len, rows.values())) / sum(output_channels(network).values())


def output_channels(network: nn.Module) -> dict[str, int]:
    """Of every convolution and linear layer but those that make the scores."""
    layers = {name: module for name, module in network.named_modules() if isinstance(module, CANDIDATES)}
    counts = {name: getattr(layer, "out_channels", None) or layer.out_features for name, layer in layers.items()}
    return {name: count for name, count in counts.items() if count != CLASSES}

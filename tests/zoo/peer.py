"""What Torch-Pruning does with the same networks, without any setting for one of them.

It groups channels by the graph of gradients, and removes a third of every group. Before that they are made dead: with
all that belongs to them, or in their filters alone, when what a normalization or bias makes of 0 still flows on.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch_pruning
from torch import Tensor, nn
from torch_pruning import DependencyGraph, importance

from tests.zoo.cases import Case
from tests.zoo.walk import EXACT, difference, output_channels, settle_
from utils_quantization import CANDIDATES

SECONDS = 60


class Peer(NamedTuple):
    """share: of the output channels that are in its groups; None where it finds none.

    whole, filters: "exact", "changed: ..." or "error: ..." after removal of channels that are dead in that way.
    """

    share: float | None
    whole: str
    filters: str


def peer(case: Case) -> Peer:
    try:
        with limited():
            found = _share(case)
    except Exception as error:
        return Peer(None, *2 * [f"error: {type(error).__name__}: {error}"])
    return Peer(found, _removed(case, whole=True), _removed(case, whole=False))


@contextmanager
def limited() -> Iterator[None]:
    """Ends what takes more than SECONDS of the processor: on some networks its graph grows without end."""

    def late(*_: object) -> None:
        raise TimeoutError(f"no result within {SECONDS} seconds of the processor")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _share(case: Case) -> float:
    network = case.build().eval()
    graph = DependencyGraph().build_dependency(network, torch.randn(1, *case.size))
    rows: dict[nn.Module, set[int]] = {}
    for group in graph.get_all_groups(_scores(network), [nn.modules.conv._ConvNd, nn.Linear]):
        for layer, made, channels in _parts(group):
            if made and isinstance(layer, CANDIDATES):
                rows.setdefault(layer, set()).update(channels)
    counts = {network.get_submodule(name): count for name, count in output_channels(network).items()}
    return sum(min(len(rows.get(layer, ())), count) for layer, count in counts.items()) / sum(counts.values())


def _removed(case: Case, whole: bool) -> str:
    torch.manual_seed(0)
    network, images = case.build().double(), torch.randn(4, *case.size).double()
    settle_(network, images)
    try:
        with limited():
            for group in _pruner(network, images).step(interactive=True):
                _zero_(group, whole)
            with torch.no_grad():
                dead = Recorded(network(images))
            _pruner(network, images).step()
            error = difference(dead, network, images)
    except Exception as error:
        return f"error: {type(error).__name__}: {error}"
    return "exact" if error < EXACT else f"changed: {error:.0e}"


class Recorded(nn.Module):
    """Gives the output that a network gave before it was changed."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, images: Tensor) -> Any:
        return self.output


def _pruner(network: nn.Module, images: Tensor) -> Any:
    """Chooses, in every group, the third whose first filters are smallest: those that are dead, if any are."""
    smallest = importance.MagnitudeImportance(group_reduction="first", normalizer=None)
    return torch_pruning.BasePruner(
        network, images[:1], smallest, pruning_ratio=1 / 3, ignored_layers=_scores(network),
        in_channel_groups={}, out_channel_groups={}, num_heads={},  # its defaults are shared by all pruners
    )  # fmt: skip


def _scores(network: nn.Module) -> list[nn.Module]:
    inner = output_channels(network)
    return [m for name, m in network.named_modules() if isinstance(m, CANDIDATES) and name not in inner]


def _parts(group: Any) -> Iterator[tuple[Any, bool, list[int]]]:
    """(layer or parameter, whether it makes the channels or reads them, which)."""
    graph = group._DG
    for dependency, channels in group:
        yield dependency.target.module, graph.is_out_channel_pruning_fn(dependency.handler), list(channels)


@torch.no_grad()
def _zero_(group: Any, whole: bool) -> None:
    for layer, made, channels in _parts(group):
        if isinstance(layer, CANDIDATES):
            dim = int(made == isinstance(layer, nn.modules.conv._ConvTransposeNd))  # 0: the filters of a convolution
            if made or (whole and getattr(layer, "groups", 1) == 1):
                layer.weight.index_fill_(dim, torch.tensor(channels), 0)
            if made and whole and layer.bias is not None:
                layer.bias[channels] = 0
        elif whole and isinstance(getattr(layer, "weight", None), nn.Parameter):
            layer.weight[channels] = 0
            if getattr(layer, "bias", None) is not None:
                layer.bias[channels] = 0

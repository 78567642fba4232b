"""How channels flow through a network: which parameters must vanish together for a channel to be removable.

One description serves three users: the penalty takes its groups from here, the metrics what is left after exact removal
and the removal its index maps from src/pruning/liveness.py. All read the same operations (src/pruning/graph.py).

Worked case, a basic block. Inner channel 3 is made by filter 3 of conv1, scaled and shifted by bn1, and read by slice 3
of conv2: these are its group. A channel of the residual stream is made by the stem and by conv2 of every block, and
option A's shortcut carries channel c of one stage on as channel c + planes / 4 of the next: all of these are one group.

Axis letters: O output channels, I input channels, k kernel, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn

from src.pruning.graph import Op, trace

CHANNELWISE = ("batchnorm", "relu", "pass", "pool", "stride", "pad", "flatten", "add")


@dataclass(frozen=True)
class Member:
    """One parameter's part in the groups: entry j of `groups` is the group of index j along `dim`, -1 for none.

    role: filter (rows of a weight), slice (columns of a weight: what reads a channel), scale, shift, bias.
    """

    module: str
    parameter: str
    role: str
    dim: int
    groups: NDArray[np.int64]


@dataclass(frozen=True)
class ChannelGroups:
    """Disjoint groups of parameters; group g holds all that removing one channel takes away.

    names[g] says where the channel is made first ("layer1.0.conv1[3]"). Channels that the network's output, its input
    or an operation unknown to src/pruning/graph.py depend on belong to no group, because they cannot be removed.
    """

    members: tuple[Member, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def slices(self, group: int) -> list[tuple[str, str, int, NDArray[np.int64]]]:
        """What group `group` holds: (module, parameter, dimension, indices) for every member that takes part."""
        found = [(m.module, m.parameter, m.dim, np.flatnonzero(m.groups == group)) for m in self.members]
        return [entry for entry in found if len(entry[3])]


def channel_groups(model: nn.Module, input_size: tuple[int, int, int] = (3, 32, 32)) -> ChannelGroups:
    """The groups of removable channels of `model`, from its structure alone (no weights are read).

    Channels that are added, element by element, are one channel; so are a channel and what the shortcut makes of it.
    Raises GraphError where the network cannot be traced.
    """
    return groups_of(trace(model, input_size), dict(model.named_modules()))


def groups_of(ops: Sequence[Op], modules: dict[str, nn.Module]) -> ChannelGroups:
    """`channel_groups` for operations that were traced already."""
    union = _Union()
    labels: dict[str, NDArray[np.int64]] = {}  # of each operation's output channels
    parts: list[_Part] = []
    producers: list[_Producer] = []
    for op in ops:
        sources = [labels[name] for name in op.inputs]
        own = labels[op.name] = union.fresh(op.channels)
        name = op.module or ""
        if op.kind in ("conv", "linear"):
            parts += [_Part(name, "weight", "filter", 0, own), _Part(name, "weight", "slice", 1, sources[0])]
            if getattr(modules[name], "bias", None) is not None:
                parts.append(_Part(name, "bias", "bias", 0, own))
            producers.append(_Producer(name, own))
        elif op.kind == "add":
            union.join(own, sources[0])
            union.join(own, sources[1])
        elif op.kind == "pad":
            before = op.settings["before"]
            union.join(own[before : before + len(sources[0])], sources[0])
        elif op.kind == "flatten":
            union.join(own, sources[0].repeat(op.settings["area"]))
        elif op.kind in CHANNELWISE:
            union.join(own, sources[0])
            if op.kind == "batchnorm" and getattr(modules[name], "weight", None) is not None:
                parts += [_Part(name, "weight", "scale", 0, own), _Part(name, "bias", "shift", 0, own)]
        else:  # input, output, opaque
            union.pin(own)
            for source in sources:
                union.pin(source)
    return _numbered(union, parts, producers)


class _Producer(NamedTuple):
    """A layer that makes channels, and the labels of those channels."""

    module: str
    labels: NDArray[np.int64]


class _Part(NamedTuple):
    """A member whose groups have no numbers yet: labels[j] is the channel of index j along `dim`."""

    module: str
    parameter: str
    role: str
    dim: int
    labels: NDArray[np.int64]


class _Union:
    """Disjoint sets of channel labels, with marks on those that cannot be removed."""

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.pinned: set[int] = set()

    def fresh(self, count: int) -> NDArray[np.int64]:
        start = len(self.parent)
        self.parent += range(start, start + count)
        return np.arange(start, start + count)

    def find(self, label: int) -> int:
        while self.parent[label] != label:
            self.parent[label] = self.parent[self.parent[label]]
            label = self.parent[label]
        return label

    def join(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> None:
        for a, b in zip(left, right, strict=True):
            first, second = sorted((self.find(int(a)), self.find(int(b))))
            self.parent[second] = first

    def pin(self, labels: NDArray[np.int64]) -> None:
        self.pinned.update(int(label) for label in labels)


def _numbered(union: _Union, parts: Sequence[_Part], producers: Sequence[_Producer]) -> ChannelGroups:
    fixed = {union.find(label) for label in union.pinned}
    number: dict[int, int] = {}
    names: list[str] = []
    for producer in producers:
        for channel, label in enumerate(producer.labels):
            root = union.find(int(label))
            if root not in fixed and root not in number:
                number[root] = len(names)
                names.append(f"{producer.module}[{channel}]")
    members = []
    for part in parts:
        groups = np.array([number.get(union.find(int(label)), -1) for label in part.labels], dtype=np.int64)
        if (groups >= 0).any():
            members.append(Member(part.module, part.parameter, part.role, part.dim, groups))
    return ChannelGroups(tuple(members), tuple(names))

"""How channels flow through a network: which parameters must vanish together for a channel to be removable.

One description serves three users: the penalty takes its groups from here, the metrics what is left after exact removal
and the removal its indices from src/pruning/liveness.py. All read the same operations (src/pruning/graph.py).

Worked case, a basic block. Inner channel 3 is made by filter 3 of conv1, scaled and shifted by bn1, and read by slice 3
of conv2: these are its group. A channel of the residual stream is made by the stem and by conv2 of every block, and
option A's shortcut carries channel c of one stage on as channel c + planes / 4 of the next: all of these are one group.

Axis letters: O output channels, I input channels, k kernel, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import nn

from src.pruning.graph import LAYERS, PARAMETRIC, Op, trace
from src.pruning.tracing import InputSize
from utils_quantization import unwrapped


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
    or an operation unknown to src/pruning/operations.py depend on belong to no group, because they cannot be removed.
    """

    members: tuple[Member, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def slices(self, group: int) -> list[tuple[str, str, int, NDArray[np.int64]]]:
        """What group `group` holds: (module, parameter, dimension, indices) for every member that takes part."""
        return self._by_group[group]

    @cached_property
    def _by_group(self) -> list[list[tuple[str, str, int, NDArray[np.int64]]]]:
        found: list[list[tuple[str, str, int, NDArray[np.int64]]]] = [[] for _ in self.names]
        for member in self.members:
            order = np.argsort(member.groups, kind="stable")
            order = order[np.searchsorted(member.groups[order], 0) :]  # those of no group come first
            own = member.groups[order]
            starts = np.flatnonzero(np.diff(own, prepend=-1))
            for group, indices in zip(own[starts].tolist(), np.split(order, starts[1:]), strict=True):
                found[group].append((member.module, member.parameter, member.dim, indices))
        return found


def channel_groups(model: nn.Module, input_size: InputSize = (3, 32, 32)) -> ChannelGroups:
    """The groups of removable channels of `model`, from its structure alone (no weights are read).

    Channels that are added, element by element, are one channel; so are a channel and what the shortcut makes of it.
    Raises GraphError where the network cannot be traced.
    """
    network = unwrapped(model)
    return groups_of(trace(network, input_size), dict(network.named_modules()))


def groups_of(ops: Sequence[Op], modules: dict[str, nn.Module]) -> ChannelGroups:
    """`channel_groups` for operations that were traced already."""
    numbers, names = group_numbers(ops)
    members: list[Member] = []
    for op in ops:
        own, name = numbers[op.name], op.module or ""
        if op.kind in LAYERS:
            made, read = (1, 0) if op.kind == "conv_transpose" else (0, 1)
            members.append(Member(name, "weight", "filter", made, own))
            if op.settings.get("groups", 1) == 1:  # otherwise a slice belongs to several channels
                members.append(Member(name, "weight", "slice", read, numbers[op.inputs[0]]))
            if getattr(modules[name], "bias", None) is not None:
                members.append(Member(name, "bias", "bias", 0, own))
        elif op.kind in PARAMETRIC:
            for parameter, role in (("weight", "scale"), ("bias", "shift")):
                values = getattr(modules[name], parameter, None)
                if isinstance(values, nn.Parameter) and len(values) == len(own):
                    members.append(Member(name, parameter, role, 0, own))
    return ChannelGroups(tuple(member for member in members if (member.groups >= 0).any()), tuple(names))


def group_numbers(ops: Sequence[Op]) -> tuple[dict[str, NDArray[np.int64]], list[str]]:
    """The group of each channel of each operation's output, -1 for none, by operation name; names of the groups."""
    labels, fixed = _labels(ops)
    number = np.full(1 + max((int(own.max()) for own in labels.values() if len(own)), default=0), -1)
    names: list[str] = []
    for op in ops:
        if op.kind in LAYERS:
            for channel, label in enumerate(labels[op.name].tolist()):
                if label not in fixed and number[label] < 0:
                    number[label] = len(names)
                    names.append(f"{op.module}[{channel}]")
    return {name: number[own] for name, own in labels.items()}, names


def _labels(ops: Sequence[Op]) -> tuple[dict[str, NDArray[np.int64]], set[int]]:
    """A label for each channel of each operation's output, the same where channels are one; labels that must stay."""
    count = 0  # of labels: a channel that is made anew gets a new one
    labels: dict[str, NDArray[np.int64]] = {}
    same: list[NDArray[np.int64]] = [np.empty((2, 0), np.int64)]  # pairs of labels of channels that are one
    fixed: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    for op in ops:
        sources = [labels[name] for name in op.inputs]
        own = np.arange(count, count + op.channels)
        count += op.channels
        if op.channelwise:
            made = own.copy()
            for source, channels in zip(sources, op.channel_maps([len(each) for each in sources]), strict=True):
                known = channels >= 0
                first = known & (made == own)
                made[first] = source[channels[first]]
                tied = known & ~first
                same.append(np.stack([made[tied], source[channels[tied]]]))
            own = made
        elif op.kind not in LAYERS:  # input, output, opaque
            fixed += [own, *sources]
        labels[op.name] = own
    first = _representatives(count, np.concatenate(same, axis=1))
    return {name: first[own] for name, own in labels.items()}, set(first[np.concatenate(fixed)].tolist())


def _representatives(count: int, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of each label, the smallest of all that the pairs make one with it, (count,)."""
    first = np.arange(count)
    left, right = pairs
    while True:
        least = np.minimum(first[left], first[right])
        before = first.copy()
        for ends in (left, right):
            np.minimum.at(first, first[ends], least)
            np.minimum.at(first, ends, least)
        first = first[first]
        if np.array_equal(first, before):
            return first

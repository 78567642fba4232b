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

import numpy as np
from numpy.typing import NDArray
from torch import nn

from src.pruning.graph import CHANNELWISE, LAYERS, Op, trace
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
    network = unwrapped(model)
    return groups_of(trace(network, input_size), dict(network.named_modules()))


def groups_of(ops: Sequence[Op], modules: dict[str, nn.Module]) -> ChannelGroups:
    """`channel_groups` for operations that were traced already."""
    numbers, names = group_numbers(ops)
    members: list[Member] = []
    for op in ops:
        own, name = numbers[op.name], op.module or ""
        if op.kind in LAYERS:
            read = numbers[op.inputs[0]]
            members += [Member(name, "weight", "filter", 0, own), Member(name, "weight", "slice", 1, read)]
            if getattr(modules[name], "bias", None) is not None:
                members.append(Member(name, "bias", "bias", 0, own))
        elif op.kind == "batchnorm" and getattr(modules[name], "weight", None) is not None:
            members += [Member(name, "weight", "scale", 0, own), Member(name, "bias", "shift", 0, own)]
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
    same: list[tuple[int, int]] = []  # labels of channels that are added to each other
    fixed: list[int] = []
    for op in ops:
        sources = [labels[name] for name in op.inputs]
        own = np.arange(count, count + op.channels)
        count += op.channels
        if op.kind in CHANNELWISE:
            channels = op.channel_map(len(sources[0]))
            own = np.where(channels < 0, own, sources[0][channels])
            if op.kind == "add":
                same += zip(sources[0].tolist(), sources[1].tolist(), strict=True)
        elif op.kind not in LAYERS:  # input, output, opaque
            fixed += np.concatenate([own, *sources]).tolist()
        labels[op.name] = own
    first = np.arange(count)  # of each label: the label that stands for all that are the same
    for left, right in same:
        first[first == first[right]] = first[left]
    return {name: first[own] for name, own in labels.items()}, set(first[fixed].tolist())

"""How channels flow through a network, which can be removed exactly, and the smaller network that is left.

One description, read off the torch.fx graph, serves the penalty's groups, the liveness of channels and the removal.
"""

from __future__ import annotations

from src.pruning.compact_network import CompactionError, CompactNetwork
from src.pruning.compaction import compact, own_calls
from src.pruning.graph import Op, trace
from src.pruning.groups import ChannelGroups, Member, channel_groups, groups_of
from src.pruning.liveness import LayerLiveness, analyze_liveness, check_multiple
from src.pruning.operations import OPERATIONS, Operation
from src.pruning.tracing import GraphError, InputSize

__all__ = [
    "OPERATIONS",
    "ChannelGroups",
    "CompactNetwork",
    "CompactionError",
    "GraphError",
    "InputSize",
    "LayerLiveness",
    "Member",
    "Op",
    "Operation",
    "analyze_liveness",
    "channel_groups",
    "check_multiple",
    "compact",
    "groups_of",
    "own_calls",
    "trace",
]

"""What a network of the zoo is: how it is built, what it reads, and how many removable channels it has by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

CLASSES = 7  # no inner layer of any network here has as many channels, so this tells the layers that make the scores


class Case(NamedTuple):
    """build: a new network, in training mode. size: (C, H, W) of one image. groups: removable channels, by hand."""

    build: Callable[[], nn.Module]
    size: tuple[int, int, int]
    groups: int | None = None

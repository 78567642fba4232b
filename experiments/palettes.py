"""Colour maps: dead and alive channels, and weights or activations around zero."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.colors import Colormap, LinearSegmentedColormap, ListedColormap, Normalize

from experiments import style

LIVENESS = ListedColormap([style.BLACK, style.WHITE], name="liveness").with_extremes(bad=(0.0, 0.0, 0.0, 0.0))
"""0 dead is black, 1 alive is white, absent (masked) is transparent: the hatched ground shows through."""


BALANCED = LinearSegmentedColormap.from_list("balanced", ["#B34500", "#FFFFFF", "#004D94"])
"""Activations: negative orange, 0 white, positive blue."""


class AwayFromZero(Normalize):
    """-limit..limit to 0..1 with a gap around 0.5: however small, a weight that is not 0 never looks like one."""

    GAP = 0.004

    def __init__(self, limit: float) -> None:
        super().__init__(-limit, limit)
        self.limit = limit

    def __call__(self, value: Any, clip: bool | None = None) -> Any:
        share = np.ma.masked_invalid(value) / self.limit
        return 0.5 + np.ma.asarray(np.sign(share)) * (self.GAP + (0.5 - self.GAP) * np.ma.abs(share))

    def inverse(self, value: Any) -> Any:
        side = np.asarray(value) - 0.5
        return np.sign(side) * np.maximum(np.abs(side) - self.GAP, 0) / (0.5 - self.GAP) * self.limit


def _signed_colors(steps: int = 512) -> Colormap:
    """Negative orange, positive blue, white for exactly 0 only: the smallest other weight is clearly coloured."""
    strength = np.linspace(0.25, 1.0, steps)[:, None]
    sides = [1 - strength * (1 - np.array(rgb)) for rgb in ((0.70, 0.27, 0.0), (0.0, 0.30, 0.58))]
    middle = np.ones((1, 3))
    return ListedColormap(np.concatenate([sides[0][::-1], middle, sides[1]]), name="signed").with_extremes(
        bad=style.PALE
    )


SIGNED = _signed_colors()

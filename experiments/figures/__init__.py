"""Every figure: functions from plain data to `matplotlib.figure.Figure`, in one style.

Nothing here is shown, saved or closed, and no model or file is known; alt text is the figure's label.
"""

from __future__ import annotations

from experiments.figures import style
from experiments.figures.bars import before_after, class_balance, cost_bars, layer_sparsity_bars, per_layer_channels
from experiments.figures.channels import channel_group_diagram, channel_liveness, removal_map
from experiments.figures.comparison import Series, run_curves, run_plane
from experiments.figures.curves import accuracy_curve, decay_forms, schedule_curve, sparsity_curves
from experiments.figures.dashboard import dashboard
from experiments.figures.images import (
    COMPACTED,
    FLOAT,
    QUANTIZED,
    ImageTrace,
    Stage,
    augmentation_grid,
    image_figure,
    image_grid,
)
from experiments.figures.style import BLUE, SCREEN_DPI, png_bytes, wash
from experiments.figures.tables import left_aligned, names_left, plain_table, result_css
from experiments.figures.weights import Curve, layer_figure, sparsity_map, staircase_explorer_figure, staircase_family

__all__ = [
    "BLUE",
    "COMPACTED",
    "FLOAT",
    "QUANTIZED",
    "SCREEN_DPI",
    "Curve",
    "ImageTrace",
    "Series",
    "Stage",
    "accuracy_curve",
    "augmentation_grid",
    "before_after",
    "channel_group_diagram",
    "channel_liveness",
    "class_balance",
    "cost_bars",
    "dashboard",
    "decay_forms",
    "image_figure",
    "image_grid",
    "layer_figure",
    "layer_sparsity_bars",
    "left_aligned",
    "names_left",
    "per_layer_channels",
    "plain_table",
    "png_bytes",
    "removal_map",
    "result_css",
    "run_curves",
    "run_plane",
    "schedule_curve",
    "sparsity_curves",
    "sparsity_map",
    "staircase_explorer_figure",
    "staircase_family",
    "style",
    "wash",
]

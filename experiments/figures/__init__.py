"""Every figure: functions from plain data to `matplotlib.figure.Figure`, in one style.

Nothing here is shown, saved or closed, and no model or file is known; alt text is the figure's label.
"""

from __future__ import annotations

from experiments.figures import style
from experiments.figures.channel_diagram import channel_group_diagram
from experiments.figures.comparison import Series, run_curves, run_plane
from experiments.figures.explorer_figures import (
    COMPACTED,
    FLOAT,
    QUANTIZED,
    ImageTrace,
    Stage,
    image_figure,
    layer_figure,
)
from experiments.figures.lesson_figures import augmentation_grid, class_balance, decay_forms, image_grid, schedule_curve
from experiments.figures.overview import dashboard
from experiments.figures.run_figures import (
    accuracy_curve,
    before_after,
    channel_liveness,
    cost_bars,
    layer_sparsity_bars,
    per_layer_channels,
    removal_map,
    sparsity_curves,
    sparsity_map,
)
from experiments.figures.staircases import Curve, staircase_explorer_figure, staircase_family
from experiments.figures.style import BLUE, GREEN, SCREEN_DPI, VERMILLION, png_bytes, wash
from experiments.figures.tables import left_aligned, names_left, plain_table, result_css

__all__ = [
    "BLUE",
    "COMPACTED",
    "FLOAT",
    "GREEN",
    "QUANTIZED",
    "SCREEN_DPI",
    "VERMILLION",
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

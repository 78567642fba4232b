"""Every figure: functions from plain data to `matplotlib.figure.Figure`, in one style.

Nothing here is shown, saved or closed, and no model or file is known; alt text is the figure's label.
"""

from __future__ import annotations

from experiments.figures import style
from experiments.figures.curves import (
    Series,
    accuracy_curve,
    decay_forms,
    frontier,
    run_curves,
    run_plane,
    sparsity_curves,
)
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
from experiments.figures.layers import (
    before_after,
    bit_widths,
    channel_group_diagram,
    channel_liveness,
    layer_sparsity_bars,
    per_layer_channels,
)
from experiments.figures.style import names_left, plain_table, png_bytes, result_css
from experiments.figures.svg import hover_values, svg_text
from experiments.figures.weights import Curve, layer_figure, sparsity_map, staircase_explorer_figure, staircase_family

__all__ = [
    "COMPACTED",
    "FLOAT",
    "QUANTIZED",
    "Curve",
    "ImageTrace",
    "Series",
    "Stage",
    "accuracy_curve",
    "augmentation_grid",
    "before_after",
    "bit_widths",
    "channel_group_diagram",
    "channel_liveness",
    "dashboard",
    "decay_forms",
    "frontier",
    "hover_values",
    "image_figure",
    "image_grid",
    "layer_figure",
    "layer_sparsity_bars",
    "names_left",
    "per_layer_channels",
    "plain_table",
    "png_bytes",
    "result_css",
    "run_curves",
    "run_plane",
    "sparsity_curves",
    "sparsity_map",
    "staircase_explorer_figure",
    "staircase_family",
    "style",
    "svg_text",
]

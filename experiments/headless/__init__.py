"""The walkthrough without a browser: its parameters, its execution, and the page that is made of it.

Nothing here loads torch when it is imported.
"""

from __future__ import annotations

from experiments.headless.execution import CELL_TIMEOUT, STARTUP_TIMEOUT, execute
from experiments.headless.page import to_html
from experiments.headless.parameters import (
    NotebookInputError,
    fill_in,
    inject,
    parameter_defaults,
    parse_settings,
    read_notebook,
)

__all__ = [
    "CELL_TIMEOUT",
    "STARTUP_TIMEOUT",
    "NotebookInputError",
    "execute",
    "fill_in",
    "inject",
    "parameter_defaults",
    "parse_settings",
    "read_notebook",
    "to_html",
]

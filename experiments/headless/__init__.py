"""The walkthrough without a browser: parameters, execution, the page, and the copy that the lab opens.

Nothing here loads torch.
"""

from __future__ import annotations

from experiments.headless.execution import CELL_TIMEOUT, STARTUP_TIMEOUT, execute, read_notebook
from experiments.headless.facts import header, published
from experiments.headless.lab_copy import NOTEBOOK, write_copy
from experiments.headless.page import to_html
from experiments.headless.parameters import NotebookInputError, parameter_defaults, parse_settings

__all__ = [
    "CELL_TIMEOUT",
    "NOTEBOOK",
    "STARTUP_TIMEOUT",
    "NotebookInputError",
    "execute",
    "header",
    "parameter_defaults",
    "parse_settings",
    "published",
    "read_notebook",
    "to_html",
    "write_copy",
]

"""The copy of the walkthrough that `experiments.lab` opens, so that the notebook itself stays as it is.

The copy has a cell with the run's parameters. It is written anew each time, unless its cells were edited.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from experiments.headless.parameters import NotebookInputError, inject

NOTEBOOK = Path(__file__).resolve().parent.parent / "notebooks/codeq_walkthrough.ipynb"
MARK = "lab"  # the copy's metadata: the digest of its cells when it was written


def write_copy(path: Path, parameters: Mapping[str, object], notebook: Path = NOTEBOOK) -> str:
    """Write the notebook with `parameters` to `path`, or leave an edited copy alone; returns what was done.

    Raises NotebookInputError for a parameter that the notebook does not have, and where `path` cannot be written.
    """
    if is_edited(path):
        return f"opening your edited copy {path} as it is; move it away for a fresh one"
    copy = inject(nbformat.read(notebook, as_version=4), parameters)
    copy.metadata[MARK] = digest(copy)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(copy, partial)
        os.replace(partial, path)
    except OSError as error:
        raise NotebookInputError(f"cannot write {path}: {error.strerror or error}") from error
    return f"opening {path}, a copy of {notebook.name} with these parameters"


def is_edited(path: Path) -> bool:
    """Whether there is a copy whose cells are not those that were written; one that cannot be read counts as edited."""
    if not path.exists():
        return False
    try:
        copy = nbformat.read(path, as_version=4)
        return bool(copy.metadata.get(MARK) != digest(copy))
    except (ValueError, OSError, KeyError, AttributeError):
        return True


def digest(notebook: NotebookNode) -> str:
    """Of the cells' kinds and sources in order: outputs, counts and metadata may change."""
    parts = [f"{cell.cell_type}\0{cell.source}" for cell in notebook.cells]
    return hashlib.sha256("\1".join(parts).encode()).hexdigest()

"""A notebook read from its file, and its parameters: what it declares, and values from outside put in after it.

The convention is papermill's: the cell tagged `parameters` holds the defaults, and the injected cell behind it is
tagged `injected-parameters`.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from src.storage import write_atomic

COPY_DIGEST = "lab"  # metadata of a copy: the digest of its cells as they were written
# By the type of a parameter's default: the types that a value may have, and what to ask for.
TYPES: dict[type, tuple[tuple[type, ...], str]] = {
    type(None): ((int, type(None)), "a whole number or None"),
    bool: ((bool,), "True or False"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "text"),
}


class NotebookInputError(ValueError):
    """The notebook, a parameter or an output path is not what it has to be. Nothing was executed."""


def read_notebook(path: str | Path) -> NotebookNode:
    """A notebook of format 4.5 or what can be upgraded to it. Raises NotebookInputError."""
    try:
        notebook = nbformat.read(str(path), as_version=4)
        if notebook.nbformat_minor < 5:
            notebook = nbformat.v4.upgrade(notebook, from_version=4, from_minor=notebook.nbformat_minor)
        nbformat.validate(notebook)
    except OSError as error:
        raise NotebookInputError(f"cannot read the notebook {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError, nbformat.ValidationError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise NotebookInputError(f"{path} is not a Jupyter notebook: {first_line[:200]}") from error
    return notebook


def parameter_defaults(notebook: NotebookNode) -> dict[str, object]:
    """Name and default of every literal assigned in the cell tagged `parameters`; empty where there is no such cell.

    Raises NotebookInputError where the cell computes something.
    """
    cell = next((cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])), None)
    try:
        statements = ast.parse(cell.source).body if cell else []
        return {
            target.id: ast.literal_eval(statement.value)
            for statement in statements
            if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value
            for target in (statement.targets if isinstance(statement, ast.Assign) else [statement.target])
            if isinstance(target, ast.Name)
        }
    except (SyntaxError, ValueError) as error:
        raise NotebookInputError(f"the parameters cell may hold only NAME = literal: {error}") from error


def parse_settings(settings: Sequence[str], defaults: Mapping[str, object]) -> dict[str, object]:
    """NAME=VALUE to typed values: a Python literal if it reads as one, else text. Raises NotebookInputError."""
    values: dict[str, object] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise NotebookInputError(f"--set {setting}: need NAME=VALUE, such as --set EPOCHS=3")
        if name in values:
            raise NotebookInputError(f"--set {name} is given twice: keep one of them")
        values[name] = _typed(text, defaults.get(name))
    _check(values, defaults)
    return values


def inject(notebook: NotebookNode, parameters: Mapping[str, object]) -> NotebookNode:
    """Put the parameters into a cell after the one tagged `parameters`, replacing an older one. Changes `notebook`.

    Raises NotebookInputError for a parameter that the notebook does not have, or of another type than its default.
    """
    _check(parameters, parameter_defaults(notebook))
    notebook.cells = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    if parameters:
        position = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
        lines = ["# Given for this run", *(f"{name} = {value!r}" for name, value in parameters.items())]
        cell = nbformat.v4.new_code_cell("\n".join(lines), metadata={"tags": ["injected-parameters"]})
        notebook.cells.insert(position + 1, cell)
    return notebook


def write_copy(notebook: Path, copy: Path, parameters: Mapping[str, object]) -> bool:
    """Write `notebook` with `parameters` to `copy`. False: the copy that is there was edited, and stays as it is.

    Raises NotebookInputError for a wrong parameter (see `inject`), and where `copy` cannot be written.
    """
    if copy.exists():
        try:
            present = read_notebook(copy)
        except NotebookInputError:  # no longer a notebook: somebody's edit all the same
            return False
        if present.metadata.get(COPY_DIGEST) != _digest(present):
            return False
    written = inject(read_notebook(notebook), parameters)
    written.metadata[COPY_DIGEST] = _digest(written)
    try:
        write_atomic(copy, nbformat.writes(written).encode())
    except OSError as error:
        raise NotebookInputError(f"cannot write {copy}: {error.strerror or error}") from error
    return True


def _digest(notebook: NotebookNode) -> str:
    """Of the cells' kinds and sources in order: outputs, counts and metadata may change."""
    parts = [f"{cell.cell_type}\0{cell.source}" for cell in notebook.cells]
    return hashlib.sha256("\1".join(parts).encode()).hexdigest()


def _typed(text: str, default: object) -> object:
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text
    if isinstance(default, str) and not isinstance(value, str):
        return text  # a folder may be called 2024
    if isinstance(default, bool) and text.strip().lower() in ("true", "false"):
        return text.strip().lower() == "true"
    return value


def _check(parameters: Mapping[str, object], defaults: Mapping[str, object]) -> None:
    """Raises NotebookInputError for a name that is no parameter and for a value that its default's type excludes."""
    for name, value in parameters.items():
        if name not in defaults:
            nearest = difflib.get_close_matches(name.upper(), defaults, n=1, cutoff=0.5)
            hint = f"did you mean {nearest[0]}? " if nearest else ""
            allowed = ", ".join(defaults) or "none: the notebook has no cell tagged 'parameters'"
            raise NotebookInputError(f"unknown parameter {name!r}: {hint}allowed are {allowed}")
        default = defaults[name]
        types, wanted = TYPES.get(type(default), ((type(default),), f"a {type(default).__name__}"))
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise NotebookInputError(f"{name}={value!r}: need {wanted}, such as the default {name}={default!r}")

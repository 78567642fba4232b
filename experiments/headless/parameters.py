"""A notebook's parameters: what its cell tagged `parameters` declares, and values from outside put in after it.

The convention is papermill's: the injected cell is tagged `injected-parameters` and runs after the defaults.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Mapping, Sequence

import nbformat
from nbformat import NotebookNode


class NotebookInputError(ValueError):
    """The notebook, a parameter or an output path is not what it has to be. Nothing was executed."""


def parameter_defaults(notebook: NotebookNode) -> dict[str, object]:
    """Name and default of every literal assigned in the cell tagged `parameters`; empty where there is no such cell."""
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
        values[name] = _read_value(text, defaults.get(name))
    _check(values, defaults)
    return values


def inject(notebook: NotebookNode, parameters: Mapping[str, object]) -> NotebookNode:
    """Put the parameters into a cell after the one tagged `parameters`, replacing an older one. Changes `notebook`."""
    _check(parameters, parameter_defaults(notebook))
    tags = [set(cell.metadata.get("tags", [])) for cell in notebook.cells]
    notebook.cells = [cell for cell, tag in zip(notebook.cells, tags, strict=True) if "injected-parameters" not in tag]
    if parameters:
        position = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
        lines = ["# Given for this run", *(f"{name} = {value!r}" for name, value in parameters.items())]
        cell = nbformat.v4.new_code_cell("\n".join(lines), metadata={"tags": ["injected-parameters"]})
        notebook.cells.insert(position + 1, cell)
    return notebook


def _read_value(text: str, default: object) -> object:
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
        kinds: dict[type, tuple[tuple[type, ...], str]] = {
            type(None): ((int, type(None)), "a whole number or None"),
            bool: ((bool,), "True or False"),
            int: ((int,), "a whole number"),
            float: ((int, float), "a number"),
            str: ((str,), "text"),
        }
        types, wanted = kinds.get(type(default), ((type(default),), f"a {type(default).__name__}"))
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise NotebookInputError(f"{name}={value!r}: need {wanted}, such as the default {name}={default!r}")

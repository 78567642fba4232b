"""A notebook read from its file, and its parameters: what it declares, and values from outside put in after it.

The convention is papermill's: the cell tagged `parameters` holds the defaults, and the injected cell behind it is
tagged `injected-parameters`.
"""

from __future__ import annotations

import ast
import difflib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from src.storage import check_writable, folder_lock

# What the pipeline allows, written out because its own modules load torch, which takes seconds: a test compares them.
CHOICES: Mapping[str, Sequence[str]] = {
    "PRESET": ("debug", "smoke", "mixed-bits", "paper", "paper-4bit"),
    "DATA": ("auto", "cifar10", "digits", "folder:PATH"),
    "DEVICE": ("auto", "cpu", "cuda", "mps"),
    "BASELINE": ("auto", "true", "false"),
}
LOWEST: Mapping[str, int] = {"EPOCHS": 1, "BATCH_SIZE": 2, "LIMIT": 1, "SEED": 0}


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
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NotebookInputError(f"{path} is not a Jupyter notebook: {reason[:200]}") from error
    return notebook


def tagged(notebook: NotebookNode, tag: str) -> list[int]:
    """The places of the cells with this tag."""
    return [place for place, cell in enumerate(notebook.cells) if tag in cell.metadata.get("tags", [])]


def parameter_defaults(notebook: NotebookNode) -> dict[str, object]:
    """Name and default of every parameter, NAME = literal in the cell tagged `parameters`; empty without such a cell.

    Raises NotebookInputError where the cell holds something else.
    """
    defaults: dict[str, object] = {}
    for place in tagged(notebook, "parameters")[:1]:
        try:
            for statement in ast.parse(notebook.cells[place].source).body:
                match statement:
                    case ast.Assign(targets=[ast.Name(id=name)], value=value):
                        defaults[name] = ast.literal_eval(value)
                    case _:
                        raise ValueError(ast.unparse(statement))
        except (SyntaxError, ValueError) as error:
            raise NotebookInputError(f"the parameters cell may hold only NAME = literal: {error}") from error
    return defaults


def parse_settings(settings: Sequence[str], defaults: Mapping[str, object]) -> dict[str, object]:
    """NAME=VALUE to typed values: a Python literal if it reads as one, else text.

    Raises NotebookInputError for a name that is no parameter and for a value that cannot be one of it, StorageError
    where the OUTPUT_DIR cannot be used.
    """
    values: dict[str, object] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise NotebookInputError(f"--set {setting}: need NAME=VALUE, such as --set EPOCHS=3")
        if name not in defaults:
            known = {each.upper(): each for each in defaults}
            nearest = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.5)
            hint = f"did you mean {known[nearest[0]]}? " if nearest else ""
            allowed = ", ".join(defaults) or "none: the notebook has no cell tagged 'parameters'"
            raise NotebookInputError(f"unknown parameter {name!r}: {hint}allowed are {allowed}")
        default, value = defaults[name], text
        with suppress(ValueError, SyntaxError):
            value = ast.literal_eval(text.strip().capitalize() if isinstance(default, bool) else text.strip())
        if isinstance(default, str) and not isinstance(value, str):
            value = text  # a folder may be called 2024
        numbers = (int, float)
        types = (*numbers, type(None)) if default is None else numbers if type(default) is float else (type(default),)
        if type(value) not in types:
            wanted = "a number or None" if default is None else f"a value of the kind of the default, {default!r}"
            raise NotebookInputError(f"{name}={value!r}: need {wanted}")
        _check_value(name, value)
        values[name] = value
    output = {**defaults, **values}.get("OUTPUT_DIR")
    if isinstance(output, str):
        check_writable(output)
        folder_lock.check_free(output)
    return values


def _check_value(name: str, value: object) -> None:
    """Raise NotebookInputError where the pipeline would refuse the value, with the nearest one that it knows."""
    if isinstance(value, int) and value < LOWEST.get(name, value):
        raise NotebookInputError(f"{name}={value}: need {LOWEST[name]} or more")
    allowed = CHOICES.get(name)
    if allowed is None or not isinstance(value, str) or value in allowed:
        return
    if name == "DATA" and value.startswith("folder:"):
        train = Path(value.removeprefix("folder:"), "train").expanduser()
        if not train.is_dir():
            raise NotebookInputError(f"{name}={value}: there is no folder {str(train)!r}; need train/ and test/ in it")
        return
    nearest = ["cuda"] if value.lower() == "gpu" else difflib.get_close_matches(value.lower(), allowed, n=1)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    raise NotebookInputError(f"{name}={value} is unknown: {hint}allowed are {', '.join(allowed)}")


def inject(notebook: NotebookNode, parameters: Mapping[str, object]) -> NotebookNode:
    """Put the parameters into a cell after the one tagged `parameters`, replacing an older one. Changes `notebook`."""
    for older in reversed(tagged(notebook, "injected-parameters")):
        del notebook.cells[older]
    if parameters:
        lines = ["# Given for this run", *(f"{name} = {value!r}" for name, value in parameters.items())]
        cell = nbformat.v4.new_code_cell("\n".join(lines), metadata={"tags": ["injected-parameters"]})
        notebook.cells.insert(tagged(notebook, "parameters")[0] + 1, cell)
    return notebook


def fill_in(notebook: NotebookNode, parameters: Mapping[str, object]) -> NotebookNode:
    """Write the parameters into the cell that declares them, which stays the only one. Changes `notebook`."""
    cell = notebook.cells[tagged(notebook, "parameters")[0]]
    for name, value in parameters.items():
        literal = json.dumps(value) if isinstance(value, str) else repr(value)
        lines = [f"{name} = {literal}" if line.startswith(f"{name} = ") else line for line in cell.source.split("\n")]
        cell.source = "\n".join(lines)
    return notebook

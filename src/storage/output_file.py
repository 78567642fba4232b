"""A file that a command writes for the user: never over another one unless asked, whole or not at all."""

from __future__ import annotations

from pathlib import Path

from src.storage.files import RunError, check_writable, write_atomic


class OutputError(ValueError):
    """An output path that exists already, or that cannot be written."""


def check_output(path: str | Path, force: bool) -> Path:
    """The path, where a file can be put there. Creates nothing, so that it can be asked before long work.

    Raises OutputError where something is there already and `force` is not set, where it is a folder, or where the
    folder around it cannot be written.
    """
    target = Path(path)
    try:
        if target.is_dir():
            raise OutputError(f"output {str(path)!r} is a folder; name a file in it, such as {str(target / 'model')!r}")
        if target.exists() and not force:
            raise OutputError(f"output {str(path)!r} exists already; name another file, or overwrite it with force")
        check_writable(target.parent)
    except (OSError, RunError) as error:
        raise _not_writable(path, error) from error
    return target


def write_output(path: str | Path, data: bytes, force: bool) -> None:
    """Put `data` at `path`, whole or not at all. Raises OutputError (see `check_output`)."""
    target = check_output(path, force)
    try:
        write_atomic(target, data)
    except OSError as error:
        raise _not_writable(path, error) from error


def _not_writable(path: str | Path, error: Exception) -> OutputError:
    reason = getattr(error, "strerror", None) or str(error)
    return OutputError(f"output {str(path)!r} cannot be written ({reason}); name another place")

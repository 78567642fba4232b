"""Files of a run, written whole or not at all: a temporary neighbour, flushed to the disk, then renamed.

A reader, or a crash at any moment, sees the old file or the new one. What a killed process left half written has a
name of its own, `.NAME-xxxxxxxx.tmp`, and is removed by the next run in the folder.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

LEFTOVERS = ".*-*.tmp"


class RunError(ValueError):
    """A run folder that cannot be used, or a checkpoint that does not belong to this run."""


def write_atomic(path: str | Path, data: bytes, keep: str | Path | None = None) -> None:
    """Put `data` at `path`, whole or not at all: a temporary file beside it, fsync, rename, fsync of the folder.

    keep: where the file that is replaced goes; at every moment `path` or `keep` is whole. Raises OSError.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        if keep is not None and target.exists():
            target.replace(keep)
        temporary.replace(target)
    except BaseException:
        with suppress(OSError):  # the reason of the failure is worth more than its trace
            temporary.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # not every file system lets a folder be opened
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process had not finished writing. Only for a folder that no other run is using."""
    for leftover in folder.glob(LEFTOVERS):
        with suppress(OSError):
            leftover.unlink()


def check_writable(path: str | Path) -> None:
    """Raise RunError where `path` is a file, or where no file could be put into it. Creates nothing."""
    folder = Path(path)
    if not str(path):
        raise RunError("the output folder has no name; name a folder, or . for the present one")
    try:
        if folder.is_symlink() and not folder.exists():
            raise RunError(f"output folder {str(path)!r} is a link to nowhere; name a folder, or repair the link")
        if folder.exists() and not folder.is_dir():
            raise RunError(f"output folder {str(path)!r} is a file; name a folder, or a path that does not exist yet")
        present = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        with tempfile.NamedTemporaryFile(dir=present, prefix=".writable-", suffix=".tmp"):
            pass
    except OSError as error:
        raise not_writable(path, error) from error


def not_writable(path: str | Path, error: OSError) -> RunError:
    """The error for a folder that the system does not let us use."""
    return RunError(f"output folder {str(path)!r} cannot be written ({error.strerror or error}); name another folder")

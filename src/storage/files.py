"""Files that are complete or absent: written to a temporary file beside the target, flushed to the disk, then renamed.

A reader, or a crash at any moment, sees the old file or the new one. What a killed process left half written has a
name of its own, `.NAME-xxxxxxxx.tmp`, and is removed by the next run in the folder.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path


class StorageError(ValueError):
    """A file or folder that cannot be used: damaged, of another version, in use, or in a place that is not writable."""


def write_atomic(path: str | Path, data: bytes, keep: str | Path | None = None) -> None:
    """Write `data` to `path` completely or not at all: a temporary file, fsync, rename, fsync of the folder.

    keep: where the file that is replaced goes; at every moment `path` or `keep` is complete. Raises OSError.
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
        with suppress(OSError):  # the first error is the one to report
            temporary.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # not every file system lets a folder be opened
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of a killed process. Only for a folder that no other run is using."""
    for leftover in folder.glob(".*-*.tmp"):
        with suppress(OSError):
            leftover.unlink()


def check_writable(path: str | Path) -> None:
    """Raise StorageError where `path` is a file, or where no file can be written into it. Creates nothing."""
    folder = Path(path)
    if not str(path):
        raise StorageError("the output folder has no name; name a folder, or . for the present one")
    try:
        if folder.is_symlink() and not folder.exists():
            raise StorageError(f"output folder {str(path)!r} is a link to nowhere; name a folder, or repair the link")
        if folder.exists() and not folder.is_dir():
            raise StorageError(
                f"output folder {str(path)!r} is a file; name a folder, or a path that does not exist yet"
            )
        present = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        with tempfile.NamedTemporaryFile(dir=present, prefix=".writable-", suffix=".tmp"):
            pass
    except OSError as error:
        raise not_writable(path, error) from error


def not_writable(path: str | Path, error: OSError) -> StorageError:
    """The error for a folder that the system does not let us use."""
    return StorageError(
        f"output folder {str(path)!r} cannot be written ({error.strerror or error}); name another folder"
    )


def check_output(path: str | Path, force: bool) -> Path:
    """The path of a file that a command will write. Creates nothing, so call it before long work.

    Raises StorageError where a file exists already and `force` is not set, where the path is a folder, or where the
    folder around it cannot be written.
    """
    target = Path(path)
    try:
        taken, folder = target.exists(), target.is_dir()
        check_writable(target.parent)
    except (OSError, StorageError) as error:
        raise _output_not_writable(path, error) from error
    if folder:
        raise StorageError(f"output {str(path)!r} is a folder; name a file in it, such as {str(target / 'model')!r}")
    if taken and not force:
        raise StorageError(f"output {str(path)!r} exists already; name another file, or overwrite it with force")
    return target


def write_output(path: str | Path, data: bytes, force: bool) -> None:
    """Write `data` to `path` completely or not at all. Raises StorageError (see `check_output`)."""
    target = check_output(path, force)
    try:
        write_atomic(target, data)
    except OSError as error:
        raise _output_not_writable(path, error) from error


def _output_not_writable(path: str | Path, error: Exception) -> StorageError:
    reason = getattr(error, "strerror", None) or str(error)
    return StorageError(f"output {str(path)!r} cannot be written ({reason}); name another place")

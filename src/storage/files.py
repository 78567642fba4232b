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
        leftover.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Raise StorageError where `path` is or is in a file, or where no file can be written into it. Creates nothing."""
    folder = Path(path).absolute()
    present = next(place for place in (folder, *folder.parents) if os.path.exists(place))
    if not present.is_dir():
        reason = f"{str(present)!r} is a file"
    elif not os.access(present, os.W_OK | os.X_OK):
        reason = f"{str(present)!r} may not be changed by this user"
    else:
        return
    raise StorageError(f"output folder {str(path)!r} cannot be written ({reason}); name another folder")


def check_output(path: str | Path) -> None:
    """Raise StorageError where a command could not write the file `path`. Creates nothing: call it before long work."""
    target = Path(path)
    if os.path.isdir(target):
        raise StorageError(f"output {str(path)!r} is a folder; name a file in it, such as {str(target / 'model')!r}")
    check_writable(target.parent)


def write_output(path: str | Path, data: bytes, force: bool) -> bool:
    """Write `data` to `path` completely or not at all. False: the file holds `data` already, and is left as it is.

    Raises StorageError where it holds something else and `force` is not set, and as `check_output` does.
    """
    check_output(path)
    target = Path(path)
    try:
        if target.exists():
            if target.read_bytes() == data:
                return False
            if not force:
                raise StorageError(
                    f"output {str(path)!r} exists already and holds something else; overwrite it with --force "
                    "(in Python force=True), or name another file"
                )
        write_atomic(target, data)
    except OSError as error:
        raise StorageError(
            f"output {str(path)!r} cannot be written ({error.strerror or error}); name another place"
        ) from error
    return True

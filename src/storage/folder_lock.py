"""One run at a time in an output folder, also across processes.

The lock is the operating system's, on a file `.lock` in the folder: it ends with the process that holds it, however
that ends. The file stays, and names the process that held it last. One process can take a folder any number of times,
so that a notebook's cell can be run again.
"""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from src.storage.files import StorageError

_held: dict[Path, BaseFileLock] = {}  # by the lock's file


def hold(folder: str | Path) -> None:
    """Take the folder for this process until `release` or the process's end. The folder has to exist.

    A lock whose file was deleted, perhaps with its folder, is taken again. A file system without locks is used without
    one. Raises StorageError where another process has the folder.
    """
    file = _file(folder)
    if file in _held and file.exists():
        return
    release(folder)
    # A lock that is only a file would outlive a killed process: better none.
    lock = FileLock(file, timeout=0, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise StorageError(
            f"output folder {str(folder)!r} is in use by another run ({file.read_text().strip()}); wait for it or stop "
            "it (a notebook's kernel keeps its folder until it is shut down), or name another folder"
        ) from error
    except OSError:  # of a file system without locks
        return
    _held[file] = lock
    with suppress(OSError):  # the name of the holder is a courtesy
        file.write_text(f"process {os.getpid()} on {platform.node()}\n")


def check_free(folder: str | Path) -> None:
    """Raise StorageError where another process has the folder. Creates nothing."""
    file = _file(folder)
    if file not in _held and file.exists():
        hold(folder)
        release(folder)


def release(folder: str | Path) -> None:
    """Give the folder back; does nothing where this process does not have it."""
    if lock := _held.pop(_file(folder), None):
        lock.release(force=True)


def _file(folder: str | Path) -> Path:
    return Path(os.path.realpath(folder), ".lock")

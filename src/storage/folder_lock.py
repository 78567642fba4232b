"""One run at a time in an output folder, also across processes.

The lock is the operating system's, on a file `.lock` in the folder: it ends with the process that holds it, however
that ends. The file stays and means nothing by itself; it names the process that holds the lock, or held it last. One
process can take a folder any number of times, so that a notebook's cell can be run again.
"""

from __future__ import annotations

import errno
import os
import platform
from contextlib import suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from src.storage.files import StorageError

LOCK = ".lock"
WITHOUT_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP})  # errors of some network file systems
_held: dict[Path, tuple[BaseFileLock, os.stat_result]] = {}  # by the folder's real path: lock, and its file


def hold(folder: str | Path) -> None:
    """Take the folder for this process until `release` or the process's end. The folder has to exist.

    A lock whose file was deleted, perhaps with its folder, is taken again. Raises StorageError where another process
    has it, OSError where no file can be made. A file system without locks is used without one.
    """
    place = _real(folder)
    if place in _held:
        with suppress(OSError):
            if os.path.samestat(_held[place][1], os.stat(place / LOCK)):
                return
        release(place)
    if lock := _acquired(place):
        _held[place] = lock, os.stat(place / LOCK)
        with suppress(OSError):  # the name of the holder is a courtesy
            (place / LOCK).write_text(f"process {os.getpid()} on {platform.node()}\n")


def is_held(folder: str | Path) -> bool:
    """Whether this process has the folder."""
    return _real(folder) in _held


def check_free(folder: str | Path) -> None:
    """Raise StorageError where another process has the folder. Creates nothing."""
    place = _real(folder)
    if place not in _held and (place / LOCK).exists():
        with suppress(OSError):  # whether it can be written is checked elsewhere
            if lock := _acquired(place):
                lock.release()


def release(folder: str | Path) -> None:
    """Give the folder back; does nothing where this process does not have it."""
    if held := _held.pop(_real(folder), None):
        held[0].release(force=True)


def _real(folder: str | Path) -> Path:
    return Path(os.path.realpath(folder))  # unlike `resolve` it also accepts a circle of links


def _acquired(place: Path) -> BaseFileLock | None:
    """The lock, taken; None on a file system without locks."""
    # A lock that is only a file would outlive a killed process: better none.
    lock = FileLock(place / LOCK, timeout=0, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        holder = ""
        with suppress(OSError):
            holder = (place / LOCK).read_text().strip()
        raise StorageError(
            f"output folder {str(place)!r} is in use by another run ({holder or 'another process'}); wait for it or "
            "stop it (a notebook's kernel keeps its folder until it is shut down), or name another folder"
        ) from error
    except OSError as error:
        if error.errno in WITHOUT_LOCKS:
            return None
        raise
    return lock

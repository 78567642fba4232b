"""One run at a time in an output folder, also across processes.

The lock is the operating system's, on a file `.lock` in the folder: it ends with the process that holds it, however
that ends. The file stays and means nothing by itself; it says who holds the lock, or held it last. Within one process
a folder can be taken any number of times, so that a notebook's cell can be run again.
"""

from __future__ import annotations

import errno
import os
import platform
from contextlib import suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from src.storage.files import RunError

LOCK = ".lock"
WITHOUT_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP})  # said by some network file systems
_held: dict[Path, tuple[BaseFileLock, os.stat_result]] = {}  # of this process, by the folder's real path, and its file


def hold(folder: str | Path) -> None:
    """Take the folder for this process until `release` or the process's end. The folder has to exist.

    A lock whose file was deleted, with its folder perhaps, is taken anew. Raises RunError where another process has
    it, OSError where no file can be made. A file system without locks is used without one.
    """
    place = _real(folder)
    if place in _held:
        if _is_current(place):
            return
        release(place)
    lock = _new_lock(place)
    if _acquired(lock, place):
        _held[place] = lock, os.stat(place / LOCK)
        with suppress(OSError):  # the name of the holder is a courtesy
            (place / LOCK).write_text(f"process {os.getpid()} on {platform.node()}\n")


def is_held(folder: str | Path) -> bool:
    """Whether this process has the folder."""
    return _real(folder) in _held


def check_free(folder: str | Path) -> None:
    """Raise RunError where another process has the folder. Creates nothing."""
    place = _real(folder)
    if place in _held or not (place / LOCK).exists():
        return
    lock = _new_lock(place)
    with suppress(OSError):  # whether it can be written is asked elsewhere
        if _acquired(lock, place):
            lock.release()


def release(folder: str | Path) -> None:
    """Give the folder back; nothing happens where this process does not have it."""
    if held := _held.pop(_real(folder), None):
        held[0].release(force=True)


def _real(folder: str | Path) -> Path:
    return Path(os.path.realpath(folder))  # unlike `resolve` it has an answer for links in a circle, too


def _new_lock(place: Path) -> BaseFileLock:
    # A lock that is only a file would outlive a killed process: rather none.
    return FileLock(place / LOCK, timeout=0, thread_local=False, fallback_to_soft=False)


def _acquired(lock: BaseFileLock, place: Path) -> bool:
    """False on a file system without locks."""
    try:
        lock.acquire()
    except Timeout as error:
        with suppress(OSError):
            holder = (place / LOCK).read_text().strip()
            raise RunError(_in_use(place, holder)) from error
        raise RunError(_in_use(place, "another process")) from error
    except OSError as error:
        if error.errno in WITHOUT_LOCKS:
            return False
        raise
    return True


def _is_current(place: Path) -> bool:
    """Whether the lock that is held is on the file that is there now."""
    try:
        return os.path.samestat(_held[place][1], os.stat(place / LOCK))
    except OSError:
        return False


def _in_use(place: Path, holder: str) -> str:
    return (
        f"output folder {str(place)!r} is in use by another run ({holder or 'another process'}); wait for it or stop "
        "it (a notebook's kernel keeps its folder until it is shut down), or name another folder"
    )

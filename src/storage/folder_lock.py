"""One process at a time changes an output folder.

The lock is the operating system's, on a file `.lock` in the folder: it ends with the process that holds it, however
that ends. The file stays, and names the process that held it last.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from src.storage.files import StorageError


@contextmanager
def hold(folder: str | Path) -> Iterator[bool]:
    """Have the folder for this process inside the block; True unless a block around this one has it already.

    A file system without locks is used without one. Raises StorageError where another process has the folder.
    """
    file = Path(os.path.realpath(folder), ".lock")
    # A lock that is only a file would outlive a killed process: better none.
    lock = FileLock(file, timeout=0, thread_local=False, fallback_to_soft=False, is_singleton=True)
    try:
        lock.acquire()
    except Timeout as error:
        raise StorageError(
            f"output folder {str(folder)!r} is in use by another run ({file.read_text().strip()}); wait for it or stop "
            "it, or name another folder"
        ) from error
    except OSError:  # of a file system without locks
        pass
    else:
        with suppress(OSError):  # the name of the holder is a courtesy
            file.write_text(f"process {os.getpid()} on {platform.node()}\n")
    try:
        yield lock.lock_counter <= 1
    finally:
        lock.release()  # does nothing where there is none


def check_free(folder: str | Path) -> None:
    """Raise StorageError where another process has the folder. Creates nothing."""
    if Path(folder, ".lock").exists():
        with hold(folder):
            pass

"""Files that are complete or absent: atomic writes, one process at a time in a folder, and one checked container.

Nothing here knows what a file means, and nothing loads torch. Everything that the project writes goes through here.
"""

from __future__ import annotations

from src.storage import folder_lock
from src.storage.console import (
    BAD_INPUT,
    CommandParser,
    Notify,
    duration,
    fail,
    log_info,
    prepare_streams,
    print_result,
)
from src.storage.container import DamagedFileError, container_bytes, read_container, save_arrays
from src.storage.files import (
    StorageError,
    check_output,
    check_writable,
    remove_leftovers,
    write_atomic,
    write_output,
)

__all__ = [
    "BAD_INPUT",
    "CommandParser",
    "DamagedFileError",
    "Notify",
    "StorageError",
    "check_output",
    "check_writable",
    "container_bytes",
    "duration",
    "fail",
    "folder_lock",
    "log_info",
    "prepare_streams",
    "print_result",
    "read_container",
    "remove_leftovers",
    "save_arrays",
    "write_atomic",
    "write_output",
]

"""Files that are whole or absent: atomic writes, one process at a time in a folder, and checked containers.

Nothing here knows what a file means. Everything that the project writes goes through `write_atomic`.
"""

from __future__ import annotations

from src.storage import folder_lock
from src.storage.checked_load import load_checked
from src.storage.console import BAD_INPUT, fail, prepare_streams, say, tell
from src.storage.files import RunError, check_writable, not_writable, remove_leftovers, write_atomic
from src.storage.folder_lock import WITHOUT_LOCKS, check_free, hold, is_held, release
from src.storage.output_file import OutputError, check_output, write_output
from src.storage.packed_file import PackedFileError, read_frame, write_frame

__all__ = [
    "BAD_INPUT",
    "WITHOUT_LOCKS",
    "OutputError",
    "PackedFileError",
    "RunError",
    "check_free",
    "check_output",
    "check_writable",
    "fail",
    "folder_lock",
    "hold",
    "is_held",
    "load_checked",
    "not_writable",
    "prepare_streams",
    "read_frame",
    "release",
    "remove_leftovers",
    "say",
    "tell",
    "write_atomic",
    "write_frame",
    "write_output",
]

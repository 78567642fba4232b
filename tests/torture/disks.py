"""A small disk of its own in memory, where the system lets one be mounted: it can be really full, or read-only."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SIZE = 2**22


@contextmanager
def small_disk(place: Path) -> Iterator[bool]:
    """A file system of 4 MB at `place` while the block runs. False where it cannot be had: then a folder is there."""
    place.mkdir(parents=True)
    mounted = False
    if sys.platform == "linux" and os.geteuid() == 0:
        command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(place)]
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(place)], capture_output=True, check=True)

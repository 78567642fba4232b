"""Where a Chromium is that the tests can drive, and what it is started with."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping

VARIABLE = "CODEQ_BROWSER"
COMMANDS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find(environment: Mapping[str, str] = os.environ) -> str | None:
    """Path of the browser: what CODEQ_BROWSER names, else the first of COMMANDS on the PATH, else None.

    Raises FileNotFoundError where CODEQ_BROWSER names no program: who sets it wants that browser and no skipped test.
    """
    asked = environment.get(VARIABLE, "")
    path = environment.get("PATH", "")
    if asked:
        found = shutil.which(asked, path=path)
        if found is None:
            raise FileNotFoundError(f"{VARIABLE}={asked!r}: no such program; give the path of a Chromium, or unset it")
        return found
    return next((found for name in COMMANDS if (found := shutil.which(name, path=path))), None)


def arguments() -> list[str]:
    """Command-line arguments: root has no sandbox, and containers have a small /dev/shm."""
    return ["--disable-dev-shm-usage", *(["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else [])]

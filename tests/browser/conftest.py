"""One browser, shared by the tests of this folder; without one they skip.

CODEQ_BROWSER names the browser to use, otherwise a Chromium or Chrome on the PATH is taken. The playwright of this
package must have ended before other tests use asyncio, hence the package scope.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ROOT = Path(__file__).resolve().parents[2]
VARIABLE = "CODEQ_BROWSER"
COMMANDS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Chromium. As root it has no sandbox; containers have a small /dev/shm."""
    path = os.environ.get(VARIABLE) or next(filter(None, map(shutil.which, COMMANDS)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(COMMANDS)} is on the PATH and {VARIABLE} is unset")
    sync_api = pytest.importorskip("playwright.sync_api", reason="the playwright package is not installed")
    with sync_api.sync_playwright() as playwright:
        arguments = ["--disable-dev-shm-usage", "--no-sandbox"]
        started = playwright.chromium.launch(executable_path=path, args=arguments, timeout=60_000)
        yield started
        started.close()


@pytest.fixture(scope="package")
def screenshots() -> Path:
    """Where screenshots are kept for people to look at."""
    folder = ROOT / "build/screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    return folder

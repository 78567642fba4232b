"""One browser and one walkthrough run in it, shared by the tests of this folder; without a browser they skip.

CODEQ_BROWSER names the browser to use, otherwise a Chromium or Chrome on the PATH is taken. The playwright of this
package must have ended before other tests use asyncio, hence the package scope.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ROOT = Path(__file__).resolve().parents[2]
VARIABLE = "CODEQ_BROWSER"
COMMANDS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_browser(environment: Mapping[str, str] = os.environ) -> str | None:
    """Path of the browser: what CODEQ_BROWSER names, else the first of COMMANDS on the PATH, else None.

    Raises FileNotFoundError where CODEQ_BROWSER names no program: who sets it wants that browser and no skipped test.
    """
    asked, path = environment.get(VARIABLE, ""), environment.get("PATH", "")
    found = (shutil.which(name, path=path) for name in ([asked] if asked else COMMANDS))
    browser = next((one for one in found if one), None)
    if asked and browser is None:
        raise FileNotFoundError(f"{VARIABLE}={asked!r}: no such program; give the path of a Chromium, or unset it")
    return browser


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Chromium. As root it has no sandbox; containers have a small /dev/shm."""
    path = find_browser()
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(COMMANDS)} is on the PATH and {VARIABLE} is unset")
    sync_api = pytest.importorskip("playwright.sync_api", reason="the playwright package is not installed")
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    with sync_api.sync_playwright() as playwright:
        arguments = ["--disable-dev-shm-usage", *["--no-sandbox"] * root]
        started = playwright.chromium.launch(executable_path=path, args=arguments, timeout=60_000)
        yield started
        started.close()


@pytest.fixture(scope="package")
def workplace() -> Iterator[Path]:
    """A folder inside the project, where a notebook finds its modules, that is gone afterwards."""
    (ROOT / "build").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="browser-", dir=ROOT / "build"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="package")
def screenshots() -> Path:
    """Where screenshots are kept for people to look at."""
    folder = ROOT / "build/screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    return folder

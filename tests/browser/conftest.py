"""One browser and one walkthrough run in it, shared by the tests of this folder; without a browser they skip.

CODEQ_BROWSER names the browser to use, otherwise a Chromium or Chrome on the PATH is taken. The playwright of this
package must have ended before other tests use asyncio, hence the package scope.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser import chromium

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ROOT = Path(__file__).resolve().parents[2]
SCREENSHOTS = ROOT / "build/screenshots"


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    path = chromium.find()
    if path is None:
        pytest.skip(
            f"no browser: none of {', '.join(chromium.COMMANDS)} is on the PATH and {chromium.VARIABLE} is unset"
        )
    sync_api = pytest.importorskip("playwright.sync_api", reason="the playwright package is not installed")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=chromium.arguments(), timeout=60_000)
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
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    return SCREENSHOTS

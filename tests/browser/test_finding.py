"""Which browser is taken: no browser is started here, so this test never skips."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.browser.conftest import VARIABLE, find_browser


def test_the_browser_asked_for_is_taken_else_the_first_known_name_on_the_path(tmp_path: Path) -> None:
    first = {"firefox": None, "google-chrome": "google-chrome", "chromium": "chromium", "mine": "chromium"}
    for name, taken in first.items():
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
        assert find_browser({"PATH": str(tmp_path)}) == (str(tmp_path / taken) if taken else None)
    assert find_browser({"PATH": str(tmp_path), VARIABLE: "mine"}) == str(tmp_path / "mine")
    with pytest.raises(FileNotFoundError, match=r"CODEQ_BROWSER='no-such': no such program; give the path"):
        find_browser({"PATH": str(tmp_path), VARIABLE: "no-such"})

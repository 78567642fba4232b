"""Which browser is taken: no browser is started here, so these tests never skip."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.browser import chromium


def program(folder: Path, name: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_first_known_name_on_the_path_is_taken(tmp_path: Path) -> None:
    program(tmp_path, "google-chrome")
    assert chromium.find({"PATH": str(tmp_path)}) == str(tmp_path / "google-chrome")
    program(tmp_path, "chromium")
    assert chromium.find({"PATH": str(tmp_path)}) == str(tmp_path / "chromium")


def test_none_where_there_is_none(tmp_path: Path) -> None:
    program(tmp_path, "firefox")
    assert chromium.find({"PATH": str(tmp_path)}) is None


def test_the_one_asked_for_comes_first_and_has_to_exist(tmp_path: Path) -> None:
    program(tmp_path, "chromium")
    other = program(tmp_path / "other", "my-browser")
    assert chromium.find({"PATH": str(tmp_path), chromium.VARIABLE: str(other)}) == str(other)
    with pytest.raises(FileNotFoundError, match=r"CODEQ_BROWSER='no-such': no such program; give the path"):
        chromium.find({"PATH": str(tmp_path), chromium.VARIABLE: "no-such"})

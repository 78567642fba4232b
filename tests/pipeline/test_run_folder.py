"""A run's folder is locked while it trains, no longer, and a run that is only explored stays as it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from src.data import load_data
from src.runs import RunError
from src.storage import StorageError
from tests.reliability.small_run import Unbroken, open_loop, prepare, run_command, train
from tests.storage.test_folder_lock import another_process


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch)


def test_exploring_a_finished_run_changes_nothing(tiny_run: Unbroken, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_run.folder, tmp_path / "run"))
    (folder / ".lock").unlink()
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    loop = open_loop(load_data("digits", limit=60), folder, lambda line: None, resume=True)
    train(loop)
    assert loop.explores
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()} == before


def test_other_processes_have_the_folder_before_and_after_the_training(tmp_path: Path) -> None:
    data, seen = load_data("digits", limit=60), []
    loop = open_loop(data, tmp_path, lambda line: None)
    assert not loop.explores

    def refused(_: object) -> None:
        if not seen:
            with pytest.raises(AssertionError), another_process(tmp_path):
                pass
        seen.append(1)

    with another_process(tmp_path), pytest.raises(StorageError, match="in use by another run"):
        train(loop)
    train(loop, refused)
    with another_process(tmp_path), pytest.raises(StorageError, match="in use by another run"):
        loop.folder.write("run.json", "{}")
    loop.folder.write("run.json", "{}")
    assert run_command(tmp_path, "--resume", "--epochs=4") == 0
    with pytest.raises(RunError, match="another process has changed the run"):
        loop.folder.write("run.json", "{}")

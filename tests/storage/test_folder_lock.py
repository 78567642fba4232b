"""One process at a time in a folder, however the process ends, and any number of times within it."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock
import pytest

from src.runs import RunFolder
from src.storage import StorageError, folder_lock, remove_leftovers

HOLD = """
import sys
from src.storage import folder_lock
with folder_lock.hold(sys.argv[1]):
    print("held", "torch" in sys.modules, flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_process(folder: Path) -> Iterator[int]:
    """Another process that has the folder, and has not loaded torch for it; its number."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", HOLD, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": Path(__file__).parents[2]}
    with subprocess.Popen(command, text=True, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "held False\n"
        try:
            yield process.pid
        finally:
            process.kill()


def take(folder: Path) -> None:
    with folder_lock.hold(folder):
        pass


def test_the_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    with another_process(tmp_path) as first:
        for use in (folder_lock.check_free, take, RunFolder.open):
            with pytest.raises(StorageError, match=rf"in use by another run \(process {first} on .*wait for it or"):
                use(tmp_path)
    folder_lock.check_free(tmp_path)
    take(tmp_path)


def test_one_process_takes_it_any_number_of_times_and_under_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_lock.check_free(tmp_path / "run")
    (tmp_path / "run").mkdir()
    folder_lock.check_free(tmp_path / "run")
    assert not list((tmp_path / "run").iterdir()), "checking creates nothing"
    monkeypatch.chdir(tmp_path)
    with folder_lock.hold("run") as first, folder_lock.hold(tmp_path / "run") as second:
        assert (first, second) == (True, False)
        folder_lock.check_free("run/../run")
        with folder_lock.hold("run"), pytest.raises(AssertionError), another_process(tmp_path / "run"):
            pass
    with another_process(tmp_path / "run"):
        pass


def test_a_file_system_without_locks_is_used_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*_: object, **__: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", without)
    take(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_temporary_files_of_a_killed_process_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".checkpoint.pt-a1b2c3d4.tmp", ".history.csv-00000000.tmp", ".hidden", "notes.tmp", "checkpoint.pt"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".hidden", "notes.tmp", "checkpoint.pt"}

"""Each row of the table of failures: the quick ones a few times, those with processes of their own once and slowly."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.reliability import __main__ as command
from tests.reliability import failures, files, long_runs, processes
from tests.reliability.small_run import Row, Unbroken

TRIES_OF_A_FILE = 4
SLOW = {**processes.ROWS, **long_runs.ROWS}
MINUTES = "memory over"  # 200 epochs: in `make torture` alone


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, f in failures.FAILURES.items() for kind in f.kinds])
def test_a_failure_is_survived(name: str, kind: str, tiny_run: Unbroken, tmp_path: Path) -> None:
    failures.strike(name, kind)(random.Random(f"{name} {kind}"), tmp_path, tiny_run)


@pytest.mark.parametrize("name", files.ROWS)
def test_a_file_is_refused_or_read_as_it_was(name: str, tiny_run: Unbroken, tmp_path: Path) -> None:
    for number in range(TRIES_OF_A_FILE if files.ROWS[name].share == 1 else 1):
        folder = tmp_path / str(number)
        folder.mkdir()
        files.ROWS[name].trial(random.Random(f"{name} {number}"), folder, tiny_run)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SLOW if MINUTES not in name])
def test_nothing_is_lost(name: str, tiny_run: Unbroken, tmp_path: Path) -> None:
    SLOW[name].trial(random.Random(f"test {name}"), tmp_path, tiny_run)


def test_a_long_history_stays_small() -> None:
    assert long_runs.size_of_history(3_000, random.Random(0)) < long_runs.LARGEST


def test_what_is_lost_is_counted_and_printed(
    tiny_run: Unbroken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def half(rng: random.Random, tmp: Path, unbroken: Unbroken) -> str:
        tries.append(tmp.name)
        assert len(tries) % 2, "it is even"
        return "odd"

    tries: list[str] = []
    rows = {"half": Row("odd", half), "once": Row("it runs", lambda *_: "", share=0)}
    monkeypatch.setattr(command, "ROWS", rows)
    monkeypatch.setattr(command, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(command, "train_unbroken", lambda folder: tiny_run)
    assert command.main(["--tries=4"]) == 1
    written = (tmp_path / "page.md").read_text()
    assert "| half | 4 | 2 | 2 | odd (2 odd) |" in written
    assert "| once | 1 | 1 | 0 | it runs |" in written
    out = capsys.readouterr().out
    assert "LOST half, try 1: AssertionError: it is even" in out
    assert "5 tries, 2 lost" in out
    assert command.main(["--tries=9", "--minutes=0", "hal"]) == 0
    assert "0 tries, 0 lost" in capsys.readouterr().out
    assert (tmp_path / "page.md").read_text() == written, "a part of the table is not written"
    assert command.main(["whole"]) == 2

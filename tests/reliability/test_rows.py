"""Rows of the table that need processes of their own or minutes, once each; and the command that makes the table."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.reliability import __main__ as command
from tests.reliability import long_runs, processes
from tests.reliability.small_run import Row, Unbroken

ROWS = {**processes.ROWS, **long_runs.ROWS}
MINUTES = "memory over"  # 200 epochs: in `make torture` alone


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ROWS if MINUTES not in name])
def test_nothing_is_lost(name: str, tiny_run: Unbroken, tmp_path: Path) -> None:
    ROWS[name].trial(random.Random(f"test {name}"), tmp_path, tiny_run)


def test_a_long_history_stays_small() -> None:
    assert long_runs.size_of_history(3_000, random.Random(0)) < long_runs.LARGEST


def test_what_is_lost_is_counted_and_printed(
    tiny_run: Unbroken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tries: list[str] = []

    def half(rng: random.Random, tmp: Path, unbroken: Unbroken) -> str:
        tries.append(tmp.name)
        assert len(tries) % 2, "it is even"
        return "odd"

    def ended(rng: random.Random, tmp: Path, unbroken: Unbroken) -> str:
        raise SystemExit(3)

    rows = {"half": Row("odd", half), "ended": Row("it runs", ended, share=0)}
    monkeypatch.setattr(command, "ROWS", rows)
    monkeypatch.setattr(command, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(command, "train_unbroken", lambda folder: tiny_run)
    assert command.main(["--tries=4"]) == 1
    written = (tmp_path / "page.md").read_text()
    assert "| half | 4 | 2 | 2 | odd (2 odd) |" in written
    assert "| ended | 1 | 0 | 1 | it runs |" in written
    assert "5 tries, 3 lost, on " in written
    out = capsys.readouterr().out
    assert "LOST half, try 1: AssertionError: it is even" in out
    assert "LOST ended, try 0: SystemExit: 3" in out
    assert command.main(["--tries=9", "--minutes=0", "hal"]) == 0
    assert "0 tries, 0 lost" in capsys.readouterr().out
    assert (tmp_path / "page.md").read_text() == written, "a part of the table is not written"
    assert command.main(["whole"]) == 2

"""What the commands read and print. Oracle: argparse itself says what it does not know."""

from __future__ import annotations

import io
import sys

import pytest

from src.storage import CommandParser, duration, log_info


@pytest.mark.parametrize(
    ("given", "suggested"),
    [("--batchsize=64", "--batch-size"), ("--ressume", "--resume"), ("--zzz", None), ("stray", None)],
)
def test_a_mistyped_flag_gets_a_suggestion(
    given: str, suggested: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = CommandParser("experiments.nothing", "Do nothing.\n\n    python -m experiments.nothing --resume")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--resume", action="store_true")
    with pytest.raises(SystemExit) as ended:
        parser.parse_args([given])
    assert ended.value.code == 2
    told = capsys.readouterr().err.splitlines()[-1]
    hint = f"; did you mean {suggested}?" if suggested else ""
    assert told == f"python -m experiments.nothing: error: unrecognized arguments: {given}{hint}"


def test_a_notice_takes_the_place_of_a_progress_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    log_info("into a log")
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    log_info("on a terminal")
    assert terminal.getvalue() == "into a log\n\r\x1b[Kon a terminal\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.7, "1 min 00 s"), (75.2, "1 min 15 s"), (2400, "40 min"), (3725, "1 h 02 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text

"""The framework itself: what is not survived is counted as lost and told, and the document has all rows."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from tests.torture import __main__ as command
from tests.torture import table
from tests.torture.damage import damaged, read_damaged
from tests.torture.fault import FAULTS, Fault, Hang, Outcome, limited
from tests.torture.table import ROWS


class Refused(ValueError):
    """The error of a reader in these tests."""


def test_a_trial_that_raises_is_lost_and_one_that_ends_is_survived() -> None:
    outcome = Outcome()
    for error in (None, ValueError("bad"), AssertionError("wrong"), SystemExit(3)):
        with outcome.trial(f"with {error!r}"):
            if error:
                raise error
    assert (outcome.tried, outcome.survived) == (4, 1)
    assert outcome.lost == [
        "with ValueError('bad'): ValueError: bad",
        "with AssertionError('wrong'): AssertionError: wrong",
        "with SystemExit(3): SystemExit: 3",
    ]


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="no alarm signal on this system")
def test_a_trial_that_hangs_is_lost_and_the_clock_around_it_goes_on() -> None:
    outcome = Outcome()
    with limited(100.0):
        with outcome.trial("a hang", seconds=0.05):
            try:
                time.sleep(30)
            except Exception:  # a hang is not an ordinary error
                pytest.fail("was taken for an ordinary error")
        assert 50 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100
    assert outcome.lost == ["a hang: Hang: not over after 0.05 s"]
    assert issubclass(Hang, BaseException)


def test_an_interrupt_ends_the_whole() -> None:
    outcome = Outcome()
    with pytest.raises(KeyboardInterrupt), outcome.trial("stopped by the user"):
        raise KeyboardInterrupt


def test_damage_changes_or_shortens_the_bytes() -> None:
    data, rng, kinds = bytes(range(1, 201)), random.Random(0), set()
    for _ in range(300):
        what, bad = damaged(data, rng)
        kinds.add(what.split()[0])
        assert bad != data
        assert len(bad) == len(data) or (what.startswith("cut") and data.startswith(bad))
    assert kinds == {"bit", "byte", "zeros", "noise", "cut"}


def test_a_reader_that_does_not_notice_is_found_out(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100) + b"the end")

    def careless(path: Path) -> bytes:
        return path.read_bytes()[100:]

    outcome = read_damaged(path, random.Random(0), 50, careless, bytes.__eq__, Refused)
    assert 0 < outcome.survived < outcome.tried == 50  # damage before byte 100 is harmless
    assert all("read without an error, with other contents" in line for line in outcome.lost)
    assert path.read_bytes() == bytes(100) + b"the end"


def test_a_message_has_to_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"contents")

    def curt(path: Path) -> bytes:
        if path.read_bytes() != b"contents":
            raise Refused("something is wrong")
        return b""

    outcome = read_damaged(path, random.Random(0), 5, curt, bytes.__eq__, Refused)
    assert outcome.survived == 0
    assert "does not name file" in outcome.lost[0]


def test_the_command_tells_what_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def half(rng: random.Random, tmp: Path, rounds: int) -> Outcome:
        outcome = Outcome()
        for number in range(rounds):
            with outcome.trial(f"number {number}"):
                assert number % 2 == 0, "it is odd"
        return outcome

    rows = {"half": Fault("half", "number is even", 4, 1, half)}
    for module in (command, table):
        monkeypatch.setattr(module, "ROWS", rows)
    page = tmp_path / "page.md"
    page.write_text(f"{table.BEGIN}\n{table.END}\n")
    monkeypatch.setattr(command, "DOCUMENT", page)
    assert command.main(["hal"]) == 1
    assert "| half | 4 | 2 | 2 | number is even |" in page.read_text()
    rows["other"] = Fault("other", "nothing", 4, 1, half)
    written = page.read_text()
    page.write_text(f"{table.BEGIN}\n{table.END}\n")
    assert command.main(["hal"]) == 1
    assert "| half |" not in page.read_text(), "a table that lacks rows is not written"
    page.write_text(written)
    del rows["other"]
    out = capsys.readouterr().out
    assert "2/4" in out
    assert "LOST number 1: AssertionError: it is odd" in out
    assert "2 of 4 survived, 2 lost" in out
    assert command.main(["--quick"]) == 0
    assert command.main(["whole"]) == 2


def test_the_table_stands_between_its_marks() -> None:
    name = next(iter(ROWS))
    outcomes = {name: Outcome(3, 2, ["one"], note="a note"), list(ROWS)[1]: Outcome(skipped="not here")}
    text = table.document(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n", outcomes)
    assert text.startswith(f"before\n{table.BEGIN}\n\n| fault |")
    assert text.endswith(f"{table.END}\nafter\n")
    assert f"| {name} | 3 | 2 | 1 | {ROWS[name].survived} (a note) |" in text
    assert "(not here)" in text
    assert "old" not in text
    assert "3 tries, 1 lost" in text
    assert table.document(text, outcomes) == text
    again = table.document(text, {name: Outcome(5, 5)})
    assert f"| {name} | 5 | 5 | 0 | {ROWS[name].survived} |" in again
    assert "(not here)" in again, "the other faults keep their lines"
    assert "5 tries, 0 lost" in again
    with pytest.raises(ValueError, match=r"reliability\.md needs the lines"):
        table.document("no marks", outcomes)


def test_every_fault_is_in_the_table() -> None:
    assert set(ROWS) == set(FAULTS)


def test_the_document_has_a_row_for_every_fault() -> None:
    rows = table.rows_of(table.DOCUMENT.read_text(encoding="utf-8"))
    assert list(rows) == list(ROWS)
    assert {row.split(" | ")[3] for row in rows.values()} == {"0"}

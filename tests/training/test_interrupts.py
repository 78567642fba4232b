"""Signals wait for the end of a step, a second Ctrl-C does not wait, and the handlers come back in any case."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest

from src.training import Interrupted, Terminated, between_steps, raise_pending, terminations
from src.training.interrupts import SIGNALS

INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


@pytest.fixture(autouse=True)
def _handlers_come_back() -> Iterator[None]:
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def raised_by(run: Callable[[], None]) -> BaseException:
    with pytest.raises(KeyboardInterrupt) as caught:
        run()
    return caught.value


@pytest.mark.parametrize(
    ("numbers", "kind", "done"),
    [
        ([INT], Interrupted, ["step 1"]),
        ([TERM, TERM], Terminated, ["step 1"]),  # schedulers send it more than once
        ([HUP], Terminated, ["step 1"]),
        ([INT, TERM], Terminated, ["step 1"]),  # a request to end outweighs Ctrl-C
        ([TERM, INT], Terminated, ["step 1"]),
        ([INT, INT], KeyboardInterrupt, []),  # at once: something may be half done
    ],
)
def test_a_signal_within_a_step_is_raised_at_its_end(
    numbers: list[int], kind: type[BaseException], done: list[str]
) -> None:
    steps: list[str] = []

    def train() -> None:
        with between_steps():
            raise_pending()  # nothing came yet
            for number in numbers:
                send(number)
            steps.append("step 1")
            raise_pending()
            steps.append("step 2")

    error = raised_by(train)
    assert type(error) is kind
    assert steps == done
    if isinstance(error, Terminated):
        assert error.signal in numbers
        assert error.signal != INT
    raise_pending()  # it was raised once


def test_one_that_nobody_asked_for_is_raised_at_the_end_of_the_outer_block() -> None:
    done = []

    def train() -> None:
        with between_steps():
            with between_steps():
                send(INT)
            done.append("after the inner block")

    assert type(raised_by(train)) is Interrupted
    assert done == ["after the inner block"]


def test_an_error_inside_stays_itself() -> None:
    def train() -> None:
        with between_steps():
            send(INT)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        train()
    with between_steps():
        raise_pending()  # what came to the block before is over


@pytest.mark.parametrize("block", [between_steps, terminations])
def test_an_ignored_signal_stays_ignored(block: Callable[[], AbstractContextManager[None]]) -> None:
    before = signal.signal(HUP, signal.SIG_IGN)  # as nohup does
    try:
        with block():
            assert signal.getsignal(HUP) is signal.SIG_IGN
            send(HUP)
            raise_pending()
    finally:
        signal.signal(HUP, before)


@pytest.mark.parametrize("number", [TERM, HUP])
def test_outside_of_the_steps_a_command_is_ended_at_once(number: int) -> None:
    done = []

    def command() -> None:
        with terminations():
            with between_steps():
                pass
            try:
                send(number)
                done.append("not reached")
            finally:
                done.append("cleaned up")

    error = raised_by(command)
    assert isinstance(error, Terminated)
    assert error.signal == number
    assert done == ["cleaned up"]


@pytest.mark.parametrize("number", SIGNALS)
def test_an_interruption_within_a_destructor_comes_again(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    class Closing:
        def __del__(self) -> None:
            send(number)
            time.sleep(0.01)

    def command() -> None:
        with terminations():
            Closing()
            time.sleep(5)

    began = time.monotonic()
    assert getattr(raised_by(command), "signal", INT) == number
    assert time.monotonic() - began < 4
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("block", [between_steps, terminations])
def test_another_thread_is_left_alone(block: Callable[[], AbstractContextManager[None]]) -> None:
    seen: list[Any] = []

    def elsewhere() -> None:
        with block():
            seen.extend(signal.getsignal(number) for number in SIGNALS)

    before = [signal.getsignal(number) for number in SIGNALS]
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == before


def test_a_notebook_shows_a_line_and_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    try:
        result = shell.run_cell("from src.training import Interrupted\nraise Interrupted")
    finally:
        InteractiveShell.clear_instance()
    told = "".join(capsys.readouterr())
    assert type(result.error_in_exec).__name__ == "Interrupted"
    assert told.strip() == "Interrupted: stopped between two steps, as asked; nothing is half done"

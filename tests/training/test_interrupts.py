"""Signals wait for the end of a step, a second Ctrl-C does not wait, and the handlers come back in any case."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from src.training import Interrupted, Terminated, between_steps, raise_pending, terminations
from src.training.interrupts import SIGNALS


@pytest.fixture(autouse=True)
def _handlers_come_back() -> Iterator[None]:
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_a_signal_waits_until_it_is_asked_for() -> None:
    done = []

    def steps() -> None:
        with between_steps():
            raise_pending()  # nothing came yet
            send(signal.SIGINT)
            done.append("the rest of the step")
            raise_pending()
            done.append("the next step")

    with pytest.raises(Interrupted):
        steps()
    assert done == ["the rest of the step"]
    raise_pending()  # it was raised once


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_request_to_end_says_which_signal_it_was(number: int) -> None:
    def steps() -> None:
        with between_steps():
            send(number)
            send(number)  # schedulers send it more than once
            raise_pending()

    with pytest.raises(Terminated) as caught:
        steps()
    assert caught.value.signal == number
    assert isinstance(caught.value, KeyboardInterrupt)


def test_a_second_ctrl_c_interrupts_at_once() -> None:
    done = []

    def steps() -> None:
        with between_steps():
            send(signal.SIGINT)
            done.append("first")
            send(signal.SIGINT)
            done.append("second")

    with pytest.raises(KeyboardInterrupt) as caught:
        steps()
    assert done == ["first"]
    assert not isinstance(caught.value, Interrupted)  # something may be half done


@pytest.mark.parametrize("order", [(signal.SIGINT, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)])
def test_a_request_to_end_outweighs_ctrl_c(order: tuple[int, int]) -> None:
    def steps() -> None:
        with between_steps():
            for number in order:
                send(number)
            raise_pending()

    with pytest.raises(Terminated):
        steps()


def test_one_that_nobody_asked_for_is_raised_at_the_end_of_the_block() -> None:
    done = []

    def steps() -> None:
        with between_steps():
            send(signal.SIGINT)
            done.append("all of it")

    with pytest.raises(Interrupted):
        steps()
    assert done == ["all of it"]


def test_an_error_inside_stays_itself() -> None:
    def steps() -> None:
        with between_steps():
            send(signal.SIGINT)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        steps()
    with between_steps():
        raise_pending()  # what came to the block before is over


def test_an_inner_block_leaves_it_to_the_outer_one() -> None:
    done = []

    def steps() -> None:
        with between_steps():
            with between_steps():
                send(signal.SIGINT)
            done.append("after the inner block")
            raise_pending()

    with pytest.raises(Interrupted):
        steps()
    assert done == ["after the inner block"]


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with between_steps():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            send(signal.SIGHUP)
            raise_pending()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_hears_of_its_end_outside_of_the_steps(number: int) -> None:
    done = []

    def command() -> None:
        with terminations():
            with between_steps():
                pass
            try:
                send(number)
                done.append("not reached")
            finally:
                done.append("put away")

    with pytest.raises(Terminated) as caught:
        command()
    assert caught.value.signal == number
    assert done == ["put away"]


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
    with pytest.raises(KeyboardInterrupt) as caught:
        command()
    assert getattr(caught.value, "signal", signal.SIGINT) == number
    assert time.monotonic() - began < 4
    assert "Traceback" not in capsys.readouterr().err


def test_a_command_under_nohup_lives_on() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with terminations():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            send(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_is_left_alone() -> None:
    seen: list[Any] = []

    def elsewhere() -> None:
        with between_steps():
            seen.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [before]


def test_outside_of_a_block_a_signal_does_what_it_always_does() -> None:
    with pytest.raises(KeyboardInterrupt) as caught:
        send(signal.SIGINT)
    assert type(caught.value) is KeyboardInterrupt


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

"""An interruption between two training steps instead of in the middle of one.

Ctrl-C, the stop button of a notebook (both SIGINT), a scheduler's SIGTERM and a closed terminal's SIGHUP come at any
moment. Amid an update they would leave half of the weights changed. Inside `between_steps` they are noted, and the
training loop raises them where nothing is half done, by calling `raise_pending`. A second Ctrl-C interrupts at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
SOON = 0.05  # seconds


class Interrupted(KeyboardInterrupt):
    """An interruption that came between two steps: nothing is half done."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of a traceback, which would look like a fault of the cell."""
        return [f"{type(self).__name__}: stopped between two steps, as asked; nothing is half done"]


class Terminated(Interrupted):
    """The process was asked to end (SIGTERM, SIGHUP); `signal` is the number. An exit status is 128 + signal."""

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__(f"signal {number}")
        self.signal = number


class _Watch:
    """The signal that came, if any. One watch a process: only its main thread receives signals."""

    active = False
    pending: int | None = None

    def note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.pending == signal.SIGINT:
            self.pending = None
            raise KeyboardInterrupt
        if self.pending is None or number != signal.SIGINT:
            self.pending = number


_watch = _Watch()


@contextmanager
def terminations() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise Terminated at once, as Ctrl-C raises KeyboardInterrupt.

    So what a command has to say and to put away at its end is said and put away then, too. An interruption that comes
    within a destructor, where Python drops every exception, is sent again. The handlers that were there come back. An
    ignored signal stays ignored (nohup). In another thread than the main one this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS if number != signal.SIGINT}
    ours = [number for number, handler in before.items() if handler == signal.SIG_DFL]
    hook = sys.unraisablehook

    def send_again(dropped: Any) -> None:
        if not isinstance(dropped.exc_value, KeyboardInterrupt):
            hook(dropped)
            return
        number = getattr(dropped.exc_value, "signal", signal.SIGINT)
        threading.Timer(SOON, os.kill, (os.getpid(), number)).start()

    try:
        sys.unraisablehook = send_again
        for number in ours:
            signal.signal(number, _terminate)
        yield
    finally:
        sys.unraisablehook = hook
        for number in ours:
            signal.signal(number, before[number])


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated(number)


@contextmanager
def between_steps() -> Iterator[None]:
    """Inside, the first interruption waits for `raise_pending`, or for the end of the block.

    The handlers that were there come back in any case. A signal that was ignored stays ignored (nohup). In another
    thread than the main one, and inside another such block, this does nothing.
    """
    if _watch.active or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    ours = [number for number, handler in before.items() if handler not in (None, signal.SIG_IGN)]
    _watch.active, _watch.pending = True, None
    try:
        for number in ours:
            signal.signal(number, _watch.note)
        yield
        raise_pending()
    finally:
        for number in ours:
            signal.signal(number, before[number])
        _watch.active, _watch.pending = False, None


def raise_pending() -> None:
    """Raise the interruption that came since: Interrupted for SIGINT, Terminated for the others. Else do nothing."""
    number, _watch.pending = _watch.pending, None
    if number == signal.SIGINT:
        raise Interrupted("between two steps; run it again to go on")
    if number is not None:
        raise Terminated(number)


def in_notebook() -> bool:
    """True inside a Jupyter kernel, also a headless one."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module else None
    return shell is not None and hasattr(shell, "kernel")

"""An interruption between two training steps instead of in the middle of one.

Ctrl-C and the stop button of a notebook (both SIGINT), a scheduler's SIGTERM and a closed terminal's SIGHUP come at any
moment, and would leave half of the weights updated. Inside `between_steps` they are noted, and the training loop raises
them where nothing is half done, by calling `raise_pending`. A second Ctrl-C interrupts at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
RESEND_SECONDS = 0.05


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
    """The signal that came, if any. One per process: only its main thread receives signals."""

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

    So a command cleans up and reports before it ends. An interruption within a destructor, where Python drops every
    exception, is sent again. An ignored signal stays ignored (nohup). Only the main thread receives signals: in another
    one this does nothing.
    """
    hook = sys.unraisablehook

    def send_again(dropped: Any) -> None:
        if not isinstance(dropped.exc_value, KeyboardInterrupt):
            hook(dropped)
            return
        number = getattr(dropped.exc_value, "signal", signal.SIGINT)
        threading.Timer(RESEND_SECONDS, os.kill, (os.getpid(), number)).start()

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ends = [n for n in SIGNALS if n != signal.SIGINT and signal.getsignal(n) == signal.SIG_DFL]
    try:
        sys.unraisablehook = send_again
        with _handling(ends, terminate):
            yield
    finally:
        sys.unraisablehook = hook


@contextmanager
def between_steps() -> Iterator[None]:
    """Inside, the first interruption waits for `raise_pending`, or for the end of the block.

    A signal that was ignored stays ignored (nohup). In another thread than the main one, and inside another such block,
    this does nothing.
    """
    if _watch.active or threading.current_thread() is not threading.main_thread():
        yield
        return
    _watch.active, _watch.pending = True, None
    try:
        with _handling([n for n in SIGNALS if signal.getsignal(n) not in (None, signal.SIG_IGN)], _watch.note):
            yield
            raise_pending()
    finally:
        _watch.active, _watch.pending = False, None


def raise_pending() -> None:
    """Raise the interruption that came since, if any: Interrupted for SIGINT, Terminated for the others."""
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


@contextmanager
def _handling(signals: Sequence[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Inside, `handler` receives the signals; afterwards the handlers that were there before."""
    before = {number: signal.getsignal(number) for number in signals}
    try:
        for number in signals:
            signal.signal(number, handler)
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)

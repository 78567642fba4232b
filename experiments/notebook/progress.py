"""How far a run has come and how long the rest will take: a bar in a notebook, a line in a terminal or a log.

A bar is displayed once and that display is updated. Both are drawn at most once a second (in a log every 30 seconds).
Nothing here knows a model or a file. Times are seconds.
"""

from __future__ import annotations

import html
import shutil
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Self, TextIO

from experiments.notebook import live
from experiments.notebook.live import Clock
from src.training import EpochRecord


class ProgressReporter(ABC):
    """Progress through epochs and steps with an estimate of the time left; subclasses say where it is shown.

    start, then step after every training step and epoch_done after every epoch, then close. Epochs and steps count
    from 1. The rate is that of the last epoch of steps, so that the time of a test is part of it.
    """

    def __init__(self, min_interval: float = 1.0, *, clock: Clock = time.monotonic) -> None:
        self._clock, self._interval = clock, min_interval
        self.start(1, 1)

    def start(self, epochs: int, steps_per_epoch: int, first_epoch: int = 0, first_step: int = 0) -> None:
        """epochs: planned in total; first_epoch, and first_step of the next: how many were done before (resumed)."""
        self.epochs, self.steps_per_epoch, self.first_epoch = epochs, max(steps_per_epoch, 1), first_epoch
        self._tested, self._note = first_epoch, ""
        self._begin, self._next = self._clock(), float("-inf")
        self._seen = deque(  # (when, steps done), over the last epoch
            [(self._begin, first_epoch * self.steps_per_epoch + first_step)], maxlen=max(steps_per_epoch, 10) + 1
        )

    def step(self, epoch: int, step: int, loss: Callable[[], float] | None = None) -> None:
        """`step` steps of `epoch` are done. loss is called only where the line is really drawn."""
        self._advance((epoch - 1) * self.steps_per_epoch + step)
        if self._clock() >= self._next:
            parts = [f"Epoch {epoch}/{self.epochs}", f"step {step}/{self.steps_per_epoch}"]
            self._draw([*parts, f"loss {loss():.3f}"] if loss else parts)

    def epoch_done(self, record: EpochRecord) -> None:
        """An epoch was trained and tested; call it before printing a line of one's own."""
        self._advance(record.epoch * self.steps_per_epoch)
        self._tested = record.epoch
        self._note = f"test accuracy {100 * record.accuracy:.1f} %"
        if self._clock() >= self._next:
            self._draw([f"Epoch {record.epoch}/{self.epochs} done", self._note])

    def close(self, message: str = "") -> None:
        """The last state: how many epochs were trained and tested in how long, and `message`."""
        done, spent = self._tested - self.first_epoch, duration(self._clock() - self._begin)
        text = f"{done} epoch{'s' if done != 1 else ''} in {spent}"
        if self.first_epoch >= self.epochs:
            text = f"All {self.epochs} epochs were trained before"
        elif self._tested < self.epochs:
            text = f"Stopped after {self._tested} of {self.epochs} epochs, {spent}"
        self._show(" · ".join(part for part in (text, self._note, message) if part), final=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """An interrupt or an error shows how far it came, too."""
        self.close()

    @property
    def share(self) -> float:
        """Share of all planned steps that is done, 0 to 1."""
        return min(self._seen[-1][1] / (self.epochs * self.steps_per_epoch), 1.0)

    @property
    def seconds_left(self) -> float | None:
        """Estimate for the steps that are left; None before the first step."""
        (began, before), (now, done) = self._seen[0], self._seen[-1]
        if done == before:
            return None
        return max(self.epochs * self.steps_per_epoch - done, 0) * (now - began) / (done - before)

    @abstractmethod
    def _show(self, text: str, *, final: bool) -> None:
        """Put the line where it is seen."""

    def _advance(self, done: int) -> None:
        if done > self._seen[-1][1]:
            self._seen.append((self._clock(), done))

    def _draw(self, parts: list[str]) -> None:
        left = self.seconds_left
        times = [f"{duration(self._clock() - self._begin)} spent"]
        times += [f"about {duration(left)} left"] if left is not None else []
        self._show(" · ".join(parts + times), final=False)
        self._next = self._clock() + self._interval


class ProgressBar(ProgressReporter):
    """Progress in a notebook: a plain HTML bar, readable without any script, in one place."""

    def start(self, epochs: int, steps_per_epoch: int, first_epoch: int = 0, first_step: int = 0) -> None:
        """As `ProgressReporter.start`, with a display of its own."""
        super().start(epochs, steps_per_epoch, first_epoch, first_step)
        self._handle: Any = None

    def _show(self, text: str, *, final: bool) -> None:
        percent = 100 * self.share
        bar = (
            '<div style="max-width:54em;font-size:0.92em;line-height:1.5;font-variant-numeric:tabular-nums">'
            f'<progress aria-label="Training progress" max="100" value="{percent:.1f}" style="width:100%">'
            f"{percent:.0f} %</progress><div>{percent:.0f} % · {html.escape(text)}</div></div>"
        )
        self._handle = live.put({"text/html": bar, "text/plain": f"{percent:.0f} % · {text}"}, {}, handle=self._handle)


class TerminalProgress(ProgressReporter):
    """Progress on stderr: one line that overwrites itself on a terminal, a line every 30 seconds in a log."""

    def __init__(self, stream: TextIO | None = None, *, clock: Clock = time.monotonic) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._tty = self._stream.isatty()
        super().__init__(1.0 if self._tty else 30.0, clock=clock)

    def start(self, epochs: int, steps_per_epoch: int, first_epoch: int = 0, first_step: int = 0) -> None:
        """As `ProgressReporter.start`; a log gets its first line after 30 seconds."""
        super().start(epochs, steps_per_epoch, first_epoch, first_step)
        if not self._tty:
            self._next = self._clock() + self._interval

    def epoch_done(self, record: EpochRecord) -> None:
        """Clear the line, so that the caller can print its own."""
        super().epoch_done(record)
        if self._tty:
            self._write("\r\x1b[K")
            self._next = float("-inf")

    def _show(self, text: str, *, final: bool) -> None:
        line = f"{100 * self.share:3.0f} % · {text}"
        if self._tty:
            width = shutil.get_terminal_size().columns
            line = f"\r\x1b[K{line[: max(width - 1, 20)]}"
        self._write(line + ("\n" if final or not self._tty else ""))

    def _write(self, text: str) -> None:
        with suppress(OSError):  # a terminal that is gone ends no training
            self._stream.write(text)
            self._stream.flush()


def duration(seconds: float) -> str:
    """75.2 -> '1 min 15 s'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"

"""Run a notebook's cells in a kernel of this Python and keep what was executed, also when a cell fails.

The kernel's working directory is the notebook's folder. A cell that fails, runs out of time or is interrupted and a
kernel that dies do not raise: they are the `failure` of the `Execution`.
"""

from __future__ import annotations

import asyncio
import atexit
import datetime
import math
import os
import re
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbclient.util import ensure_async
from nbconvert.filters import strip_ansi
from nbformat import NotebookNode

from experiments.headless.page import headings
from experiments.headless.parameters import inject, read_notebook
from src.storage import Notify

CELL_TIMEOUT = 6 * 3600
STARTUP_TIMEOUT = 120
GRACE_SECONDS = 10  # an interrupted cell has this long to clean up


@dataclass(frozen=True)
class Execution:
    """An executed notebook with all outputs there are, and why it stopped early, if it did.

    failure: cell, line and error, for a terminal; several lines. exit_status: 0 finished, 130 interrupted, 1 any other
    failure.
    """

    notebook: NotebookNode
    failure: str = ""
    exit_status: int = 0


def execute(
    path: str | Path,
    parameters: Mapping[str, object] | None = None,
    *,
    cell_timeout: float | None = CELL_TIMEOUT,
    startup_timeout: float = STARTUP_TIMEOUT,
    notify: Notify | None = None,
    narrate: Notify | None = None,
) -> Execution:
    """Run all cells of the notebook at `path` in a kernel of this Python.

    parameters: values of the notebook's parameters cell to replace. cell_timeout: seconds that one cell may take,
    None for no limit. startup_timeout: seconds for the kernel to answer. notify: called with one line per heading, when
    the first cell below it starts. narrate: called with each line that a cell tagged `summary` prints, as soon as it
    does.
    `notebook.metadata["run"]` says when, how long and how it ended. Raises NotebookInputError before anything starts.
    """
    notebook = inject(read_notebook(path), parameters or {})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    runner = _Runner(notebook, Path(path).resolve().parent, cell_timeout, startup_timeout, notify, narrate)
    started, start = datetime.datetime.now(datetime.UTC), time.monotonic()
    failure = asyncio.run(runner.run())
    notebook.metadata["run"] = {
        "status": "failed" if failure else "complete",
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - start, 1),
        "message": failure,
    }
    return Execution(notebook, failure, 130 if runner.stopped_by == "interrupted" else int(bool(failure)))


class _Stopped(RuntimeError):
    """A cell that was interrupted has ended; no further one may start."""


class _Runner(NotebookClient):  # type: ignore[misc, unused-ignore]
    """nbclient with progress lines, with stops that reach the cell first, and with every failure as a text."""

    def __init__(
        self,
        nb: NotebookNode,
        folder: Path,
        cell_timeout: float | None,
        startup_timeout: float,
        notify: Notify | None,
        narrate: Notify | None,
    ) -> None:
        # Without folders to look into it knows one kernel, this Python, whatever is registered on the machine.
        specs = KernelSpecManager(kernel_dirs=[])
        manager = AsyncKernelManager(kernel_spec_manager=specs, transport_encryption="auto")
        super().__init__(nb, km=manager, startup_timeout=math.ceil(startup_timeout), shutdown_kernel="graceful")
        self.log.setLevel("CRITICAL")  # what nbclient would log is in the failure
        self.folder, self.cell_timeout, self.notify, self.narrate = folder, cell_timeout, notify, narrate
        self.heading = self.unfinished_line = ""
        self.code_cells = [i for i, cell in enumerate(nb.cells) if cell.cell_type == "code" and cell.source.strip()]
        self.current: int | None = None
        self.stopped_by: str | None = None  # "timeout" or "interrupted"
        self.timers: list[asyncio.TimerHandle] = []
        self.on_cell_execute, self.on_cell_executed = self._starts, self._ended

    async def run(self) -> str:
        """Execute all cells; why that ended early, "" where all went well."""
        # A backend that is set for scripts would keep figures out of the notebook.
        environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
        self.loop, self.task, self.started = asyncio.get_running_loop(), asyncio.current_task(), time.monotonic()
        try:
            await self.async_execute(cwd=str(self.folder), env=environment, cleanup_kc=True)
        except (CellExecutionError, RuntimeError, asyncio.CancelledError) as error:  # DeadKernelError is a RuntimeError
            return self._failure(error)
        finally:
            self._clear_timers()
            atexit.unregister(self._cleanup_kernel)  # nbclient leaves it behind where no kernel started
        return ""

    async def async_start_new_kernel(self, **options: Any) -> None:
        # nbclient has set handlers that shut the kernel down while a cell is running; these replace them.
        with suppress(NotImplementedError, RuntimeError, ValueError):  # Windows, or not the main thread
            for number in (signal.SIGINT, signal.SIGTERM):
                self.loop.add_signal_handler(number, self._stop, "interrupted")
        await super().async_start_new_kernel(**options)

    def _starts(self, cell: NotebookNode, cell_index: int) -> None:
        self.current = cell_index
        if self.cell_timeout is not None:
            self.timers.append(self.loop.call_later(self.cell_timeout, self._stop, "timeout"))
        before = [cell.source for cell in self.nb.cells[:cell_index] if cell.cell_type == "markdown"]
        heading = ([""] + [text for source in before for text in headings(source)])[-1]
        if self.notify and heading != self.heading:
            elapsed = round(time.monotonic() - self.started)
            self.notify(f"{elapsed // 60}:{elapsed % 60:02}  {heading}")
        self.heading = heading

    def output(self, outs: Any, msg: Any, display_id: Any, cell_index: int) -> Any:
        """Collect what a cell gives; what one tagged `summary` prints is passed on at once, line by line."""
        tags = self.nb.cells[cell_index].metadata.get("tags", [])
        if self.narrate and "summary" in tags and msg["content"].get("name") == "stdout":
            *lines, self.unfinished_line = (self.unfinished_line + msg["content"]["text"]).split("\n")
            for line in lines:
                self.narrate(line)
        return super().output(outs, msg, display_id, cell_index)

    def _ended(self, cell: NotebookNode, cell_index: int, execute_reply: Any) -> None:
        self._clear_timers()
        if self.stopped_by:  # also where the cell has caught the interrupt and ended well
            raise _Stopped

    def _stop(self, reason: str) -> None:
        """Interrupt the cell, so that it can save what it has; a second request, or no reaction, ends the kernel."""
        again, self.stopped_by = self.stopped_by is not None, self.stopped_by or reason
        if again or self.current is None or self.km is None:
            self._end()
        else:
            self.interruption = asyncio.ensure_future(ensure_async(self.km.interrupt_kernel()))
            self.timers.append(self.loop.call_later(GRACE_SECONDS, self._end))

    def _end(self) -> None:
        self.shutdown_kernel = "immediate"
        if self.task is not None:
            self.task.cancel()

    def _clear_timers(self) -> None:
        while self.timers:
            self.timers.pop().cancel()

    def _failure(self, error: BaseException) -> str:
        """What happened and where; what the kernel could not write into the cell any more is added to its outputs."""
        if self.stopped_by == "timeout":
            happened, name = "timed out", "CellTimeoutError"
            value = f"took more than {self.cell_timeout:g} seconds; allow more with --cell-timeout (0 is no limit)"
        elif self.stopped_by:
            happened, name, value = "interrupted", "KeyboardInterrupt", "what was executed until then is kept"
        elif isinstance(error, CellExecutionError):
            happened, name, value = "failed", error.ename, error.evalue[:2000]
        elif self.current is not None:
            happened, name = "kernel died", "DeadKernelError"
            value = "the kernel's process ended, often for want of memory; try a smaller LIMIT or BATCH_SIZE"
        else:
            return f"no kernel started\n  {type(error).__name__}: {error} (--startup-timeout allows more time)"
        reason = f"{name}: {value}" if value else name
        if self.current is None:
            return f"{happened} before the first cell\n  {reason}"
        cell = self.nb.cells[self.current]
        at = f"cell {self.current + 1} (code cell {self.code_cells.index(self.current) + 1})"
        errors = [output for output in cell.outputs if output.output_type == "error"]
        if not errors:
            cell.outputs.append(nbformat.v4.new_output("error", ename=name, evalue=value, traceback=[reason]))
        else:
            text = strip_ansi("\n".join(errors[-1].traceback))
            for line in re.findall(rf"Cell In\[{cell.execution_count}\], line (\d+)", text)[-1:]:
                at += f", line {line}: {cell.source.splitlines()[int(line) - 1].strip()}"
        return f"{happened} at {at}\n  {reason}"

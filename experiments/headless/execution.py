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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbclient.util import ensure_async
from nbformat import NotebookNode

from experiments.headless.page import headings
from experiments.headless.parameters import NotebookInputError, inject

CELL_TIMEOUT = 6 * 3600
STARTUP_TIMEOUT = 120
GRACE_SECONDS = 10  # what an interrupted cell has to clean up in

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Failure:
    """Why an execution ended early.

    kind: error, timeout, dead kernel, no kernel or interrupted. cell, code_cell and line count from 1; cell is the
    position among all cells, code_cell among the code cells; 0 where it is not known. name, value: the exception.
    """

    kind: str
    name: str
    value: str
    cell: int = 0
    code_cell: int = 0
    line: int = 0
    source: str = ""
    origin: str = ""

    @property
    def message(self) -> str:
        """Cell, line and error, for a terminal; several lines."""
        place = f"cell {self.cell} (code cell {self.code_cell})" if self.cell else "before the first cell"
        at = f"{place}, line {self.line}: {self.source}" if self.line else place
        text = {
            "error": f"failed at {at}",
            "timeout": f"timed out at {at}",
            "dead kernel": f"kernel died at {at}",
            "no kernel": "no kernel started",
            "interrupted": f"interrupted at {at}",
        }[self.kind]
        error = f"{self.name}: {self.value}" if self.value else self.name
        return "\n".join([text, f"  {error}", *([f"  raised in {self.origin}"] if self.origin else [])])


@dataclass(frozen=True)
class Execution:
    """An executed notebook with all outputs there are, how long it took, and why it stopped if it did."""

    notebook: NotebookNode
    seconds: float
    failure: Failure | None = None

    @property
    def exit_status(self) -> int:
        if self.failure is None:
            return 0
        return 130 if self.failure.kind == "interrupted" else 1


def execute(
    path: str | Path,
    parameters: Mapping[str, object] | None = None,
    *,
    cell_timeout: float | None = CELL_TIMEOUT,
    startup_timeout: float = STARTUP_TIMEOUT,
    progress: Progress | None = None,
) -> Execution:
    """Run all cells of the notebook at `path` in a kernel of this Python.

    parameters: values of the notebook's parameters cell to replace. cell_timeout: seconds that one cell may take,
    None for no limit. startup_timeout: seconds for the kernel to answer. progress: called with one line a code cell.
    A failing cell does not raise: it is `Execution.failure`. `notebook.metadata["run"]` says when, how long and with
    what parameters it ran, and how it ended. Raises NotebookInputError before anything starts.
    """
    notebook = inject(read_notebook(path), parameters or {})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    runner = _Runner(notebook, cell_timeout, startup_timeout, progress, Path(path).resolve().parent)
    started, start = datetime.datetime.now(datetime.UTC), time.monotonic()
    failure = asyncio.run(runner.run())
    seconds = time.monotonic() - start
    notebook.metadata["run"] = {
        "status": "failed" if failure else "complete",
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "parameters": dict(parameters or {}),
    }
    if failure:
        notebook.metadata["run"]["message"] = failure.message
    return Execution(notebook, seconds, failure)


def read_notebook(path: str | Path) -> NotebookNode:
    """A notebook of format 4.5 or what can be upgraded to it. Raises NotebookInputError."""
    try:
        notebook = nbformat.read(str(path), as_version=4)
        if notebook.nbformat_minor < 5:
            notebook = nbformat.v4.upgrade(notebook, from_version=4, from_minor=notebook.nbformat_minor)
        nbformat.validate(notebook)
    except OSError as error:
        raise NotebookInputError(f"cannot read the notebook {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError, nbformat.ValidationError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise NotebookInputError(f"{path} is not a Jupyter notebook: {first_line[:200]}") from error
    return notebook


class _Kernelspecs(KernelSpecManager):  # type: ignore[misc, unused-ignore]
    """Knows one kernel, this Python, whatever is registered as "python3" on the machine."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        return KernelSpec(**get_kernel_dict())


class _Stopped(RuntimeError):
    """A cell has ended that was interrupted; no further one is to start."""


class _Runner(NotebookClient):  # type: ignore[misc, unused-ignore]
    """nbclient with progress, with stops that reach the cell first, and with every failure as a `Failure`."""

    def __init__(
        self,
        nb: NotebookNode,
        cell_timeout: float | None,
        startup_timeout: float,
        progress: Progress | None,
        folder: Path,
    ) -> None:
        manager = AsyncKernelManager(kernel_spec_manager=_Kernelspecs(), transport_encryption="auto")
        super().__init__(nb, km=manager, startup_timeout=math.ceil(startup_timeout), shutdown_kernel="graceful")
        self.log.setLevel("CRITICAL")  # what nbclient would log is in the Failure
        self.cell_timeout, self.progress, self.folder = cell_timeout, progress, folder
        self.code_cells = [i for i, cell in enumerate(nb.cells) if cell.cell_type == "code" and cell.source.strip()]
        self.current: int | None = None
        self.stopped_by: str | None = None  # "timeout" or "interrupted"
        self.timers: list[asyncio.TimerHandle] = []
        self.on_cell_execute, self.on_cell_executed = self._starts, self._ended

    async def run(self) -> Failure | None:
        """Execute all cells; None where all went well."""
        # A backend that is set for scripts would keep figures out of the notebook.
        environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
        self.loop, self.task, self.started = asyncio.get_running_loop(), asyncio.current_task(), time.monotonic()
        try:
            await self.async_execute(cwd=str(self.folder), env=environment, cleanup_kc=True)
        except (CellExecutionError, RuntimeError, asyncio.CancelledError) as error:  # DeadKernelError is a RuntimeError
            return self._failure(error)
        finally:
            self._clear_timers()
            atexit.unregister(self._cleanup_kernel)  # left behind by nbclient where no kernel started
        return None

    async def async_start_new_kernel(self, **options: Any) -> None:
        # nbclient has set handlers that pull the kernel away from under the running cell; these replace them.
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.loop.add_signal_handler(number, self._stop, "interrupted")
            except (NotImplementedError, RuntimeError, ValueError):  # Windows, or not the main thread
                break
        await super().async_start_new_kernel(**options)

    def _starts(self, cell: NotebookNode, cell_index: int) -> None:
        self.current = cell_index
        if self.cell_timeout is not None:
            self.timers.append(self.loop.call_later(self.cell_timeout, self._stop, "timeout"))
        if self.progress:
            before = [cell.source for cell in self.nb.cells[:cell_index] if cell.cell_type == "markdown"]
            heading = ([""] + [text for source in before for text in headings(source)])[-1]
            elapsed = round(time.monotonic() - self.started)
            number, total = self.code_cells.index(cell_index) + 1, len(self.code_cells)
            self.progress(f"[{number:{len(str(total))}}/{total}] {elapsed // 60}:{elapsed % 60:02} {heading}".rstrip())

    def _ended(self, cell: NotebookNode, cell_index: int, execute_reply: Any) -> None:
        self._clear_timers()
        if self.stopped_by:  # also where the cell has caught the interrupt and ended well
            raise _Stopped

    def _stop(self, reason: str) -> None:
        """First KeyboardInterrupt in the cell, so that it can save what it has; asked again or in vain, the end."""
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

    def _failure(self, error: BaseException) -> Failure:
        """What happened and where; what the kernel could not write into the cell any more is added to its outputs."""
        if self.stopped_by == "timeout":
            kind, name = "timeout", "CellTimeoutError"
            value = f"took more than {self.cell_timeout:g} seconds; allow more with --cell-timeout (0 is no limit)"
        elif self.stopped_by:
            kind, name, value = "interrupted", "KeyboardInterrupt", "what was executed until then is kept"
        elif isinstance(error, CellExecutionError):
            kind, name, value = "error", error.ename, error.evalue
        elif self.current is not None:
            kind, name = "dead kernel", "DeadKernelError"
            value = "the kernel's process ended, often for want of memory; try a smaller LIMIT or BATCH_SIZE"
        else:
            return Failure("no kernel", type(error).__name__, f"{error} (--startup-timeout allows more time)")
        if self.current is None:
            return Failure(kind, name, value)
        cell = self.nb.cells[self.current]
        errors = [output for output in cell.outputs if output.output_type == "error"]
        if not errors:
            cell.outputs.append(
                nbformat.v4.new_output("error", ename=name, evalue=value, traceback=[f"{name}: {value}"])
            )
        line, origin = _place(errors[-1].traceback, cell.execution_count) if errors else (0, "")
        lines = cell.source.splitlines()
        source = lines[line - 1].strip() if 0 < line <= len(lines) else ""
        code_cell = self.code_cells.index(self.current) + 1
        return Failure(kind, name, value[:2000], self.current + 1, code_cell, line, source, origin)


def _place(traceback: Sequence[str], execution_count: int | None) -> tuple[int, str]:
    """Line of the cell (from 1, 0 if unknown) and "file:line" of the innermost frame, "" where that is in a cell."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(traceback))
    last = re.split(r"During handling of the above exception|direct cause of the following exception", text)[-1]
    own = re.search(rf"Cell In\[{execution_count}\], line (\d+)", last)
    frames = re.findall(r"^\s*(?:File (.+?):(\d+), in |Cell In\[\d+\], line \d+)", last, flags=re.MULTILINE)
    file, line = frames[-1] if frames else ("", "")
    path = Path(file).expanduser()
    if file and path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return int(own.group(1)) if own else 0, f"{path}:{line}" if file else ""

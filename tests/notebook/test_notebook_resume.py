"""The stop button and a request to end, in a real kernel: training continues, in a new one too, and ends the same.

The notebook is three cells: what the walkthrough builds, the cell that opens the run, the cell that trains.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tests.reliability.small_run import Unbroken, differences

ROOT = Path(__file__).parents[2]
BUILD = """
import os, signal
import pytest, torch
from experiments.pipeline import TrainingLoop
from src.data import load_data
from tests.reliability import failures, small_run
torch.set_num_threads(1)
patch, calls = pytest.MonkeyPatch(), []
small_run.prepare(patch, lambda: calls.append(1))
run = small_run.build_run(load_data("digits", limit=60))
"""
INTERRUPT = """
failures.in_step(patch, 6, lambda model, stack: os.kill(os.getpid(), signal.{name}))
"""
OPEN = """
loop = TrainingLoop.open(run, {folder!r}, resume={resume}, checkpoint_every=3)
"""
TRAIN = "small_run.train(loop)"
WHERE = "after epoch 1 of 3 and 2 steps of the next"


def execute(client: NotebookClient, source: str) -> str:
    """Run a cell; its text output. Raises what nbclient raises."""
    client.nb.cells.append(nbformat.v4.new_code_cell(source))
    client.execute_cell(client.nb.cells[-1], len(client.nb.cells) - 1)
    return printed(client)


def printed(client: NotebookClient) -> str:
    """The text output of the last cell."""
    outputs = client.nb.cells[-1].outputs
    return "\n".join(one.get("text") or one.get("data", {}).get("text/plain", "") for one in outputs)


@contextmanager
def kernel(folder: Path, *, resume: bool = False, signal_name: str = "") -> Iterator[NotebookClient]:
    """A kernel with the run opened; the signal comes in the middle of step 6, the second of epoch 2."""
    notebook = nbformat.v4.new_notebook()
    client = NotebookClient(notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}})
    with client.setup_kernel():
        execute(client, BUILD + (INTERRUPT.format(name=signal_name) if signal_name else ""))
        opened = execute(client, OPEN.format(folder=str(folder), resume=resume))
        assert ("resumed" in opened) == resume
        yield client


@pytest.mark.slow
def test_the_cell_that_was_stopped_is_run_again(tiny_run: Unbroken, tmp_path: Path) -> None:
    with kernel(tmp_path, signal_name="SIGINT") as one:  # what a stop button has the server do
        with pytest.raises(CellExecutionError, match="Interrupted"):
            execute(one, TRAIN)
        assert f"stopped {WHERE}; the state {WHERE} is kept in {tmp_path}; run this cell again" in printed(one)
        execute(one, TRAIN)  # the kernel lives
        assert execute(one, "print(len(calls), len(run.history))") == "12 3\n"
    assert not differences(tmp_path, tiny_run.folder, command=False)


@pytest.mark.slow
def test_a_kernel_that_was_asked_to_end_does_and_a_new_one_continues(tiny_run: Unbroken, tmp_path: Path) -> None:
    with kernel(tmp_path, signal_name="SIGTERM") as one:
        with pytest.raises(CellExecutionError, match="Terminated"):
            execute(one, TRAIN)
        assert f"stopped {WHERE}; the state {WHERE} is kept in {tmp_path}; run this cell again" in printed(one)
        assert one.km.provisioner.process.wait(timeout=60) is not None
    with kernel(tmp_path, resume=True) as one:
        execute(one, TRAIN)
        assert execute(one, "print(len(calls))") == "6\n"  # 12 steps less the 6 that were kept
    assert not differences(tmp_path, tiny_run.folder, command=False)

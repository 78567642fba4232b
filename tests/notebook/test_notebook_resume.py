"""The stop button and a request to end, in a real kernel: training goes on, in a new one too, and ends the same.

The notebook is three cells: what the walkthrough builds, the cell that opens the run, the cell that trains.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from src import training
from src.runs import load_checkpoint

ROOT = Path(__file__).parents[2]
BUILD = """
import os, signal
import torch
from experiments import live, pipeline
from experiments.presets import configure
from experiments.sparsity import coupled_group_lasso
from resnet import BasicBlock, ResNet
from src import training
from src.data import load_data
from src.records import History
torch.set_num_threads(1)
torch.manual_seed(0)
config = configure("smoke", epochs=3, batch_size=15, device="cpu", precision="fp32", delay=1)
data = load_data("digits", limit=60)
model = ResNet(BasicBlock, [1, 1, 1], widths=(4, 8, 16))
attached = pipeline.attach(config, model)
optimizer = pipeline.build_optimizer(config, model)
objective = config.objective(coupled_group_lasso(model))
real, calls, actions = training.train_step, [], {}
def step(*arguments):
    calls.append(1)
    actions.pop(len(calls), lambda: None)()
    return real(*arguments)
training.train_step = step
"""
OPEN = """
history = History(config.epochs)
run = pipeline.Run(
    config, data, torch.device("cpu"), torch.float32, model, attached, optimizer, objective, history
)
loop = pipeline.TrainingLoop.open(run, {folder!r}, resume={resume})
"""
TRAIN = """
progress = live.Progress()
progress.start(config.epochs, 4, len(history), run.means.steps)
with progress, loop:
    for epoch in loop.epochs():
        for step in loop.steps():
            progress.step(epoch + 1, step.index + 1, step.loss)
        record = loop.finish_epoch()
        progress.epoch_done(record)
"""


class Kernel:
    """A kernel and what its cells said."""

    def __init__(self, client: NotebookClient) -> None:
        self.client = client

    def execute(self, source: str) -> str:
        """Run a cell; its text output. Raises what nbclient raises."""
        self.cell = nbformat.v4.new_code_cell(source)
        self.client.nb.cells.append(self.cell)
        self.client.execute_cell(self.cell, len(self.client.nb.cells) - 1)
        return self.said()

    def said(self) -> str:
        texts = (output.get("text") or output.get("data", {}).get("text/plain", "") for output in self.cell.outputs)
        return "\n".join(texts)


@contextmanager
def kernel(folder: Path, *, resume: bool = False, action: str = "") -> Iterator[Kernel]:
    """A kernel with the run opened; `action` is done in the middle of step 6, the second of epoch 2."""
    notebook = nbformat.v4.new_notebook()
    client = NotebookClient(notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}})
    with client.setup_kernel():
        started = Kernel(client)
        started.execute(BUILD + (f"actions[6] = lambda: {action}\n" if action else ""))
        opened = started.execute(OPEN.format(folder=str(folder), resume=resume))
        assert ("resumed" in opened) == resume
        yield started


def ends(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    state = load_checkpoint(folder / "checkpoint.pt")
    return state["model"], [{**record, "seconds": 0} for record in state["history"]["records"]]


def assert_same_end(folder: Path, expected: tuple[dict[str, torch.Tensor], list[dict[str, Any]]]) -> None:
    weights, records = ends(folder)
    assert records == expected[1]
    assert len(records) == 3
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected[0].items())


def test_stopped_lost_or_ended_it_goes_on_and_ends_as_the_unbroken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.training.epoch.train_step", training.train_step)  # the cells replace it
    threads = torch.get_num_threads()
    exec(BUILD + OPEN.format(folder=str(tmp_path / "whole"), resume=False) + TRAIN, {})
    torch.set_num_threads(threads)
    expected = ends(tmp_path / "whole")

    folder = tmp_path / "stopped"
    stop = "os.kill(os.getpid(), signal.SIGINT)"  # what a stop button has the server do
    with kernel(folder, action=stop) as one:
        with pytest.raises(CellExecutionError, match="Interrupted"):
            one.execute(TRAIN)
        where = "after epoch 1 of 3 and 2 steps of the next"
        assert f"stopped {where}, which is kept in {folder}; run this cell again to go on" in one.said()
        again = one.execute(TRAIN)  # the kernel lives
        assert "100 %" in again
        assert one.execute("print(len(calls), len(history))") == "12 3\n"
        assert_same_end(folder, expected)

    folder = tmp_path / "ended"
    with kernel(folder, action="os.kill(os.getpid(), signal.SIGTERM)") as one:
        with pytest.raises(CellExecutionError, match="Terminated"):
            one.execute(TRAIN)
        assert f"stopped {where}, which is kept in {folder}; the notebook with RESUME = True goes on" in one.said()
        process = one.client.km.provisioner.process
        assert process.wait(timeout=60) is not None  # it was asked to end, and does
    with kernel(folder, resume=True) as one:
        one.execute(TRAIN)
        assert one.execute("print(len(calls))") == "6\n"  # 12 steps less the 6 that were kept
        assert_same_end(folder, expected)

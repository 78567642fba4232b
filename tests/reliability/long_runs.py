"""Runs of many epochs: their memory stays flat, and what they leave to be read stays small."""

from __future__ import annotations

import contextlib
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil

from experiments import figures
from experiments.notebook.live import figure_bundle
from src.training import History
from tests.histories import make_history
from tests.reliability.small_run import Row, Unbroken

MEGABYTE = 10**6
LARGEST = 5 * MEGABYTE
# A live figure is drawn once a second. On the way to a PNG its 2.7 million pixels are whole numbers of 8 bytes: 21 MB
# an array, and where the garbage collector stands decides whether one of them is still there. A figure that was kept
# each time would be hundreds of megabytes.
MOST_GROWTH = 25 * MEGABYTE
ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "codeq_walkthrough.ipynb"
EPOCHS = 200


def growth(samples: list[tuple[int, int]]) -> int:
    """Bytes by which the median of the last tenth of the epochs is above that of the tenth after the first quarter.

    samples: (epoch, resident bytes). A median, because a figure that is being drawn takes memory for a moment.
    """
    tenth = EPOCHS // 10

    def median(first: int) -> float:
        return statistics.median([size for epoch, size in samples if first <= epoch < first + tenth])

    return round(median(EPOCHS - tenth) - median(EPOCHS // 4))


def memory_of(command: Sequence[str], output: Path) -> list[tuple[int, int]]:
    """(epoch, resident bytes) of a command while it trains, twenty times a second; of its kernel where it has one.

    output: its output folder, whose history.csv tells the epoch.
    """
    samples: list[tuple[int, int]] = []
    with tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, stdout=told, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError):
                    epoch = (output / "history.csv").read_bytes().count(b"\n") - 1
                    watched = [*psutil.Process(process.pid).children(), psutil.Process(process.pid)][0]
                    if epoch < EPOCHS:
                        samples.append((epoch, watched.memory_info().rss))
                time.sleep(0.05)
        finally:
            process.kill()
        told.seek(0)
        assert process.returncode == 0, told.read()[-1000:]
    return samples


def notebook_memory(rng: random.Random, tmp: Path, unbroken: Unbroken) -> str:
    """The walkthrough, executed headless: the kernel's memory, and the size of notebook and page."""
    executed, page = tmp / "executed.ipynb", tmp / "page.html"
    settings = {"DATA": "digits", "EPOCHS": EPOCHS, "LIMIT": 100, "BATCH_SIZE": 50, "OUTPUT_DIR": tmp / "run"}
    words = [f"--output-notebook={executed}", f"--html={page}", *(f"--set={k}={v}" for k, v in settings.items())]
    grown = growth(memory_of(["experiments.run_notebook", *words], tmp / "run"))
    sizes = [path.stat().st_size for path in (executed, page)]
    assert grown < MOST_GROWTH, f"grown by {grown:,} bytes"
    assert max(sizes) < LARGEST, f"notebook and page have {sizes} bytes"
    return f"{grown / MEGABYTE:+.1f} MB; notebook {sizes[0] / MEGABYTE:.1f} MB, page {sizes[1] / MEGABYTE:.1f} MB"


def long_histories(rng: random.Random, tmp: Path, unbroken: Unbroken) -> str:
    """Made-up histories of up to 20,000 epochs."""
    largest = max(size_of_history(epochs, rng) for epochs in (20, 300, 3_000, 20_000))
    return f"the largest has {largest / MEGABYTE:.1f} MB"


def size_of_history(epochs: int, rng: random.Random) -> int:
    """Bytes of what the walkthrough shows of such a history: figures as a page holds them, and the printed lines."""
    history, subtitle = _noisy_history(epochs, rng), "a subtitle"
    drawn = [
        figures.dashboard(history, coefficient_plan=[0.01] * history.epochs, subtitle=subtitle),
        figures.accuracy_curve(history, subtitle=subtitle, chance=0.1),
        figures.sparsity_curves(history, subtitle=subtitle),
        figures.channel_liveness(history.last.layers, subtitle=subtitle),
        figures.per_layer_channels(history.last.layers, subtitle=subtitle),
    ]
    size = sum(len(str(figure_bundle(figure))) for figure in drawn) + len(_printed(history))
    assert size < LARGEST, f"{epochs:,} epochs: {size:,} bytes"
    return size


def _noisy_history(epochs: int, rng: random.Random) -> History:
    """A history of ResNet-20 whose curves compress badly."""
    history, (record,) = History(epochs), make_history(1).records
    numbers = ("loss", "task_loss", "accuracy", "train_accuracy", "test_loss", "unstructured_sparsity")
    for epoch in range(1, epochs + 1):
        changes = {name: rng.random() for name in numbers}
        history.append(replace(record, epoch=epoch, coefficient=0.01 * epoch / epochs, **changes))
    return history


def _printed(history: History) -> str:
    """What the training cell prints of it: one line an epoch."""
    return "".join(f"{record.console_line(history.epochs)}\n" for record in history)


ROWS = {
    f"memory over {EPOCHS} epochs of the notebook, and the size of what it leaves": Row(
        f"the kernel grows by less than {MOST_GROWTH // MEGABYTE} MB from epoch 50 to the end, figures and "
        f"outputs included; executed notebook and page are below {LARGEST // MEGABYTE} MB each",
        notebook_memory,
        share=0,
    ),
    "histories of 20 to 20,000 epochs as figures and text": Row(
        f"every figure can be drawn; all of them, as a page holds them, are below {LARGEST // MEGABYTE} MB",
        long_histories,
        share=0,
    ),
}

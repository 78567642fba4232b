"""Runs of many epochs: their memory stays flat, and what they leave to be read stays small."""

from __future__ import annotations

import base64
import contextlib
import io
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import nbformat
import psutil
from nbformat import NotebookNode

from experiments import figures
from experiments.headless import to_html
from experiments.notebook.display import figure_bundle
from src.training import EpochRecord, History, LayerRecord
from tests.torture.fault import Outcome, fault
from tests.torture.runner import ROOT, the_runner

MEGABYTE = 10**6
LARGEST = 5 * MEGABYTE
# The history grows by a record an epoch: 14 numbers and a flag for each of ResNet-20's 688 channels, with Python's own
# overhead about 10 kB, so 2 MB in 150 epochs, and once more while a checkpoint of it is being written.
MOST_GROWTH = 10 * MEGABYTE
# A live figure is drawn once a second. On the way to a PNG its 2.7 million pixels are whole numbers of 8 bytes: 21 MB
# an array, and where the garbage collector stands decides whether one of them is still there. A figure that was kept
# each time would be hundreds of megabytes.
MOST_GROWTH_DRAWING = 25 * MEGABYTE
NOTEBOOK = ROOT / "notebooks" / "codeq_walkthrough.ipynb"
STEPS = 2


def growth(samples: list[tuple[int, int]], epochs: int) -> int:
    """Bytes by which the median of the last tenth of the epochs is above that of the tenth after the first quarter.

    samples: (epoch, resident bytes). A median, because a figure that is being drawn takes memory for a moment.
    """
    tenth = max(epochs // 10, 2)

    def median(first: int) -> float:
        return statistics.median([size for epoch, size in samples if first <= epoch < first + tenth])

    return round(median(epochs - tenth) - median(epochs // 4))


def watch(process: psutil.Process, epoch: Callable[[], int], running: Callable[[], bool]) -> list[tuple[int, int]]:
    """(epoch, resident bytes) of a process, twenty times a second while it is running."""
    samples: list[tuple[int, int]] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        while running():
            samples.append((epoch(), process.memory_info().rss))
            time.sleep(0.05)
    return samples


@fault(
    "memory over 200 epochs of the script",
    survived=f"resident memory grows by less than {MOST_GROWTH // MEGABYTE} MB from epoch 50 to the end",
    rounds=200,
    quick=20,
)
def script_memory(rng: random.Random, tmp: Path, rounds: int) -> Outcome:
    outcome = Outcome()
    run = the_runner().start(tmp / "run", f"--epochs={rounds}", "--limit=40", f"--checkpoint-every={STEPS}")
    samples = watch(psutil.Process(run.pid), lambda: run.steps // STEPS, lambda: run.wait(0) is None)
    with outcome.trial(f"{rounds} epochs"):
        assert run.end() in (0, 1), run.told[-500:]
        grown = growth(samples, rounds)
        outcome.note = f"{rounds} epochs, {grown / MEGABYTE:+.1f} MB"
        assert grown < MOST_GROWTH, f"grown by {grown:,} bytes"
    return outcome


@fault(
    "memory over 200 epochs of the notebook, and the size of what it leaves",
    survived=f"the kernel grows by less than {MOST_GROWTH_DRAWING // MEGABYTE} MB from epoch 50 to the end, "
    f"figures and outputs included; executed notebook and page are below {LARGEST // MEGABYTE} MB each",
    rounds=200,
    quick=0,
)
def notebook_memory(rng: random.Random, tmp: Path, rounds: int) -> Outcome:
    outcome, output = Outcome(), tmp / "run"
    executed, page = tmp / "executed.ipynb", tmp / "page.html"
    settings = {"DATA": "digits", "EPOCHS": rounds, "LIMIT": 100, "BATCH_SIZE": 50, "OUTPUT_DIR": output}
    command = [sys.executable, "-m", "experiments.run_notebook", f"--output-notebook={executed}", f"--html={page}"]
    command += [f"--set={name}={value}" for name, value in settings.items()]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def epoch() -> int:
        history = output / "history.csv"
        return max(0, history.read_bytes().count(b"\n") - 1) if history.exists() else 0

    def training() -> bool:
        return process.poll() is None and epoch() < rounds

    while process.poll() is None and not output.exists():
        time.sleep(0.1)
    kernels = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    samples = watch(kernels[0], epoch, training) if kernels else []
    told = process.communicate()[0]
    with outcome.trial("the notebook", seconds=10):
        assert process.returncode == 0, told[-1000:]
    with outcome.trial("memory"):
        grown = growth(samples, rounds)
        assert grown < MOST_GROWTH_DRAWING, f"grown by {grown:,} bytes"
        sizes = {path.suffix: path.stat().st_size / MEGABYTE for path in (executed, page)}
        outcome.note = f"{grown / MEGABYTE:+.1f} MB; notebook {sizes['.ipynb']:.1f} MB, page {sizes['.html']:.1f} MB"
    for path in (executed, page):
        with outcome.trial(f"size of {path.name}"):
            assert path.stat().st_size < LARGEST, f"{path.stat().st_size:,} bytes"
    return outcome


@fault(
    "histories of 20 to 100,000 epochs as figures, text and a page",
    survived=f"every figure can be drawn; a notebook of all of them, and its page, are below {LARGEST // MEGABYTE} MB",
    rounds=5,
    quick=2,
)
def long_histories(rng: random.Random, tmp: Path, rounds: int) -> Outcome:
    outcome, largest = Outcome(), 0.0
    for epochs in (20, 3_000, 300, 20_000, 100_000)[:rounds]:
        with outcome.trial(f"{epochs:,} epochs", seconds=300):
            notebook = executed_with(made_up(epochs, rng))
            sizes = len(nbformat.writes(notebook).encode()), len(to_html(notebook).encode())
            assert max(sizes) < LARGEST, f"{max(sizes):,} bytes"
            largest = max(largest, *sizes)
    outcome.note = f"the largest has {largest / MEGABYTE:.1f} MB"
    return outcome


def made_up(epochs: int, rng: random.Random) -> History:
    """A noisy history of ResNet-20, whose figures compress badly."""
    history, patterns = History(epochs), [_layers(rng) for _ in range(100)]
    for epoch in range(1, epochs + 1):
        done = epoch / epochs
        losses = [2.3 * (1 - done) + rng.random() for _ in range(4)]
        accuracy, test_loss, *shares = (rng.random() for _ in range(5))
        rates = 0.01 * done, 1e-3
        history.append(
            EpochRecord(epoch, *losses, *rates, accuracy, test_loss, *shares, 5.0, 2.0, patterns[rng.randrange(100)])
        )
    return history


def _layers(rng: random.Random) -> tuple[LayerRecord, ...]:
    places = [(stage, block, number) for stage in (1, 2, 3) for block in (0, 1, 2) for number in (1, 2)]
    return tuple(
        LayerRecord(
            f"layer{stage}.{block}.conv{number}",
            rng.uniform(2, 8),
            rng.random(),
            rng.random(),
            tuple(rng.random() < 0.5 for _ in range(8 * 2**stage)),
        )
        for stage, block, number in places
    )


def executed_with(history: History) -> NotebookNode:
    """A notebook that shows the history in every way the walkthrough does."""
    subtitle = "a subtitle"
    drawn = [
        figures.dashboard(history, coefficient_plan=[0.01] * history.epochs, subtitle=subtitle),
        figures.accuracy_curve(history, subtitle=subtitle, chance=0.1),
        figures.sparsity_curves(history, subtitle=subtitle),
        figures.channel_liveness(history.last.layers, subtitle=subtitle),
        figures.per_layer_channels(history.last.layers, subtitle=subtitle),
    ]
    v4, outputs = nbformat.v4, []
    for figure in drawn:
        data, metadata = figure_bundle(figure)
        assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
        outputs.append(v4.new_output("display_data", data, metadata=metadata))
    outputs.append(v4.new_output("stream", name="stdout", text=printed(history)))
    return v4.new_notebook(cells=[v4.new_markdown_cell("# Title"), v4.new_code_cell("", outputs=outputs)])


def printed(history: History) -> str:
    """What the walkthrough's own cell prints of it: one line an epoch, but not of all."""
    cells = [cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    code = next(source for source in cells if "console_line" in source)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {"history": history, "config": SimpleNamespace(epochs=history.epochs)})
    return out.getvalue()

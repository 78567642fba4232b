"""Runs of the script that can be killed, stopped and sabotaged, and what they leave, to be held against each other."""

from __future__ import annotations

import atexit
import csv
import functools
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.runs import load_checkpoint
from tests.torture.damaged_files import equal

ROOT = Path(__file__).parents[2]
FIGURES = ("accuracy_curve.png", "sparsity_curves.png", "channel_liveness.png", "per_layer_channels.png")
LONGEST = 50.0  # seconds that a small run may take on a busy machine
EPOCHS, STEPS_PER_EPOCH, EVERY = 6, 5, 3  # a checkpoint every 3 steps, so that most are in mid-epoch
SMALL = {
    "preset": "tiny",
    "data": "digits",
    "limit": 100,
    "batch-size": 20,
    "epochs": EPOCHS,
    "device": "cpu",
    "checkpoint-every": EVERY,
}


@dataclass(frozen=True)
class Started:
    """A run that was started: its process, and the files that tell about it."""

    server: Runner
    pid: int
    log: Path
    counter: Path

    def wait(self, seconds: float = LONGEST) -> int | None:
        """The exit status; None where it is still running."""
        status = self.server.ask({"do": "wait", "pid": self.pid, "seconds": seconds})
        assert status is None or isinstance(status, int)
        return status

    def end(self) -> int:
        """The exit status of a run that ends by itself. One that does not is killed, and that is an error."""
        status = self.wait()
        if status is None:
            self.send(signal.SIGKILL)
            self.wait()
            raise AssertionError(f"the run does not end: {self.told[-300:]}")
        assert "Traceback" not in self.told, f"the run ends with a traceback: {self.told[-800:]}"
        return status

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    @property
    def told(self) -> str:
        """What it has printed."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @property
    def steps(self) -> int:
        """Steps that it has done, those before it was resumed included."""
        data = self.counter.read_bytes() if self.counter.exists() else b""
        return int(struct.unpack("<q", data)[0]) if data else 0


class Runner:
    """Starts runs; see run_server.py. Get it from `the_runner`, which starts the server once for all faults."""

    def __init__(self, server: subprocess.Popen[str], tmp: Path) -> None:
        self._server, self._tmp, self._started = server, tmp, 0
        self.unbroken, self.seconds = tmp / "unbroken", 0.0
        self._run_unbroken()

    def ask(self, request: dict[str, Any]) -> object:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, output: Path, *words: str, sabotage: str = "", settings: dict[str, Any] | None = None) -> Started:
        """The small run, into `output`. words: more of the command line. sabotage: a function of sabotage.py."""
        self._started += 1
        log, counter = self._tmp / f"{self._started}.log", self._tmp / f"{self._started}.steps"
        request = {
            "do": "start",
            "arguments": [*(f"--{name}={value}" for name, value in SMALL.items()), f"--output={output}", *words],
            "log": str(log),
            "steps": str(counter),
            "sabotage": sabotage,
            "settings": settings or {},
        }
        pid = self.ask(request)
        assert isinstance(pid, int)
        return Started(self, pid, log, counter)

    def _run_unbroken(self) -> None:
        """A run that nothing happens to, for the others to be held against, and how long one takes here and now."""
        began = time.monotonic()
        started = self.start(self.unbroken)
        assert started.end() in (0, 1), started.told
        assert started.steps == EPOCHS * STEPS_PER_EPOCH
        self.seconds = time.monotonic() - began


@functools.cache
def the_runner() -> Runner:
    """The one runner of this process. Its server and its files go with the process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    own = tempfile.mkdtemp(prefix="torture-")
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.torture.run_server"],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.kill)
    assert server.stdout is not None
    assert json.loads(server.stdout.readline()) == "ready"
    return Runner(server, Path(own))


def steps_kept(folder: Path) -> int:
    """Steps that the newest checkpoint of a run holds; 0 where there is none yet."""
    if not any((folder / name).exists() for name in ("checkpoint.pt", "checkpoint.previous.pt")):
        return 0
    # Killed between two renames, a run has only the one before it; reading that is said, and is no fault.
    state = load_checkpoint(folder / "checkpoint.pt", report=lambda _: None)
    return int(state["epoch"]) * STEPS_PER_EPOCH + int(state["step"])


def differences(
    folder: Path, unbroken: Path, *, generators: Collection[str] = ("torch", "numpy", "python")
) -> list[str]:
    """What of a finished run is not as in the unbroken one: state, history, figures, results; not the seconds.

    generators: random generators that had the same state when both runs were started for the first time.
    """
    one, other = (load_checkpoint(place / "checkpoint.pt") for place in (folder, unbroken))
    for state in (one, other):
        state["random"] = {name: state["random"][name] for name in generators}
    found = [
        part
        for part in ("epoch", "step", "model", "optimizer", "random")
        if not equal(_without_seconds(one[part]), _without_seconds(other[part]))
    ]
    if not equal(_without_seconds(one["history"]), _without_seconds(other["history"])):
        found.append("history")
    drawn = (*FIGURES, "snapshots.npz")
    found += [name for name in drawn if (folder / name).read_bytes() != (unbroken / name).read_bytes()]
    if _rows(folder) != _rows(unbroken):
        found.append("history.csv")
    results = [json.loads((place / "run.json").read_text())["results"] for place in (folder, unbroken)]
    if _without_seconds(results[0]) != _without_seconds(results[1]):
        found.append("run.json")
    return found


def leftovers(folder: Path) -> list[str]:
    """Files that are half done or out of place."""
    return [path.name for path in folder.iterdir() if path.suffix == ".tmp" or "damaged" in path.name]


def _without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_seconds(part) for key, part in value.items() if key != "seconds"}
    if isinstance(value, (list, tuple)):
        return [_without_seconds(part) for part in value]
    return value


def _rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "history.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]

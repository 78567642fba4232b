"""Sweeps on the real engine: killed workers and drivers lose nothing, a run that fails is named and stops no other."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments import debug_run, sweep
from experiments.pipeline import comparison
from src.storage import folder_lock
from tests.reliability.small_run import differences

SMALL = ["--preset=smoke", "--set=limit=60", "--set=batch_size=15", "--set=epochs=3"]
GRID = [*SMALL, "--set=peak=0.01,0.02", "--seeds=0,1"]


def start(output: Path, *arguments: str) -> subprocess.Popen[str]:
    """The command, in a process of its own, with room for two runs at once."""
    command = [sys.executable, "-m", "experiments.sweep", *arguments, f"--output={output}"]
    environment = {**os.environ, "RAY_OVERRIDE_RESOURCES": '{"CPU": 2}', "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env=environment, text=True, **pipes)  # type: ignore[call-overload]


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Until the condition holds, while the process lives."""
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def holder(folder: Path) -> int:
    """The process that trains the run of a folder, 0 where none has begun."""
    try:
        return int(re.findall(r"process (\d+)", (folder / ".lock").read_text())[0])
    except (FileNotFoundError, IndexError):
        return 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_workers_and_drivers_change_no_bit_and_no_run_is_trained_twice(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    output = tmp_path / "sweep"
    places = [f"limit=60/batch_size=15/epochs=3/peak={peak}/seed={seed}" for peak in ("0.01", "0.02") for seed in "01"]
    for place in places:
        folder = tmp_path / "unbroken" / place
        peak, seed = place.split("/")[3:]
        flags = [f"--set={peak}", f"--{seed}", "--baseline=false", f"--output={folder}"]
        assert debug_run.main([*SMALL, *flags]) < 2

    process = start(output, *GRID)
    first = output / places[0]
    wait_for(lambda: (first / "checkpoint.pt").exists(), process)
    killed = holder(first)
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: holder(first) not in (0, killed), process)  # Ray has started it again
    wait_for(lambda: any((output / place / "run.json").exists() for place in places), process)
    process.kill()
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in output.rglob("run.json")}

    with folder_lock.hold(output):
        second = start(output, *GRID)
        assert second.wait() == 2
        assert "in use by another run" in second.communicate()[0]
    process = start(output, *GRID)
    told = process.communicate()[0]
    assert process.returncode == 0, told
    assert f"4 runs, of which {len(finished)} are finished" in told
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    found = {place: differences(output / place, tmp_path / "unbroken" / place) for place in places}
    # Python's and numpy's generators, of which no run draws, start anew with every process.
    assert all(set(parts) <= {"random"} for parts in found.values()), found
    table = pd.read_csv(output / "sweep.csv")
    assert list(table["n"]) == [2, 2]
    assert (output / "frontier.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    """One loss that is not a number, one setting that does not exist, one whose worker is killed again and again."""
    pytest.importorskip("ray")
    output = tmp_path / "sweep"
    process = start(output, *SMALL, "--set=shortcut=A,C", "--set=init_bit_logit=3.0,1e30", "--seeds=0,1")
    doomed = output / "limit=60/batch_size=15/epochs=3/shortcut=A/init_bit_logit=3.0/seed=1"
    killed = {0}
    for _ in range(1 + sweep.ATTEMPTS):
        wait_for(lambda: holder(doomed) not in killed, process)
        killed.add(holder(doomed))
        os.kill(holder(doomed), signal.SIGKILL)
    told = process.communicate()[0]
    assert process.returncode == 1, told
    lines = [line for line in (output / "sweep.md").read_text().splitlines() if line.startswith("failed: ")]
    reasons = dict(line.removeprefix("failed: ").split(": ", 1) for line in lines)
    assert len(reasons) == 7, told
    assert reasons.pop(doomed.relative_to(output).as_posix()) == "WorkerCrashedError: its worker ended"
    for name, reason in reasons.items():
        assert ("shortcut='C' is unknown" if "shortcut=C" in name else "the loss is inf") in reason
    assert list(pd.read_csv(output / "sweep.csv")["n"]) == [1]


def test_without_ray_the_runs_are_trained_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    arguments = ["--preset=smoke", "--set=limit=30", "--set=batch_size=15", "--set=epochs=1", "--seeds=0,1"]
    assert sweep.main([*arguments, f"--output={tmp_path}"]) == 0
    captured = capsys.readouterr()
    assert "Ray is not installed" in captured.err
    accuracies = [
        comparison.read_run(tmp_path / f"limit=30/batch_size=15/epochs=1/seed={seed}").summary for seed in "01"
    ]
    values = [summary["results"]["accuracy_float32"] for summary in accuracies]
    table = pd.read_csv(tmp_path / "sweep.csv")
    assert table["accuracy mean"][0] == pytest.approx(sum(values) / 2)
    assert table["accuracy sd"][0] == pytest.approx(abs(values[0] - values[1]) / np.sqrt(2))  # n - 1
    assert "| smoke | 2 | " in captured.out
    assert sweep.main([*arguments, f"--output={tmp_path}"]) == 0
    assert "2 runs, of which 2 are finished" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--set=peka=1"], "unknown parameter 'peka': did you mean peak?"),
        (["--set=shortcut=C"], "shortcut='C' is unknown: choose one of A, B"),
        (["--preset=debag"], "did you mean 'debug'"),
        (["--seeds=x"], "seed='x': need a value of the kind of the default, 0"),
    ],
)
def test_a_grid_without_any_valid_run_is_refused_and_writes_nothing(
    arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main([*arguments, f"--output={tmp_path / 'new'}"]) == 2
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

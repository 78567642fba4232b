"""The script from its command line: what it prints, what it writes, how it ends, and what it refuses.

ResNet-20 on 100 of the embedded digits in batches of 50, so that an epoch is two steps.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import debug_run, pipeline
from experiments.doctor.core.findings import STAGES
from experiments.pipeline import FAILED, Verdict
from experiments.pipeline.verdict import Expectation
from src import training
from src.data import load_data
from src.runs import load_checkpoint
from src.training import History
from src.training.history import SCALARS

ROOT = Path(__file__).parents[1]
FIGURES = {"accuracy_curve.png", "sparsity_curves.png", "channel_liveness.png", "per_layer_channels.png"}
CHECKPOINTS = {"checkpoint.pt", "checkpoint.previous.pt"}
KEPT = CHECKPOINTS | {"history.csv", "snapshots.npz"}
FILES = FIGURES | KEPT | {"run.json"}
LINE = re.compile(
    r"Epoch +(\d+)/(\d+) \| Loss: (\d+\.\d\d) \| Acc: (\d+\.\d)% "
    r"\| Unstr: (\d+\.\d)% \| Struct: (\d+\.\d)% \| Bits: (\d+\.\d)"
)
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def words(output: Path, *more: str) -> list[str]:
    """The command line; later words win."""
    small = {
        "data": "digits",
        "epochs": 2,
        "limit": 100,
        "batch-size": 50,
        "device": "cpu",
        "seed": 3,
        "output": output,
    }
    return [*(f"--{name}={value}" for name, value in small.items()), *more]


def run(arguments: list[str]) -> int:
    try:
        return debug_run.main(arguments)
    except SystemExit as stopped:  # argparse
        return int(str(stopped.code))


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def histories(folder: Path) -> list[dict[str, Any]]:
    """The records in a checkpoint, without the seconds."""
    records = load_checkpoint(folder / "checkpoint.pt")["history"]["records"]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def on_step(number: int, action: Callable[[Any], None]) -> Callable[..., Any]:
    """`train_step` that does `action(model)` before its step `number`, counted from 1."""
    real, calls = training.train_step, []

    def step(model: Any, *rest: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            action(model)
        return real(model, *rest)

    return step


def interrupt(_: Any) -> None:
    """In the middle of a step, as a second Ctrl-C does."""
    raise KeyboardInterrupt


def send(number: int) -> Callable[[Any], None]:
    """A signal that comes while a step is under way."""
    return lambda _: os.kill(os.getpid(), number)


@dataclass(frozen=True)
class Done:
    """A run that was made once for all tests."""

    folder: Path
    status: int
    out: str
    err: str


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """An unbroken run of two epochs."""
    folder, out, err = tmp_path_factory.mktemp("finished") / "deep" / "run", io.StringIO(), io.StringIO()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with redirect_stdout(out), redirect_stderr(err):
        status = run(words(folder))
    torch.set_num_threads(before)
    return Done(folder, status, out.getvalue(), err.getvalue())


# --- a run that ends well


def test_one_line_an_epoch_and_nothing_between(finished: Done) -> None:
    assert finished.status == 0, finished.err
    lines = finished.out.splitlines()
    parsed = [LINE.fullmatch(line) for line in lines[:2]]
    assert not any(line.startswith("Epoch") for line in lines[2:])
    assert lines[2] == ""
    for epoch, (match, row) in enumerate(zip(parsed, rows_of(finished.folder), strict=True), 1):
        assert match is not None
        assert match.groups() == (
            str(epoch),
            "2",
            f"{float(row['loss']):.2f}",
            *(f"{100 * float(row[name]):.1f}" for name in ("accuracy", "unstructured_sparsity", "structured_sparsity")),
            f"{float(row['mean_bits']):.1f}",
        )


def rows_of(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((folder / "history.csv").read_text())))


def test_table_and_verdict_follow_and_progress_is_elsewhere(finished: Done) -> None:
    for text in ("layer3.2.conv2", "Unstructured:", "Structured:", "INCONCLUSIVE", f"are in {finished.folder}"):
        assert text in finished.out
    for text in ("preset 'debug' becomes 'smoke'", "18 quantizers", "100 training images", "trained"):
        assert text in finished.err
        assert text not in finished.out


def test_the_files(finished: Done) -> None:
    folder = finished.folder
    files = contents(folder)
    assert set(files) == FILES
    assert all(data.startswith(b"\x89PNG") for name, data in files.items() if name.endswith(".png"))
    rows, state = rows_of(folder), load_checkpoint(folder / "checkpoint.pt")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    history = History.from_json(state["history"])
    assert history.csv_text().encode() == files["history.csv"]
    assert sum("logit_dz" in name for name in state["model"]) == 18


def test_the_summary(finished: Done) -> None:
    folder = finished.folder
    found = json.loads((folder / "run.json").read_text())
    wanted = ("config", "data", "machine", "versions", "quantized_layers", "results", "verdict")
    assert all(found[name] for name in wanted)
    config = found["config"]
    assert (config["preset"], config["epochs"], config["batch_size"], config["limit"]) == ("smoke", 2, 50, 100)
    assert (config["seed"], config["exclude_layers"]) == (3, ["conv1", "bn", "linear"])
    data = load_data("digits", limit=100)
    assert (found["data"]["name"], found["data"]["sha256"]) == ("digits", data.digest)
    assert (found["data"]["train_images"], found["data"]["test_images"]) == (100, 100)
    assert (found["machine"]["device"], found["machine"]["threads"]) == ("cpu", 1)
    assert found["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert len(found["quantized_layers"]) == 18
    assert "layer1.0.conv1" in found["quantized_layers"]
    last = rows_of(folder)[-1]
    for name in ("accuracy", "unstructured_sparsity", "structured_sparsity", "mean_bits"):
        assert found["results"][name] == float(last[name])
    assert found["results"]["structured_mac_ratio"] == pytest.approx(40_551_040 / found["results"]["structured_macs"])
    assert found["verdict"]["state"] == "inconclusive"
    assert found["verdict"]["headline"] in finished.out


# --- a run that is stopped, and taken up again


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_and_equals_the_unbroken_one(
    number: int,
    finished: Done,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    folder = tmp_path / "run"
    monkeypatch.setattr("src.training.epoch.train_step", on_step(3, send(number)))  # the first step of epoch 2
    assert run(words(folder)) == 128 + number
    first = capsys.readouterr()
    assert [line[:9] for line in first.out.splitlines()] == ["Epoch 1/2"]
    where = "after epoch 1 of 2 and 1 step of the next"
    told = f"stopped {where}, which is kept in {folder}; the same command with --resume goes on"
    assert first.err.splitlines().count(told) == 1
    assert set(contents(folder)) == FIGURES | KEPT

    monkeypatch.undo()
    torch.set_num_threads(1)
    assert run(words(folder, "--resume")) == 0
    second = capsys.readouterr()
    assert f"resumed {where}" in second.err
    assert [line[:9] for line in second.out.splitlines() if line.startswith("Epoch")] == ["Epoch 2/2"]
    assert set(contents(folder)) == FILES
    unbroken = finished.folder
    assert histories(folder) == histories(unbroken)
    mine, theirs = (load_checkpoint(path / "checkpoint.pt")["model"] for path in (folder, unbroken))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    drop = SCALARS.index("seconds")
    tables = [list(csv.reader(io.StringIO((path / "history.csv").read_text()))) for path in (folder, unbroken)]
    assert [[*row[:drop], *row[drop + 1 :]] for row in tables[0]] == [[*r[:drop], *r[drop + 1 :]] for r in tables[1]]
    assert all((folder / name).read_bytes() == (unbroken / name).read_bytes() for name in FIGURES)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_evaluation_says_that_the_training_is_kept(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(pipeline, "evaluate_run", send(number))
    assert run(words(tmp_path / "run", "--epochs", "1")) == 128 + number
    told = capsys.readouterr().err
    assert "the training is complete and kept" in told
    assert "--resume goes on with its evaluation and figures" in told
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["epoch"] == 1


def test_with_the_doctor_the_run_is_the_same_and_the_findings_are_told(
    finished: Done, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "run"
    assert run(words(folder, "--doctor")) == 0
    told = capsys.readouterr()
    assert "doctor: before training: " in told.err
    assert "doctor: first steps: " in told.err
    assert "DOCTOR: no fault found" in told.out
    assert histories(folder) == histories(finished.folder), "examining changed the run"
    found = json.loads((folder / "run.json").read_text())["doctor"]
    assert found["state"] == "healthy"
    assert {finding["stage"] for finding in found["findings"]} == set(STAGES)
    assert len(found["findings"]) > 40


def test_what_the_doctor_finds_is_exit_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    real = pipeline.evaluate_run

    def on_half(run: pipeline.Run) -> tuple[Any, float]:
        result, accuracy = real(run)
        return result, accuracy + 0.25

    monkeypatch.setattr(pipeline, "evaluate_run", on_half)
    folder = tmp_path / "run"
    assert run(words(folder, "--epochs", "1", "--checkpoint-every", "1")) == 0
    assert "DOCTOR" not in capsys.readouterr().out
    assert run(words(folder, "--epochs", "1", "--resume", "--doctor")) == 1
    told = capsys.readouterr()
    assert "what it was before training is not examined again" in told.err
    assert "DOCTOR: 1 of " in told.out
    assert json.loads((folder / "run.json").read_text())["doctor"]["likely_causes"][0]["key"] == "partial-test-set"


KILLED = """
import os, signal, sys, torch
from experiments import debug_run
from src import training
torch.set_num_threads(1)
real, calls = training.train_step, []
def step(*arguments):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
training.train_step = step
debug_run.main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_from_mid_epoch_and_equals_the_unbroken_one(
    finished: Done, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-c", KILLED, *words(folder, "--checkpoint-every", "1")]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == -signal.SIGKILL
    assert run(words(folder, "--resume")) == 0
    assert "resumed after epoch 1 of 2 and 1 step of the next" in capsys.readouterr().err
    assert histories(folder) == histories(finished.folder)
    mine, theirs = (load_checkpoint(path / "checkpoint.pt") for path in (folder, finished.folder))
    assert all(torch.equal(mine["model"][name], theirs["model"][name]) for name in theirs["model"])
    for number, state in theirs["optimizer"]["state"].items():
        assert all(torch.equal(mine["optimizer"]["state"][number][name], state[name]) for name in state)
    assert all((folder / name).read_bytes() == (finished.folder / name).read_bytes() for name in FIGURES)


def test_an_interruption_before_anything_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("src.training.epoch.train_step", on_step(1, interrupt))
    assert run(words(tmp_path / "run")) == 130
    captured = capsys.readouterr()
    assert "stopped within a step; no step was finished, so there is nothing to resume" in captured.err
    assert captured.out == ""
    monkeypatch.setattr(pipeline, "prepare_data", lambda *_: interrupt(None))
    assert run(words(tmp_path / "other")) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert not (tmp_path / "other").exists()


def test_a_loss_that_is_not_a_number_ends_the_run_with_the_finished_epochs_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def spoil(model: Any) -> None:
        model.conv1.weight.data[0] = float("nan")

    monkeypatch.setattr("src.training.epoch.train_step", on_step(3, spoil))  # the first step of epoch 2
    assert run(words(tmp_path)) == 2
    captured = capsys.readouterr()
    assert [line[:9] for line in captured.out.splitlines()] == ["Epoch 1/2"]
    message = r"error: the loss is nan at epoch 2, step 1 .*: weight conv1\.weight.*the state after epoch 1 of 2 is in"
    assert re.search(message, captured.err)
    assert set(contents(tmp_path)) == KEPT - {"checkpoint.previous.pt"}
    assert len(histories(tmp_path)) == 1


def test_a_fault_found_is_exit_status_1(
    finished: Done,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    fault = Verdict((Expectation("loss falls", "below 3", "4", FAILED, "the learning rate"),))
    monkeypatch.setattr(debug_run.pipeline, "judge_run", lambda *_: fault)
    assert run(words(folder, "--resume")) == 1  # all epochs are done: only the evaluation is repeated
    assert "FAULT: 1 of 1 expectations not met (loss falls)" in capsys.readouterr().out
    assert json.loads((folder / "run.json").read_text())["verdict"]["state"] == "faulty"
    assert histories(folder) == histories(finished.folder)


def test_a_new_run_sets_the_old_one_aside(finished: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    monkeypatch.setattr("src.training.epoch.train_step", on_step(1, interrupt))
    assert run(words(folder)) == 130
    assert contents(folder) == {f"previous/1/{name}": data for name, data in contents(finished.folder).items()}


# --- bad input

BAD: list[tuple[list[str], str]] = [
    (["--preset", "debgu"], "preset='debgu' is unknown: choose one of debug, smoke, paper, paper-4bit; did you mean"),
    (["--data", "cifar11"], "unknown data 'cifar11': choose auto, cifar10, digits or folder:PATH"),
    (["--data", "folder:/no/such"], "no such folder"),
    (["--device", "gpu"], "device='gpu' is unknown: choose one of auto, cpu, cuda, mps"),
    (["--device", "cuda"], "device 'cuda' is not present here: use one of cpu, or auto"),
    (["--epochs", "0"], "epochs=0: need 1..100000"),
    (["--epochs", "-1"], "epochs=-1: need 1"),
    (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
    (["--epochs", "1.5"], "argument --epochs: invalid int value: '1.5'"),
    (["--batch-size", "0"], "batch_size=0: need 2"),
    (["--batch-size", "x"], "argument --batch-size: invalid int value: 'x'"),
    (["--limit", "0"], "limit=0: need 1"),
    (["--limit", "9"], "limit=9: need a whole number from 10 (one image a class)"),
    (["--seed", "-1"], "seed=-1: need 0"),
    (["--epoch-count", "3"], "unrecognized arguments: --epoch-count 3"),
    (["--resume"], "there is no checkpoint at"),
    (["--checkpoint-every", "0"], "--checkpoint-every 0: need a whole number of steps, at least 1"),
]


@pytest.mark.parametrize(("more", "message"), BAD, ids=[" ".join(more) for more, _ in BAD])
def test_bad_input_is_one_message_and_nothing_is_created(
    more: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert run(words(tmp_path / "run", *more)) == 2
    captured = capsys.readouterr()
    assert message in captured.err.splitlines()[-1]
    assert captured.err.count("error: ") == 1
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_cannot_be_one(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").write_text("mine")
    for output, message in ((tmp_path / "file", "is a file"), (tmp_path / "file" / "run", "cannot be written")):
        assert run(words(output)) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: output folder")
        assert message in captured.err
        assert captured.err.count("\n") == 1
    assert contents(tmp_path) == {"file": b"mine"}


def test_a_checkpoint_that_does_not_fit_leaves_the_run_as_it_was(
    finished: Done, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    before = contents(folder)
    assert run(words(folder, "--resume", "--seed", "4")) == 2
    assert "another configuration (seed: 3 then, 4 now)" in capsys.readouterr().err.splitlines()[-1]
    assert contents(folder) == before
    for name in CHECKPOINTS:
        (folder / name).write_bytes(before[name][:-1000])
    assert run(words(folder, "--resume")) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "is damaged or not a checkpoint; start without --resume" in last
    assert "checkpoint.previous.pt cannot be read either" in last
    assert contents(folder).keys() == before.keys()


def test_a_damaged_checkpoint_gives_way_to_the_one_before_it_and_the_end_is_the_same(
    finished: Done, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    damaged = (folder / "checkpoint.pt").read_bytes()[:-1000]
    (folder / "checkpoint.pt").write_bytes(damaged)
    assert run(words(folder, "--resume")) == 0
    assert "NOTICE: checkpoint.pt is missing or damaged; reading checkpoint.previous.pt" in capsys.readouterr().err
    assert histories(folder) == histories(finished.folder)
    assert (folder / "checkpoint.damaged.pt").read_bytes() == damaged
    before = finished.folder / "checkpoint.previous.pt"
    assert (folder / "checkpoint.previous.pt").read_bytes() == before.read_bytes()


def test_a_second_run_on_a_folder_in_use_is_refused(tmp_path: Path, capsys: Capture) -> None:
    code = f"import time; from src import run_lock; run_lock.hold({str(tmp_path)!r}); print('held', flush=True)"
    command = [sys.executable, "-c", f"{code}; time.sleep(100)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        assert run(words(tmp_path)) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"error: output folder {str(tmp_path)!r} is in use by another run (process {other.pid} ")
        assert "wait for it or stop it" in told
        assert list(contents(tmp_path)) == []
        other.kill()  # without a chance to clean up
    assert run(words(tmp_path, "--epochs=1")) == 0


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_leaves_the_one_before(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    real, states = os.fsync, []

    def full(handle: int) -> None:
        if states:
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr("src.training.epoch.train_step", on_step(3, lambda _: states.append("full")))
    assert run(words(tmp_path)) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith(f"error: the checkpoint after epoch 2 of 2 could not be written to {str(tmp_path)!r} ")
    assert f"({os.strerror(number)}); make room" in told[-1]
    assert told[-3] == f"the state after epoch 1 of 2 is in {tmp_path}; the same command with --resume goes on"
    assert set(contents(tmp_path)) == KEPT - {"checkpoint.previous.pt"}
    assert len(histories(tmp_path)) == 1


@pytest.mark.filterwarnings("default")
def test_a_table_or_figure_that_cannot_be_written_or_drawn_is_a_warning(
    finished: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("history.csv", "accuracy_curve.png", "run.json"):  # a folder in the file's place
        (folder / name).mkdir()
        (folder / name / "mine").touch()

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such colour")

    monkeypatch.setattr("src.runs.folder.set_aside", lambda _: None)
    monkeypatch.setattr(pipeline.figures, "sparsity_curves", broken)
    assert run(words(folder)) == 2
    captured = capsys.readouterr()
    assert finished.out.splitlines()[:2] == captured.out.splitlines()[:2]
    assert "INCONCLUSIVE" in captured.out
    warned = [line for line in captured.err.splitlines() if line.startswith("warning: ")]
    assert sum("history.csv' could not be written" in line for line in warned) == 1
    assert sum("accuracy_curve.png' could not be written" in line for line in warned) == 1
    assert "warning: sparsity_curves.png could not be drawn: RuntimeError: no such colour; the run goes on" in warned
    assert len(warned) == 3
    assert captured.err.splitlines()[-1].startswith("error: run.json could not be written (")
    assert {"channel_liveness.png", "per_layer_channels.png"} <= set(contents(folder))
    assert histories(folder) == histories(finished.folder)


def test_out_of_memory_says_which_batch_size_would_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def exhausted(_: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: not enough memory: you tried")

    monkeypatch.setattr("src.training.epoch.train_step", on_step(3, exhausted))
    assert run(words(tmp_path)) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "does not hold a batch of 50 images; try batches of 25: --batch-size 25, or BATCH_SIZE = 25" in told
    assert f"the state after epoch 1 of 2 is in {tmp_path}" in told
    assert len(histories(tmp_path)) == 1


@pytest.mark.parametrize(("where", "kept"), [("load_data", ""), ("evaluate_run", "the training is complete and kept")])
def test_out_of_memory_outside_of_the_steps_is_one_message(
    where: str, kept: str, finished: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def exhausted(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")

    shutil.copytree(finished.folder, tmp_path / "run")
    monkeypatch.setattr(pipeline, where, exhausted)
    assert run(words(tmp_path / "run", "--resume")) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: the memory does not hold the ")
    assert kept in told


def test_a_network_of_which_nothing_is_left_is_judged_too(
    finished: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    real = pipeline.evaluate_run

    def emptied(run: pipeline.Run) -> Any:
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.mul_(parameter.dim() < 1)  # all but the logits
        return real(run)

    shutil.copytree(finished.folder, tmp_path / "run")
    monkeypatch.setattr(pipeline, "evaluate_run", emptied)
    assert run(words(tmp_path / "run", "--resume")) == finished.status
    results = json.loads((tmp_path / "run" / "run.json").read_text())["results"]
    assert (results["structured_macs"], results["structured_mac_ratio"]) == (0, None)
    assert "Structured:   infx fewer MACs" in capsys.readouterr().out


# --- nobody listens


class Broken(io.TextIOWrapper):
    """A stream whose reader is gone."""

    def __init__(self, error: int) -> None:
        super().__init__(io.BytesIO())
        self.error = error

    def write(self, text: str) -> int:
        raise OSError(self.error, os.strerror(self.error))


@pytest.mark.parametrize("error", [errno.EPIPE, errno.ENOSPC, errno.EIO])
def test_a_run_that_nobody_listens_to_goes_on(
    error: int, finished: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Broken(error))
        patch.setattr(sys, "stderr", Broken(error))
        assert run(words(tmp_path)) == finished.status
    assert histories(tmp_path) == histories(finished.folder)
    assert set(contents(tmp_path)) == FILES


def test_a_broken_pipe_is_said_once_and_costs_nothing(finished: Done, tmp_path: Path) -> None:
    """The first line is read and then nothing more, as by `| head -1`; the folder's name cannot be encoded."""
    shutil.copytree(finished.folder, tmp_path / "r\udcff")
    command = [sys.executable, "-m", "experiments.debug_run", *words(tmp_path / "r\udcff", "--resume")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        told = process.stderr.read().decode()
    assert process.returncode == finished.status, told
    assert told.count("warning: the standard output cannot be written (Broken pipe); the run goes on without it") == 1
    assert "Traceback" not in told
    assert "Exception" not in told


def test_a_run_without_any_streams(finished: Done, tmp_path: Path) -> None:
    shutil.copytree(finished.folder, tmp_path / "run")
    command = [sys.executable, "-m", "experiments.debug_run", *words(tmp_path / "run", "--resume")]
    (tmp_path / "run" / "run.json").unlink()
    done = subprocess.run(["sh", "-c", '"$@" >&- 2>&-', "sh", *command], cwd=ROOT, check=False)
    assert done.returncode == finished.status
    assert json.loads((tmp_path / "run" / "run.json").read_text())["results"]["epochs"] == 2
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["epoch"] == 2


def test_the_commands_exit_status_is_the_functions() -> None:
    command = [sys.executable, "-m", "experiments.debug_run", "--preset", "nope"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: preset='nope' is unknown")
    assert done.stderr.count("\n") == 1

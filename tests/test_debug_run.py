"""The script from its command line: what it prints, what it writes, how it ends, and what it refuses.

What becomes of a run that fails is tested in tests/reliability, whose small run is the one here.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import torch

from experiments import debug_run, pipeline
from experiments.pipeline import FAILED, Verdict, configure, prepare_data
from experiments.pipeline.verdict import Expectation
from src.data import load_data
from src.runs import load_checkpoint
from src.storage import StorageError
from src.training import train_step
from tests.reliability.failures import FAILURES, in_step
from tests.reliability.small_run import (
    FILES,
    STEP,
    Unbroken,
    differences,
    prepare,
    run_command,
    seed_generators,
)

ROOT = Path(__file__).parents[1]
LINE = re.compile(
    r"Epoch +(\d+)/(\d+) \| Loss: (\d+\.\d\d) \| Acc: (\d+\.\d)% "
    r"\| Unstr: (\d+\.\d)% \| Struct: (\d+\.\d)% \| Bits: (\d+\.\d)"
)
# Multiplications of the small network: a stem of 3 x 4 channels at 32 x 32 pixels, then 4 x 4, 4 x 8, 8 x 8, 8 x 16 and
# 16 x 16 channels of 3 x 3 weights at half the width and height with each stage, then 16 x 10 of the linear layer.
MACS = 9 * (1024 * (3 * 4 + 2 * 4 * 4) + 256 * (4 * 8 + 8 * 8) + 64 * (8 * 16 + 16 * 16)) + 16 * 10
Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def _small(monkeypatch: Patch) -> None:
    prepare(monkeypatch)
    seed_generators(0)


@pytest.fixture
def finished(tiny_run: Unbroken, tmp_path: Path) -> Path:
    """A folder with a run that has come to its end."""
    return Path(shutil.copytree(tiny_run.folder, tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def send(number: int) -> Callable[..., None]:
    """What sends the signal to this process."""
    return lambda *_: os.kill(os.getpid(), number)


# --- a run that comes to its end


def test_one_line_an_epoch_then_table_and_verdict_and_progress_elsewhere(tiny_run: Unbroken) -> None:
    assert tiny_run.status == 0, tiny_run.err
    lines = tiny_run.out.splitlines()
    rows = list(csv.DictReader((tiny_run.folder / "history.csv").read_text().splitlines()))
    shares = ("accuracy", "unstructured_sparsity", "structured_sparsity")
    for epoch, (line, row) in enumerate(zip(lines[:3], rows, strict=True), 1):
        match = LINE.fullmatch(line)
        assert match is not None, line
        percent = [f"{100 * float(row[name]):.1f}" for name in shares]
        assert [*match.groups()] == [str(epoch), "3", f"{float(row['loss']):.2f}", *percent, row["mean_bits"][:3]]
    assert lines[3] == ""
    assert not any(line.startswith("Epoch") for line in lines[4:])
    for text in ("layer3.0.conv2", "Unstructured:", "Structured:", "INCONCLUSIVE", f"are in {tiny_run.folder}"):
        assert text in tiny_run.out
    for text in ("6 quantizers", "60 training images", "3 epochs in "):
        assert text in tiny_run.err
        assert text not in tiny_run.out


def test_on_the_digits_the_debug_preset_becomes_another_and_that_is_said() -> None:
    said: list[str] = []
    config, _ = prepare_data(configure("debug", data="digits", limit=20, device="cpu"), said.append)
    assert config.preset == "smoke"
    assert any("preset 'debug' becomes 'smoke'" in line for line in said)
    assert "batch size lowered to 20" in said[-1]


def test_the_summary(tiny_run: Unbroken) -> None:
    assert set(contents(tiny_run.folder)) == FILES
    found = json.loads((tiny_run.folder / "run.json").read_text())
    config, data, last = found["config"], load_data("digits", limit=60), found["results"]
    assert (config["preset"], config["epochs"], config["batch_size"], config["limit"]) == ("tiny", 3, 15, 60)
    assert (found["data"]["name"], found["data"]["sha256"]) == ("digits", data.digest)
    assert found["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert found["quantized_layers"] == [f"layer{stage}.0.conv{i}" for stage in (1, 2, 3) for i in (1, 2)]
    row = list(csv.DictReader((tiny_run.folder / "history.csv").read_text().splitlines()))[-1]
    for name in ("accuracy", "unstructured_sparsity", "structured_sparsity", "mean_bits"):
        assert last[name] == float(row[name])
    assert last["structured_mac_ratio"] == pytest.approx(MACS / last["structured_macs"])
    assert found["verdict"]["state"] == "inconclusive"
    assert found["verdict"]["headline"] in tiny_run.out


def test_a_network_of_which_nothing_is_left_is_judged_too(finished: Path, monkeypatch: Patch, capsys: Capture) -> None:
    real = pipeline.evaluate_run

    def emptied(run: pipeline.Run) -> Any:
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.mul_(parameter.dim() < 1)  # all but the logits
        return real(run)

    monkeypatch.setattr(pipeline, "evaluate_run", emptied)
    assert run_command(finished, "--resume") == 0
    results = json.loads((finished / "run.json").read_text())["results"]
    assert (results["structured_macs"], results["structured_mac_ratio"]) == (0, None)
    assert "Structured:   infx fewer MACs" in capsys.readouterr().out


def test_what_compression_costs_is_said_where_it_was_measured(finished: Path, capsys: Capture) -> None:
    assert run_command(finished, "--resume", "--baseline=auto") == 0
    assert not (finished / "baseline").exists(), "nothing is added to a finished run that nobody asked for"
    assert "--resume --baseline true" in capsys.readouterr().err
    assert run_command(finished, "--resume", "--baseline=true") == 0
    accuracy = json.loads((finished / "run.json").read_text())["results"]["baseline_accuracy"]
    assert f"than the uncompressed one ({accuracy:.1%}). Its file is " in capsys.readouterr().out
    assert (finished / "baseline" / "checkpoint.pt").exists()


def test_a_fault_found_is_exit_status_1(finished: Path, monkeypatch: Patch, capsys: Capture) -> None:
    fault = Verdict((Expectation("loss falls", "below 3", "4", FAILED, "the learning rate"),))
    monkeypatch.setattr(pipeline, "judge_run", lambda *_: fault)
    assert run_command(finished, "--resume") == 1  # all epochs are done: only the evaluation is repeated
    assert "FAULT: 1 of 1 expectations not met (loss falls)" in capsys.readouterr().out
    assert json.loads((finished / "run.json").read_text())["verdict"]["state"] == "faulty"


def test_what_the_doctor_finds_is_exit_status_1(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    """Takes about 5 s: every check of the doctor runs."""
    real = pipeline.evaluate_run

    def on_half(run: pipeline.Run) -> tuple[Any, float]:
        result, accuracy = real(run)
        return result, accuracy + 0.25

    monkeypatch.setattr(pipeline, "evaluate_run", on_half)
    monkeypatch.setattr(STEP, train_step)  # without noise, which is a fault, too
    folder = tmp_path / "run"
    assert run_command(folder, "--doctor") == 1
    told = capsys.readouterr()
    assert "doctor: before training: " in told.err
    assert "doctor: first steps: " in told.err
    assert "DOCTOR: " in told.out
    found = json.loads((folder / "run.json").read_text())["doctor"]
    assert found["likely_causes"][0]["key"] == "partial-test-set"
    assert len(found["findings"]) > 40
    assert run_command(folder, "--resume", "--doctor") == 1
    assert "its state before training is not examined again" in capsys.readouterr().err


# --- a run that is stopped


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_is_resumed_and_equals_the_unbroken_one(
    number: int, tiny_run: Unbroken, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        in_step(patch, 6, send(number))
        assert run_command(folder) == 128 + number
    first, where = capsys.readouterr(), "after epoch 1 of 3 and 2 steps of the next"
    assert [line[:9] for line in first.out.splitlines()] == ["Epoch 1/3"]
    stopped = [line for line in first.err.splitlines() if line.startswith(f"stopped {where}; ")]
    assert len(stopped) == 1
    assert str(folder) in stopped[0]
    assert "the same command with --resume" in stopped[0]
    assert set(contents(folder)) == FILES - {"run.json"}
    assert run_command(folder, "--resume") == 0
    second = capsys.readouterr()
    assert f"resumed {where}" in second.err
    assert [line[:9] for line in second.out.splitlines() if line.startswith("Epoch")] == ["Epoch 2/3", "Epoch 3/3"]
    assert not differences(folder, tiny_run.folder)


@pytest.mark.parametrize(
    ("where", "number", "told"),
    [
        ("prepare_data", signal.SIGINT, r"^interrupted\n$"),
        ("evaluate_run", signal.SIGTERM, r"the training is complete and kept in .*--resume .*figures"),
    ],
)
def test_an_interruption_outside_of_the_training(
    where: str, number: int, told: str, finished: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    monkeypatch.setattr(pipeline, where, send(number))
    assert run_command(finished, "--resume") == 128 + number
    assert re.search(told, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NaN or infinity in the loss, a gradient or a weight", "weight"),
        ("out of memory in a step", "memory of the CPU"),
        ("disk full or read-only at a checkpoint", "read-only"),
    ],
)
@pytest.mark.filterwarnings("default")
def test_a_training_that_cannot_continue_is_exit_status_2(
    name: str, kind: str, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    FAILURES[name].inject(monkeypatch, 8, kind)
    assert run_command(tmp_path) == 2
    captured = capsys.readouterr()
    assert [line[:9] for line in captured.out.splitlines()][:1] == ["Epoch 1/3"]
    assert captured.err.count("error: ") == 1
    assert captured.err.splitlines()[-1].startswith("error: ")
    assert re.search(FAILURES[name].kinds[kind], captured.err)
    assert f"the state after epoch 1 of 3 and 2 steps of the next is kept in {tmp_path}; " in captured.err
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 2


@pytest.mark.filterwarnings("default")
def test_a_figure_that_cannot_be_drawn_is_a_warning_and_a_missing_summary_an_error(
    finished: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    (finished / "run.json").unlink()
    (finished / "run.json" / "mine").mkdir(parents=True)  # a folder in the file's place
    FAILURES["figure that cannot be drawn"].inject(monkeypatch, 4, "sparsity_curves")
    assert run_command(finished, "--resume") == 2
    captured = capsys.readouterr()
    assert "INCONCLUSIVE" in captured.out
    warned = [line for line in captured.err.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 1
    assert warned[0].startswith("warning: sparsity_curves.png could not be drawn: RuntimeError: no font; ")
    assert "Is a directory" in captured.err.splitlines()[-1]


# --- a run that is resumed or continued


@pytest.fixture
def resumed(finished: Path, capsys: Capture) -> Callable[..., tuple[int, str]]:
    """The command with `--resume` and what is given, nothing repeated: its status, and what it says on stderr."""

    def run(*more: str) -> tuple[int, str]:
        return debug_run.main(["--resume", f"--output={finished}", "--baseline=false", *more]), capsys.readouterr().err

    return run


def test_resuming_takes_the_settings_of_the_run(resumed: Callable[..., tuple[int, str]], finished: Path) -> None:
    before = load_checkpoint(finished / "checkpoint.pt")["config"]
    assert resumed() == (0, ANY)
    assert json.loads((finished / "run.json").read_text())["config"] == before
    elsewhere = ("--data=auto", "--data-root=elsewhere", "--preset=tiny", "--batch-size=15", "--doctor")
    assert resumed(*elsewhere) == (0, ANY), "what shapes no result is not compared, by the doctor neither"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("--epochs=2", r"\(epochs: 3 then, 2 now\); leave these settings out"),
        ("--seed=5", r"\(seed: 0 then, 5 now\)"),
        ("--batch-size=10", r"\(batch_size: 15 then, 10 now\)"),
        ("--batch-size=20", r"\(batch_size: 15 then, 20 now\)"),
        ("--preset=paper", r"\(preset: 'tiny' then, 'paper' now\)"),
        ("--target-bops=9%", r"\(target: '' then, 'bops 9%' now\)"),
        ("--data=cifar10", r"is on digits, not on cifar10"),
    ],
)
def test_a_setting_that_contradicts_the_runs_is_an_error_with_both_values(
    setting: str, message: str, resumed: Callable[..., tuple[int, str]], finished: Path
) -> None:
    before = contents(finished)
    status, told = resumed(setting)
    assert status == 2
    assert re.search(message, told)
    assert contents(finished) == before


def test_more_epochs_continue_a_finished_run(
    resumed: Callable[..., tuple[int, str]], finished: Path, tiny_run: Unbroken
) -> None:
    before = contents(finished)
    in_step_of_epoch_5 = 6
    with pytest.MonkeyPatch.context() as patch:
        in_step(patch, in_step_of_epoch_5, send(signal.SIGINT))
        status, told = resumed("--epochs=5")
    assert status == 130
    # "hold_then_linear" for 70 % of the epochs: 3 of 5 are before that, so the rate is the preset's 3e-3 once more.
    rates = re.search(r"the learning rate goes from (\S+) to (\S+) and ends at (\S+), the penalty's", told)
    assert rates is not None, told
    assert float(rates[1]) < 3e-3
    assert rates.groups()[1:] == ("0.003", "0")
    assert "resumed after epoch 3 of 5, which was its end; now the schedules are those of 5 epochs" in told
    assert "an unbroken run of 5 epochs gives other numbers" in told
    kept = {f"previous/1/{name}": data for name, data in before.items()}
    assert kept.items() <= contents(finished).items()
    assert "run.json" not in contents(finished)
    status, told = resumed()  # nothing has to be said twice
    assert status == 0
    assert "resumed after epoch 4 of 5" in told
    assert "schedules" not in told
    summary = json.loads((finished / "run.json").read_text())
    assert (summary["results"]["epochs"], summary["config"]["continued_from"]) == (5, 3)
    rows = (finished / "history.csv").read_text().splitlines()
    assert len(rows) == 1 + 5
    assert rows[:4] == (tiny_run.folder / "history.csv").read_text().splitlines()
    assert "previous/2" not in contents(finished)


def test_a_run_that_is_not_finished_keeps_its_number_of_epochs(
    resumed: Callable[..., tuple[int, str]], finished: Path, capsys: Capture
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        in_step(patch, 6, send(signal.SIGINT))
        assert run_command(finished) == 130
    capsys.readouterr()
    assert "(epochs: 3 then, 5 now)" in resumed("--epochs=5")[1]


# --- bad input

BAD: list[tuple[list[str], str]] = [
    (["--preset", "debgu"], "preset='debgu' is unknown: choose one of debug, smoke, mixed-bits, paper"),
    (["--data", "cifar11"], "choose auto, cifar10, digits or folder:PATH; did you mean 'cifar10'?"),
    (["--data", "folder:/no/such"], "No such file or directory: '/no/such/train'; need train/"),
    (["--device", "cuda"], "device 'cuda' is not present here: use one of cpu, or auto"),
    (["--epochs", "0"], "epochs=0: need 1..100000, a whole number"),
    (["--limit", "9"], "limit=9: need a whole number from 10 (one image a class)"),
    (["--epoch-count", "3"], "unrecognized arguments: --epoch-count 3"),
    (["--resume"], "holds no run: there is no such folder"),
]


@pytest.mark.parametrize(("more", "message"), BAD[:5], ids=[" ".join(more) for more, _ in BAD[:5]])
def test_what_is_typed_wrong_is_said_although_the_folder_is_in_use(
    more: list[str], message: str, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    def in_use(_: object) -> None:
        raise StorageError("in use")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("src.storage.folder_lock.check_free", in_use)
    for resumed in ([], ["--resume"]):
        assert run_command(tmp_path, *more, *resumed) == 2
        assert message in capsys.readouterr().err
    assert run_command(tmp_path) == 2
    assert "in use" in capsys.readouterr().err


@pytest.mark.parametrize(("more", "message"), BAD, ids=[" ".join(more) for more, _ in BAD])
def test_bad_input_is_one_message_and_nothing_is_created(
    more: list[str], message: str, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", cache(lambda: False))
    assert run_command(tmp_path / "run", *more) == 2
    captured = capsys.readouterr()
    assert message in captured.err.splitlines()[-1]
    assert captured.err.count("error: ") == 1
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


# --- nobody reads what it prints


@pytest.mark.slow
def test_a_broken_pipe_is_said_once_and_costs_nothing(tmp_path: Path) -> None:
    """The first line is read and then nothing more, as by `| head -1`; the folder's name cannot be encoded."""
    output = tmp_path / "r\udcff"
    words = ["--data=digits", "--epochs=1", "--limit=20", "--device=cpu", f"--output={output}"]
    command = [sys.executable, "-m", "experiments.debug_run", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        told = process.stderr.read().decode()
    assert process.returncode == 0, told
    assert told.count("warning: the standard output cannot be written (Broken pipe); ") == 1
    assert "Traceback" not in told
    assert "Exception" not in told
    (output / "run.json").unlink()
    done = subprocess.run(["sh", "-c", '"$@" >&- 2>&-', "sh", *command, "--resume"], cwd=ROOT, check=False)
    assert done.returncode == 0, "without any streams"
    assert json.loads((output / "run.json").read_text())["results"]["epochs"] == 1


def test_images_that_the_memory_does_not_hold_are_bad_input(
    capsys: Capture, monkeypatch: Patch, tmp_path: Path
) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(pipeline, "prepare_data", full)
    assert run_command(tmp_path / "run") == 2
    assert "error: the memory does not hold the images; use --limit" in capsys.readouterr().err

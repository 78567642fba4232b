"""`make lab` decides what to train, what to open and how to start, without starting anything.

Oracle: a run made by the script itself, on few images, is what has to be taken up. The server itself is started in
tests/browser.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from experiments import debug_run, lab
from experiments.headless import NotebookInputError, lab_copy
from experiments.notebook import LabRunError, explorable, training_command
from src.runs import load_checkpoint, state_bytes

PARAMETERS = 'PRESET = "debug"\nDATA = "auto"\nDATA_ROOT = "data"\nEPOCHS = None\nBATCH_SIZE = None\nLIMIT = None\n'
PARAMETERS += 'SEED = 0\nDEVICE = "auto"\nOUTPUT_DIR = "debug_output"\nRESUME = False'


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run: two epochs on 40 digits."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    arguments = ["--data", "digits", "--epochs", "2", "--limit", "40", "--batch-size", "20", "--output", str(folder)]
    assert debug_run.main(arguments) in (0, 1)
    return folder


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a notebook and nothing else; the command believes that it lies there."""
    notebook = tmp_path / "notebooks/codeq_walkthrough.ipynb"
    notebook.parent.mkdir()
    cells = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), new_code_cell("1 + 1")]
    nbformat.write(new_notebook(cells=cells), notebook)
    monkeypatch.setattr(lab, "ROOT", tmp_path)
    monkeypatch.setattr(lab, "write_copy", lambda path, given: lab_copy.write_copy(path, given, notebook))
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Started:
    """Notes what would be started; a training leaves `result` where it was told to."""

    def __init__(self, result: Path | None = None, status: int = 0) -> None:
        self.commands: list[list[str]] = []
        self.result, self.status = result, status

    def __call__(self, command: Sequence[str]) -> int:
        self.commands.append(list(command))
        if "experiments.debug_run" in command:
            if self.result:
                shutil.copytree(self.result, command[command.index("--output") + 1], dirs_exist_ok=True)
            return self.status
        return 0

    @property
    def modules(self) -> list[str]:
        return [command[2] for command in self.commands]


def injected(project: Path) -> dict[str, object]:
    copy = nbformat.read(project / "runs/lab/codeq_walkthrough.ipynb", as_version=4)
    (cell,) = [cell for cell in copy.cells if "injected-parameters" in cell.metadata.get("tags", [])]
    scope: dict[str, object] = {}
    exec(cell.source, scope)
    return {name: value for name, value in scope.items() if name.isupper()}


def test_without_a_run_a_short_one_is_trained_and_then_opened(
    project: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = Started(finished)
    assert lab.main(["--no-browser"], start) == 0
    assert start.modules == ["experiments.debug_run", "jupyterlab"]
    assert start.commands[0][3:] == ["--data", "digits", "--output", "runs/lab/run"]
    assert "training a short one on the embedded digits into runs/lab/run, about a minute" in capsys.readouterr().err
    given = injected(project)
    assert (given["OUTPUT_DIR"], given["RESUME"], given["DATA"]) == ("runs/lab/run", True, "digits")


def test_the_second_time_nothing_is_trained(project: Path, finished: Path) -> None:
    lab.main(["--no-browser"], Started(finished))
    start = Started()
    assert lab.main(["--no-browser"], start) == 0
    assert start.modules == ["jupyterlab"]


def test_run_that_the_notebook_has_left_is_taken_first(project: Path, finished: Path) -> None:
    shutil.copytree(finished, project / "debug_output")
    shutil.copytree(finished, project / "runs/lab/run")
    start = Started()
    assert lab.main(["--no-browser"], start) == 0
    assert start.modules == ["jupyterlab"]
    assert injected(project)["OUTPUT_DIR"] == "debug_output"


@pytest.mark.parametrize("status", [2, 130])
def test_training_that_was_stopped_or_failed_opens_nothing(project: Path, status: int) -> None:
    start = Started(status=status)
    assert lab.main([], start) == status
    assert start.modules == ["experiments.debug_run"]


def test_run_with_a_fault_is_explored_all_the_same(project: Path, finished: Path) -> None:
    start = Started(finished, status=1)
    assert lab.main([], start) == 0
    assert start.modules == ["experiments.debug_run", "jupyterlab"]


def test_folder_asked_for_without_a_run_is_an_error(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = Started()
    assert lab.main(["--output", "nothing_here"], start) == 2
    assert (
        "'nothing_here' holds no finished run: there is no such folder; need checkpoint.pt" in capsys.readouterr().err
    )
    assert start.commands == []


def test_interrupted_training_is_gone_on_with(tmp_path: Path) -> None:
    assert "--resume" not in training_command(tmp_path)
    (tmp_path / "checkpoint.pt").touch()
    assert training_command(tmp_path)[-1] == "--resume"


def test_parameters_rebuild_the_configuration_of_the_run(finished: Path) -> None:
    assert explorable(finished) == {
        "PRESET": "smoke",
        "DATA": "digits",
        "DATA_ROOT": "data",
        "EPOCHS": 2,
        "BATCH_SIZE": 20,
        "LIMIT": 40,
        "OUTPUT_DIR": finished.as_posix(),
        "RESUME": True,
    }


def test_run_with_settings_beyond_the_parameters_is_not_taken_up(
    project: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(finished, project / "debug_output")
    state = load_checkpoint(folder / "checkpoint.pt")
    state["config"]["peak"] = 0.5
    (folder / "checkpoint.pt").write_bytes(state_bytes(state))
    with pytest.raises(LabRunError, match=r"no parameter for \(peak\): explore it in a cell with explorers\.load_run"):
        explorable(folder)
    start = Started(finished)
    assert lab.main([], start) == 0
    assert start.modules == ["experiments.debug_run", "jupyterlab"]
    assert "passed over: the run has settings" in capsys.readouterr().err


def test_unfinished_and_unreadable_runs_are_told_as_such(tmp_path: Path, finished: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    state = load_checkpoint(folder / "checkpoint.pt")
    shorter = {**state["history"], "records": state["history"]["records"][:1]}
    (folder / "checkpoint.pt").write_bytes(state_bytes({**state, "history": shorter}))
    with pytest.raises(LabRunError, match="stopped after 1 of 2 epochs: finish it first"):
        explorable(folder)
    (folder / "run.json").write_text("{")
    with pytest.raises(LabRunError, match="cannot be read"):
        explorable(folder)
    (folder / "run.json").unlink()
    with pytest.raises(LabRunError, match=r"need run\.json"):
        explorable(folder)


def test_copy_is_written_anew_unless_its_cells_were_edited(project: Path, finished: Path) -> None:
    notebook, copy = project / "notebooks/codeq_walkthrough.ipynb", project / "copy.ipynb"
    lab_copy.write_copy(copy, {"EPOCHS": 3}, notebook)
    executed = nbformat.read(copy, as_version=4)
    executed.cells[-1].outputs = [nbformat.v4.new_output("stream", text="2")]
    nbformat.write(executed, copy)
    assert "a copy of codeq_walkthrough.ipynb" in lab_copy.write_copy(copy, {"EPOCHS": 4}, notebook)
    assert "EPOCHS = 4" in copy.read_text()
    edited = nbformat.read(copy, as_version=4)
    edited.cells.append(new_code_cell("mine"))
    nbformat.write(edited, copy)
    assert "your edited copy" in lab_copy.write_copy(copy, {"EPOCHS": 5}, notebook)
    assert "EPOCHS = 4" in copy.read_text()
    copy.write_text("not a notebook any more")
    assert lab_copy.is_edited(copy)
    assert [path.name for path in project.glob(".*")] == []


def test_parameter_that_the_notebook_does_not_have_is_an_error(project: Path) -> None:
    notebook = project / "notebooks/codeq_walkthrough.ipynb"
    with pytest.raises(NotebookInputError, match="unknown parameter 'NO_SUCH'"):
        lab_copy.write_copy(project / "copy.ipynb", {"NO_SUCH": 1}, notebook)


def test_notebook_of_this_project_has_every_parameter_that_is_given(tmp_path: Path, finished: Path) -> None:
    lab_copy.write_copy(tmp_path / "copy.ipynb", explorable(finished))
    assert "RESUME = True" in (tmp_path / "copy.ipynb").read_text()


def test_server_opens_the_copy_below_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "is_root", lambda: False)
    monkeypatch.setattr(lab, "has_browser", lambda: True)
    command = lab.server_command(lab.COPY, port=9000)
    assert command[1:] == [
        "-m",
        "jupyterlab",
        f"--ServerApp.root_dir={lab.ROOT}",
        "--LabApp.default_url=/lab/tree/runs/lab/codeq_walkthrough.ipynb",
        "--ServerApp.port=9000",
    ]
    monkeypatch.setattr(lab, "is_root", lambda: True)
    assert "--allow-root" in lab.server_command(lab.COPY)


def test_without_a_browser_the_address_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lab, "has_browser", lambda: False)
    assert "--no-browser" in lab.server_command(lab.COPY)
    assert "open the address that JupyterLab prints" in capsys.readouterr().err


def test_a_browser_takes_a_display_on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab.webbrowser, "get", lambda: object())
    assert not lab.has_browser({}, "linux")
    assert lab.has_browser({"DISPLAY": ":0"}, "linux")
    assert lab.has_browser({}, "darwin")

    def none() -> None:
        raise lab.webbrowser.Error("could not locate runnable browser")

    monkeypatch.setattr(lab.webbrowser, "get", none)
    assert not lab.has_browser({"DISPLAY": ":0"}, "linux")


@pytest.mark.parametrize("port", ["-1", "65536", "http"])
def test_port_is_a_port(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        lab.main(["--port", port])
    assert stop.value.code == 2
    assert "need a port from 0" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="signals are sent as POSIX does")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_leave_the_end_to_what_was_started(tmp_path: Path, number: int) -> None:
    """A server that takes a moment to save is waited for, and its exit status is the command's."""
    child = tmp_path / "child.py"
    child.write_text(
        "import pathlib, signal, sys, time\n"
        "def end(*_):\n"
        "    time.sleep(0.3)\n"
        "    pathlib.Path('saved').touch()\n"
        "    sys.exit(7)\n"
        "signal.signal(signal.SIGINT, end)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "pathlib.Path('ready').touch()\n"
        "time.sleep(60)\n"
    )
    code = f"import sys; from experiments.lab import run_to_end; sys.exit(run_to_end([sys.executable, {str(child)!r}]))"
    environment = {**os.environ, "PYTHONPATH": str(Path(lab.__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    assert process.wait(30) == 7
    assert (tmp_path / "saved").exists()

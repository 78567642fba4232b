"""`make lab` decides what to train, what to open and how to start, without starting anything.

Oracle: a run made by the script itself, on few images, is what has to be resumed. The server itself is started in
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
from experiments.headless import NotebookInputError, parameter_defaults, write_copy

PARAMETERS = 'DATA = "auto"\nDATA_ROOT = "data"\nEPOCHS = None\nOUTPUT_DIR = "debug_output"\nRESUME = False'


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run: two epochs on 40 digits."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    arguments = ["--data", "digits", "--epochs", "2", "--limit", "40", "--batch-size", "20", "--output", str(folder)]
    assert debug_run.main(arguments) in (0, 1)
    return folder


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a notebook and nothing else, and the command takes it for its own."""
    notebook = tmp_path / lab.NOTEBOOK
    notebook.parent.mkdir()
    cells = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), new_code_cell("1 + 1")]
    nbformat.write(new_notebook(cells=cells), notebook)
    monkeypatch.setattr(lab, "ROOT", tmp_path)
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
    """The parameters in the copy that was opened."""
    copy = nbformat.read(project / lab.COPY, as_version=4)
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
    told = capsys.readouterr().err
    assert "training a short one on the embedded digits into runs/lab/run, about a minute" in told
    assert "exploring the run in runs/lab/run: preset smoke, 2 epochs on digits" in told
    assert injected(project) == {"DATA_ROOT": "data", "OUTPUT_DIR": "runs/lab/run", "RESUME": True}
    again = Started()
    assert lab.main(["--no-browser"], again) == 0
    assert again.modules == ["jupyterlab"], "the second time nothing is trained"


def test_a_run_in_the_usual_folder_is_taken_first(project: Path, finished: Path) -> None:
    shutil.copytree(finished, project / "debug_output")
    shutil.copytree(finished, project / lab.OWN)
    start = Started()
    assert lab.main(["--no-browser"], start) == 0
    assert start.modules == ["jupyterlab"]
    assert injected(project)["OUTPUT_DIR"] == "debug_output"


@pytest.mark.parametrize(("status", "opened"), [(1, True), (2, False), (130, False)])
def test_a_training_that_failed_opens_nothing_but_a_faulty_run_is_explored(
    project: Path, finished: Path, status: int, opened: bool
) -> None:
    start = Started(finished, status)
    assert lab.main([], start) == (0 if opened else status)
    assert start.modules == ["experiments.debug_run", *["jupyterlab"] * opened]


def test_an_interrupted_training_is_resumed(tmp_path: Path) -> None:
    assert "--resume" not in lab.training_command(tmp_path)
    (tmp_path / "checkpoint.pt").touch()
    assert lab.training_command(tmp_path)[-1] == "--resume"


def test_runs_that_cannot_be_explored_are_named_with_the_reason(
    project: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(finished, project / "debug_output")
    (folder / "run.json").write_text("{")
    start = Started(finished)
    assert lab.main([], start) == 0
    assert start.modules == ["experiments.debug_run", "jupyterlab"], "another run is trained"
    assert "skipped: 'debug_output/run.json' cannot be read" in capsys.readouterr().err
    for name, reason in (("debug_output", "run.json' cannot be read"), ("nothing", "there is no such folder")):
        start = Started()
        assert lab.main(["--output", name], start) == 2
        assert reason in capsys.readouterr().err
        assert start.commands == []
    (folder / "run.json").unlink()
    with pytest.raises(ValueError, match=r"no finished run: in it are .*; need run\.json"):
        lab.finished_run(folder)


def test_a_run_that_was_stopped_is_to_be_finished_first(tmp_path: Path) -> None:
    arguments = ["--data", "digits", "--epochs", "2", "--limit", "40", "--batch-size", "20", "--output", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch:

        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr("experiments.notebook.TerminalProgress.epoch_done", stop)
        assert debug_run.main(arguments) == 130
    with pytest.raises(ValueError, match="stopped after 1 of 2 epochs: finish it first"):
        lab.finished_run(tmp_path)


def test_copy_is_written_anew_unless_its_cells_were_edited(project: Path) -> None:
    copy = project / "copy.ipynb"
    assert write_copy(lab.NOTEBOOK, copy, {"EPOCHS": 3})
    executed = nbformat.read(copy, as_version=4)
    executed.cells[-1].outputs = [nbformat.v4.new_output("stream", text="2")]
    nbformat.write(executed, copy)
    assert write_copy(lab.NOTEBOOK, copy, {"EPOCHS": 4})
    assert "EPOCHS = 4" in copy.read_text()
    edited = nbformat.read(copy, as_version=4)
    edited.cells.append(new_code_cell("mine"))
    nbformat.write(edited, copy)
    assert not write_copy(lab.NOTEBOOK, copy, {"EPOCHS": 5})
    assert "EPOCHS = 4" in copy.read_text()
    copy.write_text("not a notebook any more")
    assert not write_copy(lab.NOTEBOOK, copy, {"EPOCHS": 5})
    assert [path.name for path in project.glob(".*")] == []
    with pytest.raises(NotebookInputError, match="unknown parameter 'NO_SUCH'"):
        write_copy(lab.NOTEBOOK, project / "other.ipynb", {"NO_SUCH": 1})


def test_notebook_of_this_project_has_every_parameter_that_is_given() -> None:
    notebook = nbformat.read(lab.ROOT / lab.NOTEBOOK, as_version=4)
    assert parameter_defaults(notebook).keys() >= {"DATA_ROOT", "OUTPUT_DIR", "RESUME"}


@pytest.mark.parametrize(("display", "root"), [(":0", False), ("", False), ("", True)])
def test_server_opens_the_copy_in_a_browser_where_there_is_a_display(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], display: str, root: bool
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "geteuid", lambda: 0 if root else 1000)
    for name in lab.DISPLAYS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DISPLAY", display)
    command = lab.server_command(lab.COPY, port=9000)
    assert command[1:6] == [
        "-m",
        "jupyterlab",
        f"--ServerApp.root_dir={lab.ROOT}",
        "--LabApp.default_url=/lab/tree/runs/lab/codeq_walkthrough.ipynb",
        "--ServerApp.port=9000",
    ]
    assert command[6:] == ["--allow-root"] * root + ["--no-browser"] * (not display)
    assert ("open the address that JupyterLab prints" in capsys.readouterr().err) == (not display)


@pytest.mark.parametrize("port", ["-1", "65536", "http"])
def test_port_is_a_port(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        lab.main(["--port", port])
    assert stop.value.code == 2
    assert "need a port from 0" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals are sent as POSIX does")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_leave_the_end_to_what_was_started(tmp_path: Path, number: int) -> None:
    """A server that takes a moment to save is waited for, and its exit status is the command's.

    Slow: real processes.
    """
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

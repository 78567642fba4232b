"""`make lab` decides what to train, what to open and how to start, without starting anything.

Oracle: a run made by the script itself, on few images, is what has to be resumed. The server itself is started in
tests/browser.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import jupyterlab.labapp
import nbformat
import pytest
from nbformat.sign import NotebookNotary
from nbformat.v4 import new_code_cell, new_notebook

from experiments import debug_run, lab
from experiments.headless import parameter_defaults, read_notebook
from experiments.headless.execution import Execution
from src.storage import Notify

PARAMETERS = 'DATA = "auto"\nDATA_ROOT = "data"\nEPOCHS = None\nOUTPUT_DIR = "debug_output"\nRESUME = False'
FEW = ["--data", "digits", "--epochs", "2", "--limit", "40", "--batch-size", "20", "--output"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run: two epochs on 40 digits."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert debug_run.main([*FEW, str(folder)]) in (0, 1)
    return folder


class Project:
    """A project with a notebook and nothing else; what would be started is noted. A training ends as `finished`."""

    def __init__(self, finished: Path) -> None:
        self.finished, self.status = finished, 0
        self.trained: list[list[str]] = []
        self.served: list[list[str]] = []
        self.execution = 0
        self.executed: list[dict[str, object]] = []

    def train(self, command: list[str]) -> int:
        self.trained.append(command)
        if self.status < 2:
            shutil.copytree(self.finished, command[command.index("--output") + 1])
        return self.status

    def execute(self, path: Path, *, notify: Notify) -> Execution:
        notify("0:00  a chapter")
        self.executed.append(parameter_defaults(read_notebook(path)))
        return Execution(read_notebook(path), "cell 2 failed" * bool(self.execution), self.execution)


@pytest.fixture
def project(tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    cells = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), new_code_cell("1 + 1")]
    (tmp_path / lab.NOTEBOOK).parent.mkdir()
    nbformat.write(new_notebook(cells=cells), tmp_path / lab.NOTEBOOK)
    project = Project(finished)
    monkeypatch.setattr(lab, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(debug_run, "main", project.train)
    monkeypatch.setattr(lab, "execute", project.execute)
    monkeypatch.setattr(jupyterlab.labapp, "main", project.served.append)
    return project


def test_without_a_run_a_short_one_is_trained_once_and_then_opened(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lab.main(["--no-browser"]) == 0
    assert project.trained == [["--data", "digits", "--output", "runs/lab/run"]]
    told = capsys.readouterr().err
    assert "training a short one on the embedded digits into runs/lab/run, about two minutes" in told
    assert "exploring the run in runs/lab/run: preset smoke, 2 epochs on digits" in told
    given = {"DATA_ROOT": "data", "OUTPUT_DIR": "runs/lab/run", "RESUME": True}
    assert project.executed == [{"DATA": "auto", "EPOCHS": None, **given}], "in the one cell of parameters"
    assert lab.main(["--no-browser"]) == 0
    assert (len(project.trained), len(project.executed), len(project.served)) == (1, 1, 2)
    shutil.copytree(project.finished, "debug_output")
    assert lab.main(["--no-browser"]) == 0
    assert project.executed[1]["OUTPUT_DIR"] == "debug_output", "a run in the usual folder is taken first"


@pytest.mark.parametrize(("status", "opened"), [(1, True), (2, False), (130, False)])
def test_a_training_that_failed_opens_nothing_but_a_faulty_run_is_explored(
    project: Project, status: int, opened: bool
) -> None:
    project.status = status
    assert lab.main([]) == (0 if opened else status)
    assert len(project.served) == opened


def test_an_interrupted_training_is_resumed(project: Project) -> None:
    lab.OWN.mkdir(parents=True)
    (lab.OWN / "checkpoint.pt").touch()
    project.status = 130
    assert lab.main([]) == 130
    assert project.trained[0][-1] == "--resume"


def test_runs_that_cannot_be_explored_are_named_with_the_reason(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(project.finished, Path("debug_output"))
    (folder / "run.json").write_text("{")
    assert lab.main([]) == 0
    assert len(project.trained) == 1, "another run is trained"
    assert "skipped: 'debug_output/run.json' cannot be read" in capsys.readouterr().err
    for name, reason in (("debug_output", "run.json' cannot be read"), ("nothing", "there is no such folder")):
        assert lab.main(["--output", name]) == 2
        assert reason in capsys.readouterr().err
    assert len(project.served) == 1
    (folder / "run.json").unlink()
    with pytest.raises(ValueError, match="not finished: 2 of 2 epochs, in it are"):
        lab.finished_run(folder)


def test_a_run_that_was_stopped_is_to_be_finished_first(tmp_path: Path) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.notebook.ProgressBar.epoch_done", stop)
        assert debug_run.main([*FEW, str(tmp_path)]) == 130
    with pytest.raises(ValueError, match=r"not finished: 1 of 2 epochs, .*; finish it first"):
        lab.finished_run(tmp_path)


def test_copy_is_executed_anew_for_a_newer_run_unless_its_cells_were_edited(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    copy, summary = Path("copy.ipynb"), tmp_path / "run.json"
    summary.touch()
    os.utime(summary, (0, 0))
    for given, executed in ((3, 1), (3, 1), (4, 2)):
        assert lab.execute_copy(copy, {"EPOCHS": given}, summary) == 0
        assert len(project.executed) == executed
    assert NotebookNotary().check_signature(nbformat.read(copy, as_version=4)), "JupyterLab does not trust its outputs"
    assert capsys.readouterr().err.count("0:00  a chapter") == 2
    os.utime(copy, (0, 0))
    lab.execute_copy(copy, {"EPOCHS": 4}, summary)
    assert len(project.executed) == 3
    edited = nbformat.read(copy, as_version=4)
    edited.cells.append(new_code_cell("mine"))
    nbformat.write(edited, copy)
    lab.execute_copy(copy, {"EPOCHS": 5}, summary)
    assert "copy.ipynb was edited and stays as it is" in capsys.readouterr().err
    assert "EPOCHS = 4" in copy.read_text()
    lab.COPY.parent.mkdir(parents=True)
    lab.COPY.write_text("not a notebook any more")
    assert lab.main([]) == 2
    assert "is not a Jupyter notebook" in capsys.readouterr().err


@pytest.mark.parametrize(("status", "exit_status", "opened"), [(1, 0, 1), (130, 130, 0)])
def test_a_notebook_with_a_failed_cell_is_opened_and_an_interrupted_one_is_not(
    project: Project, status: int, exit_status: int, opened: int
) -> None:
    project.execution = status
    assert lab.main([]) == exit_status
    assert len(project.served) == opened


def test_notebook_of_this_project_has_every_parameter_that_is_given() -> None:
    notebook = nbformat.read(lab.ROOT / lab.NOTEBOOK, as_version=4)
    assert parameter_defaults(notebook).keys() >= {"DATA_ROOT", "OUTPUT_DIR", "RESUME"}


def test_server_opens_the_copy(project: Project) -> None:
    assert lab.serve(lab.COPY, port=9000, show=False) == 0
    settings = lab.ROOT / "runs/lab/settings"
    assert json.loads((settings / "overrides.json").read_text()) == lab.SETTINGS
    assert project.served == [
        [
            f"--ServerApp.root_dir={lab.ROOT}",
            "--LabApp.default_url=/lab/tree/runs/lab/codeq_walkthrough.ipynb",
            "--allow-root",
            f"--LabApp.app_settings_dir={settings}",
            "--ServerApp.port=9000",
            "--no-browser",
        ]
    ]

"""`make lab` decides what to train, what to open and how to start, without starting anything.

Oracle: a run made by the script itself, on few images, is what has to be resumed. The server itself is started in
tests/browser.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import jupyterlab.labapp
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from experiments import debug_run, lab
from experiments.headless import parameter_defaults

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

    def train(self, command: list[str]) -> int:
        self.trained.append(command)
        if self.status < 2:
            shutil.copytree(self.finished, command[command.index("--output") + 1])
        return self.status

    @property
    def injected(self) -> dict[str, object]:
        """The parameters in the copy that was opened."""
        copy = nbformat.read(lab.COPY, as_version=4)
        (cell,) = [cell for cell in copy.cells if "injected-parameters" in cell.metadata.get("tags", [])]
        scope: dict[str, object] = {}
        exec(cell.source, scope)
        return {name: value for name, value in scope.items() if name.isupper()}


@pytest.fixture
def project(tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    cells = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), new_code_cell("1 + 1")]
    (tmp_path / lab.NOTEBOOK).parent.mkdir()
    nbformat.write(new_notebook(cells=cells), tmp_path / lab.NOTEBOOK)
    project = Project(finished)
    monkeypatch.setattr(lab, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(debug_run, "main", project.train)
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
    assert project.injected == {"DATA_ROOT": "data", "OUTPUT_DIR": "runs/lab/run", "RESUME": True}
    assert lab.main(["--no-browser"]) == 0
    assert (len(project.trained), len(project.served)) == (1, 2)
    shutil.copytree(project.finished, "debug_output")
    assert lab.main(["--no-browser"]) == 0
    assert project.injected["OUTPUT_DIR"] == "debug_output", "a run in the usual folder is taken first"


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


def test_copy_is_written_anew_unless_its_cells_were_edited(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path("copy.ipynb")
    assert lab.write_copy(copy, {"EPOCHS": 3})
    executed = nbformat.read(copy, as_version=4)
    executed.cells[-1].outputs = [nbformat.v4.new_output("stream", text="2")]
    nbformat.write(executed, copy)
    assert lab.write_copy(copy, {"EPOCHS": 4})
    edited = nbformat.read(copy, as_version=4)
    edited.cells.append(new_code_cell("mine"))
    nbformat.write(edited, copy)
    assert not lab.write_copy(copy, {"EPOCHS": 5})
    assert "EPOCHS = 4" in copy.read_text()
    lab.COPY.parent.mkdir(parents=True)
    lab.COPY.write_text("not a notebook any more")
    assert lab.main([]) == 2
    assert "is not a Jupyter notebook" in capsys.readouterr().err


def test_notebook_of_this_project_has_every_parameter_that_is_given() -> None:
    notebook = nbformat.read(lab.ROOT / lab.NOTEBOOK, as_version=4)
    assert parameter_defaults(notebook).keys() >= {"DATA_ROOT", "OUTPUT_DIR", "RESUME"}


def test_server_opens_the_copy(project: Project) -> None:
    assert lab.serve(lab.COPY, port=9000, show=False) == 0
    assert project.served == [
        [
            f"--ServerApp.root_dir={lab.ROOT}",
            "--LabApp.default_url=/lab/tree/runs/lab/codeq_walkthrough.ipynb",
            "--allow-root",
            "--ServerApp.port=9000",
            "--no-browser",
        ]
    ]

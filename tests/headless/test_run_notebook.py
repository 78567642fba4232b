"""The headless runner on tiny notebooks.

Oracles: values that the notebook itself prints, and exit statuses of the real command. Kernels are slow to start, so
the tests that need one share it where they can. The page that the runner writes is tested in test_page.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from experiments.headless import (
    NotebookInputError,
    execute,
    execution,
    inject,
    parameter_defaults,
    parameters,
    parse_settings,
    to_html,
)
from experiments.pipeline import PRESETS, WISHES, configure
from experiments.run_notebook import main
from src.training import DEVICES
from tests.storage.test_folder_lock import another_process

ROOT = Path(__file__).resolve().parents[2]
PARAMETERS = 'DATA = "auto"\nEPOCHS = None  # None: the preset\'s\nSEED = 0\nFAST = False'
DEFAULTS = {"DATA": "auto", "EPOCHS": None, "SEED": 0, "FAST": False}


def notebook(*cells: str, parameters: str | None = PARAMETERS, summary: int | None = None) -> NotebookNode:
    """A lesson: a title, the parameters cell, a section, then the code cells given, number `summary` tagged so."""
    result = new_notebook(cells=[new_markdown_cell("# A *small* lesson")])
    if parameters is not None:
        result.cells.append(new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    result.cells.append(new_markdown_cell("## A section\n\n```\n# no heading\n```"))
    result.cells.extend(new_code_cell(cell) for cell in cells)
    if summary is not None:
        result.cells[summary].metadata["tags"] = ["summary"]
    return result


def written(path: Path, book: NotebookNode) -> Path:
    nbformat.write(book, path)
    return path


# Parameters: no kernel starts.


def test_defaults_are_read_from_the_parameters_cell() -> None:
    assert parameter_defaults(notebook()) == DEFAULTS


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("EPOCHS=3", 3),
        ("EPOCHS=None", None),
        ("FAST=True", True),
        ("FAST=false", False),
        ("DATA=digits", "digits"),
        ("TITLE=2024", "2024"),
        ("TITLE='quoted'", "quoted"),
        ("TITLE=folder:/a b/it's=x", "folder:/a b/it's=x"),
    ],
)
def test_setting_becomes_a_value_of_the_default_type(setting: str, value: object) -> None:
    parsed = parse_settings([setting], {**DEFAULTS, "TITLE": ""})[setting.partition("=")[0]]
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["EPOCH=3"], r"unknown parameter 'EPOCH': did you mean EPOCHS\? allowed are DATA, EPOCHS, SEED, FAST"),
        (["EPOCHS=abc"], "EPOCHS='abc': need a number or None"),
        (["EPOCHS=True"], "EPOCHS=True: need a number or None"),
        (["SEED=None"], "SEED=None: need a value of the kind of the default, 0"),
        (["FAST=1"], "FAST=1: need a value of the kind of the default, False"),
        (["SEED"], "--set SEED: need NAME=VALUE"),
    ],
)
def test_wrong_setting_is_one_clear_error(settings: list[str], message: str) -> None:
    with pytest.raises(NotebookInputError, match=message):
        parse_settings(settings, DEFAULTS)


ALL = {
    "PRESET": "debug",
    "DATA": "auto",
    "EPOCHS": None,
    "BATCH_SIZE": None,
    "LIMIT": None,
    "SEED": 0,
    "DEVICE": "auto",
}
ALL |= {"BASELINE": "auto", "OUTPUT_DIR": "debug_output"}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("DATA=cifar", r"DATA=cifar is unknown: did you mean cifar10\? allowed are auto, cifar10, digits, folder:PATH"),
        ("DATA=folder:/no/such", "there is no folder '/no/such/train'; need train/"),
        ("PRESET=papper", r"did you mean paper\?"),
        ("DEVICE=gpu", r"did you mean cuda\?"),
        ("BASELINE=yes", "BASELINE=yes is unknown: allowed are auto, true, false"),
        ("EPOCHS=0", "EPOCHS=0: need 1 or more"),
        ("BATCH_SIZE=1", "need 2 or more"),
        ("SEED=-1", "need 0 or more"),
        ("OUTPUT_DIR=setup.cfg/run", "cannot be written"),
        ("OUTPUT_DIR=held", "in use by another run"),
    ],
)
def test_a_value_that_the_pipeline_would_refuse_is_refused_before_a_kernel_starts(
    setting: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "setup.cfg").touch()
    with another_process(tmp_path / "held"), pytest.raises(ValueError, match=message):
        parse_settings([setting], ALL)


def test_what_is_allowed_is_what_the_pipeline_allows() -> None:
    assert set(parameters.CHOICES["PRESET"]) == PRESETS.keys()
    assert parameters.CHOICES["DEVICE"] == DEVICES
    assert parameters.CHOICES["BASELINE"] == WISHES
    for name, values in parameters.CHOICES.items():
        for value in values:
            assert value == "folder:PATH" or parse_settings([f"{name}={value}"], ALL) == {name: value}
    for source in parameters.CHOICES["DATA"][:-1]:
        configure(data=source)
    for name, lowest in parameters.LOWEST.items():
        assert getattr(configure(**{name.lower(): lowest}), name.lower()) == lowest
        with pytest.raises(ValueError, match=name.lower()):
            configure(**{name.lower(): lowest - 1})


def test_a_notebook_without_a_parameters_cell_has_none_to_set() -> None:
    with pytest.raises(NotebookInputError, match="no cell tagged 'parameters'"):
        parse_settings(["SEED=1"], parameter_defaults(notebook(parameters=None)))


def test_injected_cell_follows_the_parameters_and_replaces_an_older_one() -> None:
    book = inject(inject(notebook("1"), {"SEED": 1}), {"DATA": 'a "b"\\'})
    nbformat.validate(book)
    tagged = [i for i, cell in enumerate(book.cells) if "injected-parameters" in cell.metadata.get("tags", [])]
    assert tagged == [2]
    scope: dict[str, object] = {}
    exec(book.cells[2].source, scope)
    assert scope["DATA"] == 'a "b"\\'
    assert "SEED" not in scope


@pytest.mark.parametrize("source", ["SEED = int(3)", "import os", "SEED = ="])
def test_parameters_cell_that_computes_is_an_error(source: str) -> None:
    with pytest.raises(NotebookInputError, match="only NAME = literal"):
        parameter_defaults(notebook(parameters=source))


def test_bad_input_ends_with_status_2_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a kernel was about to start")

    monkeypatch.setattr(execution, "_Runner", never)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    lesson = written(tmp_path / "lesson.ipynb", notebook("1"))
    device = written(tmp_path / "device.ipynb", notebook("1", parameters="DEVICE = 'auto'"))
    (tmp_path / "broken.ipynb").write_text("{]")
    (tmp_path / "list.ipynb").write_text("[1]")
    folder = tmp_path / "folder"
    folder.mkdir()
    out = ["--output-notebook", str(tmp_path / "o.ipynb"), "--html", str(tmp_path / "o.html")]
    for arguments, message in [
        (["--notebook", str(lesson), "--set", "SED=1"], "did you mean SEED"),
        (["--notebook", str(tmp_path / "none.ipynb")], "No such file"),
        (["--notebook", str(folder)], "cannot read"),
        (["--notebook", str(tmp_path / "broken.ipynb")], "not a Jupyter notebook"),
        (["--notebook", str(tmp_path / "list.ipynb")], "not a Jupyter notebook"),
        (["--notebook", str(lesson), "--output-notebook", str(lesson)], "the notebook itself"),
        (["--notebook", str(lesson), "--html", str(folder)], "is a folder; name a file in it"),
        (["--notebook", str(lesson), "--html", str(lesson / "x.html")], "cannot be written"),
        (["--notebook", str(lesson), "--render-only"], "No such file"),
        (["--notebook", str(device), "--set", "DEVICE=cuda"], "device 'cuda' is not present here: use one of cpu"),
    ]:
        assert main([*out, *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("o.*"))


# Execution: a kernel each, which takes seconds to start. One of them is enough for the quick suite.


@pytest.mark.slow
def test_success_with_parameters_widget_and_stderr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    lesson = written(
        tmp_path / "lesson.ipynb",
        notebook(
            "import json, os, sys\n"
            "print(json.dumps([EPOCHS, DATA, SEED, sys.executable, os.getcwd(), os.environ.get('MPLBACKEND', '')]))\n"
            "print('be warned', file=sys.stderr)",
            "import ipywidgets\nipywidgets.IntSlider()",
            "import pathlib, time\n"
            "print('Epoch 1')\n"
            "for _ in range(200):\n"
            "    pathlib.Path('heard').exists() or time.sleep(0.1)\n"
            "print('told while it runs:', pathlib.Path('heard').exists())",
            summary=-1,
        ),
    )
    lines: list[str] = []
    narrated: list[str] = []

    def narrate(line: str) -> None:
        narrated.append(line)
        (tmp_path / "heard").touch()  # what the cell waits for

    result = execute(lesson, {"EPOCHS": 2, "DATA": "it's"}, notify=lines.append, narrate=narrate, cell_timeout=None)
    assert (result.failure, result.exit_status) == ("", 0)
    printed = {output.get("name"): output.get("text") for cell in result.notebook.cells[4:5] for output in cell.outputs}
    values = json.loads(printed["stdout"])
    assert values[:3] == [2, "it's", 0]
    assert [os.path.realpath(path) for path in values[3:5]] == [os.path.realpath(sys.executable), str(tmp_path)]
    assert values[5] != "Agg"
    assert [re.sub(r"\d+:\d\d", "0:00", line) for line in lines] == ["0:00  A small lesson", "0:00  A section"]
    assert narrated == ["Epoch 1", "told while it runs: True"]
    assert all("outputs" not in cell or not cell.outputs for cell in nbformat.read(lesson, as_version=4).cells)
    page = to_html(result.notebook)
    assert re.search(r'<pre class="output stderr *" tabindex="0">be warned', page)
    assert "IntSlider(value" not in page


def test_failing_cell_is_saved_with_its_number_line_and_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "helper.py").write_text("def broken():\n    raise ValueError('two is not three')\n")
    lesson = written(tmp_path / "lesson.ipynb", notebook("print('kept')", "", "import helper\n\nhelper.broken()", "0"))
    executed, page = tmp_path / "out/executed.ipynb", tmp_path / "out/page.html"
    files = ["--output-notebook", str(executed), "--html", str(page)]
    executed.parent.mkdir()
    page.write_text("the last good page")
    assert main(["--notebook", str(lesson), *files]) == 1
    told = capsys.readouterr()
    assert "failed at cell 6 (code cell 3), line 3: helper.broken()" in told.err
    assert "ValueError: two is not three" in told.err
    assert "page.html stay as an earlier run left them" in told.err
    assert "page.failed.html" in told.out
    assert page.read_text() == "the last good page"
    failed_page = page.with_name("page.failed.html")
    assert sorted(path.name for path in executed.parent.iterdir()) == [
        "executed.failed.ipynb",
        "page.failed.html",
        "page.html",
    ]
    cells = nbformat.read(executed.with_name("executed.failed.ipynb"), as_version=4).cells
    assert cells[3].outputs[0].text == "kept\n"
    assert cells[5].outputs[-1].ename == "ValueError"
    assert cells[6].outputs == []
    html = failed_page.read_text()
    assert "This run stopped before the end" in html
    assert "ValueError: two is not three" in html
    # A page that is written again from the notebook of the failed run replaces the failed page alone.
    failed_page.unlink()
    shutil.copy(executed.with_name("executed.failed.ipynb"), executed)
    assert main(["--render-only", *files]) == 0
    assert failed_page.read_text() == html
    assert page.read_text() == "the last good page"


@pytest.mark.slow
def test_a_page_that_cannot_be_written_is_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    lesson = written(tmp_path / "lesson.ipynb", notebook(f"import os; os.mkdir({str(page)!r})"))
    assert (
        main(["--notebook", str(lesson), "--output-notebook", str(tmp_path / "done.ipynb"), "--html", str(page)]) == 2
    )
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("run_notebook: ")
    assert f"not written into {tmp_path}: " in last
    assert (tmp_path / "done.ipynb").is_file()


@pytest.mark.slow
def test_cell_out_of_time_is_interrupted_saved_and_reported_as_such(tmp_path: Path) -> None:
    # The cell catches the interrupt and ends well: that must not let the next one start.
    caught = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('tidied up')"
    result = execute(written(tmp_path / "lesson.ipynb", notebook(caught, "print('late')")), cell_timeout=1)
    assert result.exit_status == 1
    assert "timed out at cell 4 (code cell 2)" in result.failure
    assert "CellTimeoutError: took more than 1 seconds" in result.failure
    assert "tidied up" in result.notebook.cells[3].outputs[0].text
    assert result.notebook.cells[3].outputs[-1].ename == "CellTimeoutError"
    assert result.notebook.cells[4].outputs == []
    assert result.notebook.metadata["run"]["seconds"] < 30


@pytest.mark.slow
def test_dead_kernel_is_reported_as_such(tmp_path: Path) -> None:
    lesson = notebook("print('alive', flush=True)", "import os\nos._exit(7)")
    result = execute(written(tmp_path / "lesson.ipynb", lesson))
    assert result.exit_status == 1
    assert result.failure.startswith("kernel died at cell 5 (code cell 3)")
    assert "DeadKernelError: the kernel's process ended" in result.failure
    assert result.notebook.cells[3].outputs[0].text == "alive\n"
    assert result.notebook.metadata["run"]["status"] == "failed"


@pytest.mark.slow
def test_kernel_that_does_not_start_is_reported_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = {"argv": [sys.executable, "-c", "pass"], "display_name": "nothing", "language": "python"}
    monkeypatch.setattr("ipykernel.kernelspec.get_kernel_dict", lambda: nothing)
    result = execute(written(tmp_path / "lesson.ipynb", notebook("1")), startup_timeout=20)
    assert result.exit_status == 1
    assert "no kernel started" in result.failure


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals are sent as POSIX does")
def test_interrupt_keeps_what_was_executed_and_ends_with_130(tmp_path: Path) -> None:
    cell = "import pathlib, time\npathlib.Path('running').touch()\ntime.sleep(60)"
    lesson = written(tmp_path / "lesson.ipynb", notebook(cell))
    executed, page = tmp_path / "executed.ipynb", tmp_path / "page.html"
    files = [f"--notebook={lesson}", f"--output-notebook={executed}", f"--html={page}"]
    command = [sys.executable, "-m", "experiments.run_notebook", *files]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "running").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted at cell 4 (code cell 2), line 3: time.sleep(60)" in error
    assert "Traceback" not in error
    assert (
        nbformat.read(tmp_path / "executed.failed.ipynb", as_version=4).cells[3].outputs[-1].ename
        == "KeyboardInterrupt"
    )
    assert (tmp_path / "page.failed.html").exists()
    assert not page.exists()

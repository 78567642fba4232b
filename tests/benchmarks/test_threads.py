"""How OpenMP's idle threads wait: the setting reaches the runtime, and the measurement runs each setting on its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest

from experiments.benchmarks import threads

ROOT = Path(__file__).parents[2]
LOAD = "import sys, experiments, ctypes; assert 'torch' not in sys.modules; ctypes.CDLL(sys.argv[1])"


def spin_count(**settings: str) -> int:
    """What torch's own libgomp reads where `experiments` is imported before it."""
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    library = Path(spec.origin).parent / "lib" / "libgomp.so.1"
    if not library.exists():
        pytest.skip("this build of torch has another OpenMP runtime")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment = {**plain, "OMP_DISPLAY_ENV": "VERBOSE", **settings}
    command = [sys.executable, "-c", LOAD, str(library)]
    done = subprocess.run(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=True)
    found = re.search(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    assert found is not None, done.stderr
    return int(found[1])


def test_idle_threads_spin_briefly_unless_the_environment_says_otherwise() -> None:
    assert spin_count() == 10_000
    assert spin_count(OMP_WAIT_POLICY="passive") == 0
    assert spin_count(GOMP_SPINCOUNT="7") == 7
    assert spin_count(OMP_WAIT_POLICY="active") > 10**9


def test_the_notebook_imports_experiments_before_torch() -> None:
    cells = nbformat.read(ROOT / "notebooks/codeq_walkthrough.ipynb", as_version=4).cells
    lines = [line for cell in cells if cell.cell_type == "code" for line in cell.source.splitlines()]
    imports = [line.split()[1].split(".")[0] for line in lines if re.match(r"\s*(import|from) ", line)]
    assert imports.index("experiments") < imports.index("torch")


def test_every_setting_is_measured_quiet_and_busy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The child is exchanged: it prints its environment's wait policy as its time."""
    child = "import json, os; print(json.dumps({'seconds': len(os.environ.get('OMP_WAIT_POLICY', '')), 'loss': 3}))"
    monkeypatch.setattr(threads, "CHILD", child)
    monkeypatch.setenv("OMP_WAIT_POLICY", "what the package has set")
    words = ["threads", "--rounds", "1", "--busy", "1", "default", "OMP_WAIT_POLICY=passive,OMP_NUM_THREADS=1"]
    monkeypatch.setattr(sys, "argv", words)
    threads.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [["default", "0.0", "0.0", "3"], [words[-1], "7000.0", "7000.0", "3"]]


@pytest.mark.slow
def test_the_steps_of_one_epoch_are_measured() -> None:
    """A whole epoch of resnet20 on the digits."""
    found = threads.measured("OMP_NUM_THREADS=1", 0)
    assert found["seconds"] > 0
    assert json.dumps(found["loss"]) not in ("NaN", "0.0")

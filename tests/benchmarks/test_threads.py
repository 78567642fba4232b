"""How OpenMP's idle threads wait: the setting reaches the runtime before torch starts it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest

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

"""The set-up files agree with each other: pyproject.toml, requirements.lock, environment.yml, Makefile.

And the notebook finds the project, or says how to get it, wherever a front end starts its kernel. Oracles: `packaging`
reads requirements and markers, `make` itself says what it would do, and the notebook's set-up cells are run by a bare
Python in the folders where JupyterLab, VS Code, Colab or Binder would start.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import experiments

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "requirements.lock").read_text()
DIRECT = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
SUPPORTED = ("3.11.0", "3.12.0", "3.13.0")

SETUP = "\n\n".join(
    cell.source
    for cell in nbformat.read(ROOT / "notebooks/codeq_walkthrough.ipynb", as_version=4).cells
    if "setup" in cell.metadata.get("tags", [])
)
REPORT = "\nimport json; print(json.dumps([str(ROOT.resolve()), os.getcwd(), sys.path[0]]))"

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@functools.cache
def locked() -> list[Requirement]:
    """The pinned lines of the lock; a package may stand there once for each range of Python."""
    joined = LOCK.replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if line and not line.lstrip().startswith("#")]
    return [Requirement(re.split(r"\s--hash=", line)[0].strip()) for line in lines]


def pinned(name: str, python: str) -> list[str]:
    """The versions that the lock gives `name` on Linux with this Python: one, or none where a marker excludes it."""
    environment = {"python_full_version": python, "python_version": python[:4], "sys_platform": "linux"}
    return [
        str(requirement.specifier).removeprefix("==")
        for requirement in locked()
        if canonicalize_name(requirement.name) == canonicalize_name(name)
        and (requirement.marker is None or requirement.marker.evaluate(environment))
    ]


@pytest.mark.parametrize("python", SUPPORTED)
@pytest.mark.parametrize("line", DIRECT)
def test_lock_pins_every_direct_dependency_once_within_its_bounds(line: str, python: str) -> None:
    requirement = Requirement(line)
    assert {specifier.operator for specifier in requirement.specifier} == {">="}
    versions = pinned(requirement.name, python)
    assert len(versions) == 1, f"{requirement.name} on {python}: {versions}"
    assert requirement.specifier.contains(versions[0])


def test_lock_names_no_address_and_no_folder_of_a_machine() -> None:
    assert re.findall(r"\w+://\S+|--(?:extra-)?index-url|--find-links|(?<=\s)/\w+", LOCK) == []


def test_conda_and_make_want_the_same_python_and_packages() -> None:
    supported = SpecifierSet(PROJECT["requires-python"])
    assert [minor for minor in range(8, 20) if supported.contains(f"3.{minor}")] == [11, 12, 13]
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, *rest = environment["dependencies"]
    assert Requirement(python.replace(" ", "")).specifier == supported
    assert (environment["name"], rest) == (PROJECT["name"], ["pip", {"pip": ["-r requirements.lock"]}])
    assert "(3, 11) <= sys.version_info[:2] < (3, 14)" in (ROOT / "Makefile").read_text()


@needs_make
def test_make_alone_lists_every_target() -> None:
    listed = re.findall(r"^make ([\w-]+)", make(), flags=re.MULTILINE)
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert phony is not None
    assert sorted(listed) == sorted(set(phony.group(1).split()) - {"help", "venv"})


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with a blank in its name, an environment that looks installed, and commands that print what they get."""
    folder = tmp_path / "a folder"
    (folder / ".venv/bin").mkdir(parents=True)
    for name in ("Makefile", "requirements.lock"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copy(ROOT / "requirements.lock", folder / ".venv/installed.lock")
    python = folder / ".venv/bin/python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 0\nfor argument; do printf "%s\\n" "$argument"; done\n')
    python.chmod(0o755)
    return folder


AS_TYPED = 'DATA=folder:/x y/it\'s "q" $HOME `ls` $(rm) a;b'


@needs_make
@pytest.mark.parametrize(
    ("arguments", "passed_on"),
    [
        (
            ["walkthrough", AS_TYPED, "EPOCHS=3", "LIMIT="],
            ["experiments.run_notebook", "--set", AS_TYPED, "--set", "EPOCHS=3"],
        ),
        (
            ["debug", "PRESET=smoke", "OUTPUT_DIR=my runs"],
            ["experiments.debug_run", "--preset=smoke", "--output=my runs"],
        ),
        (["lab"], ["experiments.lab"]),
        (["lab", "OUTPUT_DIR=my runs"], ["experiments.lab", "--output=my runs"]),
    ],
)
def test_make_passes_parameters_on_as_they_were_typed(
    checkout: Path, arguments: list[str], passed_on: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEED", "of the environment, which is not asked")
    assert make(*arguments, folder=checkout).splitlines() == ["-m", *passed_on]


@needs_make
def test_variables_that_a_calling_make_hands_down_are_let_be(checkout: Path) -> None:
    (checkout / "parent.mk").write_text("all:\n\t@$(MAKE) debug\n")
    given = ["--no-print-directory", "CC=gcc", "PREFIX=/usr", "EPOCHS=3"]
    assert make("-f", "parent.mk", *given, folder=checkout).splitlines() == [
        "-m",
        "experiments.debug_run",
        "--epochs=3",
    ]
    assert "unknown parameter CC: allowed are PRESET" in started("debug", "CC=gcc", folder=checkout).stderr


@needs_make
def test_make_without_a_suitable_python_says_which_ones_it_looked_for(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(checkout / ".venv")
    tools = checkout / "bin"
    tools.mkdir()
    for name in ("sh", "cmp", "make"):
        (tools / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(tools))
    result = subprocess.run(["make", "test"], cwd=checkout, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "no Python 3.11, 3.12 or 3.13 found" in result.stderr
    assert not (checkout / ".venv").exists()


@pytest.fixture
def small_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose lock is one package, which pip alone can install, and which its script prints the place of."""
    folder, wheel = tmp_path / "checkout", tmp_path / "wheels/only-1.0-py3-none-any.whl"
    (folder / "experiments").mkdir(parents=True)
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("only.py", "")
        archive.writestr("only-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: only\nVersion: 1.0\n")
        archive.writestr("only-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("only-1.0.dist-info/RECORD", "")
    shutil.copy(ROOT / "Makefile", folder)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    (folder / "requirements.lock").write_text(f"only==1.0 --hash=sha256:{digest}\n")
    (folder / "experiments/debug_run.py").write_text("import only\nprint(only.__file__, __debug__)\n")
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/uv").write_text('#!/bin/sh\n[ "$1" = --version ]\n')
    (tmp_path / "tools/uv").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'tools'}:{os.environ['PATH']}")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    return folder


@needs_make
@pytest.mark.slow
def test_settings_of_pip_and_python_do_not_reach_the_environment(
    small_lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them at once, given to two makes at once, of which one installs; then a make without them."""
    elsewhere = small_lock.parent / "elsewhere"
    (elsewhere / "only-1.0.dist-info").mkdir(parents=True)
    (elsewhere / "only-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: only\nVersion: 1.0\n")
    (elsewhere / "only.py").write_text("")
    (elsewhere / "pip.conf").write_text(f"[install]\nuser = true\ntarget = {elsewhere}/a\nprefix = {elsewhere}/b\n")
    with monkeypatch.context() as harmful:
        for name in ("PIP_USER", "PIP_DRY_RUN", "PYTHONSAFEPATH", "PYTHONOPTIMIZE"):
            harmful.setenv(name, "1")
        for name in ("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PYTHONHOME", "PYTHONPATH"):
            harmful.setenv(name, str(elsewhere))
        harmful.setenv("PIP_CONFIG_FILE", str(elsewhere / "pip.conf"))
        with ThreadPoolExecutor() as pool:
            results = list(pool.map(lambda _: started("debug", folder=small_lock), range(2)))
    assert sum("Installing the pinned packages" in result.stderr for result in results) == 1, results
    results.append(started("debug", folder=small_lock))
    (place,) = {result.stdout for result in results}
    assert re.fullmatch(rf"{small_lock}/.venv/.* True\n", place), results
    assert sorted(path.name for path in elsewhere.iterdir()) == ["only-1.0.dist-info", "only.py", "pip.conf"]


@needs_make
def test_a_folder_that_can_have_no_environment_gets_the_reason_and_no_record(small_lock: Path) -> None:
    folder = small_lock.rename(small_lock.parent / "a:b")
    assert re.search("PATH separator.*\n.*the reason stands above", started("debug", folder=folder).stderr)
    assert not (folder / ".venv").exists()


def started(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    # A make that runs these tests must not lend its variables to the one tested.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def make(*arguments: str, folder: Path = ROOT) -> str:
    result = started(*arguments, folder=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout


# The first cells of the notebook, in the folders where front ends start their kernels.


def set_up(
    folder: Path, *, code: str = SETUP + REPORT, repository: str | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CODEQ_REPOSITORY")}
    if repository is not None:
        environment["CODEQ_REPOSITORY"] = repository
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("place", ["notebooks", ".", "src"], ids=["JupyterLab, VS Code", "VS Code, workspace", "other"])
def test_notebook_finds_its_checkout_also_when_its_cells_are_run_again(place: str) -> None:
    done = set_up(ROOT / place, code=f"{SETUP}\n{SETUP}{REPORT}")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [str(ROOT)] * 3


def test_notebook_that_came_alone_says_how_to_get_the_project(tmp_path: Path) -> None:
    done = set_up(tmp_path)
    assert done.returncode == 1
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("FileNotFoundError")]
    assert f"the project is not above {tmp_path.resolve()}" in message
    assert "REPOSITORY" in message
    assert "CODEQ_REPOSITORY" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_notebook_that_came_alone_clones_the_project_where_it_is_told_from_where(tmp_path: Path) -> None:
    """As on Colab: an empty working folder and an address. The second time the clone is there already."""
    origin, folder = tmp_path / "origin", tmp_path / "content"
    folder.mkdir()
    (origin / "experiments").mkdir(parents=True)
    for name in ("utils_quantization.py", "pyproject.toml", "experiments/__init__.py"):
        shutil.copy(ROOT / name, origin / name)
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    for arguments in (["init", "--quiet"], ["add", "."], [*identity, "commit", "--quiet", "-m", "all"]):
        subprocess.run(["git", *arguments], cwd=origin, check=True)
    for repository in (origin.as_uri(), ""):
        done = set_up(folder, repository=repository)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == [str((folder / "codeq-walkthrough").resolve())] * 3


def test_missing_packages_are_named_with_the_line_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    experiments.check_packages()  # all of them are here
    monkeypatch.setattr(experiments, "required", lambda: ["torch>=2.6", "no-such-package>=1.2", "nor-this"])
    with pytest.raises(ModuleNotFoundError, match=r'no-such-package, nor-this; .*%pip install "no-such-package>=1\.2"'):
        experiments.check_packages()


def test_packages_that_the_notebook_does_without_are_still_dependencies() -> None:
    declared = {experiments.name_of(line) for line in PROJECT["dependencies"]}
    assert declared >= experiments.ELSEWHERE
    assert {"torch", "numpy", "safetensors", "matplotlib"} <= {*map(experiments.name_of, experiments.required())}


@pytest.mark.parametrize("backend", ["qt4agg", "module://backend_interagg"])
def test_a_backend_that_is_gone_does_not_matter(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes seconds: a process that loads matplotlib."""
    monkeypatch.setenv("MPLBACKEND", backend)
    code = "from experiments import figures; figure = figures.style.canvas('a', 'b', 'c', height=1)"
    done = set_up(ROOT, code=f"{code}; print(len(figures.png_bytes(figure)) > 0)")
    assert done.stdout == "True\n", done.stderr


WITHOUT = """
import sys
import IPython
import experiments
for package in experiments.ELSEWHERE:  # an import of it fails, as where it is not installed
    sys.modules.setdefault(package.replace("-", "_"), None)
from experiments import doctor, pipeline
from experiments.notebook import explorers, live
shown = []
live.put = lambda data, metadata, handle=None: shown.append(sorted(data)) or "handle"
explorers.quantizer(explorers.weight_samples(0))
print(shown)
"""


def test_the_notebook_does_without_the_packages_that_only_commands_need() -> None:
    """Takes seconds: a process that loads torch."""
    done = set_up(ROOT, code=WITHOUT)
    assert done.returncode == 0, done.stderr
    assert "image/png" in done.stdout


def test_commands_that_answer_at_once_do_not_load_torch() -> None:
    """Takes seconds: a process that loads nbconvert."""
    code = "import sys, src.storage, experiments.headless, experiments.lab, experiments.run_notebook"
    done = set_up(ROOT, code=f"{code}; print('torch' in sys.modules, 'matplotlib' in sys.modules)")
    assert done.stdout == "False False\n", done.stderr

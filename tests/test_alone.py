"""The notebook without its checkout, in an environment that has only torch, numpy, matplotlib and Jupyter.

As on Colab and Kaggle, but without a network: what is installed here is linked into a bare environment or made into a
wheel for its pip, and the project is cloned from this checkout.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
import venv
import zipfile
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.tags import sys_tags

from experiments import name_of, required

ROOT = Path(__file__).resolve().parent.parent
GIVEN = ("torch", "numpy", "matplotlib", "jupyterlab", "ipykernel")
SMALL = {"DATA": '"digits"', "LIMIT": "100", "BASELINE": "False"}


def with_dependencies(names: Iterable[str]) -> dict[str, Distribution]:
    """The packages and all that they need, by name, as far as they are installed here."""
    found: dict[str, Distribution] = {}
    left, seen = [Requirement(name) for name in names], set()
    while left:
        wanted = left.pop()
        if (visit := (wanted.name, *sorted(wanted.extras))) in seen:
            continue
        seen.add(visit)
        try:
            package = found[name_of(wanted.name)] = distribution(wanted.name)
        except PackageNotFoundError:  # of another system, say
            continue
        for each in map(Requirement, package.requires or []):
            if not each.marker or any(each.marker.evaluate({"extra": extra}) for extra in wanted.extras or [""]):
                left.append(each)
    return found


def files_of(package: Distribution) -> list[str]:
    """Its files below site-packages, without what pip or Python writes when it is installed."""
    written = ("INSTALLER", "REQUESTED", "direct_url.json")
    names = [file.as_posix() for file in package.files or []]
    return [name for name in names if not name.startswith("..") and not name.endswith((*written, ".pyc"))]


def link(package: Distribution, folder: Path) -> None:
    """Put an installed package into another environment's site-packages."""
    for top in {name.split("/")[0] for name in files_of(package)}:
        if not (folder / top).exists():
            (folder / top).symlink_to(Path(str(package.locate_file(top))))


def write_wheel(package: Distribution, folder: Path) -> None:
    """The package as pip would get it from an index."""
    tags = re.findall(r"^Tag: (.*)$", package.read_text("WHEEL") or "", re.MULTILINE)
    tag = next(tag for tag in tags if tag in set(map(str, sys_tags())))
    name = re.sub(r"[-_.]+", "_", package.metadata["Name"])
    with zipfile.ZipFile(folder / f"{name}-{package.version}-{tag}.whl", "w") as wheel:
        for file in files_of(package):
            wheel.write(str(package.locate_file(file)), file)


def shorten(notebook: Path) -> None:
    """Leave the cells up to the first that loads data and those of one's own network, with small values."""
    content = nbformat.read(notebook, as_version=4)
    data = next(place for place, cell in enumerate(content.cells) if "prepare_data(" in cell.source)
    own = [cell for cell in content.cells if "own" in cell.metadata.get("tags", [])]
    content.cells = content.cells[: data + 1] + own
    for cell in content.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source += "".join(f"\n{name} = {value}" for name, value in SMALL.items())
    nbformat.write(content, notebook)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="needs git and its history")
def test_alone_it_fetches_the_project_and_installs_what_is_missing(tmp_path: Path) -> None:
    bare, wheels, folder = (tmp_path / name for name in ("bare", "wheels", "content"))
    venv.create(bare, with_pip=True)
    python = bare / "bin/python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(bare)}))
    given = with_dependencies(GIVEN)
    for package in given.values():
        link(package, site)
    wheels.mkdir()
    missing = [requirement for requirement in required() if name_of(requirement) not in given]
    for name, package in with_dependencies(missing).items():
        if name not in given:
            write_wheel(package, wheels)
    folder.mkdir()
    shorten(Path(shutil.copy(ROOT / "notebooks/codeq_walkthrough.ipynb", folder)))
    passed_on = {name: os.environ[name] for name in ("OMP_NUM_THREADS",) if name in os.environ}
    environment = {
        **passed_on,
        "PATH": f"{bare / 'bin'}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "CODEQ_REPOSITORY": ROOT.as_uri(),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
    }
    command = [str(python), "-m", "nbconvert", "--to=notebook", "--execute", "--output=done", "codeq_walkthrough.ipynb"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    cells = nbformat.read(folder / "done.ipynb", as_version=4).cells
    printed = "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))
    assert f"installing {', '.join(missing)}\n" in printed
    assert "0 predictions differ" in printed
    assert (folder / "codeq-walkthrough/resnet.py").exists()
    assert (site / "torch").is_symlink(), "what was there stays"

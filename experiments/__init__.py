"""What comes first, wherever the notebook, a command or the lab runs: how idle threads wait, and the packages needed.

Only the standard library is used here, since this runs where nothing else may be installed (Colab, a bare kernel).
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# Idle threads spin for a moment only, then sleep and leave the cores to others (docs/performance.md). OpenMP reads this
# once, when torch is loaded. What the user's own environment says wins.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Figures are files here, whatever would show them in a window; matplotlib refuses to load where the name is one that
# it no longer knows. A module, such as Jupyter's, it looks up later, if at all.
if not os.environ.get("MPLBACKEND", "module:").startswith("module:"):
    os.environ["MPLBACKEND"] = "agg"

ROOT = Path(__file__).resolve().parent.parent
# What only the commands, the page and the server need.
ELSEWHERE = frozenset({"jupyter-client", "jupyterlab", "nbclient", "nbconvert", "nbformat"})
ELSEWHERE |= {"latex2mathml", "pygments"}


def required() -> list[str]:
    """The requirements of the notebook, as in pyproject.toml: "torch>=2.6"."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    return [line for line in declared if name_of(line) not in ELSEWHERE]


def check_packages(install: bool = False) -> None:
    """Raises ModuleNotFoundError with the line that installs what is missing; any version of a package will do.

    install: install it, with this Python's pip, instead of raising; what is there stays as it is.
    """
    present, absent = [], []
    for requirement in required():
        name = name_of(requirement)
        try:
            present.append(f"{name}=={version(name)}")
        except PackageNotFoundError:
            absent.append(requirement)
    if absent and install:
        print(f"installing {', '.join(absent)}")
        # what is present is named with its version, so that pip does not replace it
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *absent, *present], check=True)
        importlib.invalidate_caches()
    elif absent:
        names = ", ".join(map(name_of, absent))
        line = " ".join(f'"{requirement}"' for requirement in absent)
        raise ModuleNotFoundError(f"this kernel has no {names}; run this in a cell, then restart: %pip install {line}")


def name_of(requirement: str) -> str:
    """'torch>=2.6' -> 'torch'."""
    return re.split(r"[\s<>=!~;\[]", requirement.strip(), maxsplit=1)[0].lower()

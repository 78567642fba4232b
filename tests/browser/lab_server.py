"""A JupyterLab of our own on loopback: a free port, a random token, and no file of the person who runs the tests."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 90
STOP_SECONDS = 20
# What JupyterLab would ask at its first start, and what it would fetch from the network; and its application in reach.
CONFIGURATION = {
    "LabApp": {"expose_app_in_browser": True, "extension_manager": "readonly", "news_url": None},
    "ServerApp": {"ip": "127.0.0.1"},
}
NEVER = "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"
SETTINGS = {"@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False}}


@dataclass(frozen=True)
class Server:
    """Where it answers, e.g. http://127.0.0.1:8888/, with which token, and what it has logged so far."""

    address: str
    token: str
    log: Path


@contextmanager
def serving(root: Path, private: Path, command: Sequence[str] = ()) -> Iterator[Server]:
    """JupyterLab on the files under `root`; everything that it keeps for itself goes into the folder `private`.

    command: what starts it, run in `root`; by default JupyterLab itself on a free port. Raises RuntimeError with its
    log where it does not start within START_SECONDS.
    """
    for name, values in SETTINGS.items():
        _write_json(private / f"settings/{name}.jupyterlab-settings", values)
    _write_json(private / "config/jupyter_lab_config.json", CONFIGURATION)
    token, log = secrets.token_hex(24), private / "jupyterlab.log"
    plain = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.port=0", NEVER]
    with log.open("wb") as file:
        process = subprocess.Popen(
            list(command) or [*plain, f"--ServerApp.root_dir={root}"],
            env=_environment(private, token),
            stdout=file,
            stderr=file,
            cwd=root,
        )
    try:
        yield Server(_wait_for_address(process, log), token, log)
    finally:
        _stop(process)


def _write_json(path: Path, values: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def _environment(private: Path, token: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "IPYTHON"))}
    kept.pop("MPLBACKEND", None)  # a backend that is set for the tests would keep figures out of the notebook
    folders = {
        "HOME": "home",
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython",
        "MPLCONFIGDIR": "matplotlib",
        "XDG_CACHE_HOME": "cache",
    }
    for variable, name in folders.items():
        (private / name).mkdir(parents=True, exist_ok=True)
        kept[variable] = str(private / name)
    return {**kept, "JUPYTER_TOKEN": token, "JUPYTER_PREFER_ENV_PATH": "1"}


def _wait_for_address(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        found = re.search(r"(http://127\.0\.0\.1:\d+/)lab", log.read_text(errors="replace"))
        if found:
            return found.group(1)
        threading.Event().wait(0.1)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text(errors='replace')[-4000:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM shuts the kernels down too; what does not listen is killed."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()

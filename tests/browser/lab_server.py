"""A JupyterLab of our own on loopback: a free port, a random token, and no file of the person who runs the tests."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

START_SECONDS = 800  # `make lab` executes the notebook first, on a busy machine perhaps
STOP_SECONDS = 20
# What JupyterLab would ask at its first start, and what it would fetch from the network; and its application in reach.
FILES = {
    "jupyter_lab_config.json": {
        "LabApp": {
            "expose_app_in_browser": True,
            "extension_manager": "readonly",
            "news_url": None,
            "check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
        },
        "ServerApp": {"ip": "127.0.0.1"},
    },
    "lab/user-settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings": {
        "fetchNews": "false",
        "checkForUpdates": False,
    },
}


@contextmanager
def serving(command: Sequence[str], root: Path, home: Path) -> Iterator[str]:
    """Run the command that starts JupyterLab, in `root`; what it keeps for itself goes into the folder `home`.

    Yields its address with a place for a path, e.g. http://127.0.0.1:8888/{}?token=... Raises RuntimeError with its log
    where it does not start within START_SECONDS.
    """
    for name, values in FILES.items():
        path = home / ".jupyter" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    # A backend that is set for the tests would keep figures out of the notebook.
    foreign = ("JUPYTER", "IPYTHON", "XDG", "MPL")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    token, log = secrets.token_hex(24), home / "jupyterlab.log"
    environment = {**kept, "HOME": str(home), "JUPYTER_TOKEN": token, "JUPYTER_PREFER_ENV_PATH": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, cwd=root)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not (found := re.search(r"(http://127\.0\.0\.1:\d+/)lab", log.read_text(errors="replace"))):
            if time.monotonic() > deadline or process.poll() is not None:
                raise RuntimeError(f"JupyterLab did not start:\n{log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.1)
        yield f"{found.group(1)}{{}}?token={token}"
    finally:
        process.terminate()  # shuts the kernels down, too
        try:
            process.wait(STOP_SECONDS)
        finally:
            process.kill()

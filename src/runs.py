"""A run's folder: what is written where, whole or not at all, and how a run is taken up again.

Every file is written to a temporary neighbour, flushed to the disk and renamed, so that a reader (or a crash) sees the
old file or the new one. A checkpoint holds what an unbroken run would hold between two epochs.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

from src.records import History

CHECKPOINT_FORMAT = 1
CHECKPOINT_PARTS = ("config", "model", "optimizer", "history")
CHECKPOINT, HISTORY, SUMMARY = "checkpoint.pt", "history.csv", "run.json"
PREVIOUS = "previous"
LIBRARIES = ("torch", "torchvision", "numpy", "matplotlib", "seaborn", "ipywidgets", "nbclient", "scikit-learn")
# Settings that may differ between the two parts of a resumed run: where things are, not what is computed.
MAY_DIFFER = frozenset({"data_root", "device", "given"})


class RunError(ValueError):
    """A run folder that cannot be used, or a checkpoint that does not belong to this run."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run. Build it with `open`, which checks that it can be written."""

    path: Path

    @classmethod
    def open(cls, path: str | Path, *, keep: bool = False) -> RunFolder:
        """Create the folder, or take it over. An earlier run's files move to `previous/N` unless `keep` is set.

        Raises RunError where the path is a file or cannot be written to.
        """
        check_writable(path)
        folder = Path(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _not_writable(path, error) from error
        run = cls(folder)
        if not keep:
            run._set_aside()
        return run

    def write(self, name: str, data: bytes | str) -> Path:
        """Write one file of the run, whole or not at all."""
        target = self.path / name
        write_atomic(target, data.encode() if isinstance(data, str) else data)
        return target

    def write_json(self, name: str, data: Mapping[str, Any]) -> Path:
        return self.write(name, json.dumps(data, indent=2, allow_nan=False, default=str) + "\n")

    def save_progress(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        history: History,
        config: Mapping[str, Any],
        data_digest: str = "",
    ) -> None:
        """Write checkpoint and history after an epoch. data_digest: of the images and labels trained on."""
        buffer = BytesIO()
        state = {
            "format": CHECKPOINT_FORMAT,
            "config": dict(config),
            "data_digest": data_digest,
            "versions": versions(),
            "epoch": len(history),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "history": history.to_json(),
        }
        torch.save(state, buffer)
        self.write(CHECKPOINT, buffer.getvalue())
        self.write(HISTORY, history.csv_text())

    def has_checkpoint(self) -> bool:
        return (self.path / CHECKPOINT).exists()

    def resume(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: Mapping[str, Any],
        device: torch.device,
        data_digest: str = "",
    ) -> History:
        """Load the checkpoint into `model` and `optimizer` and return the history so far.

        Raises RunError where there is none, it cannot be read, or it belongs to another configuration, architecture or
        (where both digests are known) other data. Nothing is changed before all of that is checked.
        """
        state = load_checkpoint(self.path / CHECKPOINT, device)
        _check_same(state["config"], config)
        trained_on = state.get("data_digest", "")
        if trained_on and data_digest and trained_on != data_digest:
            raise RunError(
                f"the checkpoint was trained on other images or labels (digest {trained_on[:12]} then, "
                f"{data_digest[:12]} now); put the data back as it was, or start without --resume"
            )
        check_model_state(model, state["model"])
        try:
            history = History.from_json(state["history"])
            optimizer.load_state_dict(state["optimizer"])  # checks its groups before it takes anything over
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"the checkpoint does not fit this run: {error}; start without --resume") from error
        model.load_state_dict(state["model"])
        return history

    def _set_aside(self) -> None:
        results = {CHECKPOINT, HISTORY, SUMMARY}
        files = [e for e in self.path.iterdir() if e.name in results or e.suffix in (".png", ".cdq", ".onnx")]
        if not files:
            return
        previous = self.path / PREVIOUS
        taken = [int(entry.name) for entry in previous.glob("*") if entry.name.isdecimal()]
        target = previous / str(max(taken, default=0) + 1)
        target.mkdir(parents=True)
        for entry in files:
            entry.replace(target / entry.name)


def check_writable(path: str | Path) -> None:
    """Raise RunError where `path` is a file, or where no file could be put into it. Creates nothing."""
    folder = Path(path)
    try:
        if folder.exists() and not folder.is_dir():
            raise RunError(f"output folder {str(path)!r} is a file; name a folder, or a path that does not exist yet")
        present = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        with tempfile.NamedTemporaryFile(dir=present, prefix=".writable-"):
            pass
    except OSError as error:
        raise _not_writable(path, error) from error


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The contents of a checkpoint, read without running any code from it (`weights_only`). Raises RunError."""
    if not Path(path).exists():
        raise RunError(f"there is no checkpoint at {str(path)!r} to resume from; run without --resume first")
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes checksums, but does not look at them when it loads
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(damaged)
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a damaged file makes the reader fail in many ways; all mean the same here
        raise RunError(
            f"checkpoint {str(path)!r} cannot be read ({type(error).__name__}): it is damaged or not a checkpoint; "
            "start without --resume"
        ) from error
    if not isinstance(state, dict) or state.get("format") != CHECKPOINT_FORMAT:
        found = state.get("format") if isinstance(state, dict) else None
        raise RunError(
            f"checkpoint {str(path)!r} has format {found!r}, this version reads {CHECKPOINT_FORMAT}; start without "
            "--resume"
        )
    absent = [name for name in CHECKPOINT_PARTS if not isinstance(state.get(name), dict)]
    if absent:
        raise RunError(f"checkpoint {str(path)!r} is incomplete: no {', '.join(absent)} in it; start without --resume")
    return state


def load_model_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Load parameters and buffers. Raises RunError, before changing anything, where names or shapes differ."""
    check_model_state(model, state)
    model.load_state_dict(state)


def check_model_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Raise RunError where `state` has other names or shapes than `model`."""
    own = model.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    reshaped = sorted(name for name in own.keys() & state.keys() if own[name].shape != state[name].shape)
    if missing or unknown or reshaped:
        first = (missing or unknown or reshaped)[0]
        raise RunError(
            f"the checkpoint is of another architecture: {len(missing)} tensors missing, {len(unknown)} unknown, "
            f"{len(reshaped)} of another shape, the first {first!r}; build the same network and attach the same "
            "quantizers"
        )


def write_atomic(path: str | Path, data: bytes) -> None:
    """Put `data` at `path`, whole or not at all: a temporary file beside it, fsync, rename, fsync of the folder."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # not every file system lets a folder be opened
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def versions() -> dict[str, str]:
    """Python and the libraries that shape a result, by name."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[library] = version(library)
    return found


def machine(device: torch.device, precision: torch.dtype) -> dict[str, Any]:
    """What a result's last digits depend on: device, arithmetic, threads and system."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": device.type,
        "device_name": name,
        "precision": str(precision).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
    }


def _check_same(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    plain = json.loads(json.dumps(dict(wanted)))  # tuples become lists, as in a file
    before = json.loads(json.dumps(dict(saved)))
    names = sorted((before.keys() | plain.keys()) - MAY_DIFFER)
    differing = [
        f"{name}: {before.get(name)!r} then, {plain.get(name)!r} now"
        for name in names
        if before.get(name) != plain.get(name)
    ]
    if differing:
        raise RunError(
            f"the checkpoint belongs to another configuration ({'; '.join(differing)}); repeat the settings of that "
            "run, or start without --resume"
        )


def _not_writable(path: str | Path, error: OSError) -> RunError:
    reason = error.strerror or str(error)
    return RunError(f"output folder {str(path)!r} cannot be written ({reason}); name another folder")

"""What is done to a run inside its own process, before it begins. Each function is named in a request (runner.py)."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from experiments import figures
from src import runs, training

FILLER = "filler"
PAGE = 4096  # bytes; a disk in memory gives room by pages
MEMORY_ERRORS: dict[str, Callable[[], Exception]] = {
    "python": MemoryError,
    "cpu": lambda: RuntimeError(
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 GB"
    ),
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB"),
}
DRAWING_ERRORS: dict[str, Callable[[], Exception]] = {
    "font": lambda: RuntimeError("Failed to load font"),
    "value": lambda: ValueError("Axis limits cannot be NaN or Inf"),
    "memory": MemoryError,
    "key": lambda: KeyError("bits"),
}


def fill_disk(name: str, time: int, free: int, disk: str) -> None:
    """Before the write number `time` (from 1) of the file `name`, leave `free` bytes on the disk mounted at `disk`.

    Without a disk of its own (""), no file may become longer than `free` bytes from there on.
    """

    def fill(target: Path) -> None:
        if not disk:
            resource.setrlimit(resource.RLIMIT_FSIZE, (free, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            return
        leave_free(Path(disk), free)

    _before_write(name, time, fill)


def leave_free(disk: Path, free: int) -> None:
    """Fill the disk with a file, so that `free` bytes of its room are left."""
    size = shutil.disk_usage(disk).free - free // PAGE * PAGE
    if size > 0:
        with open(disk / FILLER, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)


def lock_folder(name: str, time: int, mounts: bool) -> None:
    """Before a write, make the folder read-only."""
    _before_write(name, time, lambda target: set_writable(target.parent, False, mounts))


def set_writable(folder: Path, writable: bool, mounts: bool) -> None:
    """By its permissions; where file systems can be mounted, by a read-only view of itself in its place."""
    if not mounts:
        folder.chmod(0o755 if writable else 0o555)
    elif writable:
        os.system(f"umount -l '{folder}' 2>/dev/null")
    else:
        status = os.system(f"mount --bind '{folder}' '{folder}' && mount -o remount,bind,ro '{folder}'")
        assert status == 0, "the folder could not be mounted read-only"


def remove_folder(step: int, folder: str) -> None:
    """In step number `step` (from 1) the output folder vanishes."""
    _in_step(step, lambda model, stack: shutil.rmtree(folder))


def spoil_figure(name: str, error: str) -> None:
    """The figure called `name` cannot be drawn."""

    def draw(*_: Any, **__: Any) -> None:
        raise DRAWING_ERRORS[error]()

    assert hasattr(figures, name)
    setattr(figures, name, draw)


def spoil_number(step: int, kind: str, parameter: str, value: float) -> None:
    """In step number `step` (from 1) the loss, a gradient or a weight holds `value`, which is NaN or infinite."""

    def spoil(model: nn.Module, stack: ExitStack) -> None:
        tensor = dict(model.named_parameters())[parameter]
        if kind == "loss":
            real = training.F.cross_entropy
            spoilt = mock.patch.object(training.F, "cross_entropy", lambda *given: real(*given) * value)
            stack.enter_context(spoilt)
        elif kind == "gradient":
            stack.callback(tensor.register_hook(lambda gradient: torch.full_like(gradient, value)).remove)
        else:
            with torch.no_grad():
                tensor[(0,) * tensor.dim()] = value

    _in_step(step, spoil)


def exhaust_memory(step: int, kind: str) -> None:
    """In step number `step` there is no memory left, as Python, torch's CPU allocator or CUDA say it."""

    def exhaust(model: nn.Module, stack: ExitStack) -> None:
        raise MEMORY_ERRORS[kind]()

    _in_step(step, exhaust)


def _in_step(number: int, action: Callable[[nn.Module, ExitStack], None]) -> None:
    real, count = training.train_step, 0

    def step(model: nn.Module, *rest: Any) -> Any:
        nonlocal count
        count += 1
        with ExitStack() as stack:
            if count == number:
                action(model, stack)
            return real(model, *rest)

    training.train_step = step


def _before_write(name: str, time: int, action: Callable[[Path], None]) -> None:
    real, count = runs.write_atomic, 0

    def write(path: str | Path, *rest: Any, **more: Any) -> None:
        nonlocal count
        count += Path(path).name == name
        if Path(path).name == name and count == time:
            action(Path(path))
        real(path, *rest, **more)

    runs.write_atomic = write

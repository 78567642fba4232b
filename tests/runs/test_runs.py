"""A run's folder: complete files or none, earlier runs kept, checkpoints that do not fit are refused."""

from __future__ import annotations

import errno
import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from src.runs import RunError, RunFolder, load_checkpoint, load_model_state, machine, versions
from src.runs.checkpoint import state_bytes
from src.storage import StorageError, check_writable, folder_lock, write_atomic
from src.training import History, TrainingError, make_optimizer, parameter_groups
from tests.histories import make_history
from tests.quantized_networks import small_resnet
from tests.reliability.small_run import tiny
from tests.training.small import quantized

CPU = torch.device("cpu")
CONFIG = {"preset": "debug", "epochs": 2, "exclude_layers": ("conv1", "bn"), "device": "auto", "data_root": "data"}


def trained(seed: int = 0, model: nn.Module | None = None) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small quantized network after one update, so that the optimizer has a state."""
    model = model or quantized(seed)
    torch.manual_seed(seed)
    rates = {"learning_rate": 0.01, "dz_learning_rate": 0.01, "bit_learning_rate": 0.01}
    optimizer = make_optimizer(parameter_groups(model, **rates))
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def history() -> History:
    return make_history(1, 2)


def saved(path: Path, data_digest: str = "") -> tuple[RunFolder, nn.Module, torch.optim.Optimizer]:
    model, optimizer = trained()
    folder = RunFolder.open(path / "run")
    folder.save_progress(model, optimizer, history(), CONFIG, data_digest)
    return folder, model, optimizer


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    moments = [tensor.clone() for state in optimizer.state.values() for tensor in state.values()]
    return [tensor.clone() for tensor in model.state_dict().values()] + moments


# --- complete or not at all


@pytest.mark.parametrize(("owner", "name"), [(os, "fsync"), (Path, "replace"), (Path, "chmod")])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_while_writing_leaves_the_old_file(
    owner: Any, name: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "checkpoint.pt"
    write_atomic(target, b"old")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(type(error)):
        write_atomic(target, b"new, and longer")
    monkeypatch.undo()
    assert contents(tmp_path) == {"checkpoint.pt": b"old"}
    assert target.stat().st_mode & 0o777 == 0o644


def test_json_is_strict(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path)
    folder.write_json("run.json", {"path": Path("x"), "share": 0.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        folder.write_json("run.json", {"loss": math.nan})
    assert json.loads((tmp_path / "run.json").read_text()) == {"path": "x", "share": 0.5}


# --- the folder


@pytest.mark.parametrize("use", [check_writable, RunFolder.open])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file", "is a file; name a folder"),
        ("file/below", r"cannot be written \(Not a directory\); name another folder"),
        ("nowhere", "nowhere' is a link to nowhere; name a folder, or repair the link"),
        ("circle", "circle' is a link to nowhere; name a folder, or repair the link"),
        ("", "has no name; name a folder"),
    ],
)
def test_a_path_that_cannot_be_a_folder_is_refused_and_nothing_is_created(
    use: Callable[[str | Path], Any], name: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nowhere").symlink_to("absent")
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(StorageError, match=message):
        use(tmp_path / name if name else "")
    assert contents(tmp_path) == {"file": b"mine"}
    folder_lock.release(tmp_path / "circle")  # it was not held


@pytest.mark.parametrize(("owner", "name"), [(tempfile, "NamedTemporaryFile"), (Path, "mkdir")])
def test_a_folder_that_cannot_be_written_is_refused(
    owner: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(owner, name, denied)
    with pytest.raises(StorageError, match=r"run' cannot be written \(Permission denied\)"):
        RunFolder.open(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_every_earlier_run_is_set_aside_and_what_is_not_a_runs_stays(tmp_path: Path) -> None:
    own = dict.fromkeys(("photo.png", "table.npz", "notes.txt", "accuracy_curve.png", "network.onnx"), b"mine")
    for name, data in own.items():
        (tmp_path / name).write_bytes(data)
    first = RunFolder.open(tmp_path)
    assert contents(tmp_path) == own  # there was no run here
    for name in ("history.csv", "run.json", "checkpoint.pt"):
        first.write(name, f"first {name}")
    assert RunFolder.open(tmp_path, keep=True).has_checkpoint()

    second = RunFolder.open(tmp_path)
    moved = {"accuracy_curve.png", "network.onnx", "history.csv", "run.json", "checkpoint.pt"}  # named as a run's files
    earlier = {f"previous/1/{name}" for name in moved}
    assert set(contents(tmp_path)) == earlier | own.keys() - moved
    assert (tmp_path / "previous" / "1" / "run.json").read_text() == "first run.json"
    RunFolder.open(tmp_path)  # a run that never wrote anything does not push the last one out
    second.write("history.csv", "second")
    RunFolder.open(tmp_path)
    assert set(contents(tmp_path)) == earlier | {"previous/2/history.csv"} | own.keys() - moved  # none is ever deleted


@pytest.mark.parametrize("moved", range(5))
@pytest.mark.parametrize("keep", [False, True])
def test_a_run_that_was_half_set_aside_stays_together(
    keep: bool, moved: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is killed between two files, or before the last step. The next one begins anew, or resumes."""
    names = ("history.csv", "checkpoint.pt", "checkpoint.previous.pt", "snapshots.npz")
    files = {name: name.encode() for name in names}
    folder = RunFolder.open(tmp_path)
    for name, data in files.items():
        folder.write(name, data)
    (tmp_path / "previous" / "7").mkdir(parents=True)
    calls: list[Path] = []

    def replace(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) > moved:
            raise KeyboardInterrupt
        os.replace(path, target)
        return target

    def rename(path: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        patch.setattr(Path, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            RunFolder.open(tmp_path)
    folder.check_resumable()
    RunFolder.open(tmp_path, keep=keep)
    assert contents(tmp_path) == (files if keep else {f"previous/8/{name}": data for name, data in files.items()})
    assert not (tmp_path / "previous" / ".moving").exists()


# --- checkpoints


def test_a_checkpoint_gives_model_optimizer_and_history_back(tmp_path: Path) -> None:
    folder, model, optimizer = saved(tmp_path, data_digest="a" * 64)
    other, other_optimizer = trained(seed=7)
    assert not torch.equal(state_of(model, optimizer)[0], state_of(other, other_optimizer)[0])
    elsewhere = {**CONFIG, "device": "cpu", "data_root": "/elsewhere"}  # where things are may differ
    said: list[str] = []
    assert folder.restore(other, other_optimizer, elsewhere, CPU, "a" * 64, said.append).history == history()
    assert not said
    for mine, theirs in zip(state_of(model, optimizer), state_of(other, other_optimizer), strict=True):
        assert torch.equal(mine, theirs)
    assert (folder.path / "history.csv").read_text() == history().csv_text()
    assert load_checkpoint(folder.path / "checkpoint.pt")["versions"] == versions()


def refused(
    folder: RunFolder, message: str, *, model: nn.Module | None = None, digest: str = "", **config: Any
) -> None:
    """Resuming raises RunError with `message`, and neither model, optimizer nor folder changes."""
    model, optimizer = trained(7, model)
    before, files = state_of(model, optimizer), contents(folder.path)
    rates = [group["lr"] for group in optimizer.param_groups]
    with pytest.raises(RunError, match=message):
        folder.restore(model, optimizer, {**CONFIG, **config}, CPU, digest)
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(model, optimizer), strict=True))
    assert [group["lr"] for group in optimizer.param_groups] == rates
    assert contents(folder.path) == files


def test_a_missing_checkpoint(tmp_path: Path) -> None:
    refused(RunFolder.open(tmp_path), "no checkpoint at .*run without --resume first")
    refused(RunFolder(tmp_path / "absent"), "no checkpoint at")


def test_a_damaged_checkpoint_or_one_of_an_earlier_version(tmp_path: Path) -> None:
    folder, model, optimizer = saved(tmp_path)
    path, before = folder.path / "checkpoint.pt", folder.path / "checkpoint.previous.pt"
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    refused(folder, r"cannot be read: .*is damaged.*; start without --resume")
    before.write_bytes(b"")
    refused(folder, r"is damaged.*, and .*checkpoint\.previous\.pt' is damaged")
    before.write_bytes(good)
    said: list[str] = []
    folder.restore(model, optimizer, CONFIG, CPU, notify=said.append)
    assert said == ["NOTICE: checkpoint.pt is missing or damaged; reading checkpoint.previous.pt, the one before it"]
    kept = {name: data for name, data in contents(folder.path).items() if name.startswith("checkpoint")}
    assert kept == {"checkpoint.damaged.pt": good[:-1], "checkpoint.previous.pt": good}
    torch.save({"format": 2}, path)
    refused(folder, "written by an earlier version of the project")


def altered(folder: RunFolder, place: tuple[Any, ...], value: object) -> None:
    """Change one entry of the checkpoint, or remove it where the value is Ellipsis; its checksum fits again."""
    path = folder.path / "checkpoint.pt"
    state = load_checkpoint(path)
    inner: Any = state
    for key in place[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    path.write_bytes(state_bytes(state))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        *(((part,), ..., f"incomplete: no {part} in it") for part in ("config", "model", "history", "random")),
        (("model", "bn1.weight"), ..., "another architecture: 1 tensors missing, .* the first 'bn1.weight'"),
        (("model", "linear.weight"), 1.5, "another architecture: .* 1 of another shape"),
        (("model", "7"), torch.zeros(1), "another architecture: .* 1 unknown"),
        (("optimizer", "param_groups", 0), ..., "another optimizer, or of other parameters; build the same one"),
        (("optimizer", "state", 0), None, "something else than a checkpoint"),
        (("optimizer_class",), "SGD", "another optimizer"),
        (("history", "records", 0, "loss"), ..., "does not fit this run: not a history of this version"),
        (("history", "records", 0, "epoch"), 2, "epoch 2 does not follow 0 recorded epochs"),
        (("unfinished", "sums"), ..., "does not fit this run"),
        (("random", "torch"), torch.zeros(3), "not the states of random generators"),
    ],
)
def test_a_checkpoint_with_other_contents(place: tuple[Any, ...], value: object, message: str, tmp_path: Path) -> None:
    folder, _, _ = saved(tmp_path)
    altered(folder, place, value)
    refused(folder, message)


def test_a_checkpoint_of_another_run(tmp_path: Path) -> None:
    folder, model, _ = saved(tmp_path, data_digest="a" * 64)
    refused(folder, r"configuration \(epochs: 2 then, 3 now\); repeat the settings", epochs=3)
    refused(folder, r"\(new: None then, 1 now\)", new=1)
    refused(folder, r"exclude_layers: \['conv1', 'bn'\] then, \['bn'\] now", exclude_layers=("bn",))
    refused(folder, "other images or labels", digest="b" * 64)
    refused(folder, "architecture: 0 tensors missing, 0 unknown, [1-9][0-9]* of another shape", model=small_resnet())
    with pytest.raises(RunError, match="attach the same quantizers"):
        load_model_state(tiny(), model.state_dict())


def test_another_machine_or_library_is_said(tmp_path: Path) -> None:
    folder, model, optimizer = saved(tmp_path)
    altered(folder, ("versions", "torch"), "1.0")
    for name, value in {"threads": 64, "device_name": "Abacus", "precision": "bfloat16"}.items():
        altered(folder, ("machine", name), value)
    said: list[str] = []
    folder.restore(model, optimizer, CONFIG, CPU, notify=said.append)
    (line,) = said
    assert line.startswith(f"NOTICE: torch 1.0 then, {versions()['torch']} now; ")
    assert "device name Abacus then, " in line
    assert f"threads 64 then, {torch.get_num_threads()} now: the last digits may differ" in line


@pytest.mark.parametrize("where", ["weight linear.weight", "weight bn1.running_var", "the optimizer's exp_avg"])
def test_a_state_that_is_not_finite_is_never_written(where: str, tmp_path: Path) -> None:
    folder, model, optimizer = saved(tmp_path)
    before = contents(folder.path)
    moments = next(iter(optimizer.state.values()))
    spoiled = {**model.state_dict(), **moments}[where.split()[-1].removeprefix("optimizer's ")]
    spoiled.fill_(math.inf)
    with pytest.raises(TrainingError, match=f"{where} is not finite after epoch 1 of 2: this state is not written"):
        folder.save_progress(model, optimizer, history(), CONFIG)
    assert contents(folder.path) == before


def test_machine_and_versions_name_what_shapes_a_result() -> None:
    found = versions()
    assert found["torch"] == torch.__version__.partition("+")[0] or found["torch"] == torch.__version__
    assert {"python", "numpy", "torchvision", "matplotlib"} <= found.keys()
    host = machine(CPU, torch.bfloat16)
    assert (host["device"], host["precision"], host["threads"]) == ("cpu", "bfloat16", torch.get_num_threads())

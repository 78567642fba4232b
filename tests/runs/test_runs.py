"""A run's folder: complete files or none, earlier runs kept, checkpoints exact, and those that do not fit refused."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from src.runs import (
    CHECKPOINT,
    RunError,
    RunFolder,
    RunProgress,
    load_checkpoint,
    load_model_state,
    restore,
    versions,
)
from src.runs.checkpoint import state_bytes
from src.storage import Notify, StorageError, check_writable
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


def saved(path: Path, data_digest: str = "") -> tuple[RunFolder, nn.Module, torch.optim.Optimizer]:
    model, optimizer = trained()
    folder = RunFolder.open(path / "run")
    folder.save_progress(model, optimizer, RunProgress(make_history(1, 2)), CONFIG, data_digest)
    return folder, model, optimizer


def resume(
    folder: RunFolder,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    notify: Notify,
    config: dict[str, Any] = CONFIG,
    digest: str = "",
) -> History:
    state = load_checkpoint(folder.path / CHECKPOINT, CPU, notify)
    return restore(state, model, optimizer, config, digest, notify).history


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    moments = [tensor.clone() for state in optimizer.state.values() for tensor in state.values()]
    return [tensor.clone() for tensor in model.state_dict().values()] + moments


# --- the folder


@pytest.mark.parametrize("use", [check_writable, RunFolder.open])
@pytest.mark.parametrize("name", ["file", "file/below", "locked/below"])
def test_a_path_that_cannot_be_a_folder_is_refused_and_nothing_is_created(
    use: Callable[[str | Path], Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked")  # root may write everywhere
    found = "file' is a file" if name.startswith("file") else "locked' may not be changed by this user"
    with pytest.raises(StorageError, match=rf"{name}' cannot be written \(.*{found}\); name another folder"):
        use(tmp_path / name)
    assert contents(tmp_path) == {"file": b"mine"}


def test_every_earlier_run_is_set_aside_and_what_is_not_a_runs_stays(tmp_path: Path) -> None:
    own = dict.fromkeys(("photo.png", "table.npz", "notes.txt", "accuracy_curve.png", "network.onnx"), b"mine")
    for name, data in own.items():
        (tmp_path / name).write_bytes(data)
    first = RunFolder.open(tmp_path)
    assert contents(tmp_path) == own  # there was no run here
    for name in ("history.csv", "run.json", "checkpoint.pt"):
        first.write(name, f"first {name}")
    second = RunFolder.open(tmp_path)
    moved = {"accuracy_curve.png", "network.onnx", "history.csv", "run.json", "checkpoint.pt"}  # named as a run's files
    earlier = {f"previous/1/{name}" for name in moved}
    assert set(contents(tmp_path)) == earlier | own.keys() - moved
    assert (tmp_path / "previous" / "1" / "run.json").read_text() == "first run.json"
    RunFolder.open(tmp_path)  # a run that never wrote anything does not push the last one out
    second.write("history.csv", "second")
    RunFolder.open(tmp_path)
    assert set(contents(tmp_path)) == earlier | {"previous/2/history.csv"} | own.keys() - moved  # none is ever deleted


def test_a_finished_run_that_goes_on_is_kept_as_it_was(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path)
    first = {name: name.encode() for name in ("checkpoint.pt", "history.csv", "snapshots.npz", "run.json", "model.cdq")}
    for name, data in first.items():
        folder.write(name, data)
    folder.resume()
    earlier = {f"previous/1/{name}": data for name, data in first.items()}
    going_on = {name: first[name] for name in ("checkpoint.pt", "history.csv", "snapshots.npz")}
    assert contents(tmp_path) == earlier | going_on
    folder.resume()  # it has no results now
    assert contents(tmp_path) == earlier | going_on


def test_a_run_that_was_changed_elsewhere_is_not_written_to(tmp_path: Path) -> None:
    here = RunFolder.open(tmp_path)
    here.write("checkpoint.pt", "here")
    here.write("run.json", "here")
    RunFolder.open(tmp_path).write("checkpoint.pt", "elsewhere")
    with pytest.raises(RunError, match=r"another process has changed the run in .* since it was opened here; resume"):
        here.write("run.json", "here, later")
    assert not (tmp_path / "run.json").exists()
    RunFolder(tmp_path).write("run.json", "by who has seen it")


# --- checkpoints


def test_a_checkpoint_gives_model_optimizer_and_history_back(tmp_path: Path) -> None:
    folder, model, optimizer = saved(tmp_path, data_digest="a" * 64)
    other, other_optimizer = trained(seed=7)
    assert not torch.equal(state_of(model, optimizer)[0], state_of(other, other_optimizer)[0])
    elsewhere = {**CONFIG, "device": "cpu", "data_root": "/elsewhere", "given": ("seed",)}  # may differ
    said: list[str] = []
    assert resume(folder, other, other_optimizer, said.append, elsewhere, "a" * 64) == make_history(1, 2)
    assert not said
    for mine, theirs in zip(state_of(model, optimizer), state_of(other, other_optimizer), strict=True):
        assert torch.equal(mine, theirs)
    assert (folder.path / "history.csv").read_text() == make_history(1, 2).csv_text()
    assert load_checkpoint(folder.path / CHECKPOINT)["versions"] == versions()


def test_an_optimizer_is_restored_with_its_settings_and_the_layout_of_its_moments(tmp_path: Path) -> None:
    """Moments have the strides of their parameters, as those of an unbroken run."""

    def built() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        groups: list[dict[str, Any]] = [{"params": [model.weight], "name": "weights"}, {"params": [model.bias]}]
        optimizer = torch.optim.AdamW(groups)
        model(torch.randn(2, 3, 5, 5)).square().sum().backward()
        optimizer.step()
        return model, optimizer

    (model, optimizer), (other, restored) = built(), built()
    optimizer.param_groups[0]["lr"] = 0.1 + 0.2
    folder = RunFolder.open(tmp_path)
    folder.save_progress(model, optimizer, RunProgress(History(3)), {})
    resume(folder, other, restored, print, {})
    for kept, own in zip(restored.param_groups, optimizer.param_groups, strict=True):
        assert (kept["lr"], *kept["betas"], kept.get("name")) == (own["lr"], *own["betas"], own.get("name"))
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        for name, moment in optimizer.state[mine].items():
            assert torch.equal(restored.state[theirs][name], moment)
            assert restored.state[theirs][name].stride() == moment.stride()


def refused(
    folder: RunFolder, message: str, *, model: nn.Module | None = None, digest: str = "", **config: Any
) -> None:
    """Resuming raises RunError with `message`, and neither model, optimizer nor folder changes."""
    model, optimizer = trained(7, model)
    before, files = state_of(model, optimizer), contents(folder.path)
    with pytest.raises(RunError, match=message):
        resume(folder, model, optimizer, print, {**CONFIG, **config}, digest)
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(model, optimizer), strict=True))
    assert contents(folder.path) == files


def test_a_missing_or_damaged_checkpoint_or_one_of_an_earlier_version(tmp_path: Path) -> None:
    folder, model, optimizer = saved(tmp_path)
    path, before = folder.path / "checkpoint.pt", folder.path / "checkpoint.previous.pt"
    good = path.read_bytes()
    path.unlink()
    refused(folder, "No such file .*; start without --resume")
    torch.save({"format": 2}, path)
    refused(folder, "written by an earlier version of the project")
    path.write_bytes(good[:-1])
    before.write_bytes(b"")
    refused(folder, r"cannot be read: .*is damaged.*, and .*checkpoint\.previous\.pt' is damaged")
    before.write_bytes(good)
    said: list[str] = []
    resume(folder, model, optimizer, said.append)
    assert said == ["NOTICE: checkpoint.pt is missing or damaged; reading checkpoint.previous.pt, the one before it"]
    RunFolder(folder.path).save_progress(model, optimizer, RunProgress(make_history(1, 2)), CONFIG)
    assert before.read_bytes() == good  # the damaged one does not replace it


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
        (("model", "bn1.weight"), ..., "another architecture: 1 tensors missing, .* the first 'bn1.weight'"),
        (("model", "linear.weight"), torch.zeros(2, 2), "another architecture: 1 .*'linear.weight'"),
        (("model", "7"), torch.zeros(1), "another architecture: 1 .* the first '7'"),
    ],
)
def test_a_checkpoint_of_another_network(place: tuple[Any, ...], value: object, message: str, tmp_path: Path) -> None:
    folder, _, _ = saved(tmp_path)
    altered(folder, place, value)
    refused(folder, message)


def test_a_checkpoint_of_another_run(tmp_path: Path) -> None:
    folder, model, _ = saved(tmp_path, data_digest="a" * 64)
    refused(folder, r"configuration \(epochs: 2 then, 3 now\); leave these settings out", epochs=3)
    refused(folder, r"\(continued_from: None then, 1 now; epochs: 2 then, 3 now\)", epochs=3, continued_from=1)
    refused(folder, r"\(new: None then, 1 now\)", new=1)
    refused(folder, r"exclude_layers: \['conv1', 'bn'\] then, \['bn'\] now", exclude_layers=("bn",))
    refused(folder, "other images or labels", digest="b" * 64)
    refused(folder, "architecture: [1-9][0-9]* tensors", model=small_resnet(), digest="a" * 64)
    with pytest.raises(RunError, match="attach the same quantizers"):
        load_model_state(tiny(), model.state_dict())


def test_another_machine_or_library_is_said(tmp_path: Path) -> None:
    folder, model, optimizer = saved(tmp_path)
    altered(folder, ("versions", "torch"), "1.0")
    for name, value in {"threads": 64, "device_name": "Abacus", "precision": "bfloat16"}.items():
        altered(folder, ("machine", name), value)
    said: list[str] = []
    resume(folder, model, optimizer, said.append)
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
        folder.save_progress(model, optimizer, RunProgress(make_history(1, 2)), CONFIG)
    assert contents(folder.path) == before

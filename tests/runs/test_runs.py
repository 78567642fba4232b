"""A run's folder: whole files or none, earlier runs kept, checkpoints that do not fit refused and nothing changed."""

from __future__ import annotations

import errno
import json
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from resnet import BasicBlock, ResNet
from src.quantizer import DeadZoneLDZCompander
from src.runs import RunError, RunFolder, load_checkpoint, load_model_state, machine, state_bytes, versions
from src.storage import StorageError, check_writable, folder_lock, write_atomic
from src.training import EpochRecord, History, LayerRecord, make_optimizer, parameter_groups
from utils_quantization import attach_weight_quantizers

CPU = torch.device("cpu")
CONFIG = {"preset": "debug", "epochs": 2, "exclude_layers": ("conv1", "bn"), "device": "auto", "data_root": "data"}


def trained(seed: int = 0, widths: tuple[int, int, int] = (4, 8, 16)) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small quantized network after one update, so that the optimizer has a state."""
    torch.manual_seed(seed)
    model = ResNet(BasicBlock, [1, 1, 1], widths=widths)
    attach_weight_quantizers(model, ["conv1", "linear"], DeadZoneLDZCompander)
    rates = {"learning_rate": 0.01, "dz_learning_rate": 0.01, "bit_learning_rate": 0.01}
    optimizer = make_optimizer(parameter_groups(model, **rates))
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def history() -> History:
    layers = (LayerRecord("layer1.0.conv1", 8.0, 0.01, 0.0, (False, True)),)
    return History(2, [EpochRecord(1, 2.0, 2.0, 0.0, 0.0, 0.0, 1e-3, 0.1, 2.0, 0.125, 0.0, 0.5, 8.0, 1.0, layers)])


def saved(path: Path) -> tuple[RunFolder, nn.Module, torch.optim.Optimizer]:
    model, optimizer = trained()
    folder = RunFolder.open(path / "run")
    folder.save_progress(model, optimizer, history(), CONFIG)
    return folder, model, optimizer


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    moments = [tensor.clone() for state in optimizer.state.values() for tensor in state.values()]
    return [tensor.clone() for tensor in model.state_dict().values()] + moments


# --- whole or not at all


def test_writing_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "new" / "history.csv"
    write_atomic(target, b"first")
    write_atomic(target, b"second")
    assert contents(tmp_path) == {"new/history.csv": b"second"}
    assert target.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("failing", ["write", "fsync", "replace", "interrupt"])
def test_a_failure_while_writing_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    target = tmp_path / "checkpoint.pt"
    write_atomic(target, b"old")

    def full(*_: object) -> None:
        raise KeyboardInterrupt if failing == "interrupt" else OSError(errno.ENOSPC, "No space left on device")

    if failing == "replace":
        monkeypatch.setattr(Path, "replace", full)
    elif failing == "write":
        real = os.fdopen
        monkeypatch.setattr(os, "fdopen", lambda *arguments: _Full(real(*arguments)))
    else:
        monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KeyboardInterrupt if failing == "interrupt" else OSError):
        write_atomic(target, b"new, and longer")
    monkeypatch.undo()
    assert contents(tmp_path) == {"checkpoint.pt": b"old"}


class _Full:
    """A file on a disk that is full."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __enter__(self) -> _Full:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: bytes) -> None:
        self._file.write(data[:3])
        raise OSError(errno.ENOSPC, "No space left on device")


# --- the folder


def test_a_path_that_cannot_be_a_folder_is_refused_and_nothing_is_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for check in (check_writable, RunFolder.open):
        with pytest.raises(StorageError, match="is a file; name a folder"):
            check(tmp_path / "file")
        with pytest.raises(StorageError, match=r"cannot be written \(Not a directory\); name another folder"):
            check(tmp_path / "file" / "below")
    assert contents(tmp_path) == {"file": b"mine"}


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", denied)
    with pytest.raises(StorageError, match=r"run' cannot be written \(Permission denied\)"):
        RunFolder.open(tmp_path / "run")
    monkeypatch.undo()
    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(StorageError, match=r"run' cannot be written \(Permission denied\)"):
        RunFolder.open(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_name_or_behind_a_broken_link(tmp_path: Path) -> None:
    (tmp_path / "nowhere").symlink_to("absent")
    (tmp_path / "circle").symlink_to("circle")
    for take in (check_writable, RunFolder.open):
        for name in ("nowhere", "circle"):
            with pytest.raises(StorageError, match=f"{name}' is a link to nowhere; name a folder, or repair the link"):
                take(tmp_path / name)
        with pytest.raises(StorageError, match="has no name; name a folder"):
            take("")
    folder_lock.release(tmp_path / "circle")  # it was not held


def test_checking_creates_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    assert RunFolder.open(tmp_path / "a" / "b").path.is_dir()


def test_an_earlier_run_is_set_aside_once(tmp_path: Path) -> None:
    first = RunFolder.open(tmp_path)
    for name in ("history.csv", "run.json", "checkpoint.pt", "accuracy_curve.png"):
        first.write(name, f"first {name}")
    (tmp_path / "notes.txt").write_text("the user's own")
    assert RunFolder.open(tmp_path, keep=True).has_checkpoint()

    second = RunFolder.open(tmp_path)
    names = {"history.csv", "run.json", "checkpoint.pt", "accuracy_curve.png"}
    assert set(contents(tmp_path)) == {f"previous/1/{name}" for name in names} | {"notes.txt"}
    assert (tmp_path / "previous" / "1" / "run.json").read_text() == "first run.json"
    RunFolder.open(tmp_path)  # a run that never wrote anything does not push the last one out
    assert (tmp_path / "previous" / "1" / "run.json").read_text() == "first run.json"

    second.write("history.csv", "second")
    RunFolder.open(tmp_path)
    kept = contents(tmp_path)
    assert kept.pop("previous/2/history.csv") == b"second"
    assert set(kept) == {f"previous/1/{name}" for name in names} | {"notes.txt"}  # no run is ever deleted


def test_only_what_a_run_leaves_is_set_aside(tmp_path: Path) -> None:
    own = dict.fromkeys(("photo.png", "table.npz", "notes.txt", "accuracy_curve.png", "network.onnx"), b"mine")
    for name, data in own.items():
        (tmp_path / name).write_bytes(data)
    run = RunFolder.open(tmp_path)
    assert contents(tmp_path) == own  # there was no run here
    run.write("run.json", "first")
    RunFolder.open(tmp_path)
    moved = {"accuracy_curve.png", "network.onnx", "run.json"}  # as a run and an export call their files
    assert set(contents(tmp_path)) == {f"previous/1/{name}" for name in moved} | own.keys() - moved


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

    class Killed(BaseException):
        pass

    def replace(path: Path, target: Path, calls: list[int] = []) -> Path:  # noqa: B006  (one list for all calls)
        calls.append(1)
        if len(calls) > moved:
            raise Killed
        os.replace(path, target)
        return target

    def rename(path: Path, target: Path) -> Path:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        patch.setattr(Path, "rename", rename)
        with pytest.raises(Killed):
            RunFolder.open(tmp_path)
    folder.check_resumable()
    RunFolder.open(tmp_path, keep=keep)
    assert contents(tmp_path) == (files if keep else {f"previous/8/{name}": data for name, data in files.items()})
    assert not (tmp_path / "previous" / ".moving").exists()


def test_json_is_strict(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path)
    folder.write_json("run.json", {"path": Path("x"), "share": 0.5})
    assert json.loads((tmp_path / "run.json").read_text()) == {"path": "x", "share": 0.5}
    with pytest.raises(ValueError, match="not JSON compliant"):
        folder.write_json("run.json", {"loss": float("nan")})
    assert json.loads((tmp_path / "run.json").read_text()) == {"path": "x", "share": 0.5}


# --- checkpoints


def test_a_checkpoint_of_other_data_is_refused(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path)
    model, optimizer = trained()
    folder.save_progress(model, optimizer, history(), CONFIG, data_digest="a" * 64)
    with pytest.raises(RunError, match="other images or labels"):
        folder.restore(model, optimizer, CONFIG, CPU, data_digest="b" * 64)
    assert folder.restore(model, optimizer, CONFIG, CPU, data_digest="a" * 64).history == history()


def test_a_checkpoint_gives_model_optimizer_and_history_back(tmp_path: Path) -> None:
    folder, model, optimizer = saved(tmp_path)
    other, other_optimizer = trained(seed=7)
    assert not torch.equal(state_of(model, optimizer)[0], state_of(other, other_optimizer)[0])
    elsewhere = {**CONFIG, "device": "cpu", "data_root": "/elsewhere"}  # where things are may differ
    assert folder.restore(other, other_optimizer, elsewhere, CPU).history == history()
    for mine, theirs in zip(state_of(model, optimizer), state_of(other, other_optimizer), strict=True):
        assert torch.equal(mine, theirs)
    assert (folder.path / "history.csv").read_text() == history().csv_text()
    assert load_checkpoint(folder.path / "checkpoint.pt")["versions"] == versions()


def refused(folder: RunFolder, message: str, config: dict[str, Any] | None = None, **network: Any) -> None:
    """Resuming raises RunError with `message`, and neither model, optimizer nor folder changes."""
    model, optimizer = trained(seed=7, **network)
    before, files = state_of(model, optimizer), contents(folder.path)
    rates = [group["lr"] for group in optimizer.param_groups]
    with pytest.raises(RunError, match=message):
        folder.restore(model, optimizer, config or CONFIG, CPU)
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(model, optimizer), strict=True))
    assert [group["lr"] for group in optimizer.param_groups] == rates
    assert contents(folder.path) == files


def test_a_missing_checkpoint(tmp_path: Path) -> None:
    refused(RunFolder.open(tmp_path), "no checkpoint at .*run without --resume first")
    refused(RunFolder(tmp_path / "absent"), "no checkpoint at")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.7, 0.999])
@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_a_damaged_checkpoint(tmp_path: Path, share: float, how: str) -> None:
    folder, _, _ = saved(tmp_path)
    path = folder.path / "checkpoint.pt"
    data = bytearray(path.read_bytes())
    position = int(share * len(data))
    if how == "cut":
        path.write_bytes(data[:position])
    else:
        data[position] ^= 0xFF
        path.write_bytes(data)
    refused(folder, r"cannot be read: .*is damaged.*; start without --resume")


def test_one_wrong_byte_in_a_weight_is_found(tmp_path: Path) -> None:
    folder, model, _ = saved(tmp_path)
    path = folder.path / "checkpoint.pt"
    stored = model.state_dict()["linear.weight"].numpy().tobytes()
    data = bytearray(path.read_bytes())
    data[data.index(stored) + 10] ^= 1
    path.write_bytes(data)
    refused(folder, "damaged")


class _Harmful:
    """Unpickled by a careless reader, this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path / "run")
    torch.save({"format": 2, "config": _Harmful(tmp_path / "harm")}, folder.path / "checkpoint.pt")
    refused(folder, "written by an earlier version of the project")
    (folder.path / "checkpoint.pt").write_bytes(pickle.dumps(_Harmful(tmp_path / "harm")))
    refused(folder, "damaged, or not a checkpoint file")
    assert not (tmp_path / "harm").exists()


def altered(folder: RunFolder, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder.path / "checkpoint.pt"
    state = load_checkpoint(path)
    changed = change(state)
    path.write_bytes(state_bytes(state if changed is None else changed))


@pytest.mark.parametrize("part", ["config", "model", "optimizer", "history", "unfinished", "random"])
def test_an_incomplete_checkpoint(tmp_path: Path, part: str) -> None:
    folder, _, _ = saved(tmp_path)
    altered(folder, lambda state: state.pop(part) and None)
    refused(folder, f"incomplete: no {part} in it")


def test_a_checkpoint_of_another_configuration(tmp_path: Path) -> None:
    folder, _, _ = saved(tmp_path)
    refused(folder, r"configuration \(epochs: 2 then, 3 now\); repeat the settings", {**CONFIG, "epochs": 3})
    refused(folder, r"\(new: None then, 1 now\)", {**CONFIG, "new": 1})
    refused(folder, r"exclude_layers: \['conv1', 'bn'\] then, \['bn'\] now", {**CONFIG, "exclude_layers": ("bn",)})


def test_a_checkpoint_of_another_architecture(tmp_path: Path) -> None:
    folder, _, _ = saved(tmp_path)
    refused(
        folder, "another architecture: 0 tensors missing, 0 unknown, [1-9][0-9]* of another shape", widths=(4, 8, 32)
    )
    altered(folder, lambda state: state["model"].pop("bn1.weight") is None or None)
    refused(folder, "another architecture: 1 tensors missing, 0 unknown, 0 of another shape, the first 'bn1.weight'")
    plain = ResNet(BasicBlock, [1, 1, 1], widths=(4, 8, 16))
    with pytest.raises(RunError, match="attach the same quantizers"):
        load_model_state(plain, trained()[0].state_dict())


def test_optimizer_or_history_that_do_not_fit(tmp_path: Path) -> None:
    folder, _, _ = saved(tmp_path)
    altered(folder, lambda state: state["optimizer"]["param_groups"].pop() and None)
    refused(folder, "of another optimizer, or of other parameters; build the same one, or start without --resume")
    folder, _, _ = saved(tmp_path)
    altered(folder, lambda state: state["history"]["records"][0].pop("loss") and None)
    refused(folder, "does not fit this run: not a history of this version")


def test_machine_and_versions_name_what_shapes_a_result() -> None:
    found = versions()
    assert found["torch"] == torch.__version__.partition("+")[0] or found["torch"] == torch.__version__
    assert {"python", "numpy", "torchvision", "matplotlib"} <= found.keys()
    host = machine(CPU, torch.bfloat16)
    assert (host["device"], host["precision"], host["threads"]) == ("cpu", "bfloat16", torch.get_num_threads())

"""A run read back from its folder: all of it, or an error that says what is there."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from experiments import pipeline
from experiments.pipeline import RunConfig, SavedRun, configure, load_run
from src.data import DataError, load_data
from src.runs import CHECKPOINT, SNAPSHOTS, SUMMARY, RunError, RunFolder, Snapshots, load_checkpoint
from src.runs.checkpoint import state_bytes
from src.training import layer_records
from tests.histories import make_history


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of resnet20 on 40 digits whose two epochs were made by hand: training it would tell nothing more here."""
    path = tmp_path_factory.mktemp("runs") / "a run"
    config, data = pipeline.prepare_data(configure("smoke", limit=40, epochs=2, batch_size=20, device="cpu"))
    run = pipeline.build_run(config, data)
    snapshots = Snapshots(run.attached)
    snapshots.add(run.model, 0)
    place = RunFolder.open(path)
    for epoch, made in enumerate(make_history(2), start=1):
        run.history.append(replace(made, layers=layer_records(run.model)))
        snapshots.add(run.model, epoch)
        place.write(SNAPSHOTS, snapshots.to_bytes())
        place.save_progress(run.model, run.optimizer, run.progress, asdict(config), data.digest)
    return path


def test_a_folder_gives_back_the_run(folder: Path) -> None:
    loaded = load_run(folder, device="cpu")
    assert loaded.config == configure("smoke", limit=40, epochs=2, batch_size=20, device="cpu")
    assert len(loaded.history) == 2
    assert loaded.snapshots.epochs == [0, 1, 2]
    assert len(loaded.data.train_labels) == 40
    assert "preset smoke" in loaded.subtitle
    state = load_checkpoint(folder / CHECKPOINT)["model"]
    mine = loaded.model.state_dict()
    assert mine.keys() == state.keys()
    assert all(torch.equal(mine[name].cpu(), state[name]) for name in state)
    assert not loaded.model.training


def test_the_same_images_in_another_place_are_the_same_data(tmp_path: Path) -> None:
    for part, name, number in itertools.product(("train", "test"), "ab", range(3)):
        path = tmp_path / "pets" / part / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (number, ord(name), len(part))).save(path)
    config = RunConfig("smoke", data=f"folder:{tmp_path}/pets/")
    saved = SavedRun("a", tmp_path, config, make_history(1), {}, load_data(config.data).digest, {})
    (tmp_path / "pets").rename(tmp_path / "moved")
    with pytest.raises(DataError, match=r"No such file.*pets.*; name the folder of the run's images with data_root"):
        saved.load_data()
    assert saved.load_data(tmp_path / "moved").digest == saved.data_digest
    assert saved.resumed(data=f"folder:{tmp_path / 'moved'}").data != config.data
    written = {"config": {"data": f"folder:{tmp_path / 'moved'}"}}  # by the resumed run, into run.json
    assert replace(saved, summary=written).load_data().digest == saved.data_digest
    Image.new("RGB", (32, 32)).save(tmp_path / "moved/train/a/0.png")
    with pytest.raises(RunError, match="trained on other images"):
        saved.load_data(tmp_path / "moved")


def test_what_cannot_be_loaded_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no run: there is no such folder; name the output folder"):
        load_run(tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(RunError, match=r"in it are notes\.txt; name the output folder"):
        load_run(tmp_path)
    copy = tmp_path / "copy"
    copy.mkdir()
    state = load_checkpoint(folder / CHECKPOINT)
    (copy / CHECKPOINT).write_bytes((folder / CHECKPOINT).read_bytes())
    (copy / SUMMARY).write_text("{")
    with pytest.raises(RunError, match=r"run\.json.*cannot be read"):
        load_run(copy)
    (copy / SUMMARY).write_text(json.dumps({"data": {"name": "digits"}}))
    assert load_run(copy).snapshots.epochs == [2], "no snapshots: the trained state alone"
    (copy / CHECKPOINT).write_bytes(state_bytes({**state, "data_digest": "0" * 64}))
    with pytest.raises(RunError, match=r"trained on other images.*000000000000 then"):
        load_run(copy)
    (copy / CHECKPOINT).write_bytes(state_bytes({**state, "config": {"preset": "smoke", "epochs": 0}}))
    with pytest.raises(RunError, match=r"cannot be used: epochs=0.*name another run"):
        load_run(copy)

"""Every kind of file that is read, with bytes changed, overwritten or cut off at random places."""

from __future__ import annotations

import io
import random
import warnings
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import torch
from PIL import Image

from experiments.headless import NotebookInputError, parameter_defaults, read_notebook, to_html
from resnet import BasicBlock, ResNet
from src.data import DataError
from src.data.image_sources import read_folder
from src.export import pack, unpack
from src.quantizer import DeadZoneLDZCompander
from src.runs import RunFolder, SnapshotError, Snapshots, load_checkpoint
from src.runs.checkpoint import DamagedCheckpoint
from src.storage import StorageError
from src.training import EpochRecord, History, LayerRecord, make_optimizer, parameter_groups
from tests.torture.damage import damaged, read_damaged, told
from tests.torture.fault import Outcome, fault
from utils_quantization import attach_weight_quantizers

REFUSED = "refused with one clear error that names the file, or read with the same contents as before"


def equal(one: Any, other: Any) -> bool:
    """The same plain data, tensors bit for bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return (
            one.dtype == other.dtype and one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()
        )
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and bool(one == other)


def small_network() -> ResNet:
    """Three blocks of 4, 6 and 8 channels, quantized."""
    torch.manual_seed(0)
    network = ResNet(BasicBlock, [1, 1, 1], 5, widths=(4, 6, 8))
    attach_weight_quantizers(network, ["conv1", "linear"], DeadZoneLDZCompander, {"max_bits": 8})
    return network


def small_packed(path: Path) -> bytes:
    pack(small_network().eval(), path, force=True)
    return path.read_bytes()


def small_history(epochs: int) -> History:
    """A history of so many epochs as a run would have written it, numbers made up."""
    history = History(epochs)
    for epoch in range(1, epochs + 1):
        layers = tuple(LayerRecord(f"layer{i}", 8.0, 0.1, 0.5, (False, True) * 4) for i in range(1, 4))
        history.append(EpochRecord(epoch, 2.0, 1.5, 0.4, 10.0, 0.01, 1e-3, 0.5, 1.4, 0.6, 0.5, 0.5, 8.0, 1.0, layers))
    return history


def small_checkpoints(folder: Path) -> RunFolder:
    """A run folder with checkpoint.pt after the second epoch and checkpoint.previous.pt after the first."""
    network = small_network()
    rates = {"learning_rate": 1e-3, "dz_learning_rate": 1e-3, "bit_learning_rate": 1e-3}
    optimizer = make_optimizer(parameter_groups(network, **rates))
    run = RunFolder.open(folder)
    for epochs in (1, 2):
        network(torch.randn(4, 3, 32, 32)).sum().backward()
        optimizer.step()
        run.save_progress(network, optimizer, small_history(epochs), {"epochs": 2})
    run.close()
    return run


@fault("checkpoint damaged", survived=REFUSED, rounds=200, quick=10)
def checkpoint(rng: random.Random, tmp: Path, rounds: int) -> Outcome:
    small_checkpoints(tmp)
    (tmp / "checkpoint.previous.pt").unlink()
    return read_damaged(tmp / "checkpoint.pt", rng, rounds, load_checkpoint, equal, DamagedCheckpoint)


@fault(
    "checkpoint damaged or gone, the one before it there",
    survived="the one before it is read in its place and said so, or the same contents are read",
    rounds=200,
    quick=10,
)
def checkpoint_before(rng: random.Random, tmp: Path, rounds: int) -> Outcome:
    small_checkpoints(tmp)
    path, outcome = tmp / "checkpoint.pt", Outcome()
    data, newest = path.read_bytes(), load_checkpoint(path)
    before = load_checkpoint(tmp / "checkpoint.previous.pt")
    assert (before["epoch"], newest["epoch"]) == (1, 2)
    for _ in range(rounds):
        what, bad = damaged(data, rng)
        path.write_bytes(bad)
        if rng.random() < 0.1:
            what = "gone"
            path.unlink()
        heard: list[str] = []
        with outcome.trial(what):
            found = load_checkpoint(path, report=heard.append)
            assert equal(found, before if heard else newest)
            assert all("checkpoint.previous.pt" in line for line in heard)
    return outcome


@fault("packed network damaged", survived=REFUSED, rounds=200, quick=10)
def packed_network(rng: random.Random, tmp: Path, rounds: int) -> Outcome:
    path = tmp / "model.cdq"
    small_packed(path)

    def read(path: Path) -> dict[str, Any]:
        network = unpack(path)
        return {"description": network.description, "state": dict(network.state_dict())}

    return read_damaged(path, rng, rounds, read, equal, StorageError)


@fault("snapshots damaged", survived=REFUSED, rounds=200, quick=10)
def snapshots(rng: random.Random, tmp: Path, rounds: int) -> Outcome:
    path, network = tmp / "snapshots.npz", small_network()
    names = [name for name, module in network.named_modules() if hasattr(module, "parametrizations")]
    kept = Snapshots(names)
    for epoch in range(4):
        kept.add(network, epoch)
    path.write_bytes(kept.to_bytes())

    def read(path: Path) -> list[bytes]:
        return [Snapshots.load(path).to_bytes()]

    return read_damaged(path, rng, rounds, read, equal, SnapshotError)


@fault(
    "image of a folder damaged",
    survived="refused with one clear error that names the file, or read as a picture of the right size",
    rounds=200,
    quick=10,
)
def image(rng: random.Random, tmp: Path, rounds: int) -> Outcome:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for part in ("train", "test"):
        for label in ("a", "b"):
            (tmp / part / label).mkdir(parents=True)
            Image.fromarray(pixels).save(tmp / part / label / "0.png")
    outcome = Outcome()
    whole = {kind: _encoded(pixels, kind) for kind in ("png", "jpeg", "gif", "bmp", "tiff", "webp")}
    for _ in range(rounds):
        kind = rng.choice(list(whole))
        what, bad = damaged(whole[kind], rng)
        path = tmp / "train" / "a" / f"1.{kind}"
        path.write_bytes(bad)
        with outcome.trial(f"{kind}: {what}"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow says by the way what it makes of a damaged file
            try:
                images = read_folder(str(tmp), lambda line: None)[0][0]
            except DataError as error:
                told(error, path)
            else:
                assert images.shape == (3, 32, 32, 3)
        path.unlink()
    return outcome


def _encoded(pixels: np.ndarray, kind: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def _notebook() -> str:
    """A notebook with parameters, formulas, text, a figure, a table and an error, as one that was executed."""
    v4 = nbformat.v4
    png = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
    outputs = [
        v4.new_output("stream", name="stdout", text="Epoch 1/3\n"),
        v4.new_output("display_data", {"image/png": png, "text/plain": "figure"}, metadata={"image/png": {"alt": "x"}}),
        v4.new_output("display_data", {"text/html": "<table><tr><td>1</td></tr></table>", "text/plain": "1"}),
        v4.new_output("error", ename="ValueError", evalue="bad", traceback=["ValueError: bad"]),
    ]
    notebook = v4.new_notebook(
        cells=[
            v4.new_markdown_cell("# Title\n\nText with $x^2$ and a [link](#part).\n\n## Part\n"),
            v4.new_code_cell('DATA = "digits"\nEPOCHS = 3', metadata={"tags": ["parameters"]}),
            v4.new_code_cell("print(EPOCHS)", outputs=outputs, execution_count=2),
        ],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}, "language_info": {"name": "python"}},
    )
    return nbformat.writes(notebook)


@fault(
    "notebook damaged",
    survived="refused with one clear error that names the file, or still a notebook whose page can be written; a "
    "changed letter in a cell's text is an edit like any other",
    rounds=200,
    quick=10,
)
def notebook(rng: random.Random, tmp: Path, rounds: int) -> Outcome:
    data, path, outcome, still = _notebook().encode(), tmp / "lesson.ipynb", Outcome(), 0
    for _ in range(rounds):
        what, bad = damaged(data, rng)
        path.write_bytes(bad)
        with outcome.trial(what):
            try:
                found = read_notebook(path)
                parameter_defaults(found)
            except NotebookInputError as error:
                told(error, path)
            else:
                nbformat.validate(found)
                assert "</html>" in to_html(found)
                still += 1
    outcome.note = f"{outcome.tried - still} refused, {still} still a notebook"
    return outcome

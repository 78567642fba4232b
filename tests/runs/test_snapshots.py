"""Snapshots: what they hold is counted again with numpy, and a resumed run has the file of an unbroken one."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from experiments.benchmarks.training import peak_memory
from resnet import BasicBlock, ResNet, resnet110
from src.quantizer import DeadZoneLDZCompander
from src.runs import EDGES, SNAPSHOTS, SnapshotError, Snapshots
from src.storage import container_bytes, read_container, save_arrays
from utils_quantization import attach_weight_quantizers, latent_weight, quantized_layers, quantizer_of


def network() -> tuple[nn.Module, list[str]]:
    torch.manual_seed(0)
    model = ResNet(BasicBlock, [1, 1, 1], 3, widths=(2, 4, 8))
    return model, attach_weight_quantizers(model, ["conv1", "bn", "linear"], DeadZoneLDZCompander)


@torch.no_grad()
def train(model: nn.Module, epoch: int) -> None:
    """An epoch of something: every weight and logit moves, the same way each time it is called with this number."""
    generator = torch.Generator().manual_seed(epoch)
    for layer in quantized_layers(model).values():
        latent_weight(layer).add_(torch.randn(latent_weight(layer).shape, generator=generator), alpha=0.02)
        quantizer_of(layer).logit_dz.mul_(0.97)
        quantizer_of(layer).logit_bit.mul_(0.97)


def trained(epochs: int) -> tuple[Snapshots, nn.Module]:
    """Snapshots of epochs 0 to `epochs` - 1 in an unbroken run, and its network."""
    model, names = network()
    snapshots = Snapshots(names)
    for epoch in range(epochs):
        train(model, epoch)
        snapshots.add(model, epoch)
    return snapshots, model


def test_a_snapshot_holds_what_numpy_counts() -> None:
    model, names = network()
    layer = model.get_submodule(names[2])
    with torch.no_grad():
        latent_weight(model.get_submodule(names[1])).zero_()
        latent_weight(layer)[1] *= 1e-6  # a filter that falls into the dead zone
        quantizer_of(layer).logit_dz.fill_(math.atanh(0.8))  # d / (2 R) = 0.2
        quantizer_of(layer).logit_bit.fill_(math.atanh(0.5))  # 2 + 6 / 2 = 5 bits
    snapshots = Snapshots(names)
    snapshots.add(model, 3)
    seen = snapshots.view(names[2], 3)
    w = latent_weight(layer).detach().double().numpy()
    range_ = np.quantile(np.abs(w), 0.99)
    share = w.ravel() / range_
    inner, _ = np.histogram(share, bins=EDGES)
    assert seen.range == pytest.approx(range_, rel=1e-6)
    assert seen.dead_zone == pytest.approx(0.4 * range_, rel=1e-5)
    assert seen.zone_share == pytest.approx(0.2, rel=1e-5)
    assert seen.bits == 5
    assert seen.counts.sum() == w.size
    assert (seen.counts[0], seen.counts[-1]) == ((share < -1.5).sum(), (share > 1.5).sum())
    assert np.abs(seen.counts[1:-1] - inner).sum() <= 2, "a weight on a border may fall to either side"
    zero = np.abs(w) <= 0.2 * range_
    assert seen.sparsity == pytest.approx(zero.mean())
    np.testing.assert_array_equal(seen.dead, zero.reshape(len(w), -1).all(1))
    assert seen.dead[1]
    zeros = snapshots.view(names[1], 3)
    assert zeros.counts[1:-1][60] == zeros.counts.sum(), "all in the middle bin"
    assert zeros.dead.all()
    assert zeros.zone_share == 0
    assert np.isfinite(zeros.levels).all()


def test_levels_are_those_of_the_quantizer() -> None:
    model, names = network()
    layer = model.get_submodule(names[0])
    with torch.no_grad():
        quantizer_of(layer).logit_bit.fill_(math.atanh(0.2))  # 2 + 1.2 rounds to 3 bits: -3..3
        quantizer_of(layer).logit_dz.fill_(1.0)
    snapshots = Snapshots(names)
    snapshots.add(model, 0)
    seen = snapshots.view(names[0], 0)
    wide = torch.linspace(-1, 1, 10_001) * seen.range
    padded = torch.cat([wide, latent_weight(layer).detach().flatten()])
    quantizer = quantizer_of(layer)
    values = np.unique((quantizer(padded).detach() / quantizer.grid(padded).range).numpy().round(4))
    np.testing.assert_allclose(seen.levels, values, atol=2e-4)


@pytest.mark.parametrize("most_kept", [8, 512])
@pytest.mark.parametrize(("stopped", "file_ahead"), [(4, 0), (8, 1), (15, 2), (22, 0)])
def test_a_resumed_run_has_the_file_of_an_unbroken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: int, file_ahead: int, most_kept: int
) -> None:
    monkeypatch.setattr(Snapshots, "most_kept", most_kept)
    unbroken, _ = trained(30)
    (tmp_path / SNAPSHOTS).write_bytes(trained(stopped + 1 + file_ahead)[0].to_bytes())
    _, model = trained(stopped + 1)  # the checkpoint is of epoch `stopped`
    second = Snapshots.resume(tmp_path / SNAPSHOTS, unbroken.layer_names, model, stopped)
    for epoch in range(stopped + 1, 30):
        train(model, epoch)
        second.add(model, epoch)
    assert second.to_bytes() == unbroken.to_bytes()
    assert second.epochs == ([0, 8, 16, 24, 29] if most_kept == 8 else list(range(30)))


def test_a_file_is_read_up_to_an_epoch_and_an_epoch_trained_again_replaces_the_later_ones(tmp_path: Path) -> None:
    snapshots, model = trained(4)
    path, name = tmp_path / SNAPSHOTS, snapshots.layer_names[0]
    path.write_bytes(snapshots.to_bytes())
    assert Snapshots.load(path, 2).epochs == [0, 1, 2]
    found = Snapshots.load(path)
    assert found.to_bytes() == snapshots.to_bytes()
    assert [seen.epoch for seen in found.through(name)] == [0, 1, 2, 3]
    found.add(model, 2)
    assert found.epochs == [0, 1, 2]
    assert found.view(name, 9).range == snapshots.view(name, 3).range, "the newest that is not later"
    path.write_bytes(Snapshots(snapshots.layer_names).to_bytes())
    assert Snapshots.load(path).epochs == []


def test_the_file_of_a_long_run_of_the_largest_network_stays_below_two_megabytes() -> None:
    """300 epochs of resnet110: weights as at the start, which fill the bins more than trained ones, noise in each."""
    model = resnet110()
    names = attach_weight_quantizers(model, ["conv1", "bn", "linear"], DeadZoneLDZCompander)
    snapshots = Snapshots(names)
    snapshots.add(model, 0)
    generator, kept = np.random.default_rng(0), range(snapshots.most_kept)
    (first,) = snapshots._rows.values()
    for epoch in kept[1:]:  # as many as are ever kept of this network, each with counting noise of its own
        snapshots._rows[epoch] = [
            replace(
                layer,
                epoch=epoch,
                counts=generator.poisson(layer.counts),
                sparsity=generator.random(),
                dead=generator.random(len(layer.dead)) < 0.4,
            )
            for layer in first
        ]
    size = len(snapshots.to_bytes())
    assert 800_000 < size < 2_000_000, f"{size} bytes"
    snapshots.add(model, 300)
    assert snapshots.epochs[:4] == [0, 4, 8, 12]


FORGERIES: dict[str, Callable[[dict[str, Any], dict[str, Any]], Any]] = {
    "epochs in no order": lambda d, a: d.update(epochs=[1, 0]),
    "epochs that are not there": lambda d, a: d.update(epochs=list(range(600))),
    "a layer twice as wide": lambda d, a: d["channels"].append(8),
    "channels that are not there": lambda d, a: d.update(channels=[3 * 10**7] * 6),
    "channels below zero": lambda d, a: d.update(channels=[-8, *d["channels"][1:-1], d["channels"][-1] + 10]),
    "bits beyond all": lambda d, a: a.update(bits=a["bits"] + 100),  # 2^100 levels to draw
    "a shape that differs": lambda d, a: a.update(range=a["range"][0]),
    "zeros that were compressed": lambda d, a: a.update(counts=np.frombuffer(zlib.compress(bytes(2**28)), np.uint8)),
    "counts cut off": lambda d, a: a.update(counts=a["counts"][:-20]),
    "counts that are noise": lambda d, a: a.update(counts=np.ones(9, np.uint8)),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_contents_are_refused_cheaply(tmp_path: Path, forgery: str) -> None:
    path = tmp_path / SNAPSHOTS
    path.write_bytes(trained(2)[0].to_bytes())
    description, arrays = read_container(path, "snapshots")
    FORGERIES[forgery](description, arrays)
    path.write_bytes(container_bytes("snapshots", description, save_arrays(arrays)))
    messages: list[str] = []

    def read() -> None:
        with pytest.raises(SnapshotError, match=r"snapshots\.npz' cannot be read .*damaged.*delete it") as caught:
            Snapshots.load(path)
        messages.append(str(caught.value))

    assert peak_memory(read, torch.device("cpu"))["step_bytes"] < 2**25
    assert messages


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    model, names = network()
    path, snapshots = tmp_path / SNAPSHOTS, Snapshots(names)
    with pytest.raises(SnapshotError, match="no layer to look at"):
        Snapshots([])
    with pytest.raises(SnapshotError, match="not those of these snapshots"):
        Snapshots(names[:-1]).add(model, 0)
    with pytest.raises(SnapshotError, match="no snapshot yet"):
        snapshots.view(names[0], 0)
    with pytest.raises(SnapshotError, match=r"'layer9'.*choose one of layer1\.0\.conv1"):
        snapshots.view("layer9", 0)
    with pytest.raises(SnapshotError, match="there are no snapshots at"):
        Snapshots.load(path)
    path.write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(SnapshotError, match=r"earlier version .*format 1.*delete it, and the run"):
        Snapshots.load(path)
    path.write_bytes(Snapshots(names[:-1]).to_bytes())
    with pytest.raises(SnapshotError, match="other layers"):
        Snapshots.resume(path, names, model, 0)
    path.unlink()
    assert Snapshots.resume(path, names, model, 5).epochs == [5]

"""Snapshots: what they hold is counted again with numpy, and a resumed run has the file of an unbroken one."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from resnet import BasicBlock, ResNet
from src.quantizer import DeadZoneLDZCompander
from src.runs import EDGES, SNAPSHOTS, SnapshotError, Snapshots
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


@pytest.mark.parametrize(("stopped", "file_ahead"), [(2, 0), (3, 1), (4, 2)])
def test_a_resumed_run_has_the_file_of_an_unbroken_one(tmp_path: Path, stopped: int, file_ahead: int) -> None:
    unbroken, _ = trained(8)
    (tmp_path / SNAPSHOTS).write_bytes(trained(stopped + 1 + file_ahead)[0].to_bytes())
    _, model = trained(stopped + 1)  # the checkpoint is of epoch `stopped`
    second = Snapshots.resume(tmp_path / SNAPSHOTS, unbroken.layer_names, model, stopped)
    assert second.epochs == list(range(stopped + 1))
    for epoch in range(stopped + 1, 8):
        train(model, epoch)
        second.add(model, epoch)
    assert second.to_bytes() == unbroken.to_bytes()
    name = unbroken.layer_names[0]
    for seen, kept in zip(second.through(name), unbroken.through(name), strict=True):
        np.testing.assert_array_equal(seen.counts, kept.counts)
        np.testing.assert_array_equal(seen.dead, kept.dead)
    second.add(model, 2)
    assert second.epochs == [0, 1, 2], "an epoch trained again replaces the later ones"
    assert second.view(name, 9).range == unbroken.view(name, 7).range, "the newest that is not later"


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    model, names = network()
    path = tmp_path / SNAPSHOTS
    with pytest.raises(SnapshotError, match="No such file"):
        Snapshots.load(path)
    path.write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(SnapshotError, match=r"earlier version .*delete it, and the run"):
        Snapshots.load(path)
    path.unlink()
    assert Snapshots.resume(path, names, model, 5).epochs == [5]

"""Snapshots: what they hold is counted again with numpy, and a run taken up again has the file of an unbroken one."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from experiments.benchmarks import peak_memory
from resnet import BasicBlock, ResNet, resnet110
from src.quantizer import DeadZoneLDZCompander
from src.runs import EDGES, SNAPSHOTS, SnapshotError, Snapshots
from src.storage import write_atomic
from utils_quantization import attach_weight_quantizers, latent_weight, quantized_layers, quantizer_of


def network(seed: int = 0) -> tuple[nn.Module, list[str]]:
    torch.manual_seed(seed)
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


def arrays(data: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def test_a_snapshot_holds_what_numpy_counts() -> None:
    model, names = network()
    layer = model.get_submodule(names[2])
    with torch.no_grad():
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


def test_a_layer_of_zeros_has_a_snapshot() -> None:
    model, names = network()
    with torch.no_grad():
        latent_weight(model.get_submodule(names[1])).zero_()
    snapshots = Snapshots(names)
    snapshots.add(model, 1)
    seen = snapshots.view(names[1], 1)
    assert seen.counts[1:-1][60] == seen.counts.sum(), "all in the middle bin"
    assert seen.dead.all()
    assert seen.zone_share == 0
    assert np.isfinite(seen.levels).all()


@pytest.mark.parametrize(("stopped", "file_ahead"), [(4, 0), (5, 1), (9, 2)])
def test_a_run_taken_up_again_has_the_file_of_an_unbroken_one(tmp_path: Path, stopped: int, file_ahead: int) -> None:
    model, names = network()
    unbroken = Snapshots(names)
    for epoch in range(13):
        train(model, epoch)
        unbroken.add(model, epoch)
    first, (model, _) = Snapshots(names), network()
    for epoch in range(stopped + 1 + file_ahead):
        train(model, epoch)
        first.add(model, epoch)
    write_atomic(tmp_path / SNAPSHOTS, first.to_bytes())
    model, _ = network()  # the checkpoint is of epoch `stopped`
    for epoch in range(stopped + 1):
        train(model, epoch)
    second = Snapshots.resume(tmp_path / SNAPSHOTS, names, model, stopped)
    for epoch in range(stopped + 1, 13):
        train(model, epoch)
        second.add(model, epoch)
    assert second.to_bytes() == unbroken.to_bytes()
    assert second.epochs == list(range(13))


def test_thinning_depends_on_the_newest_epoch_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Snapshots, "most_kept", 8)
    model, names = network()
    path = tmp_path / SNAPSHOTS
    unbroken, broken = Snapshots(names), Snapshots(names)
    for epoch in range(30):
        train(model, epoch)
        unbroken.add(model, epoch)
        assert len(unbroken) <= 8
        if epoch in (7, 8, 15, 22):
            path.write_bytes(broken.to_bytes())
            broken = Snapshots.resume(path, names, model, epoch - 1)
        broken.add(model, epoch)
    assert unbroken.epochs == [0, 8, 16, 24, 29], "multiples of 8, the newest, and the first"
    assert broken.to_bytes() == unbroken.to_bytes()


def test_an_epoch_that_is_trained_again_replaces_what_was_there() -> None:
    model, names = network()
    snapshots = Snapshots(names)
    for epoch in (0, 1, 2, 3):
        snapshots.add(model, epoch)
    train(model, 2)
    snapshots.add(model, 2)
    assert snapshots.epochs == [0, 1, 2]
    assert snapshots.view(names[0], 2).range != snapshots.view(names[0], 1).range
    assert snapshots.view(names[0], 9).epoch == 2, "the newest that is not later"


def test_the_file_of_a_long_run_of_the_largest_network_stays_below_two_megabytes() -> None:
    """300 epochs of resnet110: weights as at the start, which fill the bins more than trained ones, noise in each."""
    model = resnet110()
    names = attach_weight_quantizers(model, ["conv1", "bn", "linear"], DeadZoneLDZCompander)
    snapshots = Snapshots(names)
    snapshots.add(model, 0)
    (frame,) = snapshots._frames
    generator, kept = np.random.default_rng(0), range(127)
    for epoch in kept[1:]:  # as many as are ever kept of this network, each with counting noise of its own
        counts = generator.poisson(frame.counts).astype(np.uint32)
        values = {**vars(frame), "epoch": epoch, "counts": counts, "dead": generator.random(len(frame.dead)) < 0.4}
        snapshots._frames.append(type(frame)(**values))
    assert len(snapshots) >= snapshots.most_kept - 1
    size = len(snapshots.to_bytes())
    assert 800_000 < size < 2_000_000, f"{size} bytes"
    snapshots.add(model, 300)
    assert snapshots.epochs[:4] == [0, 4, 8, 12]


def test_a_file_survives_and_is_cut_to_the_history(tmp_path: Path) -> None:
    model, names = network()
    snapshots = Snapshots(names)
    for epoch in range(4):
        snapshots.add(model, epoch)
    path = tmp_path / SNAPSHOTS
    path.write_bytes(snapshots.to_bytes())
    assert Snapshots.load(path).to_bytes() == snapshots.to_bytes()
    assert Snapshots.load(path, 2).epochs == [0, 1, 2]
    assert [seen.epoch for seen in Snapshots.load(path).through(names[0])] == [0, 1, 2, 3]
    empty = Snapshots(names)
    path.write_bytes(empty.to_bytes())
    assert Snapshots.load(path).epochs == []


def test_damage_is_told_and_nothing_is_unpickled(tmp_path: Path) -> None:
    model, names = network()
    snapshots = Snapshots(names)
    snapshots.add(model, 0)
    good, path = snapshots.to_bytes(), tmp_path / SNAPSHOTS
    with pytest.raises(SnapshotError, match="there are no snapshots"):
        Snapshots.load(path)
    for bad in (b"", b"PK", good[: len(good) // 2], good[:400] + bytes([good[400] ^ 255]) + good[401:]):
        path.write_bytes(bad)
        with pytest.raises(SnapshotError, match=r"cannot be read .*damaged.*delete it"):
            Snapshots.load(path)
    for name, wrong in (
        ("format", np.array(9)),
        ("epochs", np.array([2, 1])),
        ("sizes", arrays(good)["sizes"] + 1),
        ("count_bytes", arrays(good)["count_bytes"][..., :-1]),
        ("layers", np.array([{}], dtype=object)),
        ("bits", arrays(good)["bits"] + 100),  # 2^100 levels to draw
        ("zeros", arrays(good)["zeros"][0]),
        ("channels", arrays(good)["channels"] + 8),
    ):
        np.savez(path, **{**arrays(good), name: wrong})
        with pytest.raises(SnapshotError, match="cannot be read"):
            Snapshots.load(path)


def test_a_small_file_that_stands_for_gigabytes_is_refused_cheaply(tmp_path: Path) -> None:
    model, names = network()
    snapshots = Snapshots(names)
    snapshots.add(model, 0)
    good, path = arrays(snapshots.to_bytes()), tmp_path / SNAPSHOTS
    absurd = {
        "zeros that were compressed": {"count_bytes": np.zeros((4, 30_000, len(names), 123), np.uint8)},
        "channels that are not there": {"channels": np.full(len(names), 3 * 10**7)},
    }
    for what, changes in absurd.items():
        np.savez_compressed(path, **{**good, **changes})
        messages: list[str] = []

        def read(messages: list[str] = messages) -> None:
            with pytest.raises(SnapshotError) as caught:
                Snapshots.load(path)
            messages.append(str(caught.value))

        used = peak_memory(read, torch.device("cpu"))["step_bytes"]
        assert "cannot be read" in messages[0]
        assert used < 2**26, f"{what}: {used / 2**20:.0f} MiB"


def test_wrong_layers_and_names_are_told(tmp_path: Path) -> None:
    model, names = network()
    with pytest.raises(SnapshotError, match="no layer to look at"):
        Snapshots([])
    with pytest.raises(SnapshotError, match="not those of these snapshots"):
        Snapshots(names[:-1]).add(model, 0)
    snapshots = Snapshots(names)
    with pytest.raises(SnapshotError, match="no snapshot yet"):
        snapshots.view(names[0], 0)
    with pytest.raises(SnapshotError, match=r"'layer9'.*choose one of layer1\.0\.conv1"):
        snapshots.view("layer9", 0)
    path = tmp_path / SNAPSHOTS
    path.write_bytes(Snapshots(names[:-1]).to_bytes())
    with pytest.raises(SnapshotError, match="other layers"):
        Snapshots.resume(path, names, model, 0)
    path.unlink()
    assert Snapshots.resume(path, names, model, 5).epochs == [5]

"""Packed files: bit for bit, near the entropy that numpy gives, and refused where they are damaged."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from resnet import BasicBlock, ResNet
from src.export import PackReport, pack, unpack
from src.export.integer_weights import IndexingError, compact_with_indices
from src.export.packing import entropy_bits
from src.pruning import CompactionError, compact
from src.quantizer import DeadZoneLDZCompander
from src.storage import StorageError, container_bytes, read_container, save_arrays
from tests.quantized_networks import SMALL_SIZE, mixed_resnet20, small_resnet
from utils_quantization import attach_weight_quantizers, toggle_quantization


def state_bytes(model: nn.Module) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Type, shape and bytes of every entry, so that -0.0 and 0.0 differ."""
    return {
        name: (str(tensor.dtype), tuple(tensor.shape), tensor.detach().contiguous().numpy().tobytes())
        for name, tensor in model.state_dict().items()
    }


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return mixed_resnet20()


@pytest.fixture(scope="module")
def packed(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PackReport]:
    path = tmp_path_factory.mktemp("packed") / "model.cdq"
    return path, pack(model, path)


def test_round_trip_bit_for_bit(model: nn.Module, packed: tuple[Path, PackReport]) -> None:
    smaller, network = compact(model), unpack(packed[0])
    assert state_bytes(network) == state_bytes(smaller)
    assert network.description == smaller.description
    assert any(step["op"] == "join" for step in network.description["steps"])  # constants off the grid took part
    assert not any(module.training for module in network.modules())
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(network(images), smaller(images))
        assert torch.equal(network(images).argmax(1), model(images).argmax(1))


def test_indices_are_the_evaluated_weights(model: nn.Module) -> None:
    """In numpy, from the quantizer's own logits: every weight is s q + delta sign(q), with q of at most b bits."""
    compacted = compact_with_indices(model)
    state = compacted.network.state_dict()
    assert [part.bits for part in compacted.weights.values()] == [2 + i % 7 for i in range(18)]
    for name, part in compacted.weights.items():
        q = part.indices.numpy().astype(np.float32)
        values = part.step.numpy() * q + part.shift.numpy() * np.sign(q)
        np.testing.assert_array_equal(values, state[f"{name}.weight"].numpy()[:, : q.shape[1]])
        assert np.abs(q).max() <= 2 ** (part.bits - 1) - 1


def test_round_numbers_of_channels_are_packed_too(model: nn.Module, tmp_path: Path) -> None:
    pack(compact_with_indices(model, multiple_of=8), tmp_path / "model.cdq")  # every weight was compared with its grid
    assert state_bytes(unpack(tmp_path / "model.cdq")) == state_bytes(compact(model, multiple_of=8))


@pytest.mark.parametrize("option", ["A", "B"])
@pytest.mark.parametrize(("bits", "max_bits"), [((2, 3), 8), ((8, 9, 16), 16)])
def test_round_trip_of_small_networks(option: str, bits: tuple[int, ...], max_bits: int, tmp_path: Path) -> None:
    model = small_resnet(bits, max_bits, option)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = pack(model, tmp_path / "model.cdq", input_size=SMALL_SIZE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert report.file_bytes == (tmp_path / "model.cdq").stat().st_size
    assert state_bytes(unpack(tmp_path / "model.cdq")) == state_bytes(compact(model, SMALL_SIZE))


def test_report_against_counts_by_hand(model: nn.Module, packed: tuple[Path, PackReport]) -> None:
    path, report = packed
    # resnet20: 269,722 parameters, 688 means and 688 variances in float32, 19 counters in int64
    assert report.fp32_state_bytes == 4 * (269_722 + 2 * 688) + 8 * 19 == 1_084_544
    assert report.file_bytes == path.stat().st_size
    assert report.ratio == pytest.approx(1_084_544 / path.stat().st_size)
    parts = compact_with_indices(model).weights.values()
    assert report.bit_width_bytes == sum(part.bits * part.indices.numel() for part in parts) / 8
    entropy = 0.0
    for part in parts:
        share = np.bincount(part.indices.numpy().ravel() + 128) / part.indices.numel()
        entropy -= part.indices.numel() * sum(p * math.log2(p) for p in share if p > 0) / 8
    assert report.entropy_bytes == pytest.approx(entropy)
    # independent weights, of which LZMA has nothing to gain: measured 1.104
    assert entropy <= report.stream_bytes <= 1.15 * entropy
    assert report.file_bytes < report.stream_bytes + report.float32_bytes + 4000
    text = report.text()
    for size in (report.fp32_state_bytes, report.stream_bytes, report.file_bytes):
        assert f"{size:,}" in text
    assert f"{report.ratio:.2f} times smaller" in text


def test_worked_example() -> None:
    """The numbers in the head of src/export/packing.py: 0.850 bits each, 106 bytes, and 500 as the bit widths say."""
    others = [q for q in range(-7, 8) if q]
    q = np.array([0] * 900 + [others[i % 14] for i in range(98)] + [1, -1], dtype=np.int32)
    assert entropy_bits(q) / 1000 == pytest.approx(0.850, abs=0.001)
    assert round(entropy_bits(q) / 8) == 106


def test_without_quantizers_all_is_float32(tmp_path: Path) -> None:
    model = ResNet(BasicBlock, [1, 1, 1], 5, widths=(4, 6, 8)).eval()
    report = pack(model, tmp_path / "plain.cdq", input_size=SMALL_SIZE)
    assert report.weights == report.bit_width_bytes == report.entropy_bytes == 0
    assert "no quantized layer" in report.text()
    assert state_bytes(unpack(tmp_path / "plain.cdq")) == state_bytes(compact(model, SMALL_SIZE))
    again = pack(unpack(tmp_path / "plain.cdq"), tmp_path / "again.cdq", input_size=SMALL_SIZE)
    assert (tmp_path / "again.cdq").read_bytes() == (tmp_path / "plain.cdq").read_bytes()
    assert again.fp32_state_bytes == report.compact_state_bytes


class _OtherQuantizer(nn.Module):
    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return w.round()


def _other_quantizer() -> nn.Module:
    model = ResNet(BasicBlock, [1, 1, 1], 5, widths=(4, 6, 8))
    attach_weight_quantizers(model, ["conv1", "linear"], _OtherQuantizer)
    return model.eval()


def _switched_off() -> nn.Module:
    model = small_resnet()
    toggle_quantization(model, False)
    return model


def test_operations_of_its_own_need_the_network(tmp_path: Path) -> None:
    """A file holds no code: softmax over pixels and its sizes come from a network of the same class."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
            self.weigh = nn.Parameter(torch.randn(1, 1, *SMALL_SIZE[1:]))
            self.linear = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x) * self.weigh
            n, c, h, w = x.shape
            return self.linear(x.view(n * c, h * w).softmax(1).view(n, c, h, w).amax((2, 3)))

    model = Gate().eval()
    attach_weight_quantizers(model, [], DeadZoneLDZCompander)
    model.eval()
    report = pack(model, tmp_path / "model.cdq", input_size=SMALL_SIZE)
    assert report.weights == 4 * 3 * 9 + 2 * 4
    with pytest.raises(CompactionError, match=r"operations of its own .*unpack\(path, like=MyNetwork\(\)\)"):
        unpack(tmp_path / "model.cdq")
    restored, images = unpack(tmp_path / "model.cdq", like=Gate()), torch.randn(3, *SMALL_SIZE)
    assert torch.equal(restored(images), compact(model, SMALL_SIZE)(images))
    torch.testing.assert_close(restored(images), model(images))


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: small_resnet().train(), CompactionError, "training mode"),
        (_switched_off, IndexingError, "switch all quantizers on"),
        (lambda: small_resnet().double(), IndexingError, "torch.float64: need float32"),
        (_other_quantizer, IndexingError, "_OtherQuantizer"),
    ],
)
def test_refused_models(build: Callable[[], nn.Module], error: type[Exception], words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=words):
        pack(build(), tmp_path / "model.cdq", input_size=SMALL_SIZE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.cuda
def test_model_on_cuda(tmp_path: Path) -> None:
    model = small_resnet().cuda()
    pack(model, tmp_path / "model.cdq", input_size=SMALL_SIZE)
    assert state_bytes(unpack(tmp_path / "model.cdq")) == state_bytes(compact(model, SMALL_SIZE).cpu())
    assert next(model.parameters()).device.type == "cuda"


def test_output_paths(tmp_path: Path) -> None:
    model, path = small_resnet(), tmp_path / "model.cdq"
    path.write_bytes(b"precious")
    with pytest.raises(StorageError, match=r"exists already.*force"):
        pack(model, path, input_size=SMALL_SIZE)
    assert path.read_bytes() == b"precious"
    pack(model, path, input_size=SMALL_SIZE, force=True)
    assert state_bytes(unpack(path)) == state_bytes(compact(model, SMALL_SIZE))
    for place in (tmp_path, path / "below" / "model.cdq"):  # a folder, and a file where a folder is needed
        with pytest.raises(StorageError, match="name"):
            pack(model, place, input_size=SMALL_SIZE, force=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.cdq"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"cannot be written \(No space left on device\); name another place"):
        pack(small_resnet(), tmp_path / "model.cdq", input_size=SMALL_SIZE)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_and_one_of_another_version_say_what_to_do(
    packed: tuple[Path, PackReport], tmp_path: Path
) -> None:
    """What a container refuses is in tests/storage/test_container.py."""
    data, path = packed[0].read_bytes(), tmp_path / "model.cdq"
    described, tensors = read_container(packed[0], "packed")
    del described["version"]  # as the first packed files were written
    for written, words in (
        (data[:-1], r"is damaged: it has .*; copy the file again, or pack the network again"),
        (b"\x89CDQP\r\n\x1a" + data[8:], r"earlier version .*format 1.*wrote it; pack the network again"),
        (container_bytes("packed", described, save_arrays(tensors)), r"version 1, need version 2; pack"),
    ):
        path.write_bytes(written)
        with pytest.raises(StorageError, match=words):
            unpack(path)
    for place in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(StorageError, match="cannot be read"):
            unpack(place)

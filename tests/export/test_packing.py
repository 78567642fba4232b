"""Packed files: bit for bit, near the entropy that numpy gives, and closed to everything that `pack` did not write."""

from __future__ import annotations

import math
import resource
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from resnet import BasicBlock, ResNet
from src.export import PackReport, pack, unpack
from src.export.entropy_coding import CodingError, decode, encode, entropy_bits
from src.export.integer_weights import IndexingError, compact_with_indices
from src.pruning import CompactionError, compact
from src.quantizer import DeadZoneLDZCompander
from src.storage import StorageError, container_bytes, read_container, save_arrays
from src.storage.container import MARK
from tests.quantized_networks import SMALL_SIZE, mixed_resnet20, small_resnet
from utils_quantization import attach_weight_quantizers, latent_weight, toggle_quantization

FEW_MEGABYTES = 8 * 2**20


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


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("small") / "model.cdq"
    pack(small_resnet(bits=(2, 5, 8)), path, input_size=SMALL_SIZE)
    return path


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
    network, indexed = compact_with_indices(model)
    assert [part.bits for part in indexed.values()] == [2 + i % 7 for i in range(18)]
    for name, part in indexed.items():
        q = part.indices.numpy().astype(np.float32)
        values = part.step.numpy() * q + part.shift.numpy() * np.sign(q)
        weight = network.state_dict()[f"{name}.weight"].numpy()
        np.testing.assert_array_equal(values, weight[:, : q.shape[1]])
        assert np.abs(q).max() <= 2 ** (part.bits - 1) - 1


@pytest.mark.parametrize("option", ["A", "B"])
@pytest.mark.parametrize(("bits", "max_bits"), [((2, 3), 8), ((9, 12, 16), 16)])
def test_round_trip_of_small_networks(option: str, bits: tuple[int, ...], max_bits: int, tmp_path: Path) -> None:
    model = small_resnet(bits, max_bits, option)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = pack(model, tmp_path / "model.cdq", input_size=SMALL_SIZE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [layer.bits for layer in report.layers] == [bits[i % len(bits)] for i in range(len(report.layers))]
    assert state_bytes(unpack(tmp_path / "model.cdq")) == state_bytes(compact(model, SMALL_SIZE))


def test_report_against_counts_by_hand(model: nn.Module, packed: tuple[Path, PackReport]) -> None:
    path, report = packed
    # resnet20: 269,722 parameters, 688 means and 688 variances in float32, 19 counters in int64
    assert report.fp32_state_bytes == 4 * (269_722 + 2 * 688) + 8 * 19 == 1_084_544
    assert report.file_bytes == path.stat().st_size
    assert report.ratio == pytest.approx(1_084_544 / path.stat().st_size)
    _, indexed = compact_with_indices(model)
    assert report.bit_width_bytes == sum(part.bits * part.indices.numel() for part in indexed.values()) / 8
    entropy = 0.0
    for part in indexed.values():
        share = np.bincount(part.indices.numpy().ravel() + 128) / part.indices.numel()
        entropy -= part.indices.numel() * sum(p * math.log2(p) for p in share if p > 0) / 8
    assert report.entropy_bytes == pytest.approx(entropy)
    assert entropy <= report.stream_bytes <= 1.03 * entropy + 64
    assert report.stream_bytes < report.zstd_bytes
    assert report.file_bytes < report.stream_bytes + report.float32_bytes + 4000
    text = report.text()
    for size in (report.fp32_state_bytes, report.stream_bytes, report.zstd_bytes, report.file_bytes):
        assert f"{size:,}" in text
    assert f"{report.ratio:.2f} times smaller" in text


def test_worked_example() -> None:
    """The numbers in the head of src/export/packing.py: 0.850 bits each, 106 bytes, and 500 as the bit widths say."""
    others = [q for q in range(-7, 8) if q]
    q = np.array([0] * 900 + [others[i % 14] for i in range(98)] + [1, -1], dtype=np.int32)
    assert entropy_bits(q) / 1000 == pytest.approx(0.850, abs=0.001)
    assert round(entropy_bits(q) / 8) == 106
    assert encode([(4, q)]).nbytes <= 1.03 * 106 + 16


@settings(max_examples=30)
@given(
    layers=st.lists(st.tuples(st.integers(2, 16), st.integers(1, 400), st.floats(0, 1)), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_any_indices_come_back(layers: list[tuple[int, int, float]], seed: int) -> None:
    generator = np.random.default_rng(seed)
    coded = []
    for bits, count, zeros in layers:
        limit = 2 ** (bits - 1) - 1
        q = generator.integers(-limit, limit, size=count, endpoint=True, dtype=np.int32)
        coded.append((bits, np.where(generator.random(count) < zeros, 0, q).astype(np.int32)))
    found = decode(encode(coded), [(bits, len(q)) for bits, q in coded])
    assert all(np.array_equal(q, again) for (_, q), again in zip(coded, found, strict=True))


@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_coder_is_near_the_entropy(bits: int, zeros: float) -> None:
    generator = np.random.default_rng(0)
    limit = 2 ** (bits - 1) - 1
    q = np.clip(np.rint(generator.laplace(0, limit / 4, 60_000)), -limit, limit)
    q = np.where(generator.random(len(q)) < zeros, 0, q).astype(np.int32)
    share = np.unique(q, return_counts=True)[1] / len(q)
    entropy = float(-(share * np.log2(share)).sum() * len(q) / 8)
    assert encode([(bits, q)]).nbytes <= 1.03 * entropy + 128


def test_noise_is_not_a_stream() -> None:
    """Whatever words a stream holds, the coder gives weights in range or its own error."""
    generator, refused = np.random.default_rng(0), 0
    for _ in range(300):
        words = generator.integers(0, 2**32, size=int(generator.integers(0, 40)), dtype=np.uint32)
        bits = int(generator.integers(2, 17))
        try:
            (q,) = decode(words, [(bits, 200)])
        except CodingError:
            refused += 1
        else:
            assert np.abs(q).max() <= 2 ** (bits - 1) - 1
    assert refused > 0


def test_without_quantizers_all_is_float32(tmp_path: Path) -> None:
    model = ResNet(BasicBlock, [1, 1, 1], 5, widths=(4, 6, 8)).eval()
    report = pack(model, tmp_path / "plain.cdq", input_size=SMALL_SIZE)
    assert report.layers == ()
    assert report.stream_bytes == report.zstd_bytes == report.bit_width_bytes == report.entropy_bytes == 0
    assert "no quantized layer" in report.text()
    assert state_bytes(unpack(tmp_path / "plain.cdq")) == state_bytes(compact(model, SMALL_SIZE))
    again = pack(unpack(tmp_path / "plain.cdq"), tmp_path / "again.cdq", input_size=SMALL_SIZE)
    assert (tmp_path / "again.cdq").read_bytes() == (tmp_path / "plain.cdq").read_bytes()
    assert again.fp32_state_bytes == report.compact_state_bytes


class _OtherQuantizer(nn.Module):
    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return w.round()


def _other_quantizer() -> nn.Module:
    model = ResNet(BasicBlock, [1, 1, 1], 5, widths=(4, 6, 8)).eval()
    attach_weight_quantizers(model, ["conv1", "linear"], _OtherQuantizer)
    return model


def _switched_off() -> nn.Module:
    model = small_resnet()
    toggle_quantization(model, False)
    return model


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: small_resnet().train(), CompactionError, "training mode"),
        (_switched_off, IndexingError, "switched off"),
        (lambda: small_resnet().double(), IndexingError, "torch.float64: need float32"),
        (_other_quantizer, IndexingError, "_OtherQuantizer"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1, groups=1), nn.Softmax(1)).eval(), CompactionError, "not known"),
    ],
)
def test_refused_models(build: Callable[[], nn.Module], error: type[Exception], words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=words):
        pack(build(), tmp_path / "model.cdq", input_size=SMALL_SIZE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
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
    assert path.read_bytes()[:8] == MARK
    for place in (tmp_path, path / "below" / "model.cdq"):  # a folder, and a file where a folder is needed
        with pytest.raises(StorageError, match="name"):
            pack(model, place, input_size=SMALL_SIZE, force=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.cdq"]


def damaged(path: Path, data: bytes, words: str = "damaged") -> None:
    """`data` in a file is refused with the error that names the file or the damage."""
    target = path.with_suffix(".damaged")
    target.write_bytes(data)
    with pytest.raises(StorageError, match=words):
        unpack(target)


def forged(
    path: Path,
    change: Callable[[dict[str, Any]], Any] = lambda described: None,
    tensors: Callable[[dict[str, np.ndarray]], None] = lambda held: None,
) -> bytes:
    """The file with its description or tensors changed and a checksum that fits."""
    described, held = read_container(path, "packed")
    described = change(described) or described
    tensors(held)
    return container_bytes("packed", described, save_arrays(held))


def test_a_damaged_file_and_one_of_an_earlier_version_say_what_to_do(small: Path) -> None:
    """What a container refuses is in tests/storage/test_container.py."""
    data = small.read_bytes()
    target = small.with_suffix(".forged")
    target.write_bytes(forged(small))  # forging nothing gives a file that reads
    assert state_bytes(unpack(target)) == state_bytes(unpack(small))
    for place in (small.parent, small.with_suffix(".nothing")):
        with pytest.raises(StorageError, match="cannot be read"):
            unpack(place)
    damaged(small, data[:-1], r"is damaged: it has .*; copy the file again, or pack the network again")
    damaged(small, b"\x89CDQP\r\n\x1a" + data[8:], r"earlier version .*format 1.*wrote it; pack the network again")


def _network(described: dict[str, Any], kind: str, **fields: Any) -> None:
    next(step for step in described["network"]["steps"] if step["op"] == kind).update(fields)


# what the error says, and the change that it answers to; a reader must not take what a description only claims
FORGERIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "cannot add values of shapes": lambda d: _network(d, "conv", out_channels=2**16),
    r"gives a value of shape": lambda d: _network(d, "conv", kernel_size=[4096, 4096]),
    "cannot join values of shapes": lambda d: d["network"].update(input_size=[3, 4096, 4096]),
    "out_channels=1000.*: need 1..65536": lambda d: _network(d, "conv", out_channels=10**400),
    "out_channels=0: need 1..65536": lambda d: _network(d, "conv", out_channels=0),
    "bits=1000000000: need 2..16": lambda d: d["quantized"][0].update(bits=10**9),
    "bits=17: need 2..16": lambda d: d["quantized"][0].update(bits=17),
    "bits=True: need 2..16": lambda d: d["quantized"][0].update(bits=True),
    r"columns=1000000: need 1..\d": lambda d: d["quantized"][0].update(columns=10**6),
    r"columns=0: need 1..\d": lambda d: d["quantized"][0].update(columns=0),
    "tensor 'rest' is": lambda d: d["quantized"][0].update(columns=1),
    "'layer9.conv' is not a convolution or linear": lambda d: d["quantized"][0].update(name="layer9.conv"),
    "'bn1' is not a convolution or linear": lambda d: d["quantized"][0].update(name="bn1"),
    "conv1.* is not a convolution": lambda d: d["quantized"][0].update(name=["conv1"]),
    "is named twice": lambda d: d["quantized"].append(d["quantized"][0]),
    "tensor '(rest|grid)' is": lambda d: d["quantized"].__delitem__(-1),
    "'forward' is an attribute": lambda d: _network(d, "conv", name="forward"),
    "'exec' is unknown": lambda d: _network(d, "conv", op="exec"),
    "needs exactly format": lambda d: {"quantized": []},
    "needs exactly format, input_size": lambda d: {"network": [1, 2], "quantized": []},
    "needs exactly network and quantized": lambda d: d.update(quantized=3),
    "layer 3 needs exactly name, bits and columns": lambda d: d.update(quantized=[3]),
    "exactly network and": lambda d: d.update(code="print(1)"),
}


@pytest.mark.parametrize("words", FORGERIES)
def test_forged_descriptions_cost_nothing(small: Path, words: str) -> None:
    data = forged(small, FORGERIES[words])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        damaged(small, data, words)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < FEW_MEGABYTES
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < FEW_MEGABYTES  # torch's own, too


def test_mostly_zeros_still_fit_the_limit_of_a_reader(tmp_path: Path) -> None:
    """1,024 x 1,024 weights, one in a row, take 1,470 bytes by their entropy of 0.0112 bits each; a reader wants a byte
    for 256 weights, 4,096, and the file is filled up to that."""
    model = nn.Sequential(nn.Conv2d(1024, 1024, 1, bias=False))
    attach_weight_quantizers(model, [], DeadZoneLDZCompander)
    latent_weight(model[0]).data.copy_(torch.eye(1024)[:, :, None, None])
    report = pack(model.eval(), tmp_path / "zeros.cdq", input_size=(1024, 2, 2))
    assert report.entropy_bytes == pytest.approx(1470, abs=10)
    assert 4096 <= report.file_bytes < 6144
    assert state_bytes(unpack(tmp_path / "zeros.cdq")) == state_bytes(compact(model, (1024, 2, 2)))


def test_zeros_without_end_are_refused(small: Path) -> None:
    """A consistent description of 60 million weights that would all decode to 0, in a file of a few thousand bytes."""

    def grow(described: dict[str, Any]) -> dict[str, Any]:
        name = described["quantized"][0]["name"]
        image = [2048, 4, 4]
        kernel = {"kernel_size": [5, 5], "stride": [1, 1], "padding": [2, 2], "dilation": [1, 1]}
        step = {"op": "conv", "inputs": [0], "name": name, "out_channels": 1024, "bias": False, **kernel}
        network = {"format": described["network"]["format"], "input_size": image, "steps": [step], "output": 1}
        return {"network": network, "quantized": [{"name": name, "bits": 8, "columns": 2048}]}

    tracemalloc.start()
    try:
        damaged(small, forged(small, grow), "cannot hold 52,428,800 parameters")
        assert tracemalloc.get_traced_memory()[1] < FEW_MEGABYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda held: held.pop("grid"), "holds the tensors"),
        (lambda held: held.update(more=np.zeros(1, np.float32)), "holds the tensors"),
        (lambda held: held.update(rest=held["rest"][:-1]), "need uint8"),
        (lambda held: held.update(grid=held["grid"].astype(np.float64)), "is float64"),
        (lambda held: held.update(rest=np.zeros(10**6, np.uint8)), r"is uint8 \(1000000,\), need"),
        (lambda held: held.update(stream=held["stream"][:10]), "damaged|decode to others"),
        (lambda held: held.update(stream=np.roll(held["stream"], 1)), "damaged|decode to others"),
        (lambda held: held["check"].__setitem__(0, held["check"][0] ^ 1), "decode to others"),
    ],
)
def test_forged_tensors(small: Path, change: Callable[[dict[str, np.ndarray]], None], words: str) -> None:
    damaged(small, forged(small, tensors=change), words)

"""The ONNX file, read back with onnx and run in ONNX Runtime, against PyTorch and against the quantizer's values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from resnet import BasicBlock, ResNet
from src.export import check_onnx, export_onnx, open_session, pack, run_onnx, unpack
from src.export.integer_weights import compact_with_indices
from src.export.onnx_file import OnnxCheck
from src.export.onnx_graph import OnnxError, integer_type
from src.pruning import CompactionError, CompactNetwork, compact
from src.storage import StorageError
from tests.networks import IMAGE, Applied
from tests.quantized_networks import SMALL_SIZE, as_trained, mixed_resnet20, small_resnet

INTEGERS = {"int4": (TensorProto.INT4, 0.5), "int8": (TensorProto.INT8, 1), "int16": (TensorProto.INT16, 2)}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return mixed_resnet20()


def initializers(path: Path) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}


def test_same_logits_for_any_batch(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    export_onnx(model, path)
    session, smaller = open_session(path), compact(model)
    with torch.no_grad():
        for count in (1, 2, 33):
            images = torch.randn(count, 3, 32, 32)
            logits = run_onnx(session, images)
            assert logits.shape == (count, 10)
            for network in (model, smaller):  # the one that was trained, and the one that was written
                assert (logits - network(images)).abs().max() < 1e-3
                assert torch.equal(logits.argmax(1), network(images).argmax(1))
    assert session.get_inputs()[0].shape == ["batch", 3, 32, 32]
    assert session.get_outputs()[0].shape == ["batch", 10]


def test_weights_are_the_integers_they_should_be(model: nn.Module, tmp_path: Path) -> None:
    """int4 up to 4 bits, int8 above; the numbers in the file are q, and 4-bit ones take half a byte."""
    path = tmp_path / "model.onnx"
    report, plain = export_onnx(model, path), export_onnx(model, tmp_path / "plain.onnx", integer_weights=False)
    assert 2 * report.file_bytes < plain.file_bytes
    assert f"{report.file_bytes:,} bytes" in report.text()
    onnx.checker.check_model(onnx.load(path), full_check=True)
    assert report.file_bytes == path.stat().st_size
    stored, indexed = initializers(path), compact_with_indices(model).weights
    assert {part.bits for part in indexed.values()} == set(range(2, 9))
    for name, part in indexed.items():
        kind = "int4" if part.bits <= 4 else "int8"
        assert report.weight_types[name] == kind
        tensor = stored[f"{name}.indices"]
        assert tensor.data_type == INTEGERS[kind][0]
        assert len(tensor.raw_data) == int(np.ceil(part.indices.numel() * INTEGERS[kind][1]))
        np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(np.int32), part.indices.numpy())
        assert f"{name}.weight" not in stored  # not there a second time
    assert report.weight_types["conv1"] == report.weight_types["linear"] == "float32"


@pytest.mark.parametrize("evaluator", ["onnxruntime", "reference"])
def test_dequantized_weights_bit_for_bit(evaluator: str, tmp_path: Path) -> None:
    """The weights that the graph computes, asked for as outputs, are the compacted network's, tails included."""
    model = small_resnet(bits=(2, 5, 8, 12), max_bits=16)
    compacted = compact_with_indices(model, SMALL_SIZE)
    state, indexed, path = compacted.network.state_dict(), compacted.weights, tmp_path / "model.onnx"
    report = export_onnx(compacted, path)
    assert sorted(set(report.weight_types.values())) == ["float32", "int16", "int4", "int8"]
    graph = onnx.load(path)
    names = [f"{name}.weight" for name in indexed]
    graph.graph.output.extend(onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    images = {"images": np.zeros((1, *SMALL_SIZE), dtype=np.float32)}
    if evaluator == "onnxruntime":
        onnx.save(graph, tmp_path / "weights.onnx")
        found = open_session(tmp_path / "weights.onnx").run(names, images)
    else:
        found = ReferenceEvaluator(graph).run(names, images)
    for name, weight in zip(names, found, strict=True):
        np.testing.assert_array_equal(weight, state[name].numpy())
    assert any(part.indices.shape[1] < state[f"{name}.weight"].shape[1] for name, part in indexed.items())


def test_narrowest_type() -> None:
    def of(*indices: int) -> str:
        return integer_type(torch.tensor(indices))

    assert [of(-7, 7), of(-8, 0), of(8), of(-9), of(-127, 127), of(128), of(-129)] == [
        "int4", "int4", "int8", "int8", "int8", "int16", "int16"
    ]  # fmt: skip


@pytest.mark.parametrize("option", ["A", "B"])
@pytest.mark.parametrize("integers", [True, False])
def test_shortcuts(option: str, integers: bool, tmp_path: Path) -> None:
    model = small_resnet(bits=(3, 8), option=option)
    report = export_onnx(model, tmp_path / "model.onnx", input_size=SMALL_SIZE, integer_weights=integers)
    assert set(report.weight_types.values()) == ({"float32", "int4", "int8"} if integers else {"float32"})
    checked = check_onnx(tmp_path / "model.onnx", model, torch.randn(300, *SMALL_SIZE))
    assert checked.passed
    assert checked.images == 300


class EveryStep(nn.Module):
    """What a ResNet does not have: biases, pooling, "same" padding, dilation, no affine."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 4, padding="same", dilation=1)
        self.norm1 = nn.BatchNorm2d(6, affine=False)
        self.max = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(6, 5, (3, 1), stride=(1, 2), padding=(2, 0), dilation=(2, 1))
        self.mean = nn.AvgPool2d(2, 1)
        self.fc1 = nn.Linear(5 * 3 * 1, 7)
        self.fc2 = nn.Linear(7, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.max(torch.relu(self.norm1(self.conv1(x))))
        x = torch.flatten(self.mean(torch.relu(self.conv2(x))), 1)
        return self.fc2(torch.relu(self.fc1(x)))


@pytest.mark.parametrize("dead", [False, True])
def test_every_operation(dead: bool, tmp_path: Path) -> None:
    model = EveryStep().eval()
    with torch.no_grad():
        model.norm1.running_mean.normal_()
        model.norm1.running_var.uniform_(0.5, 2)
        if dead:
            model.conv1.weight[2] = 0
            model.conv2.weight[[0, 3]] = 0
    network = compact(model, SMALL_SIZE)
    export_onnx(model, tmp_path / "model.onnx", input_size=SMALL_SIZE)
    images = torch.randn(9, *SMALL_SIZE)
    assert check_onnx(tmp_path / "model.onnx", network, images).passed
    assert check_onnx(tmp_path / "model.onnx", model, images).passed


def described(steps: list[dict[str, object]], size: tuple[int, int, int] = (2, 3, 4)) -> CompactNetwork:
    text = {"format": 3, "input_size": list(size), "steps": steps, "output": len(steps)}
    return CompactNetwork(text).eval()


@pytest.mark.parametrize(
    "steps",
    [
        [{"op": "select", "inputs": [0], "channels": [-1, 1, -1, 0, 1], "dim": 1}],
        [{"op": "select", "inputs": [0], "channels": [1, 0, -1], "dim": 3}],
        [{"op": "fill", "inputs": [], "value": 1, "size": [1, 3, 4]}, {"op": "join", "inputs": [0, 1], "dim": 1}],
        [{"op": "fill", "inputs": [], "value": 0, "size": [2, 3, 4]}, {"op": "add", "inputs": [1, 0]}],
        [{"op": "slice", "inputs": [0], "slices": [[None, None, 2], [1, 3, None]]}],
        [{"op": "permute", "inputs": [0], "dims": [0, 2, 3, 1]}],
        [{"op": "reshape", "inputs": [0], "space": [12]}],
        [{"op": "flatten", "inputs": [0]}, {"op": "select", "inputs": [1], "channels": [23, -1, 0], "dim": 1}],
        [{"op": "adaptive_max_pool", "inputs": [0], "output_size": 1}],
        [{"op": "shift", "inputs": [0], "name": "shift", "dim": 1}, {"op": "relu", "inputs": [1]}],
        [{"op": "scale", "inputs": [0], "name": "scale", "dim": 2}],
    ],
    ids=lambda steps: "-".join(step["op"] for step in steps),
)
def test_steps_alone(steps: list[dict[str, object]], tmp_path: Path) -> None:
    """Steps without weights are exact."""
    network = described(steps)
    network.load_state_dict({name: torch.randn(value.shape) for name, value in network.state_dict().items()})
    with torch.no_grad():
        export_onnx(network, tmp_path / "model.onnx")
        images = torch.randn(3, 2, 3, 4)
        assert torch.equal(run_onnx(open_session(tmp_path / "model.onnx"), images), network(images))


class Permute(nn.Module):
    """x.permute(dims), as a module."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.dims)


@pytest.mark.parametrize(
    "function",
    [
        *(nn.ReLU6(), nn.LeakyReLU(0.2), nn.ELU(0.7), nn.SELU(), nn.CELU(0.7), nn.GELU(), nn.GELU("tanh"), nn.SiLU()),
        *(nn.Mish(), nn.Hardswish(), nn.Hardsigmoid(), nn.Hardtanh(-0.3, 0.4), nn.Sigmoid(), nn.Tanh(), nn.Softplus(2)),
        *(nn.Softsign(), torch.abs, torch.neg, lambda x: x.clamp(min=-0.2), nn.PReLU(4), nn.PReLU()),
        *(lambda x: 1 - x / 2, lambda x: x * torch.sigmoid(x), lambda x: x - x.mean((2, 3), keepdim=True)),
        *(lambda x: x * torch.arange(4.0).view(4, 1, 1), lambda x: torch.cat([x, torch.relu(x)], 1)),
        *(nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1), nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
        *(nn.AdaptiveAvgPool2d(2), nn.AdaptiveMaxPool2d(3), nn.ReflectionPad2d(1), nn.ConstantPad2d((1, 0, 2, 0), 0.5)),
        *(nn.Upsample(scale_factor=2), nn.Upsample(scale_factor=2, mode="bilinear"), nn.CircularPad2d(1)),
        nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
        *(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), nn.Conv2d(4, 6, 3, padding=1, groups=2)),
        *(nn.Conv2d(4, 8, 3, groups=4), nn.ConvTranspose2d(4, 3, 3, 2, 1, output_padding=1)),
        *(lambda x: x.permute(0, 2, 3, 1), lambda x: x.mean((2, 3)), lambda x: x[:, 1:3], lambda x: x[..., ::2]),
        *(lambda x: x.softmax(1), lambda x: F.log_softmax(x, dim=-1), nn.PixelShuffle(2)),
        *(
            nn.GroupNorm(2, 4),
            nn.GroupNorm(1, 4, affine=False),
            nn.InstanceNorm2d(4, affine=True),
            nn.InstanceNorm2d(4),
        ),
        nn.Sequential(Permute(0, 2, 3, 1), nn.LayerNorm(4), nn.Linear(4, 6), nn.GELU()),
    ],
    ids=lambda function: str(function) if isinstance(function, nn.Module) else "",
)
def test_functions_and_modules(function: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    model = Applied(function).eval()
    for parameter in model.parameters():
        parameter.data.uniform_(-1, 1)
    export_onnx(model, tmp_path / "model.onnx", input_size=IMAGE)
    images = torch.randn(3, *IMAGE)
    with torch.no_grad():
        found, expected = run_onnx(open_session(tmp_path / "model.onnx"), images), model(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: x.cumsum(1), "does not know .'cumsum'.*torch.onnx.export"),
        (lambda x: (x, torch.relu(x)), "several inputs or outputs"),
        (nn.AdaptiveAvgPool2d(4), r"adaptive pooling of \(6, 6\) to \(4, 4\)"),
        (nn.AvgPool2d(2, divisor_override=3), "divisor"),
        (nn.Upsample(scale_factor=2, mode="bicubic"), "'bicubic'"),
    ],
)
def test_what_onnx_does_not_have(function: Callable[[Tensor], Tensor], words: str, tmp_path: Path) -> None:
    model = Applied(function).eval()
    with pytest.raises(OnnxError, match=words):
        export_onnx(model, tmp_path / "model.onnx", input_size=IMAGE)
    assert not list(tmp_path.iterdir())


def test_unpacked_network_as_float32(tmp_path: Path) -> None:
    model = small_resnet()
    pack(model, tmp_path / "model.cdq", input_size=SMALL_SIZE)
    network = unpack(tmp_path / "model.cdq")
    report = export_onnx(network, tmp_path / "unpacked.onnx", input_size=SMALL_SIZE)
    export_onnx(model, tmp_path / "plain.onnx", input_size=SMALL_SIZE, integer_weights=False)
    assert set(report.weight_types.values()) == {"float32"}
    assert (tmp_path / "unpacked.onnx").read_bytes() == (tmp_path / "plain.onnx").read_bytes()


def test_check_sees_another_network(tmp_path: Path) -> None:
    model, other = small_resnet(), as_trained(ResNet(BasicBlock, [1, 1, 1], 5, widths=(4, 6, 8)), seed=2)
    export_onnx(model, tmp_path / "model.onnx", input_size=SMALL_SIZE)
    found = check_onnx(tmp_path / "model.onnx", other, torch.randn(50, *SMALL_SIZE))
    assert not found.passed
    assert found.differing > 0
    assert not OnnxCheck(1, 0, float("nan")).passed
    assert not OnnxCheck(1, 0, 2e-3).passed


def test_bad_input(tmp_path: Path) -> None:
    model, path = small_resnet(), tmp_path / "model.onnx"
    path.write_bytes(b"precious")
    with pytest.raises(StorageError, match="exists already"):
        export_onnx(model, path, input_size=SMALL_SIZE)
    with pytest.raises(OnnxError, match="cannot read"):
        open_session(path)
    with pytest.raises(StorageError, match="folder"):
        export_onnx(model, tmp_path, input_size=SMALL_SIZE, force=True)
    with pytest.raises(CompactionError, match="training mode"):
        export_onnx(model.train(), path, input_size=SMALL_SIZE, force=True)
    assert path.read_bytes() == b"precious"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]

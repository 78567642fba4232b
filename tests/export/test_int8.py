"""The int8 file, read back with onnx and run in ONNX Runtime, against numpy's rounding and the float32 network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from src.export import compact_with_indices, export_int8, int8, open_session, run_onnx
from src.export.integer_weights import IndexedNetwork
from src.export.onnx_graph import OnnxError
from src.storage import StorageError
from tests.quantized_networks import SMALL_SIZE, small_resnet


@pytest.fixture(scope="module")
def compacted() -> IndexedNetwork:
    return compact_with_indices(small_resnet(bits=(3, 8)), SMALL_SIZE)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(300, *SMALL_SIZE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("vnni", [True, False])
def test_convolutions_compute_in_8_bits(
    vnni: bool, compacted: IndexedNetwork, images: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs uint8, weights int8 with a step a row: |q| is numpy's rounding (BatchNorm may turn signs), 7 bits without
    VNNI; the classifier is left in float32."""
    monkeypatch.setattr(int8, "int8_instructions", lambda: ["avx512_vnni"] if vnni else [])
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    path, levels = tmp_path / "int8.onnx", 127 if vnni else 64
    with torch.no_grad():
        labels = compacted.network(images).argmax(1)
    report = export_int8(compacted, path, images, images, labels)
    graph = onnx.load(path).graph
    made = {node.output[0]: node for node in graph.node}
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    layers = [name for name, module in compacted.network.named_modules() if isinstance(module, torch.nn.Conv2d)]
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convolutions) == len(layers) == 7
    for node, layer in zip(convolutions, layers, strict=True):
        x, weight = (made[name] for name in node.input[:2])
        assert x.op_type == weight.op_type == "DequantizeLinear"
        assert stored[x.input[2]].dtype == np.uint8
        rows = compacted.network.state_dict()[f"{layer}.weight"].flatten(1).numpy()
        q = stored[weight.input[0]].reshape(len(rows), -1)
        assert q.dtype == np.int8
        assert stored[weight.input[1]].shape == (len(rows),)
        expected = np.abs(np.rint(rows / np.abs(rows).max(1, keepdims=True) * levels))
        assert (np.abs(np.abs(q.astype(int)) - expected) <= 1).all()  # a tie may fall either way after BatchNorm
        assert (np.abs(q.astype(int)) == expected).mean() > 0.99
    classifier = next(node for node in graph.node if node.op_type == "Gemm")
    assert stored[classifier.input[1]].dtype == np.float32
    logits = run_onnx(open_session(path), images)
    with torch.no_grad():
        wanted = compacted.network(images)
    assert report.largest_difference == pytest.approx((logits - wanted).abs().max().item())
    assert 0 < report.largest_difference < 0.2 * wanted.abs().max()
    assert report.right["float32"] == 300
    assert report.right["int8"] == int((logits.argmax(1) == labels).sum()) == 300 - report.differing
    assert report.passed == (report.differing <= 1)
    assert f"float32 300 (100.00%), int8 weights alone {report.right['weights']}" in report.text()
    assert report.file_bytes == path.stat().st_size


def test_the_cost_of_rounding_by_hand(compacted: IndexedNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer of 1.0, 0.5 and 0.3: 0.5 is 63.5 steps of 1/127 and becomes 64, 0.3 is 38.1 and becomes 38."""
    monkeypatch.setattr(int8, "reduced_range", lambda: False)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 1, 1, bias=False))
    network[0].weight.data = torch.tensor([1.0, 0.5, 0.3]).view(1, 3, 1, 1)
    rounded, largest, rms = int8.round_weights(compact_with_indices(network.eval(), (3, 2, 2)).network)
    changes = np.array([0, 64 / 127 - 0.5, 38 / 127 - 0.3])
    np.testing.assert_allclose(next(rounded.parameters()).detach().flatten(), [1, 64 / 127, 38 / 127], rtol=1e-6)
    assert largest == pytest.approx(np.abs(changes).max(), rel=1e-4)
    assert rms == pytest.approx(np.sqrt((changes**2).mean()), rel=1e-4)


def test_nothing_is_written_where_it_cannot_be_measured(
    compacted: IndexedNetwork, images: torch.Tensor, tmp_path: Path
) -> None:
    labels = torch.zeros(300, dtype=torch.long)
    with pytest.raises(OnnxError, match=r"(?s)cannot quantize this network \(.*\); export it without int8"):
        export_int8(compacted, tmp_path / "int8.onnx", images[:, :, :4], images, labels)
    with pytest.raises(RuntimeError):
        export_int8(compacted, tmp_path / "int8.onnx", images[:9], images, labels[:9])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "int8.onnx").write_bytes(b"precious")
    with pytest.raises(StorageError, match="exists already"):
        export_int8(compacted, tmp_path / "int8.onnx", images[:9], images, labels)
    assert (tmp_path / "int8.onnx").read_bytes() == b"precious"

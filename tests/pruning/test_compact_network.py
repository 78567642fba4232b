"""Networks built from descriptions: restored, exported, and what a description may not say."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from src.export.onnx_file import OPERATION_WRITERS
from src.pruning import CompactionError, CompactNetwork, compact
from src.pruning.operations import OPERATIONS
from tests.networks import IMAGE, randomize, tiny_resnet


@pytest.fixture(scope="module")
def network() -> CompactNetwork:
    """With every kind of operation that a residual network can leave: select, shift, fill and join among them."""
    model = randomize(tiny_resnet(), 0)
    with torch.no_grad():
        model.conv1.weight[0] = 0
        model.bn1.bias.fill_(9)
        model.layer2[0].conv1.weight[:] = 0
        model.layer2[0].conv2.weight[[0, 2]] = 0
        model.layer3[0].conv1.weight[[0, 3]] = 0
        model.layer3[0].conv2.weight[1] = 0
    found = compact(model, IMAGE)
    assert {"select", "shift", "fill", "join"} <= {step["op"] for step in found.description["steps"]}
    return found


def images(count: int = 6) -> Tensor:
    return torch.randn(count, *IMAGE, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def test_every_operation_has_an_onnx_writer_and_is_computed_in_one_way() -> None:
    assert set(OPERATION_WRITERS) == set(OPERATIONS)
    assert all((kind.run is None) != (kind.layer is None) for kind in OPERATIONS.values())


def test_restores_from_description_and_state(network: CompactNetwork, tmp_path: Path) -> None:
    torch.save(network.state_dict(), tmp_path / "state.pt")
    description = json.loads(json.dumps(network.description, allow_nan=False))
    restored = CompactNetwork(description)
    shapes = {name: value.shape for name, value in restored.state_dict().items()}
    assert shapes == {name: value.shape for name, value in network.state_dict().items()}
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for each in (restored.eval(), copy.deepcopy(network)):
        assert torch.equal(each(images()), network(images()))
    assert restored.input_size == IMAGE
    assert f"input_size={IMAGE}" in str(restored)


def test_every_parameter_has_a_gradient(network: CompactNetwork) -> None:
    """So that a compacted network can be trained further."""
    model = copy.deepcopy(network).train()
    model(images()).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.slow
def test_torch_export_and_compile(network: CompactNetwork) -> None:
    """Takes 10 s, most of it torch's own imports."""
    x = images()
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    exported = torch.export.export(network, (x,), dynamic_shapes=(batch,)).module()
    torch.testing.assert_close(exported(x), network(x))
    torch.testing.assert_close(exported(images(3)), network(images(3)))
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), network(x))


def test_indices_follow_the_device_but_not_the_state(network: CompactNetwork) -> None:
    assert any("indices" in name for name, _ in network.named_buffers())
    assert not any("indices" in name for name in network.state_dict())
    assert {buffer.device.type for buffer in copy.deepcopy(network).to("meta").buffers()} == {"meta"}


def test_images_of_another_size(network: CompactNetwork) -> None:
    with pytest.raises(CompactionError, match=r"shape \(2, 9, 9\): this network was made for \(2, 6, 6\)"):
        network(torch.zeros(1, 2, 9, 9, dtype=torch.float64))


def first(description: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(step for step in description["steps"] if step["op"] == kind)


Damage = Callable[[dict[str, Any]], Any]
DAMAGE: dict[str, Damage] = {
    "format 99": lambda d: d.update(format=99),
    "needs exactly format": lambda d: d.pop("steps"),
    "input_size=1000000000: need 1..4096": lambda d: d.update(input_size=[3, 10**9, 32]),
    "need a list of 3..3 numbers": lambda d: d.update(input_size=[3]),
    "output=1000000: need 1..": lambda d: d.update(output=10**6),
    "steps: need a list of 1 to 10000": lambda d: d.update(steps=[{"op": "relu", "inputs": [0]}] * 10_001),
    "'eval' is unknown": lambda d: d["steps"][0].update(op="eval"),
    r"\['conv'\] is unknown": lambda d: d["steps"][0].update(op=["conv"]),
    "exactly the fields": lambda d: d["steps"][0].update(more=1),
    r"inputs=\[\]: need a list of 1": lambda d: d["steps"][0].update(inputs=[]),
    "an input=1: need 0..0": lambda d: d["steps"][0].update(inputs=[1]),
    "out_channels=99999999: need 1..65536": lambda d: first(d, "conv").update(out_channels=99_999_999),
    "out_channels=True": lambda d: first(d, "conv").update(out_channels=True),
    "bias=1: need true or false": lambda d: first(d, "conv").update(bias=1),
    "name='../x': need a module path": lambda d: first(d, "conv").update(name="../x"),
    "'conv1' is an attribute or a layer already": lambda d: first(d, "batchnorm").update(name="conv1"),
    "'conv1' is an attribute or": lambda d: first(d, "batchnorm").update(name="conv1.x"),
    "'forward' is an attribute": lambda d: first(d, "batchnorm").update(name="forward"),
    r"kernel_size=\[3\]: need a list": lambda d: first(d, "conv").update(kernel_size=[3]),
    "conv gives a value of shape": lambda d: first(d, "conv").update(kernel_size=[99, 99]),
    "need stride 1": lambda d: first(d, "conv").update(padding="same", stride=[2, 2]),
    "eps=nan": lambda d: first(d, "batchnorm").update(eps=float("nan")),
    "kernel_size=2 and stride=None": lambda d: first(d, "pool").update(kernel_size=2),
    "channel 4000": lambda d: first(d, "select").update(channels=[4000]),
    r"size=\[1, 2\]": lambda d: first(d, "fill").update(size=[1, 2]),
    "linear cannot read a value of shape": lambda d: first(d, "linear").update(inputs=[1]),
    "cannot add values of shapes": lambda d: first(d, "add").update(inputs=[0, 1]),
    "cannot join values of shapes": lambda d: d["steps"].append({"op": "join", "inputs": [0, len(d["steps"])]}),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damaged_descriptions(network: CompactNetwork, message: str) -> None:
    description = copy.deepcopy(network.description)
    DAMAGE[message](description)
    with pytest.raises(CompactionError, match=message):
        CompactNetwork(description)


def test_absurd_sizes_allocate_nothing() -> None:
    """Two layers of 2**16 x 2**16 weights would be 32 GiB: they are described, and not there before their state is."""
    linear = [{"op": "linear", "inputs": [n], "name": f"fc{n}", "out_features": 2**16, "bias": False} for n in (1, 2)]
    flatten = {"op": "flatten", "inputs": [0]}
    described = {"format": 2, "input_size": [1, 256, 256], "steps": [flatten, *linear], "output": 3}
    assert all(parameter.is_meta for parameter in CompactNetwork(described).parameters())

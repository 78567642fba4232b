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

from src.export.onnx_writers import OPERATION_WRITERS
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
    without = {"own", "input", "collect"}  # code of the user's; several inputs or outputs
    assert set(OPERATION_WRITERS) == set(OPERATIONS) - without
    computed = {name: kind for name, kind in OPERATIONS.items() if name not in {"own", "input"}}
    assert all((kind.run is None) != (kind.layer is None) for kind in computed.values())


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


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "format 99: this version reads format 3": lambda d: d.update(format=99),
    "KeyError: 'steps'": lambda d: d.pop("steps"),
    "KeyError: 1000000": lambda d: d.update(output=10**6),
    "KeyError: 'eval'": lambda d: d["steps"][0].update(op="eval"),
    "KeyError: 'bias'": lambda d: d["steps"][0].pop("bias"),
    "KeyError: 1\\)": lambda d: d["steps"][0].update(inputs=[1]),
    "attribute 'forward' already exists": lambda d: first(d, "batchnorm").update(name="forward"),
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
    described = {"format": 3, "input_size": [1, 256, 256], "steps": [flatten, *linear], "output": 3}
    assert all(parameter.is_meta for parameter in CompactNetwork(described).parameters())

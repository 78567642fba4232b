"""A checkpoint's contents come back exactly: every type of tensor, every digit, the optimizer's settings and layout."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.runs import CHECKPOINT, RunFolder, load_checkpoint
from src.runs.checkpoint import state_bytes
from src.training import History

CPU = torch.device("cpu")


def parts(**changes: Any) -> dict[str, Any]:
    names = ("config", "model", "history", "unfinished", "random")
    return {**{name: {} for name in names}, "optimizer": {"state": {}}, **changes}


def test_every_type_of_tensor_and_every_digit_come_back(tmp_path: Path) -> None:
    tied = torch.randn(4, 3)
    model = {
        "tensor": torch.tensor([1.0, -0.0, math.pi, 1e-45]),  # by the name that a tensor's place has in the file
        **{str(kind): torch.tensor([1, 0, 3]).to(kind) for kind in (torch.bfloat16, torch.float16, torch.float64)},
        **{str(kind): torch.tensor([1, 0, 3]).to(kind) for kind in (torch.int64, torch.uint8, torch.bool)},
        "number": torch.tensor(7),
        "nothing": torch.zeros(0, 3),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "tied": tied,
        "tied again": tied.t(),
    }
    floats = [0.1, 1e-300, 2**53 + 1, -0.0, math.inf, None, True, "Zürich"]
    (tmp_path / CHECKPOINT).write_bytes(state_bytes(parts(model=model, config={"floats": floats, "nested": [{}]})))
    state = load_checkpoint(tmp_path / CHECKPOINT)
    assert repr(state["config"]) == repr({"floats": floats, "nested": [{}]})
    assert list(state["model"]) == list(model)
    for name, tensor in model.items():
        found: Tensor = state["model"][name]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert found.contiguous().view(-1).view(torch.uint8).equal(tensor.contiguous().view(-1).view(torch.uint8))


def test_an_optimizer_is_restored_with_its_settings_and_the_layout_of_its_moments(tmp_path: Path) -> None:
    """A tuple stays a tuple, and moments have the strides of their parameters, as those of an unbroken run."""

    def built() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        groups: list[dict[str, Any]] = [{"params": [model.weight], "name": "weights"}, {"params": [model.bias]}]
        optimizer = torch.optim.AdamW(groups)
        model(torch.randn(2, 3, 5, 5)).square().sum().backward()
        optimizer.step()
        return model, optimizer

    (model, optimizer), (other, restored) = built(), built()
    optimizer.param_groups[0]["lr"] = 0.1 + 0.2
    folder = RunFolder.open(tmp_path)
    folder.save_progress(model, optimizer, History(3), {})
    folder.restore(other, restored, {}, CPU)
    assert repr(restored.state_dict()["param_groups"]) == repr(optimizer.state_dict()["param_groups"])
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        for name, moment in optimizer.state[mine].items():
            assert torch.equal(restored.state[theirs][name], moment)
            assert restored.state[theirs][name].stride() == moment.stride()

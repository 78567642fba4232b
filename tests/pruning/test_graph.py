"""Reading a network as a short program: one tiny network per operation, and what is not recognised."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from resnet import resnet20
from src.pruning import GraphError, Op, channel_groups, compact, trace
from src.quantizer import DeadZoneLDZCompander
from tests.networks import IMAGE, Applied, Chain, OptionAShortcut
from utils_quantization import attach_weight_quantizers


def kinds(model: nn.Module) -> list[str]:
    return [op.kind for op in trace(model, IMAGE)]


def made_of(function: Callable[[Tensor], Tensor]) -> list[Op]:
    """The operations that `function` adds."""
    return trace(Applied(function), IMAGE)[2:-1]


def test_chain() -> None:
    ops = trace(Chain(), IMAGE)
    assert [op.kind for op in ops] == [
        *("input", "conv", "batchnorm", "relu", "conv", "relu", "adaptive_avg_pool", "flatten", "linear", "output"),
    ]
    assert [op.module for op in ops if op.module] == ["conv1", "bn1", "conv2", "linear"]
    assert [op.channels for op in ops[:-1]] == [2, 3, 3, 3, 4, 4, 4, 4, 2]
    assert ops[1].shape == (1, 3, 6, 6)
    assert [op.inputs for op in ops[1:]] == [(op.name,) for op in ops[:-1]]


def test_option_a_is_a_stride_and_a_pad() -> None:
    ops = trace(OptionAShortcut(), IMAGE)
    stride = next(op for op in ops if op.kind == "slice")
    pad = next(op for op in ops if op.kind == "select")
    assert stride.settings["slices"] == [[None, None, 2], [None, None, 2]]
    assert stride.shape == (1, 2, 3, 3)
    assert pad.settings["channels"] == [-1, 0, 1, -1]
    assert pad.channels == 4
    add = next(op for op in ops if op.kind == "add")
    assert set(add.inputs) == {pad.name, next(op for op in ops if op.kind == "batchnorm").name}


def test_resnet20_has_nothing_unknown() -> None:
    model = resnet20()
    attach_weight_quantizers(model, ["conv1", "bn", "linear"], DeadZoneLDZCompander)
    ops = trace(model)
    counted = {kind: sum(op.kind == kind for op in ops) for kind in {op.kind for op in ops}}
    ends = dict.fromkeys(("input", "adaptive_avg_pool", "flatten", "linear", "output"), 1)
    assert counted == ends | {"conv": 19, "batchnorm": 19, "relu": 19, "add": 9, "slice": 2, "select": 2}


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (torch.relu, "relu"),
        (F.relu, "relu"),
        (nn.ReLU(), "relu"),
        (lambda x: x.relu(), "relu"),
        (nn.Identity(), "pass"),
        (nn.Dropout(0.5), "pass"),
        (StochasticDepth(0.5, "row"), "pass"),
        (lambda x: F.dropout(x, 0.3, training=False), "pass"),
        (nn.SiLU(inplace=True), "silu"),
        (lambda x: x.clamp(min=0), "clamp"),
        (nn.PReLU(4), "prelu"),
        (lambda x: 1 - x, "affine"),
        (lambda x: x + torch.arange(4.0).view(4, 1, 1), "shift"),
        (lambda x: x * torch.ones(1, 4, 1, 1), "scale"),
        (nn.MaxPool2d(2), "max_pool"),
        (nn.MaxPool2d((2, 3), stride=1, padding=1, ceil_mode=True), "max_pool"),
        (nn.AvgPool2d((2, 2), divisor_override=3), "avg_pool"),
        (nn.AdaptiveAvgPool2d((1, 1)), "adaptive_avg_pool"),
        (nn.AdaptiveMaxPool2d(2), "adaptive_max_pool"),
        (lambda x: F.adaptive_avg_pool2d(x, 1), "adaptive_avg_pool"),
        (lambda x: x.mean((2, 3), keepdim=True), "mean"),
        (lambda x: x[:, :, ::3, 1::3], "slice"),
        (lambda x: x[..., :2], "slice"),
        (lambda x: x[:, :2], "select"),
        (lambda x: F.pad(x, (0, 0, 0, 0, 2, 0)), "select"),
        (lambda x: F.pad(x, (1, 1, 1, 1)), "pad"),
        (nn.ReflectionPad2d(1), "pad"),
        (nn.Upsample(scale_factor=2), "resize"),
        (lambda x: torch.flatten(x, 1), "flatten"),
        (lambda x: x.flatten(1, -1), "flatten"),
        (nn.Flatten(), "flatten"),
        (lambda x: x.view(x.size(0), -1), "flatten"),
        (lambda x: x.reshape(x.shape[0], -1), "flatten"),
        (lambda x: x.view(x.size(0), 4, -1), "reshape"),
        (lambda x: torch.flatten(x, 2), "reshape"),
        (lambda x: x.permute(0, 2, 3, 1), "permute"),
        (lambda x: F.max_pool2d(x, 2), "max_pool"),
        (lambda x: F.avg_pool2d(x, kernel_size=x.size(3), stride=1), "avg_pool"),
        (nn.Conv2d(4, 4, 3, padding="same"), "conv"),
        (nn.Conv2d(4, 4, 3, groups=2), "conv"),
        (nn.ConvTranspose2d(4, 4, 2), "conv_transpose"),
        (nn.BatchNorm2d(4, affine=False), "batchnorm"),
        (nn.GroupNorm(2, 4), "groupnorm"),
        (nn.InstanceNorm2d(4), "instancenorm"),
        (nn.PixelShuffle(2), "pixel_shuffle"),
    ],
)
def test_known_operations(function: Callable[[Tensor], Tensor], kind: str) -> None:
    assert [op.kind for op in made_of(function)] == [kind]


@pytest.mark.parametrize(
    "function",
    [
        torch.exp,
        lambda x: x * torch.rand(1, 1, 6, 6),  # differs from pixel to pixel
        lambda x: x + F.relu(x, inplace=True),  # the sum reads what was overwritten
        lambda x: x * x[:, :1],  # one channel for all
        lambda x: F.pad(x, (0, 0, 0, 0, 1, 1), value=1.0),
        lambda x: F.pad(x, (1, 0, 0, 0, 1, 1)),
        lambda x: x[:, 1:, 1:],
        lambda x: x.transpose(0, 1),
        lambda x: x.cumsum(1),
        lambda x: F.dropout(x, 0.5, training=True),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.ConvTranspose2d(4, 4, 2, groups=2),
        nn.Flatten(0),
        nn.Linear(6, 6),  # acts on the columns of an image, not on channels
    ],
)
def test_everything_else_is_opaque(function: Callable[[Tensor], Tensor]) -> None:
    assert "opaque" in [op.kind for op in made_of(function)]


def test_a_module_called_twice_is_opaque_and_so_is_what_only_it_tells_the_channels_of() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.conv(self.act(self.conv(x))))

    assert kinds(Twice()) == ["input", *["opaque"] * 4, "output"]


def test_tracing_leaves_the_network_as_it_was() -> None:
    model = Chain().train()
    model.bn1.eval()
    training = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    trace(model, IMAGE)
    with pytest.raises(GraphError, match=r"Chain does not accept an image of size \(5, 6, 6\).*input_size"):
        trace(model, (5, 6, 6))
    assert [module.training for module in model.modules()] == training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_forward_pass_that_depends_on_values() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(GraphError, match=r"Branches cannot be traced.*fixed graph"):
        trace(Branches(), IMAGE)


class OldEnding(nn.Module):
    """How the first CIFAR ResNets in PyTorch end: a pool as wide as the image, and a view by the batch's size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1)
        self.linear = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.relu(self.conv2(x))
        x = F.avg_pool2d(x, x.size()[3])
        return self.linear(x.view(x.size(0), -1))


def test_a_network_with_the_old_ending_loses_its_dead_channels_exactly() -> None:
    torch.manual_seed(0)
    model = OldEnding().double().eval()
    ops = {op.name: op for op in trace(model)}
    assert (ops["max_pool2d"].settings["kernel_size"], ops["max_pool2d"].settings["stride"]) == ([2, 2], [2, 2])
    assert (ops["avg_pool2d"].settings["kernel_size"], ops["avg_pool2d"].settings["stride"]) == ([16, 16], [16, 16])
    assert len(channel_groups(model)) == 4 + 6
    with torch.no_grad():
        model.conv1.weight[1] = 0
        model.bn1.bias[1] = 0.5  # a constant that conv2 reads through its padding
        model.conv2.weight[[0, 3]] = 0
    smaller = compact(model)
    x = torch.randn(5, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(smaller(x), model(x), rtol=1e-10, atol=1e-12)
    assert smaller.state_dict()["conv2.weight"].shape == (4, 3 + 1, 3, 3)


def test_hooks_that_only_watch_change_nothing() -> None:
    model, seen = Chain(), []
    model.conv1.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    model.conv2.register_forward_hook(lambda module, inputs, output: 2 * output)
    ops = {op.module: op.kind for op in trace(model, IMAGE) if op.module}
    assert (ops["conv1"], ops["conv2"], seen) == ("conv", "opaque", [(1, 3, 6, 6)])

"""Exact removal, compared with the original network, torch's own operation counter, and sizes worked out by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from metrics import QuantizationComparison
from resnet import BasicBlock, ResNet, resnet20
from src.pruning import CompactionError, CompactNetwork, channel_groups, compact
from src.quantizer import DeadZoneLDZCompander
from tests.networks import IMAGE, TOPOLOGIES, Chain, randomize, tiny_resnet, zero_some
from utils_quantization import attach_weight_quantizers, latent_weight


def zero(model: nn.Module, **filters: list[int] | slice) -> nn.Module:
    """zero(model, layer1__0__conv1=[0, 2]) zeroes these filters."""
    with torch.no_grad():
        for name, which in filters.items():
            model.get_submodule(name.replace("__", ".")).get_parameter("weight")[which] = 0
    return model


@torch.no_grad()
def compared(
    model: nn.Module, size: tuple[int, int, int] = IMAGE, tolerance: float = 1e-10, multiple_of: int = 1
) -> CompactNetwork:
    """Compact, and compare the logits with the original's and the operations with the metrics'."""
    x = torch.randn(5, *size, generator=torch.Generator().manual_seed(9), dtype=next(model.parameters()).dtype)
    network, expected = compact(model, size, multiple_of), model(x)
    difference = (network(x) - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    assert difference < tolerance, f"logits differ by {difference:.1e}"
    comparison = QuantizationComparison(size, multiple_of=multiple_of)
    with FlopCounterMode(display=False) as counter:
        network(x[:1])
    assert counter.get_total_flops() == 2 * comparison.calculate_stats(model).total_macs
    return network


def sizes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """(outputs, inputs) of each layer, (channels,) of each BatchNorm, without layers that are gone."""
    found: dict[str, tuple[int, ...]] = {}
    for name, module in network.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            found[name] = tuple(module.weight.shape[:2])
        elif isinstance(module, nn.BatchNorm2d):
            found[name] = (module.num_features,)
    return found


def test_worked_example() -> None:
    """The example of docs/compression.md: a dead filter whose channel is not zero, a border that no bias can follow."""

    class Example(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2, eps=0)
            self.conv2, self.linear = nn.Conv2d(2, 1, 3, padding=1, bias=False), nn.Linear(1, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.bn1(self.conv1(x)))
            return self.linear(F.adaptive_avg_pool2d(self.conv2(x), 1).flatten(1))

    model = Example().double().eval()
    with torch.no_grad():
        model.conv1.weight[:, 0, 0, 0] = torch.tensor([1.0, 0.0])  # filter 1 is dead
        model.bn1.weight[1], model.bn1.bias[1] = 2, 3
        model.bn1.running_mean[1], model.bn1.running_var[1] = 1, 4
        model.conv2.weight.fill_(0.5)
        model.linear.weight.fill_(9)
    network = compact(model, (1, 3, 3))
    # The dead filter's channel is 3 - 2 * 1 / sqrt(4) = 2 everywhere; the channel of ones carries 2 * 0.5 = 1.
    assert sizes(network) == {"conv1": (1, 1), "bn1": (1,), "conv2": (1, 2), "linear": (1, 1)}
    assert network.conv2.weight[0, 0].unique().tolist() == [0.5]
    assert network.conv2.weight[0, 1].unique().tolist() == [1.0]
    blank = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    seen: list[Tensor] = []
    network.conv2.register_forward_hook(lambda _, __, output: seen.append(output))
    # A blank image: 9 taps in the middle, 6 at an edge, 4 in a corner. Their mean is 49 / 9, times 9.
    assert network(blank).item() == pytest.approx(49, abs=1e-12)
    assert model(blank).item() == pytest.approx(49, abs=1e-12)
    assert seen[0][0, 0].tolist() == [[4, 6, 4], [6, 9, 6], [4, 6, 4]]


def test_sizes_of_a_stream_channel_by_hand() -> None:
    """Channel 1 of stage 1 is channel 2 of stage 2 and 4 of stage 3: option A pads 1 and 2 channels on each side."""
    model = randomize(tiny_resnet(), 0)
    zero(model, conv1=[1], layer1__0__conv2=[1], layer2__0__conv2=[2], layer3__0__conv2=[4])
    for name in ("bn1", "layer1.0.bn2", "layer2.0.bn2", "layer3.0.bn2"):  # constants of 0 need no channel of ones
        norm = model.get_submodule(name)
        norm.bias.data.fill_(-1)
        norm.running_mean.zero_()
    assert sizes(compared(model)) == {
        "conv1": (1, 2),
        "bn1": (1,),
        "layer1.0.conv1": (2, 1),
        "layer1.0.bn1": (2,),
        "layer1.0.conv2": (1, 2),
        "layer1.0.bn2": (1,),
        "layer2.0.conv1": (4, 1),
        "layer2.0.bn1": (4,),
        "layer2.0.conv2": (3, 4),
        "layer2.0.bn2": (3,),
        "layer3.0.conv1": (8, 3),
        "layer3.0.bn1": (8,),
        "layer3.0.conv2": (7, 8),
        "layer3.0.bn2": (7,),
        "linear": (2, 7),
    }


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_nothing_to_remove(topology: type[nn.Module]) -> None:
    model = randomize(topology(), 0)
    network = compared(model)
    assert sizes(network) == sizes(model)
    assert list(network.state_dict()) == list(model.state_dict())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("role", ["all", "slice", "filter", "scale"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_groups_are_what_removal_takes(topology: type[nn.Module], role: str) -> None:
    """Zeroing a group loses its channel, wherever it lives, and nothing else.

    Less is enough. The slices alone: nothing reads the channel. The filters (with their biases) or the BatchNorm scales
    alone: the channel is constant, and a convolution that pads may need one channel of ones in its place.
    """
    original = randomize(topology(), 4)
    groups = channel_groups(original, IMAGE)
    for group, name in enumerate(groups.names):
        members = [member for member in groups.members if group in member.groups]
        roles = [member.role for member in members]
        if role == "scale" and roles.count("scale") < roles.count("filter"):  # a producer without BatchNorm stays live
            continue
        model, expected = copy.deepcopy(original), {key: list(shape) for key, shape in sizes(original).items()}
        readers = {member.module for member in members if member.role == "slice" and role in ("filter", "scale")}
        for member in members:
            index = torch.tensor((member.groups == group).nonzero()[0])
            if role in ("all", member.role):
                model.get_submodule(member.module).get_parameter(member.parameter).data.index_fill_(
                    member.dim, index, 0
                )
            if member.role in ("filter", "slice", "scale"):
                expected[member.module][member.dim] -= len(index)
        for module, shape in sizes(compared(model)).items():
            ones = 1 if module in readers and isinstance(original.get_submodule(module), nn.Conv2d) else 0
            assert shape[0] == expected[module][0], f"{name}: {module}"
            assert sum(expected[module][1:]) <= sum(shape[1:]) <= sum(expected[module][1:]) + ones, f"{name}: {module}"


@st.composite
def residual_networks(draw: st.DrawFn) -> nn.Module:
    option = draw(st.sampled_from("AB"))
    blocks = [draw(st.integers(1, 2)) for _ in range(3)]
    growth = [draw(st.integers(0, 2)) for _ in range(2)]
    steps = [2 * step for step in growth] if option == "A" else growth
    first = draw(st.integers(2, 6))
    widths = (first, first + steps[0], first + sum(steps))
    return ResNet(BasicBlock, blocks, draw(st.integers(1, 4)), option=option, widths=widths, in_channels=2)


@st.composite
def chains(draw: st.DrawFn) -> nn.Module:
    channels, side, parts = 2, 6, []
    for _ in range(draw(st.integers(1, 3))):
        width, kernel, padding = draw(st.integers(2, 6)), draw(st.integers(1, 3)), draw(st.integers(0, 1))
        stride = draw(st.integers(1, 2))
        if side + 2 * padding < kernel:
            break
        parts.append(nn.Conv2d(channels, width, kernel, stride, padding, bias=draw(st.booleans())))
        channels, side = width, (side + 2 * padding - kernel) // stride + 1
        if draw(st.booleans()):
            parts.append(nn.BatchNorm2d(width, affine=draw(st.booleans())))
        if draw(st.booleans()):
            parts.append(nn.ReLU(inplace=True))
        if side >= 4 and draw(st.booleans()):
            parts.append(draw(st.sampled_from([nn.MaxPool2d(2), nn.AvgPool2d(2)])))
            side //= 2
    if draw(st.booleans()):
        parts.append(nn.AdaptiveAvgPool2d(1))
        side = 1
    hidden = draw(st.integers(2, 6))
    head = [nn.Linear(channels * side * side, hidden, bias=draw(st.booleans())), nn.ReLU(), nn.Linear(hidden, 3)]
    return nn.Sequential(*parts, nn.Flatten(), *head)


TINY = st.sampled_from(TOPOLOGIES).map(lambda topology: topology())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    model=st.one_of(residual_networks(), chains(), TINY),
    seed=st.integers(0, 10_000),
    share=st.sampled_from([0.0, 0.1, 0.2, 0.4]),
    multiple_of=st.integers(1, 2),
)
def test_any_network_any_mask(model: nn.Module, seed: int, share: float, multiple_of: int) -> None:
    """Random shapes, dead filters, dead slices, zero scales: equal, or dead and said so."""
    zero_some(randomize(model, seed), seed, share)
    dead = ""
    try:
        compared(model, multiple_of=multiple_of)
    except CompactionError as error:
        dead = str(error)
    if dead:
        assert "output is the same for every image" in dead
        logits = model(torch.randn(4, *IMAGE, dtype=torch.float64))
        torch.testing.assert_close(logits, logits[:1].expand_as(logits), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_quantized_resnet20(dtype: torch.dtype, tolerance: float) -> None:
    """As a run leaves it: quantizers on, most weights in the dead zone, dead filters, moved statistics."""
    model = randomize(resnet20(), 0)
    attach_weight_quantizers(
        model, ["conv1", "bn", "linear"], DeadZoneLDZCompander, {"max_bits": 8, "init_deadzone_logit": 0.4}
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and name != "conv1":
            latent_weight(module).data[::3] *= 1e-3
    model.to(dtype).eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    network = compact(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert sizes(compared(model, (3, 32, 32), tolerance)) == sizes(network)
    assert {parameter.dtype for parameter in network.parameters()} == {dtype}
    assert not any("parametrizations" in name for name in network.state_dict())
    assert not any(module.training for module in network.modules())
    # weights are those that were evaluated, bit for bit: the kept filters of a layer that reads live channels only
    weight = model.layer1[0].conv1.weight
    alive = weight[weight.flatten(1).any(dim=1)]
    assert len(alive) == 10  # of 16, every third one is dead
    assert torch.equal(network.get_submodule("layer1.0.conv1").weight, alive)


def test_dead_networks() -> None:
    everything = slice(None)
    convolutions = ("conv1", "layer1__0__conv2", "layer2__0__conv2", "layer3__0__conv2")
    for dead in ({"linear": everything}, dict.fromkeys(convolutions, everything)):
        with pytest.raises(CompactionError, match="the same for every image"):
            compact(zero(randomize(tiny_resnet(), 0), **dead), IMAGE)
    # constants alone reach the output, through zero padding: they vary over the image, but not from image to image
    model = zero(randomize(Chain(), 0), conv1=everything)
    model.bn1.bias.data.fill_(9)
    with pytest.raises(CompactionError, match="nothing is left: conv1"):
        compact(model, IMAGE)


def diverged() -> nn.Module:
    model = randomize(tiny_resnet(), 0)
    model.layer2[0].conv1.weight.data[0, 0, 0, 0] = float("nan")
    return model


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: tiny_resnet().train(), r"training mode.*eval\(\)"),
        (diverged, r"'layer2.0.conv1'.*not finite"),
    ],
)
def test_refused_networks(build: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(CompactionError, match=words):
        compact(build(), IMAGE)


@fx.wrap
def doubled_where_negative(x: Tensor) -> Tensor:
    """What one image does not show: a function that looks at its values."""
    return x * 2 if x.min() < 0 else x


def test_the_first_operation_behind_which_the_networks_differ_is_named() -> None:
    class Deceptive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 1)
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.conv(doubled_where_negative(x)).mean((2, 3)))

    model = Deceptive().double().eval()
    with pytest.raises(
        CompactionError, match=r"differs from Deceptive by .*first behind 'doubled_where_negative' \(pass\)"
    ):
        compact(model, IMAGE)
    assert compact(model, IMAGE, atol=10).input_size == IMAGE


def test_a_hook_on_the_network_itself_is_seen_by_the_comparison() -> None:
    model = Chain().double().eval()
    model.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(CompactionError, match="the network itself has hooks"):
        compact(model, IMAGE)


def test_what_keeps_its_hooks_shares_parameters_or_writes_in_place() -> None:
    """Each computes in the smaller network what it does in the original, although the graph alone would not say so."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(2, 4, 3, padding=1)
            self.hooked = nn.Conv2d(4, 4, 3, padding=1)
            self.hooked.register_forward_pre_hook(lambda module, inputs: (inputs[0].flip(1),))
            self.first, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.second.weight = self.first.weight
            self.last = nn.Conv2d(4, 4, 3, padding=1)
            self.linear = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.second(self.first(self.hooked(F.relu(self.stem(x)))))
            F.relu_(x.view(x.size(0), -1))  # x is overwritten, too
            return self.linear(self.last(x).mean((2, 3)))

    model = Odd().double().eval()
    attach_weight_quantizers(model, [], DeadZoneLDZCompander)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        latent_weight(model.last)[1] = 0
        before["last.parametrizations.weight.original"][1] = 0
    network = compared(model)
    assert tuple(network.get_submodule("last").weight.shape[:2]) == (3, 4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "the original is whole"
    model(torch.zeros(1, *IMAGE, dtype=torch.float64))


def test_names_with_dashes_and_two_hundred_levels() -> None:
    inner: nn.Module = nn.Conv2d(2, 3, 3, padding=1)
    for _ in range(200):
        inner = nn.Sequential(inner)
    layers = nn.ModuleDict({"conv-1": inner, "0": nn.Conv2d(3, 3, 1)})
    model = nn.Sequential(layers["conv-1"], layers["0"], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    model.add_module("last-one", nn.Linear(2, 2))
    zero(randomize(model, 0), **{"1": [1]})
    assert sizes(compared(model))["1"] == (2, 3)


def test_a_quantized_weight_that_the_forward_pass_reads_itself() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.conv = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 4, 3, padding=1)
            self.linear = nn.Linear(4, 2)
            self.register_buffer("shift", torch.full((), 0.25))

        def forward(self, x: Tensor) -> Tensor:
            x = F.conv2d(x, self.read.weight * 2) + self.shift
            return self.linear(F.relu(self.conv(x)).mean((2, 3)))

    model = Reader().double().eval()
    attach_weight_quantizers(model, [], DeadZoneLDZCompander)
    with torch.no_grad():
        latent_weight(model.conv)[1] = 0
    x = torch.randn(3, *IMAGE, dtype=torch.float64)
    network = compact(model, IMAGE)
    assert sizes(network) == {"conv": (3, 3), "linear": (2, 3)}
    torch.testing.assert_close(network(x), model(x), rtol=1e-10, atol=1e-12)

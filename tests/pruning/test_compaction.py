"""Exact removal, held against the original network, torch's own operation counter, and sizes worked out by hand."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from metrics import QuantizationComparison
from resnet import BasicBlock, ResNet, resnet20
from src.pruning import CompactionError, CompactNetwork, channel_groups, compact, state_shapes
from src.quantizer import DeadZoneLDZCompander
from utils_quantization import attach_weight_quantizers, latent_weight

SIZE = (3, 8, 8)


class Chain(nn.Module):
    """3 -> 4 -> 5 channels, then 2x2 pooling and 5 * 4 * 4 = 80 features or global pooling and 5, then 6 -> 2."""

    def __init__(self, padding: int = 1, bias: bool = False, flat: bool = True) -> None:
        super().__init__()
        side = (8 - 2 * (2 - 2 * padding)) // 2
        self.conv1 = nn.Conv2d(3, 4, 3, padding=padding, bias=bias)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 5, 3, padding=padding, bias=bias)
        self.bn2 = nn.BatchNorm2d(5)
        self.pool = nn.MaxPool2d(2) if flat else nn.AdaptiveAvgPool2d(1)
        self.relu = nn.ReLU(inplace=True)
        self.fc1 = nn.Linear(5 * side * side if flat else 5, 6)
        self.fc2 = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.fc2(self.relu(self.fc1(torch.flatten(self.pool(x), 1))))


def small(option: str = "A", blocks: tuple[int, int, int] = (1, 1, 1)) -> ResNet:
    return ResNet(BasicBlock, blocks, num_classes=5, option=option, widths=(4, 6, 8))


TOPOLOGIES: dict[str, Callable[[], nn.Module]] = {
    "chain, padding, flatten to linear": Chain,
    "chain, no padding, bias, global pooling": lambda: Chain(padding=0, bias=True, flat=False),
    "identity shortcut": lambda: small("A", (2, 1, 1)),
    "option A": lambda: small("A"),
    "option B": lambda: small("B"),
}


def settled(model: nn.Module, seed: int = 0) -> nn.Module:
    """As after training: random weights, moved BatchNorm statistics, scales of both signs, float64, eval mode."""
    generator = torch.Generator().manual_seed(seed)
    model.double().eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) / 2)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
                module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
                module.num_batches_tracked.fill_(7)
    return model


def zero(model: nn.Module, **where: list[int] | None) -> None:
    """zero(model, layer1_0_conv1=[0, 2]) zeroes these filters; None means all of them."""
    with torch.no_grad():
        for name, filters in where.items():
            weight = dict(model.named_modules())[name.replace("__", ".")].weight
            weight[slice(None) if filters is None else filters] = 0


def images(count: int = 6, size: tuple[int, int, int] = SIZE, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(9), dtype=dtype)


@torch.no_grad()
def equal(model: nn.Module, size: tuple[int, int, int] = SIZE, tolerance: float = 1e-10) -> CompactNetwork:
    """Compact, and hold the logits against the original's."""
    x = images(size=size, dtype=next(model.parameters()).dtype)
    network, expected = compact(model, size), model(x)
    difference = (network(x) - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    assert difference < tolerance, f"logits differ by {difference:.1e}"
    return network


@torch.no_grad()
def compared(model: nn.Module, size: tuple[int, int, int] = SIZE, tolerance: float = 1e-10) -> CompactNetwork:
    """Compact, and hold the logits against the original's and the operations against the metrics'."""
    network = equal(model, size, tolerance)
    x = images(1, size, next(model.parameters()).dtype)
    with FlopCounterMode(display=False) as counter:
        network(x)
    assert counter.get_total_flops() == 2 * QuantizationComparison(size).calculate_stats(model).total_macs
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
    """The example of docs/compression.md: a dead filter that is no zero channel, a border that no bias can follow."""

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


CASES: dict[str, dict[str, Any]] = {
    "inside a block": {"layer1__0__conv1": [0, 2]},
    "the stem alone": {"conv1": [0, 3]},
    "the residual stream, both boundaries": {
        "conv1": [1],
        "layer1__0__conv2": [1],
        "layer2__0__conv2": [2],
        "layer3__0__conv2": [3],
    },
    "padded channels": {"layer2__0__conv2": [0, 5], "layer3__0__conv2": [0, 1, 6, 7]},
    "a whole branch": {"layer2__0__conv2": None},
    "every branch": {"layer1__0__conv2": None, "layer2__0__conv2": None, "layer3__0__conv2": None},
    "an inner convolution that is all constant": {"layer3__0__conv1": None},
    "all of these": {
        "conv1": [0, 1],
        "layer1__0__conv1": [1, 2, 3],
        "layer1__0__conv2": [1, 3],
        "layer2__0__conv1": None,
        "layer2__0__conv2": [0, 2, 4],
        "layer3__0__conv1": [0, 3, 4],
        "layer3__0__conv2": None,
    },
}


@pytest.mark.parametrize("option", ["A", "B"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_operations_equal(case: str, option: str) -> None:
    for seed in range(3):
        model = settled(small(option), seed)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        zero(model, **CASES[case])
        compared(model)
        assert model.state_dict().keys() == before.keys()
        assert not model.training


def test_sizes_of_a_stream_channel_by_hand() -> None:
    """Channel 1 of stage 1 is channel 2 of stage 2 and 3 of stage 3 (option A pads one channel on each side)."""
    model = settled(small())
    zero(model, **CASES["the residual stream, both boundaries"])
    for name in ("bn1", "layer1.0.bn2", "layer2.0.bn2", "layer3.0.bn2"):  # constants of 0 need no channel of ones
        norm = model.get_submodule(name)
        norm.bias.data.fill_(-1)
        norm.running_mean.zero_()
    assert sizes(compared(model)) == {
        "conv1": (3, 3),
        "bn1": (3,),
        "layer1.0.conv1": (4, 3),
        "layer1.0.bn1": (4,),
        "layer1.0.conv2": (3, 4),
        "layer1.0.bn2": (3,),
        "layer2.0.conv1": (6, 3),
        "layer2.0.bn1": (6,),
        "layer2.0.conv2": (5, 6),
        "layer2.0.bn2": (5,),
        "layer3.0.conv1": (8, 5),
        "layer3.0.bn1": (8,),
        "layer3.0.conv2": (7, 8),
        "layer3.0.bn2": (7,),
        "linear": (5, 7),
    }


def test_dead_stem_filter_leaves_the_stream() -> None:
    model = settled(small())
    zero(model, conv1=[2])
    model.bn1.bias.data.fill_(9)  # the constant is positive, so it passes the ReLU
    network = compared(model)
    assert sizes(network)["conv1"] == (3, 3)
    assert sizes(network)["layer1.0.conv1"] == (4, 3 + 1)  # a channel of ones for the constant
    assert sizes(network)["layer1.0.conv2"] == (4, 4)  # its part of the stream is live
    assert [step["op"] for step in network.description["steps"]].count("shift") == 1


def test_dead_branch_vanishes() -> None:
    model = settled(small())
    zero(model, layer2__0__conv2=None)
    network = compared(model)
    assert not any(name.startswith("layer2") for name, _ in network.named_parameters())
    assert sizes(network)["layer3.0.conv1"] == (8, 4 + 1)  # four channels of the shortcut, two constants in one


def test_all_constant_inner_convolution_feeds_ones() -> None:
    model = settled(small())
    zero(model, layer3__0__conv1=None)
    model.layer3[0].bn1.bias.data.fill_(9)
    found = sizes(compared(model))
    assert "layer3.0.conv1" not in found
    assert found["layer3.0.conv2"] == (8, 1)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_nothing_to_remove(topology: str) -> None:
    model = settled(TOPOLOGIES[topology]())
    network = compared(model)
    assert sizes(network) == sizes(model)
    assert network.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in network.state_dict().items())


def test_constants_become_a_bias_where_nothing_is_padded() -> None:
    model = settled(Chain(padding=0, flat=False))
    zero(model, conv1=[1], conv2=[0])
    model.bn1.bias.data.fill_(9)
    network = compared(model)
    assert sizes(network) == {"conv1": (3, 3), "bn1": (3,), "conv2": (4, 3), "bn2": (4,), "fc1": (6, 4), "fc2": (2, 6)}
    constant = 9 - model.bn1.running_mean[1] * model.bn1.weight[1] / (model.bn1.running_var[1] + 1e-5).sqrt()
    assert constant > 0
    torch.testing.assert_close(network.conv2.bias, constant * model.conv2.weight[1:, 1].sum(dim=(1, 2)))


def without(full: dict[str, tuple[int, ...]], entries: list[tuple[str, str, str, int]]) -> dict[str, tuple[int, ...]]:
    """Sizes after taking away `count` filters or slices; (module, parameter, role, count)."""
    left = {name: list(shape) for name, shape in full.items()}
    for module, _, role, count in entries:
        if role in ("filter", "slice", "scale"):
            left[module][{"filter": 0, "slice": 1, "scale": 0}[role]] -= count
    return {name: tuple(shape) for name, shape in left.items()}


@pytest.mark.parametrize("roles", ["all", "slice", "filter", "scale"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_groups_are_what_removal_takes(topology: str, roles: str) -> None:
    """Zeroing a group loses its channel, wherever it lives, and nothing else.

    Less is enough. The slices alone: nobody reads the channel. The filters alone, or the BatchNorm scales alone: the
    channel is constant, and a convolution that pads needs one channel of ones in its place.
    """
    original = settled(TOPOLOGIES[topology]())
    groups = channel_groups(original, SIZE)
    full = sizes(original)
    tried = 0
    for group in range(len(groups)):
        entries = [
            (m.module, m.parameter, m.role, int((m.groups == group).sum())) for m in groups.members if group in m.groups
        ]
        model = copy.deepcopy(original)
        parameters = dict(model.named_parameters())
        norms = [name for name, _, role, _ in entries if role == "scale"]
        if roles == "scale" and not norms:
            continue
        tried += 1
        with torch.no_grad():
            for member in groups.members:
                if roles in ("all", member.role):
                    parameter = parameters[f"{member.module}.{member.parameter}"]
                    parameter.index_fill_(member.dim, torch.tensor((member.groups == group).nonzero()[0]), 0)
        expected = without(full, entries)
        found = sizes(equal(model))
        if roles in ("all", "slice"):
            assert found == expected, f"{groups.names[group]}: {roles}"
            continue
        readers = {module for module, _, role, _ in entries if role == "slice"}
        for name, shape in expected.items():
            convolution = isinstance(original.get_submodule(name), nn.Conv2d)
            ones = 1 if name in readers and convolution else 0
            assert found[name][0] == shape[0]
            assert found[name][1:] in {shape[1:], tuple(size + ones for size in shape[1:])}
    assert tried


@st.composite
def residual_networks(draw: st.DrawFn) -> nn.Module:
    option = draw(st.sampled_from("AB"))
    blocks = tuple(draw(st.integers(1, 2)) for _ in range(3))
    first = draw(st.integers(2, 6))
    steps = (
        [2 * draw(st.integers(0, 2)) for _ in range(2)] if option == "A" else [draw(st.integers(0, 3)) for _ in "ab"]
    )
    widths = (first, first + steps[0], first + sum(steps))
    return ResNet(BasicBlock, blocks, num_classes=draw(st.integers(1, 4)), option=option, widths=widths)


@st.composite
def chains(draw: st.DrawFn) -> nn.Module:
    channels, side, parts = 3, 8, []
    for _ in range(draw(st.integers(1, 3))):
        width, kernel, padding = draw(st.integers(2, 6)), draw(st.integers(1, 3)), draw(st.integers(0, 1))
        stride = draw(st.integers(1, 2))
        parts.append(nn.Conv2d(channels, width, kernel, stride, padding, bias=draw(st.booleans())))
        side = (side + 2 * padding - kernel) // stride + 1
        if draw(st.booleans()):
            parts.append(nn.BatchNorm2d(width, affine=draw(st.booleans())))
        if draw(st.booleans()):
            parts.append(nn.ReLU(inplace=True))
        if side >= 4 and draw(st.booleans()):
            parts.append(draw(st.sampled_from([nn.MaxPool2d(2), nn.AvgPool2d(2)])))
            side //= 2
        if side < 3:
            channels = width
            break
        channels = width
    if draw(st.booleans()):
        parts.append(nn.AdaptiveAvgPool2d(1))
        side = 1
    hidden = draw(st.integers(2, 6))
    head = [nn.Linear(channels * side * side, hidden, bias=draw(st.booleans())), nn.ReLU(), nn.Linear(hidden, 3)]
    return nn.Sequential(*parts, nn.Flatten(), *head)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    model=st.one_of(residual_networks(), chains()),
    seed=st.integers(0, 10_000),
    shares=st.tuples(*[st.sampled_from([0.0, 0.1, 0.2, 0.5])] * 3),
)
def test_any_network_any_mask(model: nn.Module, seed: int, shares: tuple[float, float, float]) -> None:
    """Random shapes, dead filters, dead slices, zero scales: equal, or dead and said so."""
    settled(model, seed)
    generator = torch.Generator().manual_seed(seed)
    dead_filters, dead_slices, dead_scales = shares
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.weight[torch.rand(module.weight.shape[0], generator=generator) < dead_filters] = 0
                module.weight[:, torch.rand(module.weight.shape[1], generator=generator) < dead_slices] = 0
            elif isinstance(module, nn.BatchNorm2d) and module.affine:
                module.weight[torch.rand(module.num_features, generator=generator) < dead_scales] = 0
    try:
        compared(model)
        dead = ""
    except CompactionError as error:
        dead = str(error)
    if dead:
        assert "output is the same for every image" in dead
        logits = model(images())
        torch.testing.assert_close(logits, logits[:1].expand_as(logits), rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """ResNet-20 as a run leaves it: quantizers on, most weights in the dead zone, dead filters, moved statistics."""
    model = settled(resnet20())
    attach_weight_quantizers(
        model, ["conv1", "bn", "linear"], DeadZoneLDZCompander, {"max_bits": 8, "init_deadzone_logit": 0.4}
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d) and name != "conv1":
                weight = latent_weight(module)
                weight[torch.rand(len(weight), generator=generator) < 0.4] *= 1e-3
    return model.eval()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_quantized_resnet20(trained: nn.Module, dtype: torch.dtype, tolerance: float) -> None:
    model = copy.deepcopy(trained).to(dtype)
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    network = compared(model, (3, 32, 32), tolerance)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert {parameter.dtype for parameter in network.parameters()} == {dtype}
    assert not any("parametrizations" in name for name in network.state_dict())
    assert not any(module.training for module in network.modules())
    assert sum(p.numel() for p in network.parameters()) < 0.7 * 269_722
    # weights are those that were evaluated, bit for bit: the kept filters of a layer that reads live channels only
    whole = model.layer1[0].conv1.weight
    kept = network.get_submodule("layer1.0.conv1").weight
    alive = whole[whole.flatten(1).any(dim=1)]
    assert 0 < len(alive) < 16
    assert torch.equal(kept, alive)


def test_trains_on(trained: nn.Module) -> None:
    network = compact(copy.deepcopy(trained).float()).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4)
    x, labels = images(16, (3, 32, 32), torch.float32), torch.arange(16) % 10
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x), labels)
        loss.backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in network.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_restores_from_description_and_state(trained: nn.Module, tmp_path: Any) -> None:
    network = compact(copy.deepcopy(trained).float())
    x = images(2, (3, 32, 32), torch.float32)
    torch.save(network.state_dict(), tmp_path / "state.pt")
    description = json.loads(json.dumps(network.description, allow_nan=False))
    assert state_shapes(description) == {name: tuple(value.shape) for name, value in network.state_dict().items()}
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    copies = [copy.deepcopy(network), CompactNetwork(description), CompactNetwork(description)]
    copies[1].load_state_dict(state)
    copies[2].load_state_dict(state, assign=True)
    for restored in copies:
        assert torch.equal(restored.eval()(x), network(x))


def test_torch_export_and_compile() -> None:
    model = settled(small("A", (2, 1, 1)))
    zero(model, **CASES["all of these"])
    network = compact(model, SIZE)
    x = images()
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    exported = torch.export.export(network, (x,), dynamic_shapes=(batch,)).module()
    torch.testing.assert_close(exported(x), network(x))
    torch.testing.assert_close(exported(images(3)), network(images(3)))
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), network(x))


def test_index_lists_follow_the_device_but_not_the_state() -> None:
    model = settled(small())
    zero(model, conv1=[2])
    network = compact(model, SIZE)
    assert any("indices" in name for name, _ in network.named_buffers())
    assert not any("indices" in name for name in network.state_dict())
    assert {buffer.device.type for buffer in copy.deepcopy(network).to("meta").buffers()} == {"meta"}


def test_dead_networks() -> None:
    for kill in ({"linear": None}, {"conv1": None, **{f"layer{n}__0__conv2": None for n in (1, 2, 3)}}):
        model = settled(small())
        zero(model, **kill)
        with pytest.raises(CompactionError, match="the same for every image"):
            compact(model, SIZE)
    # constants alone reach the output, through zero padding: they vary over the image, but not from image to image
    model = settled(Chain())
    zero(model, conv1=None)
    model.bn1.bias.data.fill_(9)
    with pytest.raises(CompactionError, match="nothing is left of conv1"):
        compact(model, SIZE)


def test_networks_that_are_refused() -> None:
    with pytest.raises(CompactionError, match=r"training mode.*eval\(\)"):
        compact(settled(small()).train(), SIZE)
    unknown = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(72, 2))
    with pytest.raises(CompactionError, match=r"'1'.*metrics count everything around it"):
        compact(settled(unknown), SIZE)
    model = settled(small())
    model.layer2[0].conv1.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(CompactionError, match=r"'layer2.0.conv1'.*not finite"):
        compact(model, SIZE)
    with pytest.raises(CompactionError, match="no convolution and no linear layer"):
        compact(nn.Sequential(nn.ReLU(), nn.Flatten()).eval(), SIZE)
    with pytest.raises(CompactionError, match="made for \\(3, 8, 8\\)"):
        compact(settled(small()), SIZE)(images(1, (3, 16, 16)))


def test_in_place_writes_over_a_shared_value_are_refused() -> None:
    """relu_(x) beside another reader of x: that reader sees the changed values, which the account must not miss."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            y = self.relu(x)
            return self.linear(F.adaptive_avg_pool2d(x + y, 1).flatten(1))

    with pytest.raises(CompactionError, match="relu"):
        compact(settled(Shared()), SIZE)


def _valid() -> dict[str, Any]:
    model = settled(small())
    zero(model, **CASES["all of these"])
    return compact(model, SIZE).description


def _first(description: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(step for step in description["steps"] if step["op"] == kind)


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "format": lambda d: d.update(format=99),
    "needs exactly": lambda d: d.pop("steps"),
    "input_size": lambda d: d.update(input_size=[3, 10**9, 32]),
    "output": lambda d: d.update(output=10**6),
    "steps: need a list": lambda d: d.update(steps=[{"op": "relu", "inputs": [0]}] * 10_001),
    "'eval' is unknown": lambda d: d["steps"][0].update(op="eval"),
    r"\['conv'\] is unknown": lambda d: d["steps"][0].update(op=["conv"]),
    "exactly the fields": lambda d: d["steps"][0].update(more=1),
    "has an input=1": lambda d: d["steps"][0].update(inputs=[1]),
    "out=99999999": lambda d: _first(d, "conv").update(out=99_999_999),
    "out=True": lambda d: _first(d, "conv").update(out=True),
    "name='../x'": lambda d: _first(d, "conv").update(name="../x"),
    "layer already": lambda d: _first(d, "batchnorm").update(name=_first(d, "conv")["name"]),
    "a layer already": lambda d: _first(d, "batchnorm").update(name=_first(d, "conv")["name"] + ".x"),
    "'forward' is an attribute": lambda d: _first(d, "batchnorm").update(name="forward"),
    "kernel=": lambda d: _first(d, "conv").update(kernel=[3]),
    "gives a value": lambda d: _first(d, "conv").update(kernel=[99, 99]),
    "eps=nan": lambda d: _first(d, "batchnorm").update(eps=float("nan")),
    "channel 4000": lambda d: _first(d, "select").update(channels=[4000]),
    "size=": lambda d: _first(d, "fill").update(size=[1, 2]),
    "cannot read": lambda d: _first(d, "linear").update(inputs=[1]),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damaged_descriptions(message: str) -> None:
    description = _valid()
    CompactNetwork(description)
    DAMAGE[message](description)
    with pytest.raises(CompactionError, match=message):
        CompactNetwork(description)


def test_absurd_sizes_allocate_nothing() -> None:
    """Two layers of 2**16 x 2**16 weights would be 32 GiB: they are described, and nothing is there yet."""
    linear = [{"op": "linear", "inputs": [n], "name": f"fc{n}", "out": 2**16, "bias": False} for n in (1, 2)]
    description = {
        "format": 1,
        "input_size": [1, 256, 256],
        "steps": [{"op": "flatten", "inputs": [0]}, *linear],
        "output": 3,
    }
    assert all(parameter.is_meta for parameter in CompactNetwork(description).parameters())

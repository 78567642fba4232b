"""How channels flow: groups and accounts by hand on tiny networks, and a brute-force oracle on random ones.

The oracle runs the network, one operation at a time, on random images: a channel that the account calls constant must
be that constant at every pixel of every image, a channel that it does not keep must be replaceable by anything, and a
layer must compute its kept outputs from its kept inputs and one channel of ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from resnet import BasicBlock, ResNet, resnet20
from src.pruning import ChannelGroups, LayerLiveness, analyze_liveness, channel_groups
from src.pruning.liveness import Liveness, batchnorm_affine, is_padded
from src.quantizer import DeadZoneLDZCompander
from tests.networks import (
    IMAGE,
    TOPOLOGIES,
    Chain,
    FlattenArea,
    IdentityShortcut,
    OptionAShortcut,
    OptionBShortcut,
    UnknownOperation,
    randomize,
    tiny_resnet,
    zero_some,
)
from utils_quantization import attach_weight_quantizers, quantization

RANDOM = settings(max_examples=12, deadline=None, derandomize=True)
Part = tuple[str, int, tuple[int, ...]]
NAN = float("nan")


def by_name(groups: ChannelGroups) -> dict[str, set[Part]]:
    """Every group as a set of (parameter, dimension, indices), by its name."""
    return {
        name: {(f"{m}.{p}", dim, tuple(map(int, index))) for m, p, dim, index in groups.slices(g)}
        for g, name in enumerate(groups.names)
    }


def filter_of(module: str, channel: int) -> Part:
    return (f"{module}.weight", 0, (channel,))


def slice_of(module: str, *channels: int) -> Part:
    return (f"{module}.weight", 1, channels)


def norm(module: str, channel: int) -> set[Part]:
    return {(f"{module}.weight", 0, (channel,)), (f"{module}.bias", 0, (channel,))}


# --- groups, members written out by hand -----------------------------------------------------------------------------


def test_groups_of_a_chain() -> None:
    """A channel is its filter, its BatchNorm entries and the slice that reads it; scores and pixels are no channels."""
    expected = {f"conv1[{c}]": {filter_of("conv1", c), *norm("bn1", c), slice_of("conv2", c)} for c in range(3)}
    expected |= {
        f"conv2[{c}]": {filter_of("conv2", c), ("conv2.bias", 0, (c,)), slice_of("linear", c)} for c in range(4)
    }
    assert by_name(channel_groups(Chain(), IMAGE)) == expected


def test_groups_of_an_identity_shortcut() -> None:
    """The stream is written by stem and b, read by a and linear; the inner channel is a's alone."""
    expected = {
        f"stem[{c}]": {filter_of("stem", c), filter_of("b", c), slice_of("a", c), slice_of("linear", c)}
        for c in range(3)
    }
    expected |= {f"a[{c}]": {filter_of("a", c), *norm("bn", c), slice_of("b", c)} for c in range(2)}
    assert by_name(channel_groups(IdentityShortcut(), IMAGE)) == expected


def test_groups_of_an_option_a_shortcut() -> None:
    """Stem channel c is stream channel c + 1; channels 0 and 3 of the stream are fed by `a` alone."""
    assert by_name(channel_groups(OptionAShortcut(), IMAGE)) == {
        "stem[0]": {filter_of("stem", 0), slice_of("a", 0), filter_of("a", 1), *norm("bn", 1), slice_of("linear", 1)},
        "stem[1]": {filter_of("stem", 1), slice_of("a", 1), filter_of("a", 2), *norm("bn", 2), slice_of("linear", 2)},
        "a[0]": {filter_of("a", 0), *norm("bn", 0), slice_of("linear", 0)},
        "a[3]": {filter_of("a", 3), *norm("bn", 3), slice_of("linear", 3)},
    }


def test_groups_of_an_option_b_shortcut() -> None:
    """The 1x1 convolution cuts the stem's channels off from the stream's; both branches make stream channel c."""
    expected = {f"stem[{c}]": {filter_of("stem", c), slice_of("a", c), slice_of("shortcut.0", c)} for c in range(2)}
    expected |= {
        f"a[{c}]": {filter_of("a", c), filter_of("shortcut.0", c), *norm("shortcut.1", c), slice_of("linear", c)}
        for c in range(3)
    }
    assert by_name(channel_groups(OptionBShortcut(), IMAGE)) == expected


def test_groups_of_a_flatten_with_area() -> None:
    assert by_name(channel_groups(FlattenArea(), IMAGE)) == {
        f"conv[{c}]": {filter_of("conv", c), ("conv.bias", 0, (c,)), slice_of("linear", *range(9 * c, 9 * c + 9))}
        for c in range(3)
    }


def test_an_unknown_operation_pins_its_channels() -> None:
    """Softmax mixes conv1's channels, so they belong to no group; what comes after it is as usual."""
    assert by_name(channel_groups(UnknownOperation(), IMAGE)) == {
        f"conv2[{c}]": {filter_of("conv2", c), slice_of("linear", c)} for c in range(2)
    }


def test_groups_of_resnet20() -> None:
    """9 inner layers: 3 (16 + 32 + 64). The stream: 64 channels of the last stage, which carry all earlier ones."""
    groups = channel_groups(resnet20())
    assert len(groups) == 3 * (16 + 32 + 64) + 64
    parts = by_name(groups)["conv1[5]"]  # stage 1: 5, stage 2: 5 + 8, stage 3: 5 + 8 + 16
    assert parts == {
        *(filter_of("conv1", 5), *norm("bn1", 5), slice_of("linear", 29)),
        *(slice_of(f"layer1.{b}.conv1", 5) for b in range(3)),
        *(part for b in range(3) for part in {filter_of(f"layer1.{b}.conv2", 5), *norm(f"layer1.{b}.bn2", 5)}),
        *(slice_of(f"layer2.{b}.conv1", 5 if b == 0 else 13) for b in range(3)),
        *(part for b in range(3) for part in {filter_of(f"layer2.{b}.conv2", 13), *norm(f"layer2.{b}.bn2", 13)}),
        *(slice_of(f"layer3.{b}.conv1", 13 if b == 0 else 29) for b in range(3)),
        *(part for b in range(3) for part in {filter_of(f"layer3.{b}.conv2", 29), *norm(f"layer3.{b}.bn2", 29)}),
    }


@pytest.mark.parametrize("make", [*TOPOLOGIES, tiny_resnet, lambda: tiny_resnet("B")])
def test_groups_are_disjoint_and_whole(make: Callable[[], nn.Module]) -> None:
    """Along each parameter's dimension an index has one group at most, and no group is empty."""
    model = make()
    groups = channel_groups(model, IMAGE)
    seen: set[tuple[str, int, int]] = set()
    for parts in by_name(groups).values():
        assert parts
        entries = {(name, dim, i) for name, dim, indices in parts for i in indices}
        assert not entries & seen
        seen |= entries
    assert len(set(groups.names)) == len(groups)
    for member in groups.members:
        assert (
            len(member.groups) == model.get_submodule(member.module).get_parameter(member.parameter).shape[member.dim]
        )
    scores = ("linear.weight", 0)
    assert not any(entry[:2] == scores for entry in seen), "the network's scores are no channels"
    stem = next(name for name, m in model.named_modules() if isinstance(m, nn.Conv2d))
    assert not any(entry[:2] == (f"{stem}.weight", 1) for entry in seen), "the image's colours are no channels"


def test_groups_do_not_depend_on_values_or_quantizers() -> None:
    before = by_name(channel_groups(tiny_resnet(), IMAGE))
    model = tiny_resnet()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    attach_weight_quantizers(model, [], DeadZoneLDZCompander)
    assert by_name(channel_groups(model, IMAGE)) == before


# --- the account by hand ---------------------------------------------------------------------------------------------


def layer(found: Liveness, name: str) -> LayerLiveness:
    return next(flow for flow in found.layers if flow.name == name)


@torch.no_grad()
def chain(padding: int = 1, shift: float = 0.5) -> Chain:
    """All weights 1; filter 1 of conv1 is 0. BatchNorm: gamma 2, mean 3, var 4 - eps, so scale 1 and offset -3."""
    model = Chain(padding).double().eval()
    for parameter in model.parameters():
        parameter.fill_(1)
    assert model.bn1.running_mean is not None
    assert model.bn1.running_var is not None
    assert model.conv2.bias is not None
    model.bn1.running_mean.fill_(3)
    model.bn1.running_var.fill_(4 - model.bn1.eps)
    model.bn1.weight.fill_(2)
    model.bn1.bias.fill_(3 + shift)
    model.conv1.weight[1] = 0
    model.conv2.bias.zero_()
    return model


def test_a_dead_filter_leaves_a_constant_not_zero() -> None:
    """relu(beta - gamma mean / sqrt(var + eps)) = relu(3.5 - 2 * 3 / 2) = 0.5."""
    found = analyze_liveness(chain(), IMAGE)
    values = {op.name: found.constant[op.name] for op in found.ops}
    np.testing.assert_array_equal(values["conv1"], [NAN, 0, NAN])
    np.testing.assert_allclose(values["bn1"], [NAN, 0.5, NAN])
    np.testing.assert_allclose(values["relu"], [NAN, 0.5, NAN])
    first, second = layer(found, "conv1"), layer(found, "conv2")
    assert first.dead_out.tolist() == [False, True, False]
    assert first.kept_out.tolist() == [0, 2]
    assert first.kept_in.tolist() == [0, 1]
    assert second.kept_in.tolist() == [0, 2]
    assert second.carries_constants, "its zero padding makes 0.5 differ at the border"
    assert second.inputs_after_removal == 3
    assert not first.carries_constants
    assert (first.pixels, second.pixels, layer(found, "linear").pixels) == (36, 36, 1)


@pytest.mark.parametrize(
    ("padding", "shift", "carries"),
    [(1, 0.5, True), (1, -0.5, False), (1, 0.0, False), (0, 0.5, False)],
    ids=["positive", "stopped by ReLU", "zero", "no padding: goes into the bias"],
)
def test_when_constants_have_to_be_carried(padding: int, shift: float, carries: bool) -> None:
    second = layer(analyze_liveness(chain(padding, shift), IMAGE), "conv2")
    assert second.carries_constants is carries
    assert second.inputs_after_removal == 2 + carries


def test_constants_are_not_carried_where_no_kept_filter_reads_them() -> None:
    model = chain()
    with torch.no_grad():
        model.conv2.weight[:, 1] = 0
    assert not layer(analyze_liveness(model, IMAGE), "conv2").carries_constants


def test_all_dead_and_unpadded_is_constant_throughout() -> None:
    """conv2 reads 0.5 nine times on each of 3 channels: 13.5, plus bias 2 = 15.5; linear: 4 * 15.5 + 1 = 63."""
    model = chain(padding=0)
    with torch.no_grad():
        model.conv1.weight.zero_()
        model.conv2.bias.fill_(2)
    found = analyze_liveness(model, IMAGE)
    second = layer(found, "conv2")
    np.testing.assert_allclose(second.constant_out, [15.5] * 4)
    assert second.kept_out.tolist() == []
    assert not second.dead_out.any()
    final = layer(found, "linear")
    assert final.kept_out.tolist() == [0, 1], "the scores stay"
    assert final.kept_in.tolist() == []
    np.testing.assert_allclose(model(torch.randn(2, *IMAGE).double()).detach().numpy(), 63)


def test_a_padded_read_of_a_constant_is_live() -> None:
    model = chain()
    with torch.no_grad():
        model.conv1.weight.zero_()
    second = layer(analyze_liveness(model, IMAGE), "conv2")
    assert np.isnan(second.constant_out).all()
    assert second.inputs_after_removal == 1


def test_a_channel_nobody_reads_takes_its_producer_along() -> None:
    """Linear's columns 0 and 3 are zero: conv2's filters 0 and 3 go, and with them the last readers of conv1's 2."""
    model = chain()
    with torch.no_grad():
        model.linear.weight[:, [0, 3]] = 0
        model.conv2.weight[[1, 2], 2] = 0  # channel 2 of conv1 is read by filters 0 and 3 alone
    found = analyze_liveness(model, IMAGE)
    assert layer(found, "conv2").kept_out.tolist() == [1, 2]
    assert layer(found, "conv2").kept_in.tolist() == [0]
    assert layer(found, "conv1").kept_out.tolist() == [0]
    assert np.isnan(layer(found, "conv1").constant_out).tolist() == [True, False, True], "live, but unread"


def test_a_zero_scale_makes_a_live_channel_constant() -> None:
    model = chain()
    with torch.no_grad():
        model.bn1.weight[2] = 0
    found = analyze_liveness(model, IMAGE)
    np.testing.assert_allclose(found.constant["relu"], [NAN, 0.5, 3.5])  # beta alone: 3.5
    assert layer(found, "conv1").kept_out.tolist() == [0]
    assert layer(found, "conv1").dead_out.tolist() == [False, True, False]


def test_batchnorm_affine() -> None:
    scale, offset = batchnorm_affine(chain().bn1)
    np.testing.assert_allclose(scale, 1, rtol=1e-12)
    np.testing.assert_allclose(offset, 0.5, rtol=1e-12)
    plain = nn.BatchNorm2d(2, affine=False)
    assert plain.running_mean is not None
    plain.running_mean.fill_(3)
    np.testing.assert_allclose(batchnorm_affine(plain), [[1 / np.sqrt(1 + 1e-5)] * 2, [-3 / np.sqrt(1 + 1e-5)] * 2])


def test_a_stream_channel_goes_only_when_all_its_producers_are_constant() -> None:
    model = randomize(IdentityShortcut(), 3)
    with torch.no_grad():
        model.stem.weight[0] = 0
    assert np.isnan(analyze_liveness(model, IMAGE).constant["relu_2"][0]), "b still writes to it"
    with torch.no_grad():
        model.b.weight[0] = 0
    found = analyze_liveness(model, IMAGE)
    assert found.constant["relu_2"][0] == 0
    assert layer(found, "stem").kept_out.tolist() == [1, 2]
    assert layer(found, "b").kept_out.tolist() == [1, 2]
    assert layer(found, "a").kept_in.tolist() == [1, 2]
    assert layer(found, "linear").kept_in.tolist() == [1, 2]


@torch.no_grad()
def test_option_a_index_map() -> None:
    """Stem channel 0 is stream channel 1: both must be dead for linear to lose column 1. Channel 0 is `a`'s alone."""
    model = randomize(OptionAShortcut(), 5)
    model.a.weight[[0, 1]] = 0
    found = analyze_liveness(model, IMAGE)
    mean, variance = model.bn.running_mean, model.bn.running_var
    assert mean is not None
    assert variance is not None
    offset = (model.bn.bias - model.bn.weight * mean / (variance + model.bn.eps).sqrt()).numpy()
    np.testing.assert_allclose(found.constant["bn"], [offset[0], offset[1], NAN, NAN])
    np.testing.assert_allclose(found.constant["pad"], [0, NAN, NAN, 0])
    np.testing.assert_allclose(found.constant["relu_1"], [max(offset[0], 0), NAN, NAN, NAN])
    assert layer(found, "linear").kept_in.tolist() == [1, 2, 3]
    assert layer(found, "stem").kept_out.tolist() == [0, 1]
    model.stem.weight[0] = 0
    found = analyze_liveness(model, IMAGE)
    np.testing.assert_allclose(found.constant["relu_1"], [max(offset[0], 0), max(offset[1], 0), NAN, NAN])
    assert layer(found, "linear").kept_in.tolist() == [2, 3]
    assert layer(found, "stem").kept_out.tolist() == [1]
    assert layer(found, "a").kept_in.tolist() == [1]


@torch.no_grad()
def test_flatten_index_map() -> None:
    model = randomize(FlattenArea(), 1)
    model.linear.weight[:, 9:18] = 0
    assert layer(analyze_liveness(model, IMAGE), "conv").kept_out.tolist() == [0, 2]
    model.linear.weight[1, 13] = 1  # one pixel of channel 1 is read after all
    found = analyze_liveness(model, IMAGE)
    assert layer(found, "conv").kept_out.tolist() == [0, 1, 2]
    assert layer(found, "linear").kept_in.tolist() == [*range(9), 13, *range(18, 27)]


@torch.no_grad()
def test_nothing_is_removed_around_an_unknown_operation() -> None:
    model = randomize(UnknownOperation(), 2)
    model.conv1.weight[0] = 0
    model.conv2.weight[:, 1] = 0
    found = analyze_liveness(model, IMAGE)
    assert layer(found, "conv1").kept_out.tolist() == [0, 1, 2]
    assert np.isnan(found.constant["softmax"]).all()
    model.conv2.weight[0] = 0
    assert layer(analyze_liveness(model, IMAGE), "conv2").kept_out.tolist() == [1], "after it, as usual"


def test_grouped_and_shared_layers_are_kept_whole_and_counted() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1, groups=2)),
        *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)),
    )
    with torch.no_grad():
        model.get_submodule("0").weight[0] = 0
        model.get_submodule("2").weight[1] = 0
    found = analyze_liveness(model, IMAGE)
    grouped = layer(found, "2")
    assert layer(found, "0").kept_out.tolist() == [0, 1, 2, 3]
    assert (grouped.out_channels, grouped.in_channels, grouped.pixels) == (6, 2, 36)
    assert grouped.dead_out.tolist() == [False, True, False, False, False, False]
    assert grouped.inputs_after_removal == 2
    assert [flow.name for flow in found.layers] == ["0", "2", "6"]


def test_the_account_reads_quantized_weights_where_they_are_on() -> None:
    model = tiny_resnet()
    attach_weight_quantizers(model, ["conv1", "linear"], DeadZoneLDZCompander, {"init_deadzone_logit": 0.6})
    inner = model.get_submodule("layer1.0.conv1")
    with torch.no_grad():
        original = inner.parametrizations.weight.original
        original[0] = 1e-3 * original.abs().max()
    assert layer(analyze_liveness(model, IMAGE), "layer1.0.conv1").dead_out.tolist() == [True, False]
    with quantization(model, enabled=False):
        assert layer(analyze_liveness(model, IMAGE), "layer1.0.conv1").dead_out.tolist() == [False, False]


@pytest.mark.parametrize(
    ("module", "padded"),
    [
        (nn.Conv2d(1, 1, 3, padding=1), True),
        (nn.Conv2d(1, 1, 3, padding=(0, 1)), True),
        (nn.Conv2d(1, 1, 3), False),
        (nn.Conv2d(1, 1, 3, padding="valid"), False),
        (nn.Conv2d(1, 1, 3, padding="same"), True),
        (nn.Conv2d(1, 1, 1, padding="same"), False),
        (nn.Conv2d(1, 1, (1, 3), padding="same"), True),
        (nn.Linear(1, 1), False),
    ],
    ids=str,
)
def test_padding(module: nn.Module, padded: bool) -> None:
    assert is_padded(module) is padded


# --- the oracle ------------------------------------------------------------------------------------------------------


class Oracle(fx.Interpreter):
    """Runs the network on images, and after each operation checks the account and puts noise where it says it may."""

    def __init__(self, model: nn.Module, found: Liveness, noise: bool) -> None:
        super().__init__(fx.GraphModule(model, fx.Tracer().trace(model)))
        self.found = found
        self.noise = noise
        self.constants = 0
        self.flows = {flow.name: flow for flow in found.layers}
        self.modules = dict(model.named_modules())

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op in ("placeholder", "output") or not isinstance(value, Tensor):
            return value
        constant = torch.from_numpy(self.found.constant[n.name])
        fixed = ~constant.isnan()
        self.constants += int(fixed.sum())
        shape = (1, -1, *[1] * (value.dim() - 2))
        expected = constant.view(shape).expand_as(value)[:, fixed]
        torch.testing.assert_close(value[:, fixed], expected, rtol=1e-9, atol=1e-9)
        if isinstance(n.target, str) and n.target in self.flows:
            self.check_layer(n, value, self.flows[n.target])
        if self.noise:
            free = ~fixed & ~torch.from_numpy(self.found.kept[n.name])
            value = value.clone()
            value[:, free] = 100 * torch.randn_like(value[:, free])
        return value

    def check_layer(self, node: fx.Node, value: Tensor, flow: LayerLiveness) -> None:
        """The kept outputs from the kept inputs, and all constants through one channel of ones."""
        source_node = node.all_input_nodes[0]
        source = self.env[source_node]
        module = self.modules[flow.name]
        assert isinstance(module, (nn.Conv2d, nn.Linear))
        weight = module.weight.detach()
        constant = torch.from_numpy(np.nan_to_num(self.found.constant[source_node.name]))
        reads = torch.from_numpy(np.isnan(self.found.constant[source_node.name]))
        left_out = np.setdiff1d(np.flatnonzero(reads.numpy()), flow.kept_in)
        narrow = source[:, flow.kept_in]
        small = weight[:, flow.kept_in]
        ones = torch.ones_like(source[:, :1])
        carried = torch.einsum("oi...,i->o...", weight, constant)[:, None]
        if isinstance(module, nn.Conv2d):
            run = {"stride": module.stride, "padding": module.padding}
            result = F.conv2d(narrow, small, module.bias, **run) if len(flow.kept_in) else 0
            extra = F.conv2d(ones, carried, **run)
            if is_padded(module) and not flow.carries_constants:
                assert not extra[:, flow.kept_out].any()
        else:
            result, extra = F.linear(narrow, small, module.bias), carried[:, 0]
        if isinstance(module, nn.Conv2d) and not len(flow.kept_in) and module.bias is not None:
            extra = extra + module.bias[:, None, None]
        expected = (result + extra).expand_as(value)[:, flow.kept_out]
        torch.testing.assert_close(value[:, flow.kept_out], expected, rtol=1e-9, atol=1e-9)
        assert not weight[flow.kept_out][:, left_out].any()


@torch.no_grad()
def check(model: nn.Module, seed: int) -> int:
    """Raise where the account is wrong on random images; returns how many constant channels it had."""
    found = analyze_liveness(model, IMAGE)
    torch.manual_seed(seed)
    images = torch.randn(3, *IMAGE, dtype=torch.float64)
    scores = model(images)
    oracle = Oracle(model, found, noise=False)
    torch.testing.assert_close(oracle.run(images), scores, rtol=1e-12, atol=1e-12)
    noisy = Oracle(model, found, noise=True)
    torch.testing.assert_close(noisy.run(images), scores, rtol=1e-9, atol=1e-9)
    return oracle.constants


@RANDOM
@given(seed=st.integers(0, 10_000), share=st.sampled_from([0.0, 0.2, 0.5, 0.8]), option=st.sampled_from("AB"))
def test_oracle_on_random_resnets(seed: int, share: float, option: str) -> None:
    model = zero_some(randomize(tiny_resnet(option), seed), seed, share)
    constants = check(model, seed)
    assert constants or share < 0.5


@RANDOM
@given(seed=st.integers(0, 10_000), topology=st.sampled_from(TOPOLOGIES), padding=st.integers(0, 1))
def test_oracle_on_every_topology(seed: int, topology: type[nn.Module], padding: int) -> None:
    model = Chain(padding) if topology is Chain else topology()
    check(zero_some(randomize(model, seed), seed), seed)


def test_zeroing_a_whole_group_removes_its_channel() -> None:
    """The group is what removal needs: with all of it zero, the channel is gone from every layer it stood in."""
    for option in "AB":
        model = randomize(tiny_resnet(option), 4)
        groups = channel_groups(model, IMAGE)
        for group in (0, len(groups) // 2, len(groups) - 1):
            twin = randomize(tiny_resnet(option), 4)
            with torch.no_grad():
                for module, parameter, dim, index in groups.slices(group):
                    tensor = twin.get_submodule(module).get_parameter(parameter)
                    tensor.index_fill_(dim, torch.from_numpy(index), 0)
            check(twin, 1)
            for module, parameter, dim, index in groups.slices(group):
                if parameter == "weight" and isinstance(twin.get_submodule(module), (nn.Conv2d, nn.Linear)):
                    flow = layer(analyze_liveness(twin, IMAGE), module)
                    kept = flow.kept_out if dim == 0 else flow.kept_in
                    assert not set(kept.tolist()) & set(index.tolist())


def test_nothing_to_remove_keeps_everything() -> None:
    model = ResNet(BasicBlock, [1, 1, 1])
    found = analyze_liveness(model)
    assert all(np.isnan(flow.constant_out).all() for flow in found.layers)
    assert all(
        len(flow.kept_out) == flow.out_channels and len(flow.kept_in) == flow.in_channels for flow in found.layers
    )
    assert not any(flow.carries_constants or flow.dead_out.any() for flow in found.layers)

"""Groups of channels, their members written out by hand on one tiny network per topology."""

from __future__ import annotations

from torch import nn

from resnet import resnet20
from src.pruning import ChannelGroups, channel_groups
from src.quantizer import DeadZoneLDZCompander
from tests.networks import (
    IMAGE,
    Chain,
    FlattenArea,
    IdentityShortcut,
    OptionAShortcut,
    OptionBShortcut,
    UnknownOperation,
    tiny_resnet,
)
from utils_quantization import attach_weight_quantizers

Part = tuple[str, int, tuple[int, ...]]


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


def test_groups_of_a_chain() -> None:
    """A channel is its filter, its BatchNorm entries and the slice that reads it; scores and pixels have none."""
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


def test_groups_do_not_depend_on_values_or_quantizers() -> None:
    before = by_name(channel_groups(tiny_resnet(), IMAGE))
    model = tiny_resnet()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    attach_weight_quantizers(model, [], DeadZoneLDZCompander)
    assert by_name(channel_groups(model, IMAGE)) == before

"""Numbers of channels rounded up to a multiple: which channels are kept, what is computed, and what is counted."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from metrics import MetricsError, QuantizationComparison
from resnet import BasicBlock, ResNet
from src.pruning import CompactionError, CompactNetwork, channel_groups, compact
from tests.networks import IMAGE, Chain, FlattenArea, IdentityShortcut, randomize, zero_some

SIZE = (3, 8, 8)


def widths(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each layer."""
    layers = {name: each for name, each in model.named_modules() if isinstance(each, (nn.Conv2d, nn.Linear))}
    return {name: (layer.weight.shape[0], layer.weight.shape[1]) for name, layer in layers.items()}


def residual(seed: int, option: str, share: float, structured: bool) -> nn.Module:
    """Dead filters, slices and scales anywhere, or whole groups, as the coupled penalty leaves them."""
    model = randomize(ResNet(BasicBlock, [1, 2, 1], 5, option=option, widths=(8, 16, 32)), seed)
    if not structured:
        return zero_some(model, seed, share)
    groups = channel_groups(model, SIZE)
    dead = torch.rand(len(groups), generator=torch.Generator().manual_seed(seed)) < share
    for group in dead.nonzero().flatten().tolist():
        for module, parameter, dim, indices in groups.slices(group):
            model.get_submodule(module).get_parameter(parameter).data.index_fill_(dim, torch.from_numpy(indices), 0)
    return model


@torch.no_grad()
def compared(model: nn.Module, size: tuple[int, int, int], multiple_of: int) -> CompactNetwork:
    x = torch.randn(3, *size, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    network, expected = compact(model, size, multiple_of), model(x)
    assert (network(x) - expected).abs().max() < 1e-12 * expected.abs().max()
    with FlopCounterMode(display=False) as counter:
        network(x[:1])
    stats = QuantizationComparison(size, multiple_of=multiple_of).calculate_stats(model)
    assert counter.get_total_flops() == 2 * stats.total_macs
    return network


@pytest.mark.parametrize("structured", [False, True], ids=["random", "whole groups"])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("option", ["A", "B"])
def test_equal_and_round_on_residual_networks(option: str, share: float, structured: bool) -> None:
    for seed in range(3):
        model = residual(seed, option, share, structured)
        full, least = widths(model), widths(compact(model, SIZE))
        for multiple_of in (2, 4, 8, 16):
            network = compared(model, SIZE, multiple_of)
            for name, (outputs, inputs) in widths(network).items():
                assert outputs % multiple_of == 0 or outputs == full[name][0]
                assert outputs >= least[name][0]
                # the channel of ones comes on top only where no constant channel is kept whose place it could take
                assert inputs % multiple_of in (0, int(not structured)) or inputs == full[name][1]


def test_a_multiple_of_one_changes_nothing() -> None:
    model = residual(0, "A", 0.3, structured=False)
    assert compact(model, SIZE, 1).description == compact(model, SIZE).description


def stacked(padding: int) -> nn.Module:
    """1 -> 6 -> 1 channels. Filters 0, 2 and 5 are live; the others' slices have norms 0.1, 2 and 1 and biases 1."""
    model = nn.Sequential(
        nn.Conv2d(1, 6, 1), nn.ReLU(), nn.Conv2d(6, 1, 1 + 2 * padding, padding=padding), nn.Flatten()
    )
    model.double().eval()
    with torch.no_grad():
        model[0].weight[:, 0, 0, 0] = torch.tensor([5.0, 0, 4, 0, 0, 3])
        model[0].bias.fill_(1)
        model[2].weight.zero_()
        model[2].weight[0, :, padding, padding] = torch.tensor([1.0, 0.1, 1, 2, 1, 1])
    return model


@pytest.mark.parametrize(("multiple_of", "kept"), [(2, [0, 2, 3, 5]), (3, [0, 2, 5]), (5, [0, 2, 3, 4, 5])])
def test_the_largest_norms_are_kept_in_addition(multiple_of: int, kept: list[int]) -> None:
    """Of the dead 1, 3 and 4, channel 3 has the largest group norm, sqrt(1 + 2 * 2), and 4 the next, sqrt(1 + 1)."""
    model = stacked(padding=0)
    network = compared(model, (1, 2, 2), multiple_of)
    assert torch.equal(network.get_submodule("0").weight, model[0].weight[kept])
    assert torch.equal(network.get_submodule("2").weight, model[2].weight[:, kept])


@pytest.mark.parametrize(
    ("multiple_of", "sizes"),
    [(1, (3, 4)), (2, (4, 4)), (3, (3, 4)), (4, (4, 4)), (5, (5, 5)), (6, (6, 6))],
)
def test_the_channel_of_ones_counts_inside_the_multiple_where_there_is_room(
    multiple_of: int, sizes: tuple[int, int]
) -> None:
    """A kept constant channel gives its place to the ones; with a multiple of 3 there is none, with 6 no need."""
    network = compared(stacked(padding=1), (1, 2, 2), multiple_of)
    assert (len(network.get_submodule("0").weight), network.get_submodule("2").weight.shape[1]) == sizes


def test_tied_layers_keep_one_set() -> None:
    """Stream channel 2 is live; of 0 and 1, which stem and b both leave dead, a reads 0 with the larger weights."""
    model = randomize(IdentityShortcut(), 3)
    with torch.no_grad():
        model.stem.weight[:2] = 0
        model.b.weight[:2] = 0
        model.linear.weight[:, :2] = 0
        model.a.weight[:, 0] = 2
        model.a.weight[:, 1] = 1
    network = compared(model, IMAGE, 2)
    for name in ("stem", "b"):
        assert torch.equal(network.get_submodule(name).weight, model.get_submodule(name).weight[[0, 2]])
    assert torch.equal(network.get_submodule("linear").weight, model.linear.weight[:, [0, 2]])


@torch.no_grad()
def test_pixels_beside_each_other_stay_together() -> None:
    model = randomize(FlattenArea(), 1)
    model.conv.weight[[0, 2]] = 0
    model.linear.weight[:, 12] = 0  # one pixel of the live channel
    assert widths(compared(model, IMAGE, 2)) == {"conv": (2, 2), "linear": (2, 18)}


@pytest.mark.parametrize("multiple_of", [0, -8, 2.5, True, 5])
def test_multiples_out_of_range(multiple_of: int) -> None:
    words = rf"multiple_of={multiple_of!r}: need 1\.\.4, a whole number; the widest layer has no more channels"
    with pytest.raises(CompactionError, match=words):
        compact(Chain().eval(), IMAGE, multiple_of)
    with pytest.raises(MetricsError, match=words):
        QuantizationComparison(IMAGE, multiple_of=multiple_of).calculate_stats(Chain())

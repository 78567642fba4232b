"""Penalties against plain-Python loops, groups written out by hand, and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call

from experiments.sparsity import (
    PenaltyError,
    coupled_group_lasso,
    group_lasso_blocks,
    group_lasso_channels,
    l1_kernel_sparsity,
    safe_sqrt,
)
from src.pruning import channel_groups
from src.quantizer import DeadZoneLDZCompander
from tests.networks import IMAGE, TOPOLOGIES, Chain, OptionAShortcut, randomize, tiny_resnet
from utils_quantization import attach_weight_quantizers, quantization, shared_quantized_weights

PENALTIES: dict[str, Callable[[nn.Module], Tensor]] = {
    "coupled": lambda model: coupled_group_lasso(model, IMAGE)(model),
    "channels": group_lasso_channels,
    "blocks": group_lasso_blocks(2),
    "kernels": l1_kernel_sparsity,
}


def square(values: Tensor) -> float:
    """Sum of squares, in plain Python."""
    return sum(float(v) ** 2 for v in values.detach().flatten())


def convolutions(model: nn.Module) -> list[Tensor]:
    return [module.weight.detach() for module in model.modules() if isinstance(module, nn.Conv2d)]


def made() -> nn.Module:
    return randomize(tiny_resnet(), 6)


def test_coupled_groups_of_a_chain_by_hand() -> None:
    model = randomize(Chain(), 1)
    assert isinstance(model, Chain)
    assert model.conv2.bias is not None
    total = 0.0
    for c in range(3):
        own = square(model.conv1.weight[c]) + square(model.bn1.weight[c]) + square(model.bn1.bias[c])
        total += math.sqrt(own + square(model.conv2.weight[:, c]))
    for c in range(4):
        own = square(model.conv2.weight[c]) + square(model.conv2.bias[c])
        total += math.sqrt(own + square(model.linear.weight[:, c]))
    assert PENALTIES["coupled"](model).item() == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("topology", [*TOPOLOGIES, tiny_resnet])
def test_coupled_groups_of_every_topology(topology: Callable[[], nn.Module]) -> None:
    """Over the groups' own lists of members, which tests/pruning/test_groups.py compares with lists by hand."""
    model, total = randomize(topology(), 2), 0.0
    groups = channel_groups(model, IMAGE)
    for group in range(len(groups)):
        members = [
            model.get_submodule(module).get_parameter(parameter).index_select(dim, torch.from_numpy(indices))
            for module, parameter, dim, indices in groups.slices(group)
        ]
        total += math.sqrt(sum(square(member) for member in members))
    assert PENALTIES["coupled"](model).item() == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 100])
def test_layerwise_penalties_against_loops(size: int) -> None:
    """Block sizes that do not divide the filters leave a smaller last block."""
    model = made()
    weights = convolutions(model)
    blocks = sum(math.sqrt(square(w[o : o + size])) for w in weights for o in range(0, len(w), size))
    assert group_lasso_blocks(size)(model).item() == pytest.approx(blocks, rel=1e-12)
    if size == 1:
        assert group_lasso_channels(model).item() == pytest.approx(blocks, rel=1e-12)
    absolute = sum(abs(float(v)) for w in weights for v in w.flatten())
    assert l1_kernel_sparsity(model).item() == pytest.approx(absolute, rel=1e-12)


@pytest.mark.parametrize("name", PENALTIES)
def test_gradient_against_finite_differences(name: str) -> None:
    model = randomize(OptionAShortcut(), 3)
    names, values = zip(*model.named_parameters(), strict=True)
    penalty = coupled_group_lasso(model, IMAGE) if name == "coupled" else PENALTIES[name]
    model.forward = lambda: penalty(model)  # `functional_call` swaps the parameters of a module's forward pass

    def of(*parameters: Tensor) -> Tensor:
        return functional_call(model, dict(zip(names, parameters, strict=True)), ())

    assert gradcheck(of, tuple(v.detach().requires_grad_() for v in values), atol=1e-6)


@pytest.mark.parametrize("name", PENALTIES)
def test_all_zero_groups_have_a_finite_zero_gradient(name: str) -> None:
    model = made()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    loss = PENALTIES[name](model)
    loss.backward()
    assert loss.item() == 0
    for parameter in model.parameters():
        assert parameter.grad is None or torch.count_nonzero(parameter.grad) == 0  # nan counts as nonzero


def test_safe_sqrt() -> None:
    x = torch.tensor([0.0, 4.0, 1e-30], dtype=torch.float64, requires_grad=True)
    safe_sqrt(x).sum().backward()
    assert safe_sqrt(x).tolist() == [0, 2, pytest.approx(1e-15)]
    assert x.grad is not None
    assert x.grad.tolist() == [0, 0.25, pytest.approx(5e14)]


def test_the_closure_serves_any_network_of_the_same_structure() -> None:
    penalty, other = coupled_group_lasso(tiny_resnet(seed=1), IMAGE), tiny_resnet(seed=2)
    before = penalty(other).item()
    assert before == pytest.approx(coupled_group_lasso(other, IMAGE)(other).item())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    assert penalty(other).item() == pytest.approx(2 * before)


@pytest.mark.parametrize("name", PENALTIES)
def test_quantized_weights_are_what_is_penalised(name: str) -> None:
    """On: the penalty of a network that holds the quantized values. Off: that of the latent ones."""
    model, plain = tiny_resnet(), tiny_resnet()
    attach_weight_quantizers(model, [], DeadZoneLDZCompander, {"init_deadzone_logit": 0.7, "init_bit_logit": 0.6})
    with quantization(model, enabled=False):
        assert PENALTIES[name](model).item() == pytest.approx(PENALTIES[name](plain).item(), rel=1e-6)
    quantizer = DeadZoneLDZCompander(init_deadzone_logit=0.7, init_bit_logit=0.6)
    with torch.no_grad():
        for module in plain.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.weight.copy_(quantizer(module.weight))
    expected = PENALTIES[name](plain).item()
    assert PENALTIES[name](model).item() == pytest.approx(expected, rel=1e-6)
    with shared_quantized_weights(model):
        shared = PENALTIES[name](model)
    assert shared.item() == pytest.approx(expected, rel=1e-6)
    shared.backward()
    logit = model.get_submodule("layer1.0.conv1.parametrizations.weight.0.quantizer").get_parameter("logit_dz")
    assert logit.grad is not None
    assert math.isfinite(logit.grad.item())
    assert logit.grad.item() != 0


def test_what_cannot_be_penalised() -> None:
    with pytest.raises(PenaltyError, match="block_size=0: need 1 or more, a whole number; a number of filters"):
        group_lasso_blocks(0)
    with pytest.raises(PenaltyError, match="no removable channel"):
        coupled_group_lasso(nn.Sequential(nn.Conv2d(2, 3, 3)), IMAGE)

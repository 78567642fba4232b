"""Compression of a small network with chosen dead filters, against counts done by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from matplotlib.figure import Figure

from experiments import figures
from experiments.evaluator import EvalResult, Evaluator
from metrics import MetricsError
from resnet import BasicBlock, ResNet
from src.quantizer import DeadZoneLDZCompander
from src.training import layer_records
from utils_quantization import attach_weight_quantizers

SIZE = (3, 8, 8)
# (output, input, kernel, pixels) of each layer at 8 x 8 pixels, stride 2 into stages 2 and 3
LAYERS = {
    "conv1": (4, 3, 9, 64),
    "layer1.0.conv1": (4, 4, 9, 64),
    "layer1.0.conv2": (4, 4, 9, 64),
    "layer2.0.conv1": (8, 4, 9, 16),
    "layer2.0.conv2": (8, 8, 9, 16),
    "layer3.0.conv1": (16, 8, 9, 4),
    "layer3.0.conv2": (16, 16, 9, 4),
    "linear": (10, 16, 1, 1),
}
DENSE = {name: out * inside * kernel * pixels for name, (out, inside, kernel, pixels) in LAYERS.items()}


def network() -> ResNet:
    torch.manual_seed(0)
    return ResNet(BasicBlock, [1, 1, 1], widths=(4, 8, 16))


def pruned() -> ResNet:
    """4 bits everywhere in the blocks; filters 1 and 2 of layer3.0.conv1 are dead, and their BatchNorm shifts are 0."""
    model = network()
    block = cast(Any, model.layer3)[0]
    block.conv1.weight.data[1:3] = 0
    block.bn1.bias.data[1:3] = 0
    block.bn1.running_mean[1:3] = 0
    kwargs = {"fixed_bit_val": 4, "learnable_bit": False, "init_deadzone_logit": 20.0}  # tanh 20 = 1: no dead zone
    attach_weight_quantizers(model, ["conv1", "linear"], DeadZoneLDZCompander, kwargs)
    return model


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return Evaluator(network(), SIZE)


@pytest.fixture(scope="module")
def model() -> ResNet:
    return pruned()


@pytest.fixture(scope="module")
def result(evaluator: Evaluator, model: ResNet) -> EvalResult:
    return evaluator.evaluate(model)


def test_structured_counts_and_ratios_by_hand(result: EvalResult) -> None:
    macs = {layer.name: layer.macs for layer in result.structured_stats.layers}
    expected = {**DENSE, "layer3.0.conv1": 14 * 8 * 9 * 4, "layer3.0.conv2": 16 * 14 * 9 * 4}
    assert macs == expected
    assert result.structured_mac_ratio == pytest.approx(sum(DENSE.values()) / sum(expected.values()))
    bits = {name: 4 if name.startswith("layer") else 32 for name in DENSE}
    bops = sum(expected[name] * bits[name] * 32 for name in DENSE)
    assert result.structured_bops_ratio == pytest.approx(sum(DENSE.values()) * 32 * 32 / bops)


def test_a_row_for_every_layer(result: EvalResult) -> None:
    rows = {row["layer"]: row for row in result.rows()}
    assert list(rows) == list(LAYERS)
    row = rows["layer3.0.conv1"]
    assert (row["weights"], row["bits"], row["dead filters"]) == (16 * 8 * 9, 4, 2)
    assert (row["channels"], row["channels left"], row["MACs, after removal"]) == (16, 14, 14 * 8 * 9 * 4)
    assert (rows["conv1"]["bits"], rows["conv1"]["zeros"]) == (32, 0)


def test_the_plots_draw_the_networks_data(
    evaluator: Evaluator, model: ResNet, result: EvalResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, tuple[Any, ...]] = {}

    def recorded(name: str, draw: Callable[..., Figure]) -> Callable[..., Figure]:
        return lambda *arguments: drawn.update({name: arguments}) or draw(*arguments)

    for name in ("channel_liveness", "sparsity_map", "layer_sparsity_bars"):
        monkeypatch.setattr(figures, name, recorded(name, getattr(figures, name)))
    plots = [evaluator.plot_channel_liveness(model), evaluator.plot_sparsity_map(model, "layer3.0.conv1")]
    plots.append(evaluator.plot_layer_sparsity_bars(result))
    assert all(isinstance(figure, Figure) and figure.get_label() for figure in plots)  # the label is the alt text
    (layers,) = drawn["channel_liveness"]
    assert layers == layer_records(model)
    assert [layer.dead_channels for layer in layers] == [0, 0, 0, 0, 2, 0]
    weight, title = drawn["sparsity_map"]
    assert (weight.shape, title) == ((16, 8, 3, 3), "layer3.0.conv1")
    assert not weight[1:3].any()
    names, zeros, dead = drawn["layer_sparsity_bars"]
    assert names == [name for name in LAYERS if name.startswith("layer")]
    assert dead == [0, 0, 0, 0, 2 / 16, 0]
    assert zeros[4] >= 2 / 16
    with pytest.raises(MetricsError, match="no convolution is called 'linear': choose one of conv1, "):
        evaluator.plot_sparsity_map(model, "linear")
